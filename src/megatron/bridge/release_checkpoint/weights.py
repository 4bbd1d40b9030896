# SPDX-License-Identifier: Apache-2.0
"""What the shapes of the weights say about the model, by the names of Megatron Core's GPT model."""

import math
import re
from argparse import Namespace

from megatron.bridge.release_checkpoint.metadata import Metadata


_NO_WEIGHT = re.compile(r"(chained_\d+\.)?optimizer\b|opt_param_scheduler|rng_state|rerun_state|common_state/")
# The layers are stacked in one tensor, along its first dimension, unless they differ from each other.
_LAYER = re.compile(r"(?:model\d*\.)?decoder\.layers\.(?:(\d+)\.)?(.+)")
# Args of models whose layers are counted or sized in another way than those of a GPT.
_UNLIKE = (
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "spec",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)
_EMBEDDING = re.compile(r"(?:model\d*\.)?embedding\.word_embeddings\.weight")


def contradictions(args: Namespace | None, metadata: Metadata | None) -> list[str]:
    """Compare args with the shapes of the weights.

    Args:
        args: Megatron-LM's args.
        metadata: What `.metadata` says, None if it is damaged.

    Returns:
        What differs, each as a field with both values. A field that is unknown on either side is left out.
    """
    if args is None or metadata is None:
        return []

    def given(name: str) -> int | None:
        value = getattr(args, name, None)
        return value if type(value) is int else None

    shapes = {name: shape for name, (shape, _) in weight_shapes(metadata).items()}
    # name: (what the args say, what the weights may mean by it)
    compared: dict[str, tuple[int | None, set[int]]] = {}
    for shape in (shape for name, shape in shapes.items() if _EMBEDDING.fullmatch(name) and len(shape) == 2):
        compared["padded_vocab_size"] = given("padded_vocab_size"), {shape[0]}
        compared["hidden_size"] = given("hidden_size"), {shape[1]}
    unlike = any(getattr(args, name, None) for name in _UNLIKE) or any(name.startswith("encoder.") for name in shapes)
    layers = [(match, shape) for name, shape in shapes.items() if (match := _LAYER.fullmatch(name)) and not unlike]
    numbered = {int(found[1]) for found, _ in layers if found[1]}
    stacked = {shape[0] for found, shape in layers if not found[1] and shape}
    if numbered and not stacked:
        compared["num_layers"] = given("num_layers"), {max(numbered) + 1}
    elif len(stacked) == 1 and not numbered:
        compared["num_layers"] = given("num_layers"), stacked

    def rows(weight: str, dimension: int = -2) -> set[int]:
        return {shape[dimension] for found, shape in layers if found[2] == weight and len(shape) >= -dimension}

    gated = bool(getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False))
    for field_name, weight in (
        ("ffn_hidden_size", "mlp.linear_fc1.weight"),
        ("moe_ffn_hidden_size", "mlp.experts.experts.linear_fc1.weight"),
    ):
        found = rows(weight)
        # Not every activation with a gate has an arg of Megatron-LM.
        compared[field_name] = given(field_name), {size // 2 for size in found} | (set() if gated else found)
    # A dense model has neither routers nor experts, and its args say None.
    experts = rows("mlp.router.weight")
    if experts and hasattr(args, "num_experts"):
        compared["num_experts"] = given("num_experts") or 0, experts
    elif (
        layers and given("num_experts") and _has_routers(args) and not any("expert" in found[2] for found, _ in layers)
    ):
        compared["num_experts"] = given("num_experts"), {0}
    heads, size = given("num_attention_heads"), given("kv_channels")
    grouped = getattr(args, "group_query_attention", None)
    usual = not getattr(args, "multi_latent_attention", False) and not getattr(args, "bridge_code", None)
    if heads and size and grouped is not None and usual:
        groups = given("num_query_groups") if grouped else heads
        # If the attention's output has a gate, that has as many rows as the queries.
        wanted = {(heads * queries + 2 * groups) * size for queries in (1, 2)} if groups else set()
        found = rows("self_attention.linear_qkv.weight")
        if found and wanted and not found & wanted:
            compared["rows of linear_qkv"] = min(wanted), found
    return [
        f"{name} is {value} by the args and {' or '.join(map(str, sorted(found)))} in the weights"
        for name, (value, found) in compared.items()
        if value is not None and found and value not in found
    ]


def _has_routers(args: Namespace) -> bool:
    """Return whether a layer has experts: a list says so for each layer, and anything else means some have."""
    frequency = getattr(args, "moe_layer_freq", None)
    return any(frequency) if isinstance(frequency, list) else True


def weight_shapes(metadata: Metadata) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of the weights by name, without the state of a training."""
    return {name: found for name, found in metadata.tensors.items() if not _NO_WEIGHT.match(name)}


def count_parameters(metadata: Metadata) -> int:
    """Return the number of weights, with the padding of the vocabulary."""
    return sum(math.prod(shape) for shape, _ in weight_shapes(metadata).values())


def size(metadata: Metadata) -> int:
    """Return the bytes of the weights, as they are stored."""
    # A dtype's name has its bits: bfloat16, float8_e4m3fn.
    bits = {dtype: int(found[0]) if (found := re.search("[0-9]+", dtype)) else 8 for dtype in dtypes(metadata)}
    return sum(math.prod(shape) * bits[dtype] // 8 for shape, dtype in weight_shapes(metadata).values())


def dtypes(metadata: Metadata) -> list[str]:
    """Return the names of the weights' dtypes, the most common first."""
    counts: dict[str, int] = {}
    for shape, dtype in weight_shapes(metadata).values():
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return sorted(counts, key=counts.__getitem__, reverse=True)
