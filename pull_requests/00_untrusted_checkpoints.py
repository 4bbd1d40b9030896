# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint runs no code of it: what the pull request has beside the change."""

from fork.edits import File, expression, replace
from fork.pull_request import PullRequest


pull_request = PullRequest(
    change="untrusted-checkpoints",
    changelog=[
        "`.metadata` is read with a restricted unpickler before PyTorch's reader sees it.",
        "Checkpoints are loaded with `weights_only=True` and the classes that Megatron Core registers.",
        "Of `run_config.yaml` only what the config of a model or a tokenizer has is instantiated.",
        "What names any other class is refused, with one line; `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` loads it all the same.",
        "`megatron/bridge_cli` lies beside `megatron/bridge`, so that a checkpoint can be looked at without importing that; "
        "pyproject.toml packs it.",
    ],
    tested=[
        "Payloads in `.metadata` and in the common state are refused and do not run; the same payloads run where pickle "
        "loads them.",
        "Metadata that is cut off at any byte, that makes no sense or that asks for memory is refused.",
        "Checkpoints of Megatron Core 0.16 to 0.19 load as before, on the CPU.",
    ],
    tests={
        "bridge/tiny_models.py": "training/tiny_models.py",
        "bridge/test_run_config.py": "training/test_run_config.py",
        "bridge_cli/test_safe_pickle.py": "bridge_cli/",
    },
    expectations=[
        # Its builder is none, which is refused now before the mock is asked.
        File(
            "tests/unit_tests/training/test_model_load_save.py",
            [
                replace(
                    "TestLoadMegatronModel.test_load_mbridge_saved_model_config",
                    expression('"import.path.to.SomeModelBuilder"'),
                    '"megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder"',
                    releases=">=0.6",
                )
            ],
        )
    ],
)
