# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint without running code that somebody may have put into it.

PyTorch's distributed checkpoints use pickle in two places. PyTorch unpickles `.metadata` without restriction
(FileSystemReader.read_metadata in torch/distributed/checkpoint/filesystem.py), and loads every entry that is not a
tensor with `weights_only=False`, Megatron-LM's common state included (DefaultLoadPlanner.load_bytes in
default_planner.py; PyTorch 2.11). Megatron Core 0.19 loads with both (load_common_state_dict,
TorchDistLoadShardedStrategy). If `.metadata` is missing or can't be unpickled, PyTorch unpickles the metadata of one
rank, `__0.metadata` (_load_state_dict in state_dict_loader.py).
"""

import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.safe_globals import register_safe_globals
from torch.distributed.checkpoint.api import CheckpointException

from megatron.bridge.release_checkpoint.metadata import read_common_state, read_metadata


# PyTorch's own switches. The first overrules `weights_only=False` of a caller, the second is for users.
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# As FileSystemReader._get_metadata_path names them. Some file systems ignore case.
_METADATA = re.compile(r"(__.*)?\.metadata", re.DOTALL | re.IGNORECASE)


@contextmanager
def reading(folder: str | os.PathLike) -> Iterator[None]:
    """Load a checkpoint in the body of a `with` statement, and refuse to run code of it.

    The metadata is checked first. In the body, PyTorch unpickles only its own types and the classes that Megatron Core
    registers, in the whole process. `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` lifts this restriction, but not the check.

    Args:
        folder: Payload folder, a local path or a MultiStorageClient URL.

    Raises:
        ValueError: The checkpoint names a class that no checkpoint needs, or its metadata or `common.pt` is damaged.
    """
    vet(folder)
    if is_trusted():
        yield
        return
    register_safe_globals()
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    except (CheckpointException, Exception) as error:
        is_pickles = isinstance(error, (CheckpointException, pickle.UnpicklingError))
        refused = re.search(r"GLOBAL (\S+)|find_class: (\S+)", str(error)) if is_pickles else None
        if refused is None:
            if (damage := _damage(Path(folder, "common.pt"))) is not None:
                raise ValueError(damage) from error
            raise
        raise ValueError(
            f"{folder}: it names {refused[1] or refused[2]}, which no checkpoint needs and which could run code. "
            f"Don't load it, or set {TRUST}=1 if you trust its source."
        ) from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _damage(common_pt: Path) -> str | None:
    """Return why torch can't read a common state, since its own errors don't name the file; None if it can."""
    if not common_pt.is_file():
        return None
    try:
        torch.load(common_pt, weights_only=True, map_location="cpu")
    except OSError:
        # This error names the file.
        return None
    except Exception as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{common_pt}: the file is not what torch.save writes ({found}). Copy or download the checkpoint again."
    return None


def is_trusted() -> bool:
    """Return whether the user trusts all checkpoints, by PyTorch's `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`."""
    return os.environ.get(TRUST, "0") not in ("", "0")


def vet(folder: str | os.PathLike) -> None:
    """Refuse a payload whose `.metadata`, or that of a rank, PyTorch must not unpickle.

    Args:
        folder: Payload folder, a local path or a MultiStorageClient URL. A folder without metadata passes.

    Raises:
        ValueError: The metadata names a class that no checkpoint needs, or is damaged, or `common.pt` holds no dict.
    """
    if MultiStorageClientFeature.is_enabled() and str(folder).startswith("msc://"):
        remote = MultiStorageClientFeature.import_package().Path(str(folder))
        for path in _metadata(remote):
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(path.read_bytes())
                copy.flush()
                try:
                    read_metadata(copy.name)
                except ValueError as error:
                    raise ValueError(str(error).replace(copy.name, str(path))) from None
        return
    for path in _metadata(Path(folder)):
        seen = path.stat()
        # ctime and not mtime: extracting an archive sets mtime.
        _vet_once(str(path.resolve()), seen.st_ino, seen.st_ctime_ns, seen.st_size)
    _vet_common_state(Path(folder, "common.pt"))


def _vet_common_state(path: Path) -> None:
    """Refuse a `common.pt` without a dict, on which a load would end in an AttributeError."""
    try:
        found = read_common_state(path)
    except (ValueError, OSError):
        # torch judges it by a list of its own.
        return
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: it holds a {type(found).__name__}, expected a dict. Copy or download the checkpoint again."
        )


def _metadata(folder: Path) -> list[Path]:
    """Return the files that PyTorch may read metadata from: `.metadata`, and `__RANK.metadata`."""
    try:
        return [path for path in folder.iterdir() if _METADATA.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


@lru_cache(maxsize=8)
def _vet_once(path: str, inode: int, changed: int, size: int) -> None:
    """Read a file once, however often a load asks; that of a large training has some hundred MB."""
    read_metadata(path)
