# SPDX-License-Identifier: Apache-2.0
"""Instantiating a run_config.yaml runs no code of it."""

from fork.change import Change
from fork.edits import Edit, File, add_import, assign, expression, insert_after, replace, wrap


def reading_run_config(function: str, section: str) -> Edit:
    """Vets what the run config names before `function` instantiates it."""
    vetted = f'untrusted_run_config.vet_run_config(run_config, "{section}", run_config_filename)'
    return insert_after(function, assign("run_config"), vetted)


# Providers of Bridge's own name private functions, such as `_gemma4_block_spec`, for their layers.
NOT_A_LAYER_SPEC = (
    "({} and not (target.startswith('megatron.bridge.') and target.endswith('_spec') "
    "and private_segments == [target.rpartition('.')[2]]))"
)

change = Change(
    name="untrusted-run-config",
    message="""\
fix(ckpt): instantiate only a model's config from run_config.yaml

run_config.yaml names classes and functions, and instantiate calls what a
_target_ names: whoever writes a checkpoint runs code where it is loaded.

Refuse what no model's or tokenizer's config needs. Take the private functions
by which Bridge's own providers name their layers.
""",
    why="Instantiating the run config of a checkpoint runs no code that somebody has put into it.",
    edits=[
        File(
            "training/model_load_save.py",
            [
                add_import("from megatron.bridge.training import untrusted_run_config"),
                reading_run_config("load_model_config", "model"),
                reading_run_config("load_tokenizer", "tokenizer"),
            ],
        ),
        File(
            "utils/instantiate_utils.py",
            [
                wrap(
                    "_validate_target_prefix",
                    expression("target not in _ALLOWED_PRIVATE_TARGETS"),
                    NOT_A_LAYER_SPEC,
                    # Before 0.5 private names are not refused.
                    releases=">=0.5",
                )
            ],
        ),
    ],
    modules=["training/untrusted_run_config.py"],
    stands_on=["untrusted-checkpoints", "launch-flags"],
    problem="`run_config.yaml` of a checkpoint names classes and functions, and `instantiate` calls what a `_target_` "
    "names, a shell command included. Loading a checkpoint from somebody else runs their code.",
    changes=[
        "Only what the config of a model or a tokenizer needs is instantiated from `run_config.yaml`.",
        "Anything else is refused with one line. `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` loads it.",
        "A private function of Bridge's own that makes a layer spec is allowed: the run configs of DeepSeek-V4 and ERNIE 4.5 "
        "name one, and were refused when they were read back, as were those of EXAONE MoE that Bridge 0.6 wrote.",
    ],
    unchanged=["The run configs of all families that Bridge converts load as before."],
    tested=[
        "The config of every family is instantiated; shell commands, interpolations and foreign modules are refused."
    ],
    tests={"tests/unit/bridge/test_run_config.py": "training/test_run_config.py"},
    upstream_tests=[
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
