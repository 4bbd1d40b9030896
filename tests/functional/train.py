# SPDX-License-Identifier: Apache-2.0
"""Start Megatron-LM's training loop on this machine's accelerator, or on the CPU.

    python tests/functional/train.py --use-checkpoint-args --load CHECKPOINT --save OUT --record OUT/record …
    python tests/functional/train.py --megatron-lm CHECKOUT --sft --use-checkpoint-args --load CHECKPOINT …
    python tests/functional/train.py --packages-of CHECKOUT --use-checkpoint-args --load CHECKPOINT …

The first command runs `finetune.py`. The second runs `pretrain_gpt.py` of a checkout of Megatron-LM, with that
checkout's packages. The third runs `finetune.py` with `megatron.core` and `megatron.training` of that checkout.

Everything is imported under the main guard, because Megatron Core's checkpoint writer starts a process that imports
this file again (`megatron/core/dist_checkpointing/strategies/filesystem_async.py`, `get_write_results_queue`, core
0.19.2). Importing torch and Megatron-LM there would add eight seconds to every save.
"""

import argparse
import gc
import sys
from pathlib import Path


# Megatron-LM and transformers import these if they are installed, but don't need them. They are installed because
# Bridge requires them. Without these imports a rank starts in half the time.
OPTIONAL = ("comet_ml", "modelopt", "multistorageclient", "sklearn", "wandb")


def take_own_flags() -> argparse.Namespace:
    """Remove this script's own flags from the command line, because Megatron-LM's parser must not see them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--record", metavar="DIR", help="record the losses and batches of each iteration")
    parser.add_argument("--megatron-lm", metavar="DIR", help="run pretrain_gpt.py of this checkout of Megatron-LM")
    parser.add_argument("--packages-of", metavar="DIR", help="run finetune.py with the packages of this checkout")
    parser.add_argument(
        "--stand-ins", action="store_true", help="compute with stand-ins for Transformer Engine's modules"
    )
    given, sys.argv[1:] = parser.parse_known_args()
    return given


def install_stand_ins() -> None:
    """Let Megatron Core find Transformer Engine, mamba-ssm, and FLA, which compute on the CPU."""
    sys.path.append(str(Path(__file__).parents[1] / "families"))
    import computing

    computing.install()
    sys.modules["transformer_engine.pytorch.optimizers"] = None  # PyTorch's own are used instead


if __name__ == "__main__":
    import cuda_emulation
    import platforms

    given = take_own_flags()
    if checkout := given.megatron_lm or given.packages_of:
        # First on the path, as for a script of the checkout.
        sys.path.insert(0, checkout)
    found = cuda_emulation.accelerator()
    if found is None:
        sys.modules.update(dict.fromkeys(OPTIONAL))
        if given.stand_ins:
            install_stand_ins()
        cuda_emulation.install()
    if found == "rocm":
        platforms.save_from_pageable_memory()

    # Modules are never freed. Scanning them repeatedly would take a third of the time that a rank needs to start and
    # to end.
    gc.disable()
    import finetune

    if given.stand_ins:
        sys.modules["computing"].leave_out_kernels()
    gc.freeze()
    gc.enable()
    finetune.main(given)
