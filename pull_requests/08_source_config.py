# SPDX-License-Identifier: Apache-2.0
"""The config of an export: what the pull request has beside the change."""

from fork.pull_request import PullRequest


pull_request = PullRequest(
    change="source-config",
    changelog=[
        "`AutoBridge.export_ckpt` writes the model's own config.json in its own spelling (`rope_theta` or "
        "`rope_parameters`, `torch_dtype` or `dtype`), with what conversion or training changed in it.",
    ],
    tested=["Configs in the spellings of transformers 4 and 5 come back equal key by key, and byte for byte."],
    tests={"bridge/test_source_config.py": "models/hf_pretrained/test_source_config.py"},
    stands_on=["export-model-files"],
)
