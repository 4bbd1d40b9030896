# SPDX-License-Identifier: Apache-2.0
"""What callers find who expect an import at ``iter_0000000``, where Bridge wrote it before release checkpoints.

A path of that name is taken for the release beside it, a link of that name leads there, and the layout itself can be
had on request.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Any

from megatron.core.msc_utils import MultiStorageClientFeature

from megatron.bridge.training.utils.checkpoint_utils import is_checkpoint_iteration_directory
from megatron.bridge.utils.common_utils import get_rank_safe, print_rank_0


logger = logging.getLogger(__name__)

ITERATION_0 = "iter_0000000"
LAYOUT_VARIABLE = "MEGATRON_BRIDGE_CHECKPOINT_LAYOUT"
_RELEASE = "release"
_FORMAT = "torch_dist"
# Made and removed to see whether links can be made.
_TRIAL = f"{ITERATION_0}.incomplete"
_LAYOUTS = {_RELEASE: True, "iter": False}


def release_wanted(release: bool | None, default: bool, link_iter_0: bool = False, ckpt_format: str = _FORMAT) -> bool:
    """Decide whether a save without training state writes a release checkpoint or iteration 0.

    Args:
        release: What the caller asked for; None where nothing.
        default: What holds where neither the caller nor the environment says anything.
        link_iter_0: Whether the caller asked for a link to the release too.
        ckpt_format: The format of the checkpoint. A release is ``torch_dist``; another one saves iteration 0.

    Returns:
        ``release``, else what ``MEGATRON_BRIDGE_CHECKPOINT_LAYOUT`` says, else ``default``.

    Raises:
        ValueError: The variable holds neither ``release`` nor ``iter``, or the link has no release to lead to, or the
            caller asked for a release in another format.
    """
    layout = os.environ.get(LAYOUT_VARIABLE) if release is None else None
    if layout and layout not in _LAYOUTS:
        raise ValueError(f"{LAYOUT_VARIABLE} is {layout!r}, expected {' or '.join(map(repr, _LAYOUTS))}: correct it")
    if release and ckpt_format != _FORMAT:
        raise ValueError(f"ckpt_format is {ckpt_format!r}, a release checkpoint is {_FORMAT}: pass release=False")
    wanted = _LAYOUTS[layout] if layout else default if release is None else release
    wanted = wanted and ckpt_format == _FORMAT
    if link_iter_0 and not wanted:
        raise ValueError("link_iter_0 makes a link to a release, iteration 0 was asked for: pass one of the two")
    if not (wanted or layout or release is False or ckpt_format != _FORMAT):
        print_rank_0(
            f"  saving {ITERATION_0}, from which Megatron-LM can't fine-tune: pass release=True for a release"
        )
    return wanted


def release_for(path: str | os.PathLike | None) -> str | os.PathLike | None:
    """Return the release that a path of iteration 0 stands for, with a warning, and any other path as it is.

    Args:
        path: A path, local or a MultiStorageClient URL, or None.

    Returns:
        ``OUT/release`` for ``OUT/iter_0000000`` if that isn't there and the release is, otherwise ``path``.
    """
    if path is None or os.path.basename(os.path.normpath(path)) != ITERATION_0:
        return path
    there = as_path(path)
    release = there.parent / _RELEASE
    if os.path.islink(path) or there.exists() or not is_checkpoint_iteration_directory(str(release)):
        return path
    _warn_once(str(there), str(release))
    return str(release)


def check_link(root: str | os.PathLike) -> None:
    """Refuse a root in which the link ``iter_0000000 -> release`` can't be made. Leaves nothing behind.

    Args:
        root: Checkpoint root, whether it exists or not.

    Raises:
        ValueError: The root is in an object store.
        FileExistsError: Something else is called ``iter_0000000`` there.
        OSError: The file system has no symbolic links.
    """
    path = as_path(root)
    if not isinstance(path, Path):
        raise ValueError(f"{root} is in an object store, which has no links: import without the link {ITERATION_0}")
    link = path / ITERATION_0
    if os.path.lexists(link) and not is_link_to_release(link):
        what = f"is a link to {os.readlink(link)}" if link.is_symlink() else "is there already"
        raise FileExistsError(f"{link} {what}, a link to {_RELEASE} can't be made: move it away")
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    trial = folder / _TRIAL
    try:
        trial.symlink_to(_RELEASE)
    except OSError as error:
        # One of another import, or of one that was killed, shows the same.
        if not is_link_to_release(trial):
            reason = f"the file system of {folder} makes no symbolic links ({error.strerror})"
            raise OSError(f"{reason}: import without the link {ITERATION_0}") from None
    trial.unlink(missing_ok=True)


def set_link(root: Path, wanted: bool) -> None:
    """Make the link ``iter_0000000 -> release``, or remove the one that an earlier import made.

    Args:
        root: Checkpoint root with a release.
        wanted: Whether the link shall be there. A folder or a link to elsewhere stays in any case.
    """
    link, trial = root / ITERATION_0, root / _TRIAL
    if is_link_to_release(trial):
        trial.unlink(missing_ok=True)
    if is_link_to_release(link):
        if not wanted:
            link.unlink()
    elif link.is_symlink():
        logger.warning("%s leads to %s and not to the release that was written: remove it", link, os.readlink(link))
    elif wanted:
        link.symlink_to(_RELEASE)


def remove_link(payload: str | os.PathLike) -> None:
    """Remove the link of :func:`set_link` before a save writes iteration 0 there, and so into the release.

    Args:
        payload: The folder that is about to be written.
    """
    if get_rank_safe() == 0 and is_link_to_release(payload):
        os.unlink(payload)


def is_link_to_release(path: str | os.PathLike) -> bool:
    """Return whether a path is the link that :func:`set_link` makes."""
    return os.path.islink(path) and os.readlink(path) == _RELEASE


@functools.cache
def _warn_once(path: str, release: str) -> None:
    if get_rank_safe() == 0:
        logger.warning("%s is not there, taking the release checkpoint beside it: use %s", path, release)


def as_path(path: str | os.PathLike) -> Any:
    """Return a ``pathlib.Path``, or MultiStorageClient's look-alike for a URL of its own."""
    if MultiStorageClientFeature.is_enabled() and str(path).startswith("msc://"):
        return MultiStorageClientFeature.import_package().Path(str(path))
    return Path(path)
