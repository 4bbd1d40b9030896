# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint runs no code of it."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import Edit, File, add_import, assign, call, expression, insert_after, insert_before, replace, wrap


UNTRUSTED = add_import("from megatron.bridge.training import untrusted_checkpoint")


def reading(function: str, reader: str, folder: str, *, releases: str = "") -> Edit:
    """Reads a checkpoint in `function`, by a statement that calls `reader`, without trust in `folder`."""
    statement = m.Assign(value=call(reader)) | m.Expr(value=call(reader))
    template = f"with untrusted_checkpoint.reading({folder}):\n    {{}}"
    return wrap(function, statement, template, releases=releases)


def reading_lazily(function: str, reader: str, folder: str, *, releases: str = "") -> Edit:
    """The same, in a module that the training package imports."""
    statement = m.Assign(value=call(reader)) | m.Expr(value=call(reader))
    template = f"""from megatron.bridge.training import untrusted_checkpoint

with untrusted_checkpoint.reading({folder}):
    {{}}"""
    return wrap(function, statement, template, releases=releases)


READ_METADATA = m.Assign(
    value=m.Attribute(value=m.Call(func=m.Attribute(attr=m.Name("read_metadata"))), attr=m.Name("state_dict_metadata"))
)


def reading_metadata(function: str, releases: str = "") -> Edit:
    """Vets the metadata before PyTorch's reader unpickles it."""
    return insert_before(function, READ_METADATA, "untrusted_checkpoint.vet(checkpoint_name)", releases=releases)


def reading_run_config(function: str, section: str) -> Edit:
    """Vets what the run config names before `function` instantiates it."""
    vetted = f'untrusted_run_config.vet_run_config(run_config, "{section}", run_config_filename)'
    return insert_after(function, assign("run_config"), vetted)


# What upstream has only since a release.
EXPORT_ADAPTER, ADAPTER, MODELOPT_STATE = ">=0.4", ">=0.5", ">=0.6"
FSDP_LOADERS = {"_load_fsdp_dtensor_base_checkpoint": "<0.5", "load_fsdp_dtensor_checkpoint": ">=0.5"}
COMMON = "dist_checkpointing.load_common_state_dict"
LOAD = "dist_checkpointing.load"


change = Change(
    name="untrusted-checkpoints",
    message="""\
fix(ckpt): run no code from a checkpoint

PyTorch's DCP reads .metadata with pickle, and its load planner reads every
entry that is not a tensor, so Megatron-LM's common state, too, with
weights_only=False: whoever writes a checkpoint runs code where it is loaded.

Read .metadata with a restricted unpickler first, and load with
weights_only=True and the classes that Megatron Core registers. Instantiate
of run_config.yaml only what the config of a model has.
""",
    why="Loading a checkpoint runs no code that somebody has put into it.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                UNTRUSTED,
                reading("_load_model_weights_from_checkpoint", COMMON, "checkpoint_path"),
                reading("_load_model_weights_from_checkpoint", LOAD, "checkpoint_path"),
                reading("_load_global_dist_base_checkpoint", COMMON, "checkpoint_name"),
                reading("_load_global_dist_base_checkpoint", LOAD, "checkpoint_name"),
                reading_metadata("_load_checkpoint_from_path"),
                *(
                    edit
                    for function, releases in FSDP_LOADERS.items()
                    for edit in (
                        reading_metadata(function, releases),
                        reading(
                            function,
                            "torch.distributed.checkpoint.load_state_dict",
                            "checkpoint_name",
                            releases=releases,
                        ),
                    )
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                add_import("from megatron.bridge.training import untrusted_run_config"),
                reading_run_config("load_model_config", "model"),
                reading_run_config("load_tokenizer", "tokenizer"),
            ],
        ),
        File(
            "training/mlm_compat/arguments.py",
            [UNTRUSTED, reading("_load_args_from_checkpoint", COMMON, "checkpoint_path")],
        ),
        File(
            "training/post_training/checkpointing.py",
            [
                UNTRUSTED,
                reading("_get_modelopt_checkpoint_path", COMMON, "folder_path"),
                reading("has_modelopt_state", COMMON, "modelopt_state_path", releases=MODELOPT_STATE),
                reading("restore_sharded_modelopt_state", COMMON, "modelopt_state_path", releases=MODELOPT_STATE),
                reading(
                    "restore_sharded_modelopt_state",
                    "_load_extra_state_from_sharded_checkpoint",
                    "checkpoint_path",
                    releases=MODELOPT_STATE,
                ),
            ],
        ),
        File(
            "peft/utils.py",
            [
                reading_lazily(
                    "enable_legacy_shared_expert_adapter_loading",
                    "dist_checkpointing.load_tensors_metadata",
                    "checkpoint_path",
                    releases=ADAPTER,
                ),
                reading_lazily("load_peft_adapter_checkpoint", LOAD, "checkpoint_path", releases=ADAPTER),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [reading_lazily("AutoBridge.export_adapter_ckpt", LOAD, "ckpt_path", releases=EXPORT_ADAPTER)],
        ),
    ],
    modules=[
        "../bridge_cli/__init__.py",
        "release_checkpoint/pickles.py",
        "release_checkpoint/metadata.py",
        "training/untrusted_checkpoint.py",
        "training/untrusted_run_config.py",
    ],
    changes=[
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
        "tests/unit/bridge/test_run_config.py": "training/test_run_config.py",
        "tests/unit/release_checkpoint/test_pickles.py": "release_checkpoint/",
    },
    stands_on=["launch-flags"],
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
