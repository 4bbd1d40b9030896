# SPDX-License-Identifier: Apache-2.0
"""What a run config may name: what a model's config has, and nothing that could run code."""

import functools
import json
import pydoc
import sys
import types

import pytest
import torch
import yaml
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from tiny_models import FAMILIES, hf_config
from transformers import GenerationConfig, PretrainedConfig

from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import TokenizerConfig
from megatron.bridge.training.untrusted_run_config import vet_run_config
from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
from megatron.bridge.utils.instantiate_utils import instantiate
from megatron.bridge.utils.yaml_utils import dump_dataclass_to_yaml


PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
SPEC = "megatron.core.transformer.spec_utils.ModuleSpec"
# Each makes a process where nobody refuses it.
SHELL = {"_target_": "torch.utils.collect_env.run", "command": "touch TRACE"}


def saved(value) -> dict:
    """What a run config has of `value` once it is read."""
    return yaml.safe_load(dump_dataclass_to_yaml(_ConfigContainerBase._convert_value_to_dict(value)))


def provider(**values) -> GPTModelProvider:
    return GPTModelProvider(num_layers=1, hidden_size=8, num_attention_heads=1, **values)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family):
    made = AutoBridge.from_hf_config(hf_config(family)).to_megatron_provider(load_weights=False)
    for _ in range(2):
        config = saved(made)
        vet_run_config({"model": config}, "model", "run_config.yaml")
        made.apply_rope_fusion = made.moe_permute_fusion = False  # they need Transformer Engine
        made.finalize()


@pytest.mark.parametrize(
    "values",
    [
        {"activation_func": functools.partial(torch.nn.functional.gelu, approximate="tanh")},
        {"activation_func": torch.nn.functional.gelu},
        {"params_dtype": torch.bfloat16},
        {
            "transformer_layer_spec": functools.partial(
                gpt_layer_specs.get_gpt_decoder_block_spec, use_transformer_engine=False
            )
        },
        {"transformer_layer_spec": gpt_layer_specs.get_gpt_layer_local_spec},
        {"transformer_layer_spec": ModuleSpec(module=torch.nn.Linear)},
        {"generation_config": GenerationConfig(max_length=7)},
        {"extra": hf_config("qwen2")},
    ],
    ids=lambda values: "-".join(values),
)
def test_what_providers_have_passes(values):
    made = provider()
    vars(made).update(values)
    config = saved(made) | {key: saved(value) for key, value in values.items()}
    vet_run_config({"model": config}, "model", "run_config.yaml")


def test_what_training_leaves_passes():
    config = saved(provider()) | {
        "finalize_model_grads_func": {
            "_target_": "megatron.core.distributed.finalize_model_grads.finalize_model_grads",
            "_partial_": True,
            "_args_": [],
        },
        "grad_scale_func": {
            "_target_": "megatron.core.optimizer.optimizer.ChainedOptimizer.scale_loss",
            "_call_": False,
        },
    }
    vet_run_config({"model": config}, "model", "run_config.yaml")
    vet_run_config({"tokenizer": saved(TokenizerConfig(trust_remote_code=True))}, "tokenizer", "run_config.yaml")


def test_a_layer_spec_with_a_private_name_is_read_back():
    target = "megatron.bridge.models.ernie.ernie_45_bridge._ernie45_decoder_block_spec"
    config = {"_target_": target, "_call_": False}
    vet_run_config({"model": {"transformer_layer_spec": config}}, "model", "run_config.yaml")
    assert instantiate(config) is pydoc.locate(target)


def test_other_private_names_stay_refused():
    with pytest.raises(Exception, match="private target path segments"):
        instantiate({"_target_": "megatron.bridge.training.untrusted_run_config._locate", "_call_": False})


REFUSED = {
    "a shell": SHELL,
    "a shell, later": SHELL | {"_partial_": True},
    "a shell, named": {"_target_": "torch.utils.collect_env.run", "_call_": False},
    "in a list": [1, [SHELL]],
    "in arguments": {"_target_": PROVIDER, "_args_": [SHELL]},
    "in a dict": {"a": {"b": SHELL}},
    "an interpolation": '${oc.create:{"_target_":"torch.utils.collect_env.run"}}',
    "an interpolated target": {"_target_": "${a}", "a": "os.system"},
    "a module that is imported": {"_target_": SPEC, "module": ["torch.hub", "load"], "params": {}},
    "the same, named": {"_target_": SPEC, "_call_": False, "module": ["torch.hub", "load"]},
    "a method as a module": {
        "_target_": SPEC,
        "module": {"_target_": "megatron.bridge.AutoBridge.from_hf_pretrained", "_call_": False},
    },
    "os": {"_target_": "os.system", "_args_": ["touch TRACE"]},
    "torch.load": {"_target_": "torch.load", "_args_": ["x"]},
    "imports": {"_target_": "megatron.bridge.utils.import_utils.safe_import", "_args_": ["this"]},
    "by way of another module": {"_target_": "megatron.bridge.training.checkpointing.os.system", "_args_": ["true"]},
    "by way of another module, named": {"_target_": "torch.nn.functional.importlib.import_module", "_call_": False},
    "another function with arguments": {
        "_target_": "megatron.bridge.models.config.from_hf_pretrained",
        "_partial_": True,
        "_args_": [None, "config.yaml"],
    },
    "a function of a function": {"_target_": f"{PROVIDER}.__init__.__globals__.os.system", "_args_": ["true"]},
    "no text": {"_target_": ["os", "system"]},
    "a builder": {"_target_": PROVIDER, "_builder_": "torch.utils.collect_env.run"},
    "code of a hub": {"_target_": PROVIDER, "trust_remote_code": True},
}


@pytest.mark.parametrize("where", ["field", "model"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_could_run_code_is_refused(name, where, monkeypatch):
    config = saved(provider()) | {"extra": REFUSED[name]} if where == "field" else REFUSED[name]
    # As the YAML has it.
    run_config = json.loads(json.dumps({"model": config}))
    with pytest.raises(
        ValueError, match="^out/run_config.yaml: it names .*Don't load it, or set TORCH_FORCE"
    ) as caught:
        vet_run_config(run_config, "model", "out/run_config.yaml")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    vet_run_config(run_config, "model", "out/run_config.yaml")


def test_the_shell_would_run(tmp_path):
    instantiate(SHELL | {"command": f"touch {tmp_path}/trace"})
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("run_config", [None, [], {}, {"model": None}, {"model": "text"}, {"tokenizer": SHELL}])
def test_of_what_is_not_instantiated_nothing_is_asked(run_config):
    vet_run_config(run_config, "model", "run_config.yaml")


HUB = "transformers_modules.tiny.0123abcd.configuration_tiny"


@pytest.mark.parametrize(
    "name, passes", [("Tiny.from_dict", True), ("Tiny.other", False), ("Tiny", False), ("Other.from_dict", False)]
)
def test_a_config_of_the_hub_passes_where_its_code_runs_already(monkeypatch, name, passes):
    """The caller has passed trust_remote_code. Bridge names such a class for Nemotron-Labs-Diffusion."""
    config = {"_target_": f"{HUB}.{name}", "_call_": True, "config_dict": {"hidden_size": 8}}
    with pytest.raises(ValueError, match="could run code"):
        vet_run_config({"model": config}, "model", "run_config.yaml")
    other = type("Other", (), {"from_dict": classmethod(lambda cls, config_dict: pytest.fail("it was called"))})
    code = types.SimpleNamespace(Tiny=type("Tiny", (PretrainedConfig,), {}), Other=other)
    monkeypatch.setitem(sys.modules, HUB, code)
    if passes:
        vet_run_config({"model": config}, "model", "run_config.yaml")
        return
    with pytest.raises(ValueError, match="could run code"):
        vet_run_config({"model": config}, "model", "run_config.yaml")
