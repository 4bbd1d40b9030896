# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint runs no code of it."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import Edit, File, add_import, call, insert_before, wrap


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


# What upstream has only since a certain version.
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
weights_only=True and the classes that Megatron Core registers.
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
    modules=["training/untrusted_checkpoint.py"],
    stands_on=["metadata"],
    problem="Whoever writes a checkpoint runs code where it is loaded. PyTorch's DCP unpickles `.metadata` without "
    "restriction, and its load planner reads every entry that is not a tensor with `weights_only=False`, Megatron-LM's "
    "common state included.",
    changes=[
        "`.metadata` is read with a restricted unpickler before PyTorch's reader unpickles it.",
        "Checkpoints are loaded with `weights_only=True` and the classes that Megatron Core registers.",
        "A checkpoint that names any other class is refused with one line. "
        "`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` loads it.",
    ],
    unchanged=["Checkpoints of Megatron Core 0.16 to 0.19 load as before."],
    tested=[
        "Payloads in `.metadata` and in the common state are refused and do not run. The same payloads run where pickle "
        "loads them.",
    ],
    tests={"tests/unit/bridge/test_untrusted_checkpoint.py": "training/"},
)
