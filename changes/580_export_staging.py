# SPDX-License-Identifier: Apache-2.0
"""An export appears when it is whole, and two of them don't mix."""

from fork.change import Change
from fork.edits import File, add_import, add_parameter, decorate


OVERWRITE_DOC = (
    "True replaces an earlier export at `hf_path`: its weights, config and tokenizer. False refuses a folder that isn't "
    "empty. By default its weights, and the files that are written, are replaced."
)


change = Change(
    name="export-staging",
    message="""\
fix(ckpt): let an export appear when it is whole

Two exports into one folder left the tensors of both, and an export that was
killed left a part of a model, or a new config beside old weights.

`export_ckpt` writes to a folder beside its target and renames it at the end.
What lies at the target stays until then, with all files that the export
doesn't write, other than its weights. `overwrite=True` replaces an earlier
export with its tokenizer and config, `overwrite=False` refuses one.
""",
    why="An export is whole or not there, and leaves files that aren't its own.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.hf_pretrained import export_staging"),
                decorate("AutoBridge.export_ckpt", "export_staging.exports_whole"),
                # For the decorator.
                add_parameter("AutoBridge.export_ckpt", "overwrite: bool | None = None", doc=OVERWRITE_DOC),
            ],
        )
    ],
    modules=["models/hf_pretrained/export_staging.py"],
    stands_on=["leftovers", "export-model-files", "accelerator", "import-plan", "processes"],
    problem=(
        "`bridge.export_ckpt(checkpoint, hf_path)` writes into `hf_path` file by file. If it is killed, or runs twice at "
        "once, `hf_path` holds a mix that loads without an error. Under `torchrun` each rank exports by itself."
    ),
    changes=[
        "`AutoBridge.export_ckpt` writes to a folder beside `hf_path`, which gets its name in one step.",
        "The second of two exports into one folder is refused.",
        "`overwrite=True` replaces an earlier export; `overwrite=False` refuses a folder that isn't empty.",
        "Under `torchrun` the ranks share one export.",
    ],
    unchanged=["The files of an export, and files in `hf_path` that it doesn't write.", "`save_hf_pretrained`."],
    notes=["A mount point, and the current folder, can't be replaced in one step: they are refused."],
    tested=["Unit tests, with exports that were killed at each change to the file system."],
    tests={"tests/unit/bridge/test_export_staging.py": "models/hf_pretrained/test_export_staging.py"},
)
