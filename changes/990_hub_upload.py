# SPDX-License-Identifier: Apache-2.0
"""Uploads an export to the hub."""

from fork.change import Change


change = Change(
    name="hub-upload",
    message="""\
feat(ckpt): upload an export to the hub

`megatron-bridge export --push-to-hub` uploads the folder when it is whole, by
huggingface_hub, with a model card that says what the model was made from.
""",
    why="An export is uploaded with a card that says what it was made from.",
    modules=["utils/hub_upload.py"],
    problem="`AutoBridge.push_to_hub` does nothing. An export is uploaded by hand, with the model card of its source.",
    changes=["`megatron-bridge export --push-to-hub NAME` uploads an export."],
    unchanged=["`AutoBridge.push_to_hub`."],
    tested=["Uploads over HTTP to a small hub: whole, interrupted and repeated, refused."],
    stands_on=["hub", "export-adapter"],
    tests={"tests/unit/bridge/test_hub_upload.py": "utils/"},
)
