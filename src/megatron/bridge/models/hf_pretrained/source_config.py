# SPDX-License-Identifier: Apache-2.0
"""The config.json of an export: the model's own, in its own spelling, with what conversion or training changed.

transformers writes a config in the spelling of its own version, and an older one silently reads defaults for what it
doesn't find: 5 writes `rope_parameters`, with which 4.57 computes at a `rope_theta` of 10000.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from megatron.bridge.models.conversion.safetensors_header import DTYPES, read_header
from megatron.bridge.models.hf_pretrained.export_files import OwnFiles
from megatron.bridge.models.hf_pretrained.model_files import CONFIG, write
from megatron.bridge.models.hf_pretrained.safe_config_loader import safe_load_config_with_retry


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

logger = logging.getLogger(__name__)

# Where a config comes from, and what the files that are written say.
_NO_CHANGE = {"_name_or_path", "transformers_version", "auto_map", "torch_dtype", "dtype", "quantization_config"}


@dataclass(frozen=True)
class OwnConfig:
    """A model's own config, read before an export.

    Attributes:
        text: The file as it is.
        target: Where the export writes to.
    """

    text: bytes
    target: Path

    def give_back(self, bridge: "AutoBridge") -> None:
        """Write it in the place of the config that the export has written; its own bytes if nothing has changed.

        Every rank may call it; rank 0 does it.

        Args:
            bridge: The bridge that has exported.
        """
        from megatron.bridge.utils.common_utils import get_rank_safe

        if get_rank_safe() != 0:
            return
        own, config = json.loads(self.text), json.loads(self.text)
        if "quantization_config" not in json.loads((self.target / CONFIG).read_bytes()):
            config.pop("quantization_config", None)
        _apply(config, *configs(bridge, own))
        _set_dtype(config, config.get("torch_dtype", config.get("dtype")), _dtype_of_weights(self.target))
        changed = f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode()
        write(self.target / CONFIG, self.text if config == own else changed)


def own_config(own: OwnFiles) -> OwnConfig | None:
    """Return the config among a model's own files, or None.

    Raises:
        ValueError: It is damaged.
    """
    if CONFIG not in own.files:
        return None
    path = own.files[CONFIG]
    try:
        config = json.loads(text := path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): import the model again, or pass --hf-model") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object: import the model again")
    return OwnConfig(text, own.target)


def configs(bridge: "AutoBridge", kept: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config that a bridge was made of, and the one that it has now, both as transformers spells them."""
    pretrained: Any = bridge.hf_pretrained
    config = pretrained if isinstance(pretrained, PretrainedConfig) else pretrained.config
    if config is not pretrained:
        revision = pretrained.init_kwargs.get("revision")
        options = {"trust_remote_code": bool(getattr(pretrained, "trust_remote_code", False))}
        options |= {"revision": revision} if revision else {}
        try:
            source: Any = safe_load_config_with_retry(pretrained.model_name_or_path, **options)
            return source.to_dict(), config.to_dict()
        except (OSError, ValueError) as error:
            logger.debug("the config of %s is compared with the kept one: %s", pretrained.model_name_or_path, error)
    return type(config).from_dict(dict(kept)).to_dict(), config.to_dict()


def _apply(config: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Make the changes from `old` to `new` in a config that may spell them in another way."""
    for key in sorted({*old, *new} - _NO_CHANGE):
        value: Any = new.get(key)
        if old.get(key) == value:
            continue
        old_spelling = key not in config or "rope_scaling" in config
        if key == "rope_parameters" and old_spelling and isinstance(value, dict) and "rope_theta" in value:
            # transformers up to 4 spells it so, and 5 reads it before its own spelling.
            config |= {key: dict(value)} if key in config else {}
            rope = {name: each for name, each in value.items() if name != "rope_theta" and name not in config}
            config |= {name: each for name, each in value.items() if name not in rope}
            config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
        elif all(isinstance(each.get(key), dict) for each in (config, old, new)):
            _apply(config[key], old[key], value)
        elif key in new:
            config[key] = value
        else:
            config.pop(key, None)


def _set_dtype(config: dict[str, Any], old: str | None, new: str | None) -> None:
    """Say in which dtype the weights are, wherever a config names the one that it names for all of them."""
    if not old or not new or old == new:
        return
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, old, new)
        elif key in ("torch_dtype", "dtype") and value == old:
            config[key] = new


def _dtype_of_weights(folder: Path) -> str | None:
    """Return the dtype that most of the weights in a folder have, as a config spells it."""
    numbers: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        for tensor in read_header(file).values():
            numbers[tensor.dtype] += tensor.numel
    dtypes = (DTYPES.get(name) for name, _ in numbers.most_common())
    found = next((dtype for dtype in dtypes if dtype and dtype.is_floating_point and dtype.itemsize > 1), None)
    return str(found).removeprefix("torch.") if found else None
