# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are written without CUDA, within the process."""

from fork.change import Change
from fork.edits import File, add_import, ifs, insert_before


change = Change(
    name="in-process-save",
    message="""\
fix(ckpt): save within the process on hosts without an accelerator

Megatron Core's writer synchronizes CUDA devices and starts a process, which
runs a script again that has no `__main__` guard.

Use PyTorch's own writer on such a host. It does neither, and writes the same
files.
""",
    why="Megatron Core's writer needs CUDA and a process of its own.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.host.saving import strategy_for_this_host"),
                insert_before(
                    "save_checkpoint",
                    ifs('ckpt_cfg.ckpt_assume_constant_structure and ckpt_cfg.ckpt_format == "torch_dist"'),
                    "save_strategy = strategy_for_this_host(save_strategy)",
                ),
            ],
        )
    ],
    modules=["host/saving.py"],
    issues=[3295],
    stands_on=["accelerator"],
    problem=(
        "`save_megatron_model` stops on a host without a GPU: Megatron Core's writer calls `torch.cuda.synchronize`. "
        "It also starts a process, so that a script without `if __name__ == '__main__':` ends in an EOFError."
    ),
    changes=["Without an accelerator, checkpoints are written by PyTorch's writer, within the process."],
    unchanged=["The format.", "Hosts with CUDA or ROCm."],
    tested=["Unit tests on a CPU host, which skip themselves elsewhere; scripts without a `__main__` guard."],
    tests={"tests/unit/bridge/host/test_in_process_save.py": "host/"},
)
