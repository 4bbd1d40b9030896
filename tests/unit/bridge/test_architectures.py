# SPDX-License-Identifier: Apache-2.0
"""The bridge is that of the model which transformers makes."""

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.architectures import has_own_code


CODE = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}


def llama(**values: Any) -> transformers.LlamaConfig:
    """Return a small config."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    return transformers.LlamaConfig(**sizes, **values)


@pytest.mark.parametrize("named", [None, []])
def test_a_config_without_architectures_says_which_is_missing(named: Any) -> None:
    with pytest.raises(ValueError, match=r'Add "architectures": \["LlamaForCausalLM"\] to it') as error:
        AutoBridge._validate_config(llama(architectures=named), "here")
    assert "\n" not in str(error.value)


def test_an_unknown_model_type_without_architectures_is_refused() -> None:
    with pytest.raises(ValueError, match="Add those of the published model to it$"):
        AutoBridge._validate_config(SimpleNamespace(model_type="other", architectures=None), "here")


def test_code_that_transformers_does_not_need_is_not_looked_for() -> None:
    config = llama(architectures=["LlamaForCausalLM"], auto_map=CODE)
    AutoBridge._validate_config(config, "here")
    assert AutoBridge.from_hf_config(config)._causal_lm_architecture is transformers.LlamaForCausalLM


def test_code_that_a_person_trusts_is_looked_for() -> None:
    """The class of the config is then the checkpoint's; without AutoConfig, nothing shows it."""
    assert not has_own_code(SimpleNamespace(architectures=["LlamaForCausalLM"], auto_map=CODE))
    config = llama(architectures=["LlamaForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert not has_own_code(config)
    with pytest.raises(ValueError, match="has the architecture Model, which is not yet supported"):
        AutoBridge._validate_config(config, "here")


def test_a_name_that_is_also_an_architecture_stays() -> None:
    code = CODE | {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}
    assert not has_own_code(llama(architectures=["LlamaForCausalLM"], auto_map=code))
