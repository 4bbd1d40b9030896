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
of a MoE router) has to be on the command line, and users derive it by hand.

Print these flags when a release checkpoint is saved.
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
        "`pretrain_gpt.py --load out --use-checkpoint-args` doesn't read everything that describes a model. Without "
        "`--norm-epsilon`, for instance, it trains a different model from the imported one, and reports no error. RoPE "
        "scaling, latent attention and parts of a MoE router are missing in the same way."
    ),
    changes=[
        "Saving a release checkpoint prints the flags for Megatron-LM, with and without `--use-checkpoint-args`."
    ],
    unchanged=["What is written to disk."],
    tested=[
        "The model config that Megatron-LM's parser builds from the flags equals Bridge's, field by field, for 9 families."
    ],
    tests={
        "tests/unit/bridge/tiny_models.py": "training/tiny_models.py",
        "tests/unit/bridge/test_launch_flags.py": "release_checkpoint/",
    },
    docs=[insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE)],
)
