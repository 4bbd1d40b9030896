# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face checkpoint without their values, and which of them a conversion reads."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from megatron.bridge.models.conversion import torch_files
from megatron.bridge.models.conversion.hf_files import INDEX, headers, some
from megatron.bridge.models.conversion.quantized import UnfitScaleError
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

logger = logging.getLogger(__name__)

# Tensors that no model needs: rotary frequencies and positions; copies of embedding and head in a prediction layer.
NOT_NEEDED = re.compile(r"(^|\.)(inv_freq|position_ids)$|\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")
_ROWS = 4096


class StoredTensors(Mapping):
    """Every tensor that the state of a checkpoint has, on the meta device. Reads headers where there are files.

    Args:
        state: The state.
    """

    def __init__(self, state: StateDict) -> None:
        self._state = state
        source = state.source
        self._files: dict[str, Path] = {}
        if isinstance(source, SafeTensorsStateSource):
            self._files = {name: source.path / file for name, file in source.key_to_filename_map.items()}
        found = {file: headers(file) for file in sorted(set(self._files.values()))}
        self._others = {
            name: file.name for file, names in found.items() for name in names if self._files.get(name) != file
        }
        keys = source.get_all_keys()
        self._tensors = {
            name: found[self._files[name]][name] if name in self._files else _tensor(state, name).to("meta")
            for name in keys
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def file(self, name: str) -> str:
        """Return the name of the file that a tensor is in, or nothing for one that is in memory."""
        return self._files[name].name if name in self._files else ""

    def check_index(self, named: str | None = None) -> None:
        """Check that the files hold what the index says. transformers reads every tensor, of two the last file's.

        Args:
            named: The weights that config.json names as `transformers_weights`: transformers reads no others.

        Raises:
            ValueError: A file has a tensor that the index doesn't name, or has in another file; or other weights would
                be read than config.json names.
        """
        files = {file.name for file in self._files.values()}
        if files and named not in (None, INDEX) and files != {named}:
            raise ValueError(
                f"config.json names the weights {named!r} (transformers_weights), and {some(files)} would be read: "
                "remove that key, or the other weights"
            )
        for name, file in self._others.items():
            if name in self._files:
                raise ValueError(
                    f"{name!r} is in {self.file(name)} and in {file}: keep one of them, or download them again"
                )
            if not NOT_NEEDED.search(name):
                raise ValueError(f"{name!r} is in {file}, and the checkpoint's index doesn't name it: add it there")

    def equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same values. Takes the memory of some rows."""
        if (self[first].shape, self[first].dtype) != (self[second].shape, self[second].dtype):
            return False
        files = self._files.get(first), self._files.get(second)
        if not self[first].dim() or any(file is None or file.suffix == torch_files.SUFFIX for file in files):
            return torch.equal(_tensor(self._state, first), _tensor(self._state, second))
        with safe_open(self._files[first], "pt") as one, safe_open(self._files[second], "pt") as other:
            left, right = one.get_slice(first), other.get_slice(second)
            rows = range(0, self[first].shape[0], _ROWS)
            return all(torch.equal(left[row : row + _ROWS], right[row : row + _ROWS]) for row in rows)


class Reads:
    """Which tensors a bridge reads for the sources of its mappings, found by trying it on tensors without values.

    Args:
        bridge: The bridge.
        stored: The tensors.

    Attributes:
        missing: The tensors that are asked for and not there, in words, by the source of a mapping.
    """

    def __init__(self, bridge: "MegatronModelBridge", stored: Mapping[str, torch.Tensor]) -> None:
        self._bridge = bridge
        self._stored = stored
        self._found: dict[str, list[str]] = {}
        self.missing: dict[str, str] = {}

    def of(self, source: Any) -> list[str]:
        """Return the tensors that are read for a source, which is the name of a tensor, or several by their roles."""
        if str(source) not in self._found:
            self._found[str(source)] = self._try(source)
        return self._found[str(source)]

    def _try(self, source: Any) -> list[str]:
        recorder = _Recorder(self._stored)
        try:
            with torch.no_grad():
                self._bridge.maybe_modify_loaded_hf_weight(source, recorder)
        except KeyError:
            names = [source] if isinstance(source, str) else list(source.values())
            self.missing[str(source)] = some([name for name in names if name not in self._stored] or names)
        except UnfitScaleError:
            raise
        except Exception:  # What can't be computed without values is read all the same.
            logger.debug("%s is not computed without values", source, exc_info=True)
        return recorder.reads


class _Recorder(Mapping):
    """Tensors without values, and which of them were read."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self._stored = stored
        self.reads: list[str] = []

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, list | tuple):
            return {name: self[name] for name in key}
        tensor = self._stored[key]
        self.reads.append(key)
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _tensor(state: Mapping[str, Any], name: str) -> torch.Tensor:
    # By its annotation one name may give several tensors.
    return state[name]
