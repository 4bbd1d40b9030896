# SPDX-License-Identifier: Apache-2.0
"""The stand-ins have the parameters and extra states of Transformer Engine's modules, and compute nothing."""

import subprocess
import sys

import pytest
import torch

from megatron.bridge.host import stand_ins


def shapes(module):
    return {name: tuple(each.shape) for name, each in module.named_parameters()}


def test_a_linear_layer_has_the_share_of_its_rank():
    options = {"tp_size": 2, "params_dtype": torch.bfloat16, "device": "cuda", "sequence_parallel": False}
    column = stand_ins.Linear(8, 6, parallel_mode="column", **options)
    assert shapes(column) == {"weight": (3, 8), "bias": (3,)}
    assert {each.dtype for each in column.parameters()} == {torch.bfloat16}
    assert shapes(stand_ins.Linear(8, 6, parallel_mode="row", bias=False, **options)) == {"weight": (6, 4)}
    assert shapes(stand_ins.Linear(8, 6, bias=False)) == {"weight": (6, 8)}


@pytest.mark.parametrize("normalization, norm", [("RMSNorm", ["weight"]), ("LayerNorm", ["weight", "bias"])])
def test_the_norm_in_front_of_a_projection_is_a_part_of_it(normalization, norm):
    fused = stand_ins.LayerNormLinear(8, 6, normalization=normalization, bias=False, parallel_mode="column", tp_size=2)
    assert shapes(fused) == {"weight": (3, 8)} | {f"layer_norm_{name}": (8,) for name in norm}


def test_experts_have_numbered_weights():
    experts = stand_ins.GroupedLinear(2, 8, 6, bias=True)
    assert shapes(experts) == {"weight0": (6, 8), "bias0": (6,), "weight1": (6, 8), "bias1": (6,)}


def test_norms_and_a_learned_softmax():
    assert shapes(stand_ins.RMSNorm(8, eps=1e-5)) == {"weight": (8,)}
    assert shapes(stand_ins.LayerNorm(8)) == {"weight": (8,), "bias": (8,)}
    assert shapes(stand_ins.DotProductAttention(4, 16)) == {}
    learned = stand_ins.DotProductAttention(4, 16, tp_size=2, softmax_type="learnable")
    assert shapes(learned) == {"softmax_offset": (2,)} and learned.softmax_offset.dtype == torch.float32


def test_every_module_has_an_empty_extra_state_and_computes_nothing():
    module = stand_ins.Linear(8, 6)
    assert module.get_extra_state().numel() == 0
    assert "_extra_state" in module.state_dict()
    module.load_state_dict(module.state_dict())
    with pytest.raises(NotImplementedError, match="Linear has a layout here and no kernels"):
        module(torch.ones(8))


def test_parameters_are_on_the_default_device():
    with torch.device("meta"):
        assert stand_ins.Linear(8, 6, device="cpu").weight.is_meta


SCRIPT = """
from megatron.bridge.host import stand_ins
stand_ins.install()
stand_ins.install()
import transformer_engine.pytorch as te, mamba_ssm, fla.modules.l2norm
from megatron.core.extensions.transformer_engine import HAVE_TE, TELinear
from megatron.core.utils import get_te_version
assert HAVE_TE and issubclass(TELinear, stand_ins.Linear) and str(get_te_version()) == te.__version__
assert not stand_ins.torch.cuda.is_available()
try:
    fla.modules.l2norm.l2norm()
except NotImplementedError as error:
    print(error)
"""
LATE = """
import megatron.core
from megatron.bridge.host import stand_ins
stand_ins.install()
"""


def test_megatron_core_takes_them_for_transformer_engine():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "l2norm has a layout here and no kernels" in done.stdout


def test_they_are_not_installed_after_megatron_core():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert "RuntimeError: found megatron.core imported, expected a new process" in done.stderr
