# SPDX-License-Identifier: Apache-2.0
"""What Megatron Core's forward pass asks of CUDA, answered by the CPU, in a process of its own."""

import subprocess
import sys


CODE = """
import sys
from types import SimpleNamespace
from megatron.bridge.verify import without_cuda
without_cuda.leave_out_optional_packages()
import torch
without_cuda.answer_for_cuda()
assert "torch._inductor" not in sys.modules
assert torch.zeros(2, device="cuda").device.type == "cpu" and torch.zeros(2).cuda().device.type == "cpu"
assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
assert torch.zeros(1, device="meta").device.type == "meta"
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
with get_cuda_rng_tracker().fork():
    pass
from megatron.core.transformer.torch_norm import WrappedTorchNorm
config = SimpleNamespace(layernorm_zero_centered_gamma=True, normalization="RMSNorm")
norm = WrappedTorchNorm(config, 4)
norm.weight.data.zero_()
hidden = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
assert torch.allclose(norm(hidden), hidden, atol=1e-4)
try:
    import transformer_engine
except ImportError:
    print("done")
"""


def test_answers():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
