# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints in object stores, over MultiStorageClient."""

from fork.change import Change
from fork.edits import File, add_import, expression, replace


change = Change(
    name="object-stores",
    message="""\
fix(ckpt): write release checkpoints to object stores

MultiStorageClient has no rename of folders. Over its URLs the payload is
written in place; the tracker of an old release is removed first, and the
new one is written last.
""",
    why="A release checkpoint can be written to a MultiStorageClient URL.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.training.object_store_writer import release_writer"),
                replace(
                    "",
                    expression("release_state.writes_releases(ReleaseWriter)"),
                    "release_state.writes_releases(release_writer)",
                ),
            ],
        )
    ],
    modules=["training/object_store_writer.py"],
    stands_on=["release-checkpoints"],
    problem="`AutoBridge.import_ckpt(hf_model, 'msc://…')` fails: object stores can't rename the staged folder.",
    changes=["`import_ckpt` and `save_megatron_model(release=True)` take MultiStorageClient URLs."],
    unchanged=["What is written to a local path."],
    tested=["Unit tests over a MultiStorageClient profile of a local folder."],
    tests={"tests/unit/bridge/test_object_store_writer.py": "training/"},
)
