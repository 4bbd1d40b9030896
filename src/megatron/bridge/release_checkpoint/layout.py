# SPDX-License-Identifier: Apache-2.0
"""The names in a checkpoint, and which payload a checkpoint root stands for.

A release checkpoint, from which Megatron-LM starts fine-tuning, has this layout:

    OUT/                                     the root
    ├── latest_checkpointed_iteration.txt    the tracker, which holds the word "release"
    └── release/                             the payload: weights, Megatron-LM's args, run_config.yaml, tokenizer/
"""

import functools
import io
import logging
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

# In the root.
RELEASE = "release"
ITERATION = "iter_{:07d}"
ITERATION_0 = ITERATION.format(0)
TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE_TRACKER = "latest_train_state.pt"

# In the root, while a release is written or after a crash. A staging folder has the first in its name.
INCOMPLETE = ".incomplete"
REPLACED = "release.replaced"
# A link that an import makes and removes, to see whether the file system has links.
TRIAL = ITERATION_0 + INCOMPLETE

# In the payload.
METADATA = ".metadata"
METADATA_JSON = "metadata.json"
COMMON_PT = "common.pt"
RUN_CONFIG = "run_config.yaml"
TRAIN_STATE = "train_state.pt"
TOKENIZER = "tokenizer"
HF_FILES = "hf"
RANKS = "mp_rank_0*"  # of --ckpt-format torch

LAYOUT_VARIABLE = "MEGATRON_BRIDGE_CHECKPOINT_LAYOUT"


def as_path(path: str | os.PathLike) -> Any:
    """Return a ``pathlib.Path``, or MultiStorageClient's equivalent for one of its URLs."""
    core = sys.modules.get("megatron.core.msc_utils")  # whoever has enabled the client has imported it
    if core is not None and core.MultiStorageClientFeature.is_enabled() and str(path).startswith("msc://"):
        return core.MultiStorageClientFeature.import_package().Path(str(path))
    return Path(path)


def is_payload(path: str | os.PathLike) -> bool:
    """Return whether a folder is the payload of a checkpoint, and not a root."""
    folder = as_path(path)
    found = any((folder / name).exists() for name in (RUN_CONFIG, TRAIN_STATE, METADATA_JSON, METADATA))
    return found or any(folder.glob(RANKS))


def is_link_to_release(path: str | os.PathLike) -> bool:
    """Return whether a path is a symbolic link to the release beside it."""
    return os.path.islink(str(path)) and os.readlink(str(path)) == RELEASE


def saved_iterations(root: str | os.PathLike) -> list[int]:
    """Return the iterations that a root has folders of, in no order. A link to the release is no iteration."""
    names = (child.name for child in as_path(root).iterdir() if child.is_dir() and not is_link_to_release(child))
    return [int(name[5:]) for name in names if name.startswith("iter_") and name[5:].isdecimal()]


def read_tracker(root: str | os.PathLike) -> tuple[int, bool] | None:
    """Read Megatron-LM's tracker of a checkpoint root.

    Returns:
        ``(iteration, release)`` like ``read_metadata`` of Megatron-LM (megatron/training/checkpointing.py, core 0.19),
        or None if there is no tracker.

    Raises:
        ValueError: The tracker holds neither an iteration nor ``release``.
    """
    tracker = as_path(root) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text == RELEASE:
        return 0, True
    if not text.isdecimal():
        raise ValueError(f"{tracker} holds {text[:40]!r}, expected an iteration or 'release': correct it")
    return int(text), False


def train_state_tracker(root: str | os.PathLike) -> str:
    """Return the path of Bridge's own tracker, ``latest_train_state.pt``, unless Megatron-LM's tracker contradicts it.

    Bridge writes both trackers together. Megatron-LM, and whoever writes a release checkpoint, write only
    Megatron-LM's. If the two differ, that one is newer.

    Returns:
        The path, whether the file exists or not, or ``""`` if the trackers differ.
    """
    tracker = as_path(root) / BRIDGE_TRACKER
    tracked = read_tracker(root)
    if tracked is None or not tracker.exists() or tracked == (_read_step(tracker), False):
        return str(tracker)
    logger.warning("%s differs from the tracker beside it, which is newer: ignoring %s", tracker, BRIDGE_TRACKER)
    return ""


def resolve_checkpoint(path: str | os.PathLike) -> str:
    """Find the payload of a checkpoint.

    A payload folder is returned unchanged. A root resolves by its tracker, then by ``latest_train_state.pt``, then to
    its highest iteration, then to its release. A missing ``iter_0000000`` resolves to the release beside it.

    Args:
        path: Checkpoint root or payload folder, a local path or a MultiStorageClient URL.

    Returns:
        The payload folder, or ``path`` if there is none below it.

    Raises:
        FileNotFoundError: The tracker names a folder that does not exist.
        ValueError: The tracker holds neither an iteration nor ``release``.
    """
    path = release_for(path)
    root = as_path(path)
    if is_payload(path) or not root.is_dir():
        return str(path)
    tracked = read_tracker(path)
    if tracked is None and (root / BRIDGE_TRACKER).exists():
        tracked = _read_step(root / BRIDGE_TRACKER), False
    if tracked is not None:
        iteration, release = tracked
        payload = root / (RELEASE if release else ITERATION.format(iteration))
        if not payload.is_dir():
            raise FileNotFoundError(
                f"the tracker of {path} names {payload.name}, which is not there: pass the path of a payload folder"
            )
        return str(payload)
    if iterations := saved_iterations(path):
        return str(root / ITERATION.format(max(iterations)))
    return str(root / RELEASE) if (root / RELEASE).is_dir() else str(path)


def release_beside(path: str | os.PathLike) -> Any | None:
    """Return the release that a path of iteration 0 stands for.

    Returns:
        ``OUT/release`` for ``OUT/iter_0000000`` if only the release exists, otherwise None.
    """
    there = as_path(path)
    release = there.parent / RELEASE
    if there.name != ITERATION_0 or os.path.islink(path) or there.exists() or not is_payload(release):
        return None
    return release


def release_for(path: Any) -> Any:
    """Return what :func:`release_beside` finds, with a warning, and any other path unchanged."""
    if path is None or (release := release_beside(path)) is None:
        return path
    _warn_once(str(as_path(path)), str(release))
    return str(release)


@functools.cache
def _warn_once(path: str, release: str) -> None:
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        logger.warning("%s is not there, taking the release checkpoint beside it: use %s", path, release)


class _TrainState(pickle.Unpickler):
    """Loads a train state without torch: a tensor is the name of the record that has its value."""

    def persistent_load(self, pid: Any) -> Any:
        return pid[2]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda record, *_: record
        if (module, name) == ("collections", "OrderedDict") or (module == "torch" and name.endswith("Storage")):
            return dict
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_step(train_state: Any) -> int:
    try:
        with train_state.open("rb") as file, zipfile.ZipFile(file) as archive:
            (data,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            record = _TrainState(io.BytesIO(archive.read(data))).load()["step"]
            return int.from_bytes(archive.read(f"{data.removesuffix('.pkl')}/{record}"), "little", signed=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, LookupError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{train_state} has no step of a training ({error}): copy it again, or remove it") from error
