# SPDX-License-Identifier: Apache-2.0
"""Compute Hugging Face's loss on the batches that Megatron-LM saw, and compare tensors."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def hf_loss(
    model: Path | str, batches: Iterable[dict[str, torch.Tensor]], *, by_batch: bool = False, device: str = "cpu"
) -> float:
    """Return the mean loss of a model in transformers over all tokens that carry loss, in float32.

    Args:
        model: A Hugging Face checkpoint.
        batches: Micro-batches with `tokens`, `labels` (int64), and `loss_mask` (float32), each `[batch, sequence]`.
            The labels are already shifted. Padding is at the end, so a causal model's earlier tokens don't see it.
        by_batch: Return the mean of the micro-batches' means, as Megatron-LM's evaluation does with `--sft`
            (`megatron/training/training.py`, `evaluate`, core 0.19).
        device: The device that computes.

    Returns:
        The sum of the losses over the sum of the masks, as Megatron-LM reduces it over micro-batches and ranks.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    network = network.to(device).eval()
    sums: list[tuple[float, float]] = []
    with torch.inference_mode():
        for batch in ({name: value.to(device) for name, value in each.items()} for each in batches):
            logits = network(batch["tokens"]).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            mask = batch["loss_mask"].flatten()
            sums.append(((losses.double() * mask).sum().item(), mask.sum().item()))
    if by_batch:
        return statistics.fmean(loss / tokens for loss, tokens in sums)
    losses, tokens = zip(*sums, strict=True)
    return sum(losses) / sum(tokens)


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face checkpoint with one file or shards, each read when it is used."""

    def __init__(self, model: Path) -> None:
        self._shards = {}
        for path in sorted(model.glob("*.safetensors")):
            with safe_open(path, "pt") as shard:
                self._shards.update(dict.fromkeys(shard.keys(), path))

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._shards[name], "pt") as shard:
            return shard.get_tensor(name)

    def sizes(self) -> Iterator[int]:
        """Yield the number of values of each tensor, from the headers only."""
        for name, path in self._shards.items():
            with safe_open(path, "pt") as shard:
                yield math.prod(shard.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def differences(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a line for each tensor in which two sets differ: in name, shape, dtype, or any bit."""
    lines = [f"only in the first: {name}" for name in sorted(one.keys() - other.keys())]
    lines += [f"only in the second: {name}" for name in sorted(other.keys() - one.keys())]
    for name in sorted(one.keys() & other.keys()):
        first, second = one[name], other[name]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            lines.append(f"{name}: {first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}")
        elif not torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)):
            lines.append(f"{name}: {int((first != second).sum())} of {first.numel()} values differ")
    return lines
