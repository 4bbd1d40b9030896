# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, and its repair. Imports torch and the library only to carry a repair out."""

__all__: list[str] = []
