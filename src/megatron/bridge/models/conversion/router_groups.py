# SPDX-License-Identifier: Apache-2.0
"""Groups of experts, of which a router first chooses some: what Megatron Core computes of them."""

from collections.abc import Iterator
from typing import Any


def drop_unused(provider: Any) -> None:
    """Take the number of groups to choose from a provider whose router has no groups.

    Args:
        provider: A model provider.
    """
    if getattr(provider, "moe_router_num_groups", None) is None and hasattr(provider, "moe_router_group_topk"):
        provider.moe_router_group_topk = None


def group_problems(config: Any) -> Iterator[str]:
    """Give what Megatron Core computes otherwise than transformers.

    Megatron Core rates a group by the sum of its best `topk // group_topk` scores (`group_limited_topk` of
    `transformer/moe/moe_utils.py`, core 0.19), and transformers by that of its best two.

    Args:
        config: A config of a family that has groups, in transformers' class.
    """
    groups = getattr(config, "n_group", None) or 1
    chosen = getattr(config, "topk_group", None) or groups
    method = getattr(config, "topk_method", None)
    if method == "greedy" and chosen != groups:
        yield f"topk_method is 'greedy', Bridge's model chooses {chosen} of {groups} groups first"
    best = (getattr(config, "num_experts_per_tok", None) or 0) // chosen
    if method in (None, "noaux_tc") and chosen < groups and best != 2:
        yield (
            f"topk_group is {chosen} and num_experts_per_tok {config.num_experts_per_tok}: Bridge's model rates each "
            f"of {groups} groups by its best {best}, transformers by its best 2"
        )
