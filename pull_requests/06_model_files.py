# SPDX-License-Identifier: Apache-2.0
"""The files of a model: what the pull request has beside the change."""

from fork.pull_request import PullRequest


pull_request = PullRequest(
    change="model-files",
    changelog=[
        "A release checkpoint keeps the files of its Hugging Face model beside the weights (tokenizer, chat templates, "
        "generation and processor configs, code, license, model card) byte for byte in `hf/`; `tokenizer/` is a copy.",
        "`AutoBridge.export_ckpt` gives them back; a `source_path` that is a Hugging Face model goes before what was kept.",
    ],
    tested=[
        "A tiny Llama 3.1 and a tiny Qwen 2.5, in the form in which models are published, go out and back; transformers "
        "4.57 and 5.12, each in an environment of its own, read the export like the source: tokens, chat, logits.",
    ],
    notes=[
        "The files are told by name, links lead to files of the model alone, nothing of them is run, and what goes beyond "
        "64 MB is left out with a warning.",
        "Of a checkpoint without `hf/` the export is as before, and a warning says how to get the model's own files.",
    ],
    tests={"bridge/test_model_files.py": "models/hf_pretrained/test_model_files.py"},
    stands_on=["release-checkpoints"],
)
