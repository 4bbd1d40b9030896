# SPDX-License-Identifier: Apache-2.0
"""Start Megatron-LM's training loop on what this machine has: an accelerator, or the CPU in its place.

    python tests/functional/train.py --use-checkpoint-args --load CHECKPOINT --save OUT --record OUT/record …

Everything is imported under the main guard: Megatron Core's checkpoint writer starts a process that imports this file
again (`megatron/core/dist_checkpointing/strategies/filesystem_async.py`, `get_write_results_queue`, core 0.19.2), and
torch and Megatron-LM in there would add eight seconds to every save.
"""

import sys


# Megatron-LM and transformers import these where they find them, and do without where not. They are here because
# Bridge asks for them; without them a rank starts in half the time.
OPTIONAL = ("comet_ml", "modelopt", "sklearn", "wandb")

if __name__ == "__main__":
    import cuda_emulation
    import platforms

    found = cuda_emulation.accelerator()
    if found is None:
        sys.modules.update(dict.fromkeys(OPTIONAL))
        cuda_emulation.install()
    if found == "rocm":
        platforms.save_from_pageable_memory()

    import finetune

    finetune.main()
