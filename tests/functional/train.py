# SPDX-License-Identifier: Apache-2.0
"""Start Megatron-LM's training loop on what this machine has: an accelerator, or the CPU in its place.

    python tests/functional/train.py --use-checkpoint-args --load CHECKPOINT --save OUT --record OUT/record …
    python tests/functional/train.py --megatron-lm CHECKOUT --sft --use-checkpoint-args --load CHECKPOINT …
    python tests/functional/train.py --packages-of CHECKOUT --use-checkpoint-args --load CHECKPOINT …

The first runs `finetune.py`, the second Megatron-LM's own `pretrain_gpt.py` with all else in a checkout of it. The
third runs `finetune.py` with `megatron.core` and `megatron.training` of that checkout.

Everything is imported under the main guard: Megatron Core's checkpoint writer starts a process that imports this file
again (`megatron/core/dist_checkpointing/strategies/filesystem_async.py`, `get_write_results_queue`, core 0.19.2), and
torch and Megatron-LM in there would add eight seconds to every save.
"""

import argparse
import gc
import sys


# Megatron-LM and transformers import these where they find them, and do without where not. They are here because
# Bridge asks for them; without them a rank starts in half the time.
OPTIONAL = ("comet_ml", "modelopt", "multistorageclient", "sklearn", "wandb")


def take_own_flags() -> argparse.Namespace:
    """Take the flags that are not Megatron-LM's from the command line; its parser must not see them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--record", metavar="DIR", help="keep each iteration's loss and the batches here")
    parser.add_argument("--megatron-lm", metavar="DIR", help="run pretrain_gpt.py of this checkout of Megatron-LM")
    parser.add_argument("--packages-of", metavar="DIR", help="run finetune.py with the packages of this checkout")
    given, sys.argv[1:] = parser.parse_known_args()
    return given


if __name__ == "__main__":
    import cuda_emulation
    import platforms

    given = take_own_flags()
    if checkout := given.megatron_lm or given.packages_of:
        # In front, as when a script in the checkout is started itself.
        sys.path.insert(0, checkout)
    found = cuda_emulation.accelerator()
    if found is None:
        sys.modules.update(dict.fromkeys(OPTIONAL))
        cuda_emulation.install()
    if found == "rocm":
        platforms.save_from_pageable_memory()

    # Modules are kept anyway. To look through them again and again, last when the process ends, takes a third of the
    # time that a rank needs to start and to end.
    gc.disable()
    import finetune

    gc.freeze()
    gc.enable()
    finetune.main(given)
