# SPDX-License-Identifier: Apache-2.0
"""Start Megatron-LM's training loop on what this machine has: an accelerator, or the CPU in its place.

    python tests/functional/train.py --use-checkpoint-args --load CHECKPOINT --save OUT --record OUT/record …

Everything is imported under the main guard: Megatron Core's checkpoint writer starts a process that imports this file
again (`megatron/core/dist_checkpointing/strategies/filesystem_async.py`, `get_write_results_queue`, core 0.19.2), and
torch and Megatron-LM in there would add eight seconds to every save.
"""

if __name__ == "__main__":
    import cuda_emulation

    if cuda_emulation.accelerator() is None:
        cuda_emulation.install()

    import finetune

    finetune.main()
