# SPDX-License-Identifier: Apache-2.0
"""The files of a model beside its weights: a release checkpoint keeps them."""

from fork.change import Change
from fork.edits import File, add_import, expression, insert_before, insert_first


change = Change(
    name="model-files",
    message="""\
fix(ckpt): keep the files of a model beside its weights in a release

An import saved the tokenizer as the installed transformers does. What
transformers 5 writes, 4.57 refuses: the tokenizer's class is
TokenizersBackend. The rest was lost: the license, the model card, the chat
templates of a processor, the model's code.

A release checkpoint now keeps these files byte for byte in hf/, and those
of the tokenizer in tokenizer/. They are told by their names; links lead to
files of the model alone, nothing of them is run, and what goes beyond 64 MB
is left out with a warning.
""",
    why=(
        "A release keeps the files of its Hugging Face model beside the weights byte for byte, and its tokenizer is one "
        "that every transformers reads that reads the model's."
    ),
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.models.hf_pretrained import model_files"),
                insert_before(
                    "save_checkpoint._post_save_global_barrier",
                    expression("writer.run(release_state.complete_payload, writer.payload, cfg)"),
                    "writer.run(model_files.keep_model_files, writer.payload, cfg)",
                ),
                insert_first(
                    "save_tokenizer_assets", "if model_files.has_own_tokenizer(checkpoint_path):\n    return\n"
                ),
            ],
        ),
    ],
    modules=["models/hf_pretrained/model_files.py"],
    problem="""\
`AutoBridge.import_ckpt("meta-llama/Llama-3.2-1B", "out")` saves the tokenizer as the installed transformers spells it. If
that is transformers 5, `AutoTokenizer.from_pretrained("out/release/tokenizer")` fails in transformers 4.57, because it
doesn't know the class `TokenizersBackend`. The license, the model card, the chat templates and the model's own code are
lost.
""",
    unchanged=[
        "The weights, the run config and the tracker of a checkpoint.",
        "Checkpoints that training saves, and imports with `release=False`.",
    ],
    changes=[
        "A release checkpoint keeps the files of its Hugging Face model beside the weights (tokenizer, chat templates, "
        "generation and processor configs, code, license, model card) byte for byte in `hf/`; `tokenizer/` is a copy.",
    ],
    tested=[
        "transformers 4.57 and 5.12, each in an environment of its own, read the tokenizer of a release like the source's."
    ],
    notes=[
        "The files are told by name, links lead to files of the model alone, nothing of them is run, and what goes beyond "
        "64 MB is left out with a warning.",
    ],
    tests={"tests/unit/bridge/test_model_files.py": "models/hf_pretrained/test_model_files.py"},
    stands_on=["object-stores"],
)
