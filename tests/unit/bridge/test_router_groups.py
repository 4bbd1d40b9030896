# SPDX-License-Identifier: Apache-2.0
"""A router without groups chooses none, and groups that are rated otherwise are known."""

from types import SimpleNamespace

import pytest
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.router_groups import drop_unused, group_problems


def test_a_family_without_groups_has_none() -> None:
    """transformers' Qwen3-MoE doesn't read the key."""
    config = transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=2, hidden_size=64, num_experts=8, topk_group=1
    )
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert provider.moe_router_group_topk is None


def test_groups_stay() -> None:
    """A provider without experts has no such field."""
    provider = SimpleNamespace(moe_router_num_groups=4, moe_router_group_topk=2)
    drop_unused(provider)
    assert provider.moe_router_group_topk == 2
    drop_unused(other := SimpleNamespace())
    assert not vars(other)


@pytest.mark.parametrize(
    ("experts", "groups", "chosen", "words"),
    [
        (8, 8, 4, None),
        (3, 4, 2, "rates each of 4 groups by its best 1, transformers by its best 2"),
        (6, 4, 2, "rates each of 4 groups by its best 3"),
        (3, 4, 4, None),
        (8, 1, 1, None),
    ],
)
def test_groups_are_rated_by_two_experts(experts: int, groups: int, chosen: int, words: str | None) -> None:
    """transformers has no other number, and chooses all groups without a rating."""
    config = SimpleNamespace(n_group=groups, topk_group=chosen, num_experts_per_tok=experts)
    found = list(group_problems(config))
    assert bool(found) == bool(words) and (words or "") in "".join(found)
