# SPDX-License-Identifier: Apache-2.0
"""The files of a model beside its weights: a release checkpoint keeps them, and an export gives them back.

Upstream status: not proposed yet.
"""

from fork.edits import Change, File, add_import, call, insert_after, insert_before, insert_first


change = Change(
    name="model-files",
    message="""\
fix(ckpt): give back the files of a model beside its weights at export

An export wrote the tokenizer as the installed transformers saves it. What
transformers 5 writes, 4.57 refuses: the tokenizer's class is
TokenizersBackend. The license, the model card and, without
trust_remote_code, the model's code were lost.

A release checkpoint now keeps these files byte for byte in hf/, the
tokenizer's in tokenizer/, too. export_ckpt puts them in the place of what
transformers wrote. A source_path that is a model goes before what was kept.
""",
    why=(
        "A release keeps the files of its Hugging Face model beside the weights byte for byte, and an export gives "
        "them back, so that every transformers reads the tokenizer that reads the source's."
    ),
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.models.hf_pretrained import model_files"),
                insert_before(
                    "save_checkpoint.train_state_finalize_fn",
                    call("release_checkpoint.finalize_release"),
                    "model_files.keep_model_files(release_checkpoint.payload_being_written(save_dir), cfg)",
                ),
                insert_first(
                    "save_tokenizer_assets", "if model_files.has_own_tokenizer(checkpoint_path):\n    return\n"
                ),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_before(
                    "AutoBridge.export_ckpt",
                    call("self.save_hf_pretrained"),
                    "from megatron.bridge.models.hf_pretrained import model_files\n"
                    "\n"
                    "own_files = model_files.own_files(self, megatron_path, hf_path, source_path)",
                ),
                insert_after("AutoBridge.export_ckpt", call("self.save_hf_pretrained"), "own_files.give_back()"),
            ],
        ),
    ],
    modules=["models/hf_pretrained/model_files.py"],
)
