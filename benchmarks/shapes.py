# SPDX-License-Identifier: Apache-2.0
"""The shapes of Llama 3, and the tensors of a checkpoint of each."""

from dataclasses import dataclass
from math import prod

import torch
import transformers


_COMMON = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    # The 1B and 3B models of Llama 3.2 tie them. Here every size has a separate head, as 8B does, so that the models
    # differ in size only. So the 1B shape has 1.5e9 parameters.
    "tie_word_embeddings": False,
}

# hidden size, intermediate size, layers, heads
SHAPES = {
    "1b": (2048, 8192, 16, 32),
    "3b": (3072, 8192, 28, 24),
    "8b": (4096, 14336, 32, 32),
    "70b": (8192, 28672, 80, 64),
    "405b": (16384, 53248, 126, 128),
}
WRITTEN = ("1b", "3b", "8b", "8b-2", "8b-6")
"""Sizes that are written and converted. The other sizes are only planned. "8b-2" has 2 layers of the 8B shape."""

BYTES_PER_VALUE = 2
"""The size of a bfloat16."""


@dataclass(frozen=True)
class Shape:
    """The configuration of a model and the shapes of its tensors, without any data.

    Attributes:
        config: The configuration.
        tensors: The shape of each tensor, by its name in the Hugging Face checkpoint.
    """

    config: transformers.LlamaConfig
    tensors: dict[str, tuple[int, ...]]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors in bfloat16."""
        return sum(map(size, self.tensors.values()))


def size(shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of this shape in bfloat16."""
    return BYTES_PER_VALUE * prod(shape)


def llama(name: str, **changes: int) -> Shape:
    """Return a shape of `SHAPES`.

    Args:
        name: A key of `SHAPES`, or one with a number of layers, "8b-2".
        **changes: Values that override those of the shape.
    """
    size, _, fewer = name.partition("-")
    hidden, intermediate, layers, heads = SHAPES[size]
    values = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": int(fewer or layers),
        "num_attention_heads": heads,
    }
    config = transformers.LlamaConfig(
        **(_COMMON | values | changes), architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    with torch.device("meta"):
        state_dict = transformers.LlamaForCausalLM(config).state_dict()
    return Shape(config, {name: tuple(value.shape) for name, value in state_dict.items()})
