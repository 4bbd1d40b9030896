# SPDX-License-Identifier: Apache-2.0
"""A tensor is found under each name that transformers reads into its parameter."""

from types import SimpleNamespace

import pytest
import transformers

from megatron.bridge.models.conversion.stored_names import with_stored_names


def mapping(name):
    return SimpleNamespace(hf_param=name, allow_hf_name_mismatch=False)


@pytest.fixture
def nemotron_h():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "layers_block_type": ["mlp"]}
    config = transformers.NemotronHConfig(architectures=["NemotronHForCausalLM"], **sizes)
    return SimpleNamespace(config=config)


def test_a_name_of_the_hub_finds_what_transformers_saves(nemotron_h):
    published = mapping("backbone.embeddings.weight")
    found = with_stored_names(published, nemotron_h, ["backbone.embedding.weight", "lm_head.weight"])
    assert found.hf_param == "backbone.embedding.weight" and published.hf_param == "backbone.embeddings.weight"


def test_several_tensors_of_one_parameter_are_found_together(nemotron_h):
    parts = {"one": "backbone.embeddings.weight", "other": "lm_head.weight"}
    found = with_stored_names(mapping(parts), nemotron_h, ["backbone.embedding.weight", "lm_head.weight"])
    assert found.hf_param == {"one": "backbone.embedding.weight", "other": "lm_head.weight"}


def test_a_parameter_that_lacks_a_tensor_stays(nemotron_h):
    parts = mapping({"one": "backbone.embeddings.weight", "other": "lm_head.weight"})
    assert with_stored_names(parts, nemotron_h, ["backbone.embedding.weight"]) is parts


@pytest.mark.parametrize("architectures", [None, ["OwnForCausalLM"], ["NemotronHForCausalLM"]])
def test_what_is_there_or_unknown_stays(nemotron_h, architectures):
    nemotron_h.config.architectures = architectures
    known, unknown = mapping("lm_head.weight"), mapping("model.other.weight")
    for each in (known, unknown):
        assert with_stored_names(each, nemotron_h, ["lm_head.weight"]) is each
    assert with_stored_names(None, nemotron_h, []) is None
    assert with_stored_names(known, nemotron_h, None) is known


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_alone_is_the_embedding(tied):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], tie_word_embeddings=tied, **sizes)
    embeddings = mapping("model.embed_tokens.weight")
    found = with_stored_names(embeddings, SimpleNamespace(config=config), ["lm_head.weight"])
    assert found.hf_param == ("lm_head.weight" if tied else "model.embed_tokens.weight")
