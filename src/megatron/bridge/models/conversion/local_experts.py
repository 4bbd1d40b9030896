# SPDX-License-Identifier: Apache-2.0
"""Parameter mappings for experts that Megatron Core keeps as modules of their own.

With Transformer Engine the experts of a layer are the numbered weights of one module, `experts.linear_fc1.weight0`;
without it they are modules, `experts.local_experts.0.linear_fc1.weight` (core 0.19, transformer/moe/experts.py,
SequentialMLP). Some bridges map the former names only.
"""

import copy
import re
from collections.abc import Iterable

from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping


_GROUPED = re.compile(r"(.*\.experts\.)(linear_fc[12]\.(?:weight|bias))\*")


def local_expert_mappings(mappings: Iterable[MegatronParamMapping]) -> list[MegatronParamMapping]:
    """Returns the mappings of experts that are modules, for those of numbered experts that have none yet.

    Args:
        mappings: the mappings of a bridge, their names with wildcards.
    """
    mappings = list(mappings)
    present = {mapping.megatron_param for mapping in mappings}
    result = []
    for mapping in mappings:
        grouped = _GROUPED.fullmatch(mapping.megatron_param)
        if grouped:
            local = copy.copy(mapping)
            local.megatron_param = f"{grouped[1]}local_experts.*.{grouped[2]}"
            if local.megatron_param not in present:
                result.append(local)
    return result
