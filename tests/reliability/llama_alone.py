# SPDX-License-Identifier: Apache-2.0
"""Imports of Bridge what converts Llama, as `megatron-bridge import` does, in a process that does nothing but fork.

To be imported before anything of Bridge: what is left out then makes the forks smaller, too.
"""

import os


# Before torch is imported: pools of threads don't survive a fork.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from megatron.bridge.utils.deferred import lean_imports


with lean_imports():
    import megatron.bridge.models.llama.llama_bridge  # noqa: F401
    from megatron.bridge import AutoBridge  # noqa: F401
