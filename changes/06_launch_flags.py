# SPDX-License-Identifier: Apache-2.0
"""Saving a release prints the command line with which Megatron-LM starts from it."""

from fork.change import Change, insert_before_heading
from fork.edits import File, add_import, call, insert_after


GUIDE = """\
### Start Megatron-LM from a release checkpoint

Saving a release checkpoint prints the command line for Megatron-LM, which takes the architecture from the args in the
checkpoint:

```
--load ./megatron_checkpoints/llama32_1b --use-checkpoint-args --norm-epsilon 1e-05
```

"""

change = Change(
    name="launch-flags",
    message="""\
feat(ckpt): print how Megatron-LM starts from a release checkpoint

`--use-checkpoint-args` takes most of a model from the checkpoint. What it
never reads (the epsilon of the norm, RoPE scaling, latent attention, parts
of a MoE router) has to stand on the command line, which everybody derived by
hand.
""",
    why="Saving a release prints the flags with which Megatron-LM builds its model.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.release_checkpoint.args import megatron_lm_args"),
                add_import("from megatron.bridge.release_checkpoint.flags import launch_lines"),
                insert_after(
                    "save_checkpoint._post_save_global_barrier",
                    call("print_rank_0"),
                    "for line in launch_lines(save_dir, megatron_lm_args(cfg.model)):\n    print_rank_0(line)",
                ),
            ],
        )
    ],
    modules=["release_checkpoint/flags.py"],
    stands_on=["release-checkpoints"],
    problem=(
        "`--use-checkpoint-args` does not read everything that describes a model. Who leaves out `--norm-epsilon`, for "
        "instance, trains another model than was imported, without an error."
    ),
    changes=[
        "Saving a release checkpoint prints the flags for Megatron-LM, with and without `--use-checkpoint-args`."
    ],
    unchanged=["What is written."],
    tested=[
        "The model config that Megatron-LM's parser builds from the flags equals Bridge's, field by field, for 9 families."
    ],
    tests={
        "tests/unit/bridge/tiny_models.py": "training/tiny_models.py",
        "tests/unit/bridge/test_launch_flags.py": "release_checkpoint/",
    },
    docs=[insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE)],
)
