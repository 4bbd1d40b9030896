# SPDX-License-Identifier: Apache-2.0
"""What a proof says."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard


SAME = "same"
FLAGS = "no flags"
DIFFERS = "differs"
NOT_PROVED = "not proved"

NEAR = 1e-4
"""Logits are the same if they differ by at most this part of the largest logit."""


@dataclass
class Verdict:
    """The result of a comparison of Megatron-LM's logits with those of transformers.

    Attributes:
        verdict: One of these:

            - "same": Megatron-LM computes what transformers computes.
            - "no flags": Bridge's model does, but no flags of Megatron-LM build that model.
            - "differs": Megatron Core computes something else.
            - "not proved": they could not be compared on this host.
        of: What was compared: "model", or "twin", a small model with the same config and random weights.
        figures: `largest_difference` and `largest_logit`, `kl_divergence` (in nats, mean over tokens), and the losses
            `loss_transformers` and `loss_megatron` (cross-entropy, in nats). Of Megatron-LM's model, or else of
            Bridge's. Empty if nothing was computed.
        tokens: How many tokens both have read.
        notes: What a person should know, a line each.
    """

    verdict: str
    of: str = "model"
    figures: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The verdict and its reasons, in a line."""
        return f"{self.verdict}: {'; '.join(self.notes)}" if self.notes else self.verdict

    def plain(self) -> dict[str, Any]:
        """Return the verdict as values of JSON, which has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        return {**asdict(self), "figures": finite}


def is_same(figures: Mapping[str, float] | None) -> TypeGuard[Mapping[str, float]]:
    """Return whether logits were computed and are the same. NaN are not."""
    return figures is not None and figures["largest_difference"] <= NEAR * figures["largest_logit"]
