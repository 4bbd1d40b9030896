# SPDX-License-Identifier: Apache-2.0
"""The tables of what the keys of config.json mean."""

import pytest

from megatron.bridge.models.conversion.config_keys import ANOTHER_FUNCTION, COMPARED, FAMILIES, WITHOUT_MEANING


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_is_in_one_column(family: str) -> None:
    """No key means two things."""
    keys = FAMILIES[family]
    carried = [*keys.same, *keys.opposite, *keys.products]
    assert len(carried) == len(set(carried))
    # A number of experts may be carried, and one of them refused.
    assert not set(keys.only) & {*carried, *WITHOUT_MEANING, *COMPARED}
    assert not set(carried) & WITHOUT_MEANING


def test_a_family_that_computes_something_else_has_no_table() -> None:
    """A table says that the family was compared and is the same."""
    assert not ANOTHER_FUNCTION.keys() & FAMILIES.keys()
