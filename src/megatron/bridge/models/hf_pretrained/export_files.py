# SPDX-License-Identifier: Apache-2.0
"""An export gives back a model's own files, in the place of those that transformers writes of it."""

import logging
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from megatron.bridge.models.hf_pretrained.model_files import (
    CONFIG,
    GENERATION,
    RESAVED,
    TOKENIZER,
    copy_files,
    found_files,
    has_one_of,
    is_one_of,
    local_folder,
    names_in,
)
from megatron.bridge.release_checkpoint.layout import HF_FILES, RELEASE, resolve_checkpoint


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnFiles:
    """A model's own files, which go in the place of those that an export writes.

    Attributes:
        files: Where each lies, by name.
        target: Where the export writes to.
        before: What was there before the export, and when it was written.
        left: Names of what stays as the export writes it.
    """

    files: dict[str, Path]
    target: Path
    before: dict[str, tuple[int, ...]]
    left: tuple[str, ...]

    def save_without(self, save: Callable[[], None]) -> None:
        """Call a function that saves a model, and let it pass over what these files replace."""
        token = _replacing.set(self)
        try:
            save()
        finally:
            _replacing.reset(token)

    def give_back(self) -> None:
        """Put the files, but for the config, where the export has written, and remove what the model doesn't have.

        Every rank may call it; rank 0 does it.
        """
        from megatron.bridge.utils.common_utils import get_rank_safe

        if not self.files or get_rank_safe() != 0:
            return
        written = {name for name, state in _states(self.target).items() if self.before.get(name) != state}
        for name in written - self.files.keys():
            if not is_one_of(name, *self.left):
                (self.target / name).unlink()
        copy_files({name: path for name, path in self.files.items() if name != CONFIG}, self.target)


# While an export saves, the files that go in the place of what it would save.
_replacing: ContextVar[OwnFiles | None] = ContextVar("replacing_files", default=None)


def artifacts(pretrained: Any, names: Sequence[str]) -> list[str]:
    """Return which artifacts of a Hugging Face model are loaded and saved again.

    To load a tokenizer or a processor takes seconds, and what an export replaces isn't loaded. A folder without a
    tokenizer has none to save.

    Args:
        pretrained: The wrapper of the model.
        names: The attributes of the wrapper that its class saves.
    """
    own = _replacing.get()
    if own is not None and own.files:
        kept = {"tokenizer": TOKENIZER, "generation_config": (GENERATION,)}
        names = [name for name in names if has_one_of(own.left, *kept.get(name, ()))]
    folder = Path(pretrained.model_name_or_path or "")
    if "tokenizer" in names and (folder / CONFIG).is_file() and not has_one_of(names_in(folder), *TOKENIZER):
        logger.warning("%s has no tokenizer, and the export has none", folder)
        names = [name for name in names if name != "tokenizer"]
    return list(names)


def own_files(
    bridge: "AutoBridge",
    megatron_path: str | os.PathLike,
    hf_path: str | os.PathLike,
    source_path: str | os.PathLike | None = None,
) -> OwnFiles:
    """Find the files that an export gives back, before it writes. On every rank, so that each meets the same error.

    Args:
        bridge: The bridge that exports. A generation config that its caller has set is exported as it is.
        megatron_path: Checkpoint root or payload folder. The release there, or beside it, has kept the files.
        hf_path: Where the export writes to.
        source_path: A Hugging Face model, folder or model ID, whose files go before the kept ones.

    Returns:
        The files.
    """
    target = Path(hf_path)
    files = _files_of_source_or_release(Path(resolve_checkpoint(megatron_path)), source_path)
    if not files:
        return OwnFiles(files, target, {}, ())
    left: tuple[str, ...] = (CONFIG,) if has_one_of(files, *TOKENIZER) else (CONFIG, *TOKENIZER)
    pretrained: Any = bridge.hf_pretrained
    generation = getattr(pretrained, "_generation_config", None)
    if generation is not None and generation != pretrained._load_generation_config():
        files.pop(GENERATION, None)
        left += (GENERATION,)
    return OwnFiles(files, target, _states(target), left)


def _files_of_source_or_release(payload: Path, source_path: str | os.PathLike | None) -> dict[str, Path]:
    source = local_folder(source_path)
    if source is not None and (source / CONFIG).is_file():
        return found_files(source, links=True)
    release = payload.parent / RELEASE if payload.name.startswith("iter_") else payload
    files = found_files(release / HF_FILES, links=False)
    if not files:
        logger.warning(
            "%s keeps no files of its Hugging Face model: tokenizer and config are written as transformers %s does; "
            "pass the model as source_path (--hf-model) to get its own",
            payload,
            transformers.__version__,
        )
    return files


def _states(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return what tells whether a file was written anew, for each that transformers may write."""
    states = {name: (folder / name).lstat() for name in names_in(folder) if is_one_of(name, *RESAVED)}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states.items()}
