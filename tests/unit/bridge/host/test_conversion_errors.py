# SPDX-License-Identifier: Apache-2.0
"""Errors that say why a model can't be converted."""

import pytest
from transformers import MixtralConfig

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator, missing


class Bridge:
    """Fails as a conversion does."""

    _causal_lm_architecture = "LlamaForCausalLM"

    @missing.explain_missing
    def convert(self, error):
        raise error


@pytest.fixture(params=["no Transformer Engine and no accelerator", "no Transformer Engine"])
def lacking(request, monkeypatch):
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", False)
    monkeypatch.setattr(accelerator, "is_available", lambda: "accelerator" not in request.param)
    return request.param


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'mamba_ssm'\nmore"), StopIteration(), TypeError("'NoneType' object is no class")],
)
def test_a_model_that_needs_what_is_not_here_says_so(lacking, error):
    with pytest.raises(
        RuntimeError, match=f"^LlamaForCausalLM can't be converted on this host, which has {lacking}: "
    ) as raised:
        Bridge().convert(error)
    assert "\n" not in str(raised.value) and "Convert it on a host that has" in str(raised.value)
    assert raised.value.__cause__ is error


def test_a_mistake_of_the_caller_is_not_blamed_on_the_host(lacking):
    with pytest.raises(ValueError, match="num_layers must divide"):
        Bridge().convert(ValueError("num_layers must divide by the pipeline's size"))


def test_a_host_that_lacks_nothing_keeps_its_errors(monkeypatch):
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    monkeypatch.setattr(accelerator, "is_available", lambda: True)
    with pytest.raises(ImportError, match="mamba_ssm"):
        Bridge().convert(ImportError("No module named 'mamba_ssm'"))


def test_an_architecture_without_a_bridge_says_so(tmp_path):
    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MixtralForCausalLM.*no bridge for it") as raised:
        AutoBridge.from_hf_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_architecture_that_is_no_language_model_says_so(tmp_path):
    MixtralConfig(architectures=["MixtralForQuestionAnswering"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MixtralForQuestionAnswering.*expected one that ends in") as raised:
        AutoBridge.from_hf_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
