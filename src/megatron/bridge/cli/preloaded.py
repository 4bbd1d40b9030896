# SPDX-License-Identifier: Apache-2.0
"""Imports what a conversion needs. The processes of `--processes` are forked from one that has imported this."""

from megatron.bridge.cli.terminal import quiet
from megatron.bridge.utils.deferred import lean_imports


with quiet(verbose=False), lean_imports():
    import torch.distributed.checkpoint  # noqa: F401

    from megatron.bridge import AutoBridge  # noqa: F401
