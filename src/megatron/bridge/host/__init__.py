# SPDX-License-Identifier: Apache-2.0
"""What a host needs to convert checkpoints without an accelerator or without Transformer Engine.

On a host that has both, nothing in this package changes what Megatron Bridge does.
"""

__all__: list[str] = []
