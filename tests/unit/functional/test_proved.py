# SPDX-License-Identifier: Apache-2.0
"""The list of proved configs is what the rows of variants cover."""

from collections import defaultdict

import models
from variants import VARIANTS

from megatron.bridge.models.conversion import rope_scaling
from megatron.bridge.verify.proved import NUMBER, PROVED, traits


def test_proved_is_what_the_variants_cover():
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in VARIANTS:
        if not row.expected.startswith("refused"):
            config = rope_scaling.own_config(models.CONVERTED[row.family].configuration(**row.changes))
            for key, kind in traits(config):
                found[config.model_type][key].add(kind)
    words = {
        family: {key: " ".join(sorted(kinds)) for key, kinds in sorted(of.items()) if kinds != {NUMBER}}
        for family, of in sorted(found.items())
    }
    assert words == PROVED, "run the rows of variants, and write these words into verify/proved.py"
