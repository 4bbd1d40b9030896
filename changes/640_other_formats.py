# SPDX-License-Identifier: Apache-2.0
"""Payloads in Megatron-LM's other formats."""

from fork.change import Change


change = Change(
    name="other-formats",
    message="""\
feat(ckpt): recognize Megatron-LM's other formats

Read args, iteration and shapes of torch, torch_dcp, and fsdp_dtensor without
torch and without reading a weight.
""",
    why="Payloads of torch, torch_dcp and fsdp_dtensor are examined like those of torch_dist.",
    modules=["release_checkpoint/other_formats.py"],
    stands_on=["ranks"],
    problem="What a checkpoint in the format `torch`, `torch_dcp`, or `fsdp_dtensor` holds is only known after it was loaded.",
    changes=["A new module, `megatron.bridge.release_checkpoint.other_formats`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tests={"tests/unit/bridge/test_read_formats.py": "release_checkpoint/"},
    tested=["Small checkpoints of each format: whole, without a file, damaged, of another model than the args say."],
)
