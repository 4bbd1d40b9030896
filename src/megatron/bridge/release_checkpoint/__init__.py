# SPDX-License-Identifier: Apache-2.0
"""The format of a release checkpoint, without torch and Megatron Core."""

__all__: list[str] = []
