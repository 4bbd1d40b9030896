# SPDX-License-Identifier: Apache-2.0
"""The configs of published models are imported."""

import copy
import json
from pathlib import Path

import pytest
import transformers
from published_configs import PUBLISHED

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.config_check import check_config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_taken(tmp_path: Path, name: str) -> None:
    """Bridge's model follows every key."""
    (tmp_path / "config.json").write_text(json.dumps(copy.deepcopy(PUBLISHED[name])))
    check_config(AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(tmp_path)))
