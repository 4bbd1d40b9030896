# SPDX-License-Identifier: Apache-2.0
"""What Megatron-LM has saved becomes a release checkpoint, without Hugging Face in between."""

from fork.change import Change


change = Change(
    name="from-megatron",
    message="""\
feat(ckpt): make a release checkpoint of what Megatron-LM has saved

A checkpoint in the format torch or torch_dcp ties further training to the
parallel layout or the optimizer that wrote it.

`import_megatron_lm` makes the model from the args of the checkpoint, reads
its weights in blocks, and writes a release checkpoint, which every
Megatron-LM loads on any number of ranks.
""",
    why="A checkpoint of Megatron-LM in an older format becomes a release checkpoint.",
    modules=["models/conversion/from_megatron.py"],
    problem=(
        "`pretrain_gpt.py --load checkpoint` loads `--ckpt-format torch` only on as many ranks as saved it, and "
        "`torch_dcp` only with FSDP2. Megatron-LM's own converter holds the whole model in memory."
    ),
    changes=[
        "`import_megatron_lm(source, out)` makes a release checkpoint of a checkpoint in the format torch, "
        "torch_dcp, or torch_dist.",
    ],
    unchanged=["No existing file changes."],
    tested=[
        "For each parallel layout, every tensor is compared, and Megatron-LM's loss from the release checkpoint "
        "equals that from the source.",
    ],
    later=[
        "The optimizer's state: a release checkpoint holds weights only.",
    ],
    tests={"tests/unit/bridge/test_from_megatron.py": "models/"},
    stands_on=["streaming-load", "streaming-import", "problems", "accelerator"],
)
