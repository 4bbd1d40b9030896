# SPDX-License-Identifier: Apache-2.0
"""The files of an export: what the pull request has beside the change."""

from fork.pull_request import PullRequest


pull_request = PullRequest(
    change="export-model-files",
    changelog=[
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
    tests={"bridge/test_export_files.py": "models/hf_pretrained/test_export_files.py"},
    stands_on=["model-files"],
)
