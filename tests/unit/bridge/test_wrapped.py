# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a wrapped model: each is refused as what it is, with what to do, in one line."""

import pytest

from megatron.bridge.models.conversion.wrapped import check_adapter, check_names


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"base_model.model.{HEAD}", "a model that PEFT wrapped"),
        (f"_orig_mod.{HEAD}", "a model that torch.compile wrapped"),
        (f"module.{HEAD}", "a model that DistributedDataParallel wrapped"),
        (f"_fsdp_wrapped_module.{HEAD}", "a model that FSDP or activation checkpointing wrapped"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "an unmerged PEFT adapter"),
    ],
)
def test_the_names_of_a_wrapper(name, message):
    with pytest.raises(ValueError, match=f"^MODEL holds {message} ") as caught:
        check_names("MODEL", [HEAD, name])
    assert f"({name!r}): " in str(caught.value) and "\n" not in str(caught.value)
    check_names("MODEL", [HEAD])


def test_a_folder_with_an_adapter(tmp_path):
    check_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match="has a PEFT adapter of some/base: import its base model with adapter=DIR"):
        check_adapter(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"of some/base beside its model: move the adapter into a folder of its own"):
        check_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="has a PEFT adapter beside its model: move"):
        check_adapter(tmp_path)
