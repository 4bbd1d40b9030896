# SPDX-License-Identifier: Apache-2.0
"""Uploads an export to the hub."""

from fork.change import Change


change = Change(
    name="hub-upload",
    message="""\
feat(ckpt): upload an export to the hub

An export had to be uploaded by hand, and kept the model card of its source.

`megatron-bridge export --push-to-hub NAME` uploads the folder once it is
complete, with huggingface_hub. Its model card says what the model was made
from.
""",
    why="An export is uploaded with a card that says what it was made from.",
    modules=["utils/hub_upload.py"],
    problem=(
        "`AutoBridge.push_to_hub` does nothing. After `bridge.export_ckpt(checkpoint, hf_out)`, users upload the "
        "folder by hand, with the model card of the model that they started from."
    ),
    changes=[
        "`megatron-bridge export --push-to-hub NAME` uploads the export, with a model card that says what it was "
        "made from.",
    ],
    unchanged=["`AutoBridge.push_to_hub`."],
    tested=[
        "Uploads over HTTP to a small hub in the test: complete, interrupted and repeated, and refused.",
    ],
    stands_on=["hub", "export-adapter"],
    tests={"tests/unit/bridge/test_hub_upload.py": "utils/"},
)
