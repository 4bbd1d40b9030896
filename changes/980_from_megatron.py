# SPDX-License-Identifier: Apache-2.0
"""What Megatron-LM has saved becomes a release checkpoint, without Hugging Face in between."""

from fork.change import Change


change = Change(
    name="from-megatron",
    message="""\
feat(ckpt): make a release checkpoint of what Megatron-LM has saved

The formats torch and torch_dcp, and the split of a torch checkpoint, bind
whoever goes on training. import_megatron_lm makes the model from the
checkpoint's args, reads its weights in blocks, and writes a release that
every Megatron-LM loads on any number of ranks.
""",
    why="A checkpoint of Megatron-LM in an older format becomes a release checkpoint.",
    modules=["models/conversion/from_megatron.py"],
    problem=(
        "Megatron-LM loads `--ckpt-format torch` only on the ranks that saved it, and `torch_dcp` only with FSDP2. Its "
        "own converter loads the model on all those ranks."
    ),
    changes=[
        "`import_megatron_lm` writes the release checkpoint of a checkpoint in the format torch, torch_dcp or torch_dist."
    ],
    unchanged=["No existing file changes."],
    tested=["Every tensor, for each parallel layout, and Megatron-LM's loss from the release and from the source."],
    tests={"tests/unit/bridge/test_from_megatron.py": "models/"},
    stands_on=["streaming-load", "streaming-import", "problems", "accelerator"],
)
