# SPDX-License-Identifier: Apache-2.0
"""The dtype of a Megatron model is one that Megatron-LM trains in."""

from typing import Any

import torch


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(bridge: Any) -> None:
    """Refuse a dtype that no model of Megatron-LM has. Reads no weights.

    Args:
        bridge: An `AutoBridge`.

    Raises:
        ValueError: The model would have another dtype than float32, bfloat16, or float16.
    """
    source = getattr(bridge, "hf_pretrained", None)
    config = getattr(source, "config", source)
    asked, written = getattr(source, "torch_dtype", None), getattr(config, "torch_dtype", None)
    found = asked if isinstance(asked, torch.dtype) else written
    dtype = getattr(torch, found, None) if isinstance(found, str) else found
    if isinstance(dtype, torch.dtype) and dtype not in _DTYPES:
        place = "torch_dtype" if found is asked else "dtype of config.json"
        raise ValueError(
            f"{place} is {dtype}, expected torch.float32, torch.bfloat16, or torch.float16, in which Megatron-LM "
            "trains: pass one of them, such as torch_dtype=torch.bfloat16 (--dtype bfloat16)"
        )
