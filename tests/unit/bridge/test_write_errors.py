# SPDX-License-Identifier: Apache-2.0
"""What a save says that could not write."""

import errno

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron.bridge.training.write_errors import told_in_one_line


def failure_of(error):
    try:
        try:
            raise error
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672]")
    except RuntimeError as caught:
        return CheckpointException("write", {0: (caught, None)})


def test_the_systems_own_words_are_found(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    said = "could not be written .*No space left on device.*: free space"
    with pytest.raises(OSError, match=said) as caught, told_in_one_line(tmp_path):
        raise failure_of(full)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)


def test_another_error_is_none_of_its_business(tmp_path):
    with pytest.raises(ValueError, match="other"), told_in_one_line(tmp_path):
        raise ValueError("other")
