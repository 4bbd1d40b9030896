# SPDX-License-Identifier: Apache-2.0
"""A dtype that Megatron-LM doesn't train in is refused."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.models.conversion.model_dtype import check_dtype


def bridge(written: object, asked: object = None) -> SimpleNamespace:
    """Return what an import knows of the dtype."""
    return SimpleNamespace(
        hf_pretrained=SimpleNamespace(config=SimpleNamespace(torch_dtype=written), torch_dtype=asked)
    )


@pytest.mark.parametrize("written", [torch.float64, torch.int8, torch.complex64, torch.float8_e4m3fn, "float8_e5m2"])
def test_another_dtype_of_the_config_is_refused(written: object) -> None:
    """The line says which option helps."""
    with pytest.raises(ValueError, match=r"dtype of config.json is torch\.\w+, expected torch.float32") as error:
        check_dtype(bridge(written))
    assert "--dtype bfloat16" in str(error.value) and "\n" not in str(error.value)
    check_dtype(bridge(written, torch.bfloat16))


@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16, "float16", "auto", None])
def test_a_dtype_that_is_trained_in_is_taken(written: object) -> None:
    """What isn't a dtype says nothing."""
    check_dtype(bridge(written))
    with pytest.raises(ValueError, match="torch_dtype is torch.float64"):
        check_dtype(bridge(written, torch.float64))
