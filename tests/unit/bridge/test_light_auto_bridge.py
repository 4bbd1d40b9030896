# SPDX-License-Identifier: Apache-2.0
"""Importing AutoBridge imports neither Megatron Core nor what only it uses, and every name is there."""

import subprocess
import sys


LIGHT = """
import builtins, dis, pickle, sys
from types import CodeType, SimpleNamespace
from unittest import mock

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import auto_bridge

heavy = ["datasets", "megatron.core", "megatron.training", "modelopt", "pandas", "scipy", "sklearn", "torch._dynamo"]
heavy += ["torch._inductor", "torchvision", "transformer_engine", "transformers.generation.utils", "wandb"]
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
assert pickle.loads(pickle.dumps(AutoBridge)) is AutoBridge

def every(code):
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from every(each)

# Module-level `__getattr__` isn't asked for the globals of a function.
code = auto_bridge.__spec__.loader.get_code(auto_bridge.__name__)
read = {line.argval for each in every(code) for line in dis.get_instructions(each) if line.opname == "LOAD_GLOBAL"}
assert not read - {*vars(auto_bridge), *vars(builtins)}, read - {*vars(auto_bridge), *vars(builtins)}

for name in ("PreTrainedCausalLM", "MegatronModule", "TransformerConfig", "model_bridge"):
    assert name in dir(auto_bridge) and name not in vars(auto_bridge), name
config = SimpleNamespace(architectures=["LlamaForCausalLM"])
with mock.patch(f"{auto_bridge.__name__}.PreTrainedCausalLM") as replaced:
    assert auto_bridge._resolve_pretrained_wrapper_cls(config) is replaced
assert auto_bridge._resolve_pretrained_wrapper_cls(config).__name__ == "PreTrainedCausalLM"
assert not [name for name in dir(auto_bridge) if not hasattr(auto_bridge, name)]
assert auto_bridge.PreTrainedCausalLM in auto_bridge._PRETRAINED_WRAPPER_TYPES
assert isinstance(auto_bridge.model_bridge.MegatronModelBridge, type)
"""


def test_autobridge_imports_what_it_converts_with_when_it_converts():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
