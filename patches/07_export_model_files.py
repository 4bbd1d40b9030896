# SPDX-License-Identifier: Apache-2.0
"""The files that a release has kept come back at export.

Upstream status: not proposed yet.
"""

from fork.edits import Change, File, call, insert_after, insert_before


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
            ],
        ),
    ],
    modules=["models/hf_pretrained/export_files.py"],
)
