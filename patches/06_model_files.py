# SPDX-License-Identifier: Apache-2.0
"""The files of a model beside its weights: a release checkpoint keeps them, and an export gives them back.

Upstream status: not proposed yet.
"""

import libcst.matchers as m

from fork.edits import Change, File, add_import, call, insert_before, insert_first, wrap


change = Change(
    name="model-files",
    message="""\
fix(ckpt): give back a model's own tokenizer and config at export

An export wrote tokenizer and config as the installed transformers saves
them. What transformers 5 writes, 4.57 refuses (the tokenizer's class is
TokenizersBackend) or misreads (only rope_parameters, so that rope_theta is
10000). The license, the model card and, without trust_remote_code, the
model's code were lost.

A release checkpoint now keeps these files byte for byte in hf/, and
export_ckpt puts them in the place of what transformers wrote. config.json
is the source's own, with what conversion or training changed in it. A
source_path that is a model goes before what was kept.
""",
    why=(
        "A release keeps the files of its Hugging Face model beside the weights byte for byte, and an export gives "
        "them back, so that every transformers that reads the source reads the export."
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
                wrap(
                    "AutoBridge.export_ckpt",
                    m.Expr(value=call("self.save_hf_pretrained")),
                    "from megatron.bridge.models.hf_pretrained import model_files\n"
                    "\n"
                    "with model_files.given_back(self, megatron_path, hf_path, source_path):\n    {}",
                ),
            ],
        ),
    ],
    modules=["models/hf_pretrained/model_files.py"],
)
