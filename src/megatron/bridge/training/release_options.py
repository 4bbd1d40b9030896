# SPDX-License-Identifier: Apache-2.0
"""What callers may choose who expect an import at ``iter_0000000``, where imports lay before release checkpoints.

They can have a symbolic link of that name to the release, or the old layout itself.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from megatron.bridge.release_checkpoint.layout import (
    ITERATION_0,
    LAYOUT_VARIABLE,
    RELEASE,
    TRIAL,
    as_path,
    is_link_to_release,
)
from megatron.bridge.utils.common_utils import get_rank_safe, print_rank_0


logger = logging.getLogger(__name__)

_LAYOUTS = {RELEASE: True, "iter": False}
_FORMAT = "torch_dist"


def release_wanted(release: bool | None, default: bool, link_iter_0: bool = False, ckpt_format: str = _FORMAT) -> bool:
    """Decide whether a save without training state writes a release checkpoint or iteration 0.

    Args:
        release: What the caller asked for, None if nothing.
        default: What to write if neither the caller nor the environment says.
        link_iter_0: Whether the caller asked for a link to the release as well.
        ckpt_format: The format of the checkpoint. A release is always ``torch_dist``. Other formats save iteration 0.

    Returns:
        ``release``, else what ``MEGATRON_BRIDGE_CHECKPOINT_LAYOUT`` says, else ``default``.

    Raises:
        ValueError: The variable is neither ``release`` nor ``iter``, or the link or the format contradicts the layout.
    """
    layout = os.environ.get(LAYOUT_VARIABLE) if release is None else None
    if layout and layout not in _LAYOUTS:
        raise ValueError(f"{LAYOUT_VARIABLE} is {layout!r}, expected {' or '.join(map(repr, _LAYOUTS))}: correct it")
    if release and ckpt_format != _FORMAT:
        raise ValueError(f"ckpt_format is {ckpt_format!r}, a release checkpoint is {_FORMAT}: pass release=False")
    wanted = _LAYOUTS[layout] if layout else default if release is None else release
    wanted = wanted and ckpt_format == _FORMAT
    if link_iter_0 and not wanted:
        raise ValueError("link_iter_0 makes a link to a release, but iteration 0 was asked for: pass one of the two")
    if not (wanted or layout or release is False or ckpt_format != _FORMAT):
        print_rank_0(
            f"  saving {ITERATION_0}, from which Megatron-LM can't fine-tune: pass release=True for a release"
        )
    return wanted


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
        raise FileExistsError(f"{link} {what}, so a link to {RELEASE} can't be made: move it away")
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    trial = folder / TRIAL
    try:
        trial.symlink_to(RELEASE)
    except OSError as error:
        # A trial of another import, or of one that was killed, shows the same.
        if not is_link_to_release(trial):
            reason = f"the file system of {folder} makes no symbolic links ({error.strerror})"
            raise OSError(f"{reason}: import without the link {ITERATION_0}") from None
    trial.unlink(missing_ok=True)


def set_link(root: Path, wanted: bool) -> Callable[[], None] | None:
    """Make the link ``iter_0000000 -> release``, or remove the one that an earlier import made.

    Args:
        root: Checkpoint root with a release.
        wanted: Whether the link shall be there. A folder, or a link to something else, stays in any case.

    Returns:
        What undoes it, None if nothing was done.
    """
    link, trial = root / ITERATION_0, root / TRIAL
    if is_link_to_release(trial):
        trial.unlink(missing_ok=True)
    if is_link_to_release(link):
        if not wanted:
            link.unlink()
            return lambda: link.symlink_to(RELEASE)
    elif link.is_symlink():
        logger.warning("%s leads to %s and not to the release that was written: remove it", link, os.readlink(link))
    elif wanted:
        link.symlink_to(RELEASE)
        return link.unlink
    return None


def remove_link(payload: str | os.PathLike) -> None:
    """Remove the link of :func:`set_link` before a save writes iteration 0 through it, and so into the release."""
    if get_rank_safe() == 0 and is_link_to_release(payload):
        os.unlink(payload)
