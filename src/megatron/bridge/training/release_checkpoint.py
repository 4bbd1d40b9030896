# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints: staging, publication, and finding the payload of a checkpoint root.

A release checkpoint is what Megatron-LM starts fine-tuning from. Below a root it is

    release/                             the payload: weights, Megatron-LM args, run_config.yaml, tokenizer/
    latest_checkpointed_iteration.txt    the tracker, holding the word ``release``

The payload grows in ``release.incomplete/`` and is renamed into place, the tracker is written last: a crash leaves the
checkpoint that was there before, or none, never a tracker that names something unreadable. Object stores have no
rename of folders, so over MultiStorageClient URLs the payload is written in place and only the order protects it.
"""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron.bridge.training.iteration_0 import as_path, check_link, is_link_to_release, release_for, set_link
from megatron.bridge.training.mlm_compat.checkpoint_args import megatron_lm_args, megatron_lm_flags
from megatron.bridge.training.utils import checkpoint_utils
from megatron.bridge.utils.common_utils import get_rank_safe, print_rank_0
from megatron.bridge_cli.durable_files import sync, write_new


logger = logging.getLogger(__name__)

RELEASE = "release"
STAGING_DIR = "release.incomplete"
REPLACED_DIR = "release.replaced"
COMMON_PT = "common.pt"

# Of Linux: fcntl.h and linux/fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

# State that a release checkpoint never holds: Megatron-LM starts a release at iteration 0 with its own optimizer,
# scheduler and random numbers (megatron/training/checkpointing.py, load_checkpoint, core 0.19).
_TRAINING_STATE_KEYS = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")


@dataclass
class _Staging:
    """A release checkpoint that is being written.

    Attributes:
        locks: Descriptors of the folders that stand at ``release.incomplete``. Their locks tell a running import from
            what a crash left behind.
        created: Folders that this import made above the payload, deepest last; removed if the import fails.
        link_iter_0: Whether ``iter_0000000`` shall be a link to the release.
    """

    locks: list[int] = field(default_factory=list)
    created: list[Path] = field(default_factory=list)
    link_iter_0: bool = False


_open_stagings: dict[str, _Staging] = {}


def check_release_target(root: str | os.PathLike, link_iter_0: bool = False) -> None:
    """Refuse a root that a release checkpoint must not be written to. Changes nothing.

    Args:
        root: Checkpoint root, a local path or a MultiStorageClient URL.
        link_iter_0: Whether ``iter_0000000`` shall be a link to the release.

    Raises:
        NotADirectoryError: The root, or a folder above it, is a file.
        PermissionError: The root can't be written to.
        FileExistsError: The root holds training iterations, which a tracker set back to ``release`` would hide, or
            the link can't be made because something else has its name.
        ValueError: The tracker holds neither an iteration nor ``release``, or the link is wanted in an object store.
    """
    path = as_path(root)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{root} is a file, a checkpoint needs a directory: choose another path")
    if isinstance(path, Path):
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file, {root} can't lie below it: choose another path")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"{existing} is not writable: change its permissions or choose another path")
    if link_iter_0:
        check_link(root)
    if not path.exists():
        return
    tracked = read_tracker(root)
    saved = max(_saved_iterations(path), default=0)
    iteration = max(saved, tracked[0] if tracked else 0)
    if iteration > 0:
        raise FileExistsError(
            f"{root} holds training iteration {iteration}, a release checkpoint would set its tracker back: "
            "choose another directory, or move the training checkpoints away"
        )


def stage_release(root: str | os.PathLike, link_iter_0: bool = False) -> str:
    """Open a place for the payload of a release checkpoint. Collective: every rank calls it.

    What an earlier crash left is cleared. Until :func:`publish_release`, the tracker and the checkpoint that it names
    stay as they are (over MultiStorageClient the tracker of an old release goes first: its payload is overwritten).

    Args:
        root: Checkpoint root, a local path or a MultiStorageClient URL.
        link_iter_0: Whether publication leaves a link ``iter_0000000 -> release``, for readers that name this folder.

    Returns:
        The folder to write the payload into, the same on every rank.

    Raises:
        OSError: As :func:`check_release_target`, or another process is writing a release checkpoint to this root.
    """
    # Both readers cache by path, and this path is about to hold another model. On every rank, for a rank that answers
    # from its cache would miss the broadcast of the others.
    checkpoint_utils.read_run_config.cache_clear()
    checkpoint_utils.read_train_state.cache_clear()
    error = None
    if get_rank_safe() == 0:
        try:
            check_release_target(root, link_iter_0)
            _open_staging(root)
            _open_stagings[str(root)].link_iter_0 = link_iter_0
        except (OSError, ValueError) as caught:
            error = caught
    _raise_everywhere(error)
    return str(payload_being_written(root))


def publish_release(root: str | os.PathLike) -> None:
    """Make the staged payload the checkpoint of this root: move it into place, then write the tracker.

    Called on rank 0 after every rank has written. Where the file system can swap two folders in one step, the tracker
    names a whole release at every moment; elsewhere it is gone for the moment between two renames.

    Args:
        root: The root that was given to :func:`stage_release`.
    """
    path = as_path(root)
    train_state = as_path(_train_state_file(root))
    tracker = as_path(checkpoint_utils.get_checkpoint_tracker_filename(str(root)))
    if not isinstance(path, Path):
        train_state.unlink(missing_ok=True)
        tracker.write_text(RELEASE)
        return
    payload, staging, replaced = path / RELEASE, path / STAGING_DIR, path / REPLACED_DIR
    _sync_tree(staging)
    # Before anything changes: the disk may be full.
    new_tracker = _incomplete(tracker)
    write_new(new_tracker, RELEASE.encode())
    # Bridge's own tracker would point its readers at an iteration of an earlier import.
    train_state.unlink(missing_ok=True)
    if not _exchange(root, staging, payload):
        _remove(replaced)
        if os.path.lexists(payload):
            if read_tracker(root) == (0, True):
                tracker.unlink()
            payload.rename(replaced)
        staging.rename(payload)
    set_link(path, _open_stagings[str(root)].link_iter_0)
    new_tracker.replace(tracker)
    sync(path)
    for old in (staging, replaced):
        try:
            _remove(old)
        except OSError as error:
            # The new checkpoint is whole; a file that is open elsewhere keeps its folder on some network file systems.
            logger.warning("%s could not be removed, the next import tries again: %s", old, error)
    _close_staging(root)


def discard_release(root: str | os.PathLike) -> None:
    """Remove what an import that failed has staged. Does nothing where nothing is staged by this process.

    Args:
        root: The root that was given to :func:`stage_release`.
    """
    staging = _open_stagings.get(str(root))
    if staging is None:
        return
    path = as_path(root)
    try:
        if isinstance(path, Path):
            # Under the lock: another import could have taken over what is removed here.
            _remove(path / STAGING_DIR)
            _remove(_incomplete(Path(checkpoint_utils.get_checkpoint_tracker_filename(str(root)))))
            for created in reversed(staging.created):
                try:
                    created.rmdir()
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                        raise
    finally:
        _close_staging(root)


@contextmanager
def discarded_on_error(root: str | os.PathLike) -> Iterator[None]:
    """Leave nothing at a root if writing a release checkpoint to it fails or is interrupted.

    Args:
        root: The root that is given to :func:`stage_release` within.
    """
    try:
        yield
    except CheckpointException as error:
        # It is no Exception, holds the tracebacks of all ranks, and is of the writer's making.
        discard_release(root)
        cause = next(iter(error.failures.values()))[0]
        # PyTorch's zip writer puts an error of its own before what the system said.
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise OSError(
            getattr(cause, "errno", None) or errno.EIO,
            f"{root} could not be written ({' '.join(str(cause).split())}): free space there, or choose another path",
        ) from error
    except BaseException:
        discard_release(root)
        raise


def prepare_release_state_dict(state_dict: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Turn the state dict of a save into that of a release checkpoint: weights and Megatron-LM args only.

    Args:
        state_dict: State dict from ``generate_state_dict``.
        cfg: The ``ConfigContainer`` of the save; its ``model`` is a model provider.

    Returns:
        A new state dict without optimizer, scheduler, random number and rerun state, at iteration 0, with ``args``.
    """
    weights = {key: value for key, value in state_dict.items() if key not in _TRAINING_STATE_KEYS}
    # Below version 2.0 Megatron-LM permutes the QKV weights on load (fix_query_key_value_ordering).
    return {**weights, "args": megatron_lm_args(cfg.model), "checkpoint_version": 3.0, "iteration": 0}


def finalize_release(root: str | os.PathLike, cfg: Any) -> None:
    """Complete the staged payload with run config and tokenizer, publish it, and print how Megatron-LM starts from it.

    Called on rank 0 after every rank has written.

    Args:
        root: The root that was given to :func:`stage_release`.
        cfg: The ``ConfigContainer`` of the save.
    """
    # These import this module.
    from megatron.bridge.training.checkpointing import save_tokenizer_assets
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    payload = str(payload_being_written(root))
    write_common_pt(payload)
    cfg.to_yaml(checkpoint_utils.get_checkpoint_run_config_filename(payload))
    tokenizer = getattr(cfg.dataset, "tokenizer", None)
    if tokenizer is None and cfg.tokenizer is not None:
        tokenizer = build_tokenizer(cfg.tokenizer)
    if tokenizer is not None:
        save_tokenizer_assets(tokenizer, cfg.tokenizer, payload)
    publish_release(root)
    print_rank_0(f"  successfully saved release checkpoint to {root}")
    args = megatron_lm_args(cfg.model)
    short = " ".join(["--load", str(root), *megatron_lm_flags(args, use_checkpoint_args=True)])
    print_rank_0(f"Megatron-LM starts from this checkpoint with: {short}")
    print_rank_0(f"Without --use-checkpoint-args it needs: {' '.join(megatron_lm_flags(args))}")


def write_common_pt(payload: str | os.PathLike) -> None:
    """Write the common state of a payload as ``common.pt`` too, where Megatron Core has made it an entry.

    Megatron Core up to 0.18 looks for that file alone (``load_common`` in
    megatron/core/dist_checkpointing/strategies/common.py). Core 0.19 writes the entry and reads the file first
    (``load_common_state_dict`` in dist_checkpointing/serialization.py).

    Args:
        payload: Payload folder, a local path or a MultiStorageClient URL, after every rank has written.
    """
    path = as_path(payload) / COMMON_PT
    if not path.exists():
        # Read back and not kept from the save, so that both forms hold the same.
        state = dist_checkpointing.load_common_state_dict(str(payload))
        with path.open("wb") as file:
            torch.save(state, file)


def run_config_folder(payload: str | os.PathLike) -> str:
    """Return the folder with the run config that describes a payload.

    Megatron-LM writes none. What it saves beside a release checkpoint was trained from it and has the same model.

    Args:
        payload: Payload folder, a local path or a MultiStorageClient URL.

    Returns:
        The release beside the payload, if that has a ``run_config.yaml`` and the payload has none, else the payload.
    """
    path = as_path(payload)
    if not path.name.startswith("iter_") or not path.is_dir():
        return str(payload)
    release = str(path.parent / RELEASE)
    own, beside = (
        checkpoint_utils.file_exists(checkpoint_utils.get_checkpoint_run_config_filename(folder))
        for folder in (str(payload), release)
    )
    return release if beside and not own else str(payload)


def base_of_adapters(path: str | os.PathLike) -> str:
    """Find the checkpoint that adapters are trained on. Collective: every rank calls it.

    Adapters that are saved next to their release move its tracker on, so that the root no longer names their base.

    Args:
        path: What ``pretrained_checkpoint`` says: a checkpoint root, a payload or Hugging Face folder, or a URL.

    Returns:
        The release of a root whose tracker names that or adapters, otherwise ``path``.

    Raises:
        FileNotFoundError: The tracker names a folder that isn't there.
    """
    path = release_for(path)
    release = as_path(path) / RELEASE
    if not release.is_dir():
        return str(path)
    payload = resolve_checkpoint(path)
    if payload == str(release):
        return payload
    run_config = checkpoint_utils.get_checkpoint_run_config_filename(payload)
    if not checkpoint_utils.file_exists(run_config):
        return str(path)
    return str(path) if checkpoint_utils.read_run_config(run_config).get("peft") is None else str(release)


def read_tracker(root: str | os.PathLike) -> tuple[int, bool] | None:
    """Read Megatron-LM's tracker file of a checkpoint root.

    Args:
        root: Checkpoint root, a local path or a MultiStorageClient URL.

    Returns:
        ``(iteration, release)`` as ``read_metadata`` of Megatron-LM gives them, or None where there is no tracker.

    Raises:
        ValueError: The tracker holds neither a whole number nor ``release``.
    """
    tracker = as_path(checkpoint_utils.get_checkpoint_tracker_filename(str(root)))
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text == RELEASE:
        return 0, True
    if not text.isdecimal():
        raise ValueError(f"{tracker} holds {text[:40]!r}, expected an iteration or 'release': write the right one")
    return int(text), False


def train_state_tracker(root: str | os.PathLike) -> str:
    """Return the path of ``latest_train_state.pt`` where it may be trusted, else an empty string.

    Bridge writes that file and the tracker together, Megatron-LM and a release checkpoint only the tracker. Where the
    two differ, the tracker is the newer one.

    Args:
        root: Checkpoint root, a local path or a MultiStorageClient URL.

    Returns:
        The path of the file, whether it exists or not, or ``""`` where the tracker contradicts it.
    """
    filename = _train_state_file(root)
    tracked = read_tracker(root)
    if tracked is None or not checkpoint_utils.file_exists(filename):
        return filename
    if tracked == (checkpoint_utils.read_train_state(filename).step, False):
        return filename
    logger.warning("%s differs from the tracker beside it, which is newer: ignoring the former", filename)
    return ""


def resolve_checkpoint(path: str | os.PathLike) -> str:
    """Find the folder that holds the payload of a checkpoint.

    A payload folder (``release/``, ``iter_N/``) is taken as it is. A root resolves by its tracker, then by
    ``latest_train_state.pt``, then to its highest iteration, then to its release. ``iter_0000000`` that isn't there is
    taken for the release beside it.

    Args:
        path: Checkpoint root or payload folder, a local path or a MultiStorageClient URL.

    Returns:
        The payload folder, or ``path`` where there is none below it.

    Raises:
        FileNotFoundError: The tracker names a folder that isn't there.
    """
    path = release_for(path)
    root = as_path(path)
    if checkpoint_utils.is_checkpoint_iteration_directory(str(path)) or not root.is_dir():
        return str(path)
    tracked = read_tracker(path)
    if tracked is None:
        filename = _train_state_file(path)
        tracked = (
            (checkpoint_utils.read_train_state(filename).step, False)
            if checkpoint_utils.file_exists(filename)
            else None
        )
    if tracked is not None:
        payload = as_path(checkpoint_utils.get_checkpoint_name(str(path), *tracked))
        if not payload.is_dir():
            raise FileNotFoundError(
                f"the tracker of {path} names {payload.name}, which is not there: give the path of a checkpoint folder"
            )
        return str(payload)
    iterations = _saved_iterations(root)
    if iterations:
        return checkpoint_utils.get_checkpoint_name(str(path), max(iterations))
    return str(root / RELEASE) if (root / RELEASE).is_dir() else str(path)


def _train_state_file(root: str | os.PathLike) -> str:
    """Return the path of ``latest_train_state.pt``, Bridge's own tracker."""
    return checkpoint_utils.get_checkpoint_train_state_filename(str(root), prefix=checkpoint_utils.TRACKER_PREFIX)


def payload_being_written(root: str | os.PathLike) -> Any:
    """Return the folder that :func:`stage_release` has opened, a ``pathlib.Path`` or MultiStorageClient's."""
    path = as_path(root)
    return path / (STAGING_DIR if isinstance(path, Path) else RELEASE)


def _saved_iterations(root: Any) -> list[int]:
    names = (child.name for child in root.iterdir() if child.is_dir() and not is_link_to_release(child))
    return [int(name[5:]) for name in names if name.startswith("iter_") and name[5:].isdecimal()]


def _open_staging(root: str | os.PathLike) -> None:
    """Make an empty staging folder and lock it, or over MultiStorageClient an empty ``release/``."""
    payload = payload_being_written(root)
    if not isinstance(payload, Path):
        _clear_remote_release(root, payload)
        _open_stagings[str(root)] = _Staging()
        return
    _close_staging(root)
    staging = _Staging(created=[p for p in reversed((payload.parent, *payload.parent.parents)) if not p.exists()])
    if payload.is_symlink() or payload.is_file():
        # What lies behind a link is not this import's to clear.
        payload.unlink()
    payload.mkdir(parents=True, exist_ok=True)
    staging.locks.append(_lock(payload))
    _open_stagings[str(root)] = staging
    for leftover in payload.iterdir():
        _remove(leftover)
    if read_tracker(root) == (0, True) and (payload.parent / RELEASE).is_dir():
        # An import was killed when its release stood. What has no such successor stays until it has one.
        _remove(payload.parent / REPLACED_DIR)


def _clear_remote_release(root: str | os.PathLike, payload: Any) -> None:
    if read_tracker(root) == (0, True):
        as_path(checkpoint_utils.get_checkpoint_tracker_filename(str(root))).unlink()
    if payload.is_dir():
        for leftover in payload.rglob("*"):
            if leftover.is_file():
                leftover.unlink()


def _close_staging(root: str | os.PathLike) -> _Staging | None:
    staging = _open_stagings.pop(str(root), None)
    if staging is not None:
        for descriptor in staging.locks:
            os.close(descriptor)
    return staging


def _exchange(root: str | os.PathLike, staging: Path, payload: Path) -> bool:
    """Swap two folders in one step (renameat2 of Linux: ext4, XFS, Btrfs, tmpfs, and others, not NFS).

    Returns:
        False, with nothing changed, where one of them is not a folder or kernel and file system can't.
    """
    if payload.is_symlink() or not payload.is_dir():
        return False
    # The old payload is about to stand where another import would take it for a leftover.
    with suppress(FileExistsError):
        _open_stagings[str(root)].locks.append(_lock(payload))
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(staging), os.fsencode(payload)
    return renameat2 is not None and renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _lock(folder: Path) -> int:
    """Lock a folder for as long as this process lives and holds the descriptor that is returned."""
    busy = f"another process is writing a release checkpoint to {folder.parent}: wait for it, or choose another path"
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or not os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            # It was published, or removed, between opening and locking.
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(busy) from None
    except OSError as error:
        # Some network file systems have no locks; an import there goes unguarded.
        logger.debug("no lock on %s: %s", folder, error)
    return descriptor


def _raise_everywhere(error: Exception | None) -> None:
    """Raise rank 0's error on every rank, so that none waits for the others."""
    if torch.distributed.is_initialized():
        errors = [error]
        torch.distributed.broadcast_object_list(errors, src=0)
        error = errors[0]
    if error is not None:
        raise error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _incomplete(path: Path) -> Path:
    return path.with_name(path.name + ".incomplete")


def _sync_tree(folder: Path) -> None:
    """Flush a folder to disk: a tracker must not outlive, over a power loss, the payload that it names."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
