# SPDX-License-Identifier: Apache-2.0
"""The bridges of all families."""

import importlib


GATHERING = ("megatron.bridge.models", "megatron.bridge.diffusion.models")
"""The packages whose import registers every bridge."""


def import_all() -> None:
    """Register every bridge."""
    for package in GATHERING:
        importlib.import_module(package)
