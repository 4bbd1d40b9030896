# SPDX-License-Identifier: Apache-2.0
"""The files that a release has kept come back at export."""

from fork.change import Change
from fork.edits import File, add_import, call, expression, insert_after, insert_before, wrap


change = Change(
    name="export-model-files",
    message="""\
fix(ckpt): give back the files of a model beside its weights at export

An export wrote the tokenizer as the installed transformers saves it, and
lost the license, the model card and, without trust_remote_code, the model's
code.

export_ckpt puts the files that the release has kept in the place of what
transformers wrote, and removes what the model doesn't have. A source_path
that is a model goes before what was kept.
""",
    why="An export has the model's own tokenizer, generation config, code, license and model card, byte for byte.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_before(
                    "AutoBridge.export_ckpt",
                    call("self.save_hf_pretrained"),
                    "from megatron.bridge.models.hf_pretrained import export_files\n"
                    "\n"
                    "own_files = export_files.own_files(self, megatron_path, hf_path, source_path)",
                ),
                insert_after("AutoBridge.export_ckpt", call("self.save_hf_pretrained"), "own_files.give_back()"),
                wrap("AutoBridge.export_ckpt", call("self.save_hf_pretrained"), "own_files.save_without(lambda: {})"),
            ],
        ),
        File(
            "models/hf_pretrained/base.py",
            [
                add_import("from megatron.bridge.models.hf_pretrained import export_files"),
                *(
                    wrap("PreTrainedBase.save_artifacts", expression(names), "export_files.artifacts(self, {})")
                    for names in ("self.ARTIFACTS", "self.OPTIONAL_ARTIFACTS")
                ),
            ],
        ),
    ],
    modules=["models/hf_pretrained/export_files.py"],
    problem="""\
`bridge.export_ckpt("out", "hf")` writes the tokenizer as the installed transformers saves it. transformers 4.57 can't read
what transformers 5 writes. The license, the model card and, without `trust_remote_code`, the model's code are missing.
""",
    unchanged=["The weights of an export.", "Exports of a checkpoint that has kept no files."],
    changes=[
        "`AutoBridge.export_ckpt` gives back the files that the release has kept; a `source_path` that is a Hugging Face "
        "model goes before them.",
    ],
    tested=[
        "A tiny Llama 3.1 and a tiny Qwen 2.5, in the form in which models are published, go out and back; transformers "
        "4.57 and 5.12, each in an environment of its own, read the export like the source: tokens, chat, logits.",
    ],
    notes=[
        "Of a checkpoint without `hf/` the export is as before, and a warning says how to get the model's own files."
    ],
    tests={"tests/unit/bridge/test_export_files.py": "models/hf_pretrained/test_export_files.py"},
    stands_on=["model-files"],
)
