# SPDX-License-Identifier: Apache-2.0
"""What the system said when a checkpoint could not be written, in one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException


@contextmanager
def told_in_one_line(root: str | os.PathLike) -> Iterator[None]:
    """Raise an ``OSError`` for a ``CheckpointException``, which is no ``Exception`` and holds tracebacks of all ranks.

    Args:
        root: The checkpoint root that is written to.
    """
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        # PyTorch's zip writer puts an error of its own before that of the system.
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        said = " ".join(str(cause).split())
        raise OSError(
            getattr(cause, "errno", None) or errno.EIO,
            f"{root} could not be written ({said}): free space there, or pass a different path",
        ) from error
