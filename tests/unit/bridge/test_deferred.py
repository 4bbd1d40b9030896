# SPDX-License-Identifier: Apache-2.0
"""What a subcommand doesn't import, and that it is there when it is asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


# What `import megatron.bridge` spends its time on, and a conversion never calls.
HEAVY = [
    *("accelerate", "datasets", "megatron.energon", "modelopt", "pandas"),
    *("peft", "scipy", "sklearn", "sympy", "tensorboard", "torch._dynamo", "torch._inductor.lowering"),
    *("torchvision.models", "wandb"),
]

# A stand-in has no file.
LEAN = """
import json, sys
from megatron.bridge.utils.deferred import lean_imports
with lean_imports():
    from megatron.bridge import AutoBridge
bridge = AutoBridge.from_hf_config(__import__("transformers").AutoConfig.from_pretrained(sys.argv[1]))
import megatron.bridge.training.model_load_save
loaded = [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]

from megatron.bridge import __version__
from megatron.bridge.models import GPTModelProvider, conversion
assert GPTModelProvider.__module__ == "megatron.bridge.models.gpt_provider" and conversion.AutoBridge is AutoBridge
try:
    from megatron.bridge import nothing
except ImportError:
    pass

import scipy.optimize
from scipy.optimize import Bounds, linear_sum_assignment
assert "scipy.optimize" not in loaded and not isinstance(bridge, Bounds)
class Tight(Bounds): pass
assert linear_sum_assignment([[1.0]])[0] == [0] and isinstance(Tight(0, 1), scipy.optimize.Bounds)

import torch
from modelopt.torch.quantization.utils import is_quantized
assert not is_quantized(torch.nn.Linear(1, 1)) and not torch.compiler.is_compiling()
from torch.distributed.tensor import DTensor, Shard
assert not isinstance(torch.ones(1), DTensor) and Shard(0).dim == 0
with torch.device("meta"):
    turned = 2 ** (torch.arange(0, 8, 2).float() / 8)
    assert turned.expand(2, 4).shape == (2, 4) and "sympy" not in [*loaded]
from torch.fx.experimental.symbolic_shapes import guard_or_false
assert guard_or_false(True) and not guard_or_false(False)
import sympy, torch.export, torchvision.ops
assert sympy.Symbol("x") + 1 == 1 + sympy.Symbol("x")
assert torch.distributions.Normal(0.0, 1.0).mean == 0
assert torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]
class Twice(torch.nn.Module):
    def forward(self, value):
        return 2 * value
assert torch.export.export(Twice(), (torch.ones(2),)).module()(torch.ones(2)).tolist() == [2, 2]
double = torch.compile(backend="eager")(lambda value: 2 * value)
assert double(torch.ones(())) == 2
print(json.dumps({"loaded": loaded, "bridge": type(bridge._model_bridge).__name__}))
"""


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Give what a process has loaded that converts a Llama."""
    folder = tmp_path_factory.mktemp("llama")
    values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    Path(folder, "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-W", "ignore", "-c", LEAN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_llama_loads_nothing_that_only_training_needs(lean):
    assert lean["bridge"] == "LlamaBridge"
    assert not [name for name in lean["loaded"] if any(f"{name}.".startswith(f"{each}.") for each in HEAVY)]
    assert len(lean["loaded"]) < 4000


def test_a_llama_loads_no_family_of_others(lean):
    # Qwen3-ASR registers a configuration with transformers, and is made of Qwen's families.
    others = ("deepseek", "gemma", "glm", "kimi", "mistral", "nemotron")
    others = tuple(f"megatron.bridge.models.{family}." for family in others)
    assert not [name for name in lean["loaded"] if name.startswith(others)]
