# SPDX-License-Identifier: Apache-2.0
"""The files of a model: what the pull request has beside the change."""

from fork.pull_request import PullRequest


pull_request = PullRequest(
    change="model-files",
    changelog=[
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
    tests={"bridge/test_model_files.py": "models/hf_pretrained/test_model_files.py"},
    stands_on=["release-checkpoints"],
)
