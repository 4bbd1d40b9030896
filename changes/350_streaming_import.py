# SPDX-License-Identifier: Apache-2.0
"""`import_ckpt` converts and writes in blocks, so that its memory does not grow with the model."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    add_parameter,
    assign,
    call,
    expression,
    ifs,
    insert_before,
    pass_argument,
    replace,
    wrap,
)


STREAMING_DOC = (
    "If True, converts and writes tensor by tensor, so that the host needs no memory for the model. A model that can't "
    "be streamed is imported in memory: a warning says why. False forces that."
)

# They go the way through memory, with a mock of the bridge, which has no weights to stream.
IN_MEMORY = {
    "test_import_ckpt_basic": "",
    "test_import_ckpt_with_kwargs": "",
    "test_import_ckpt_with_low_memory_save": ">=0.7",
    "test_import_ckpt_preserves_existing_distributed_context": ">=0.7",
    "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context": ">=0.7",
}


change = Change(
    name="streaming-import",
    message="""\
perf(ckpt): import checkpoints tensor by tensor

`AutoBridge.import_ckpt` held the whole model in memory, and some of it twice.
It now plans the import on the meta device and writes it block by block with
PyTorch's own DCP. The result is the same for every family.

`streaming=False` imports in memory. So does a bridge with its own loader.
""",
    why="import_ckpt needs the memory of a block, not of a model, and goes at the speed of the disk.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_parameter(
                    "AutoBridge.import_ckpt", "streaming: bool = True", keyword_only=True, doc=STREAMING_DOC
                ),
                insert_before(
                    "AutoBridge.import_ckpt",
                    assign("megatron_model"),
                    """\
streamed_model = None
if streaming:
    from megatron.bridge.models.conversion.streaming.plan import plan_import

    streamed_model = plan_import(bridge, megatron_path)
""",
                ),
                replace(
                    "AutoBridge.import_ckpt",
                    expression("bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)"),
                    "streamed_model or bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)",
                ),
                # That flow frees the model's weights one by one; here it has none.
                *(
                    pass_argument(
                        "AutoBridge.import_ckpt",
                        call("bridge.save_megatron_model"),
                        f"low_memory_save={wanted}streamed_model is None",
                        releases=releases,
                    )
                    # From 0.7 on the caller has a say.
                    for releases, wanted in {"<0.7": "", ">=0.7": "low_memory_save and "}.items()
                ),
            ],
        ),
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.models.conversion.streaming.tensor import is_piecewise"),
                # What is imported there uses private names of torch and Megatron Core: no other save depends on them.
                insert_before(
                    "save_checkpoint",
                    ifs('ckpt_cfg.ckpt_assume_constant_structure and ckpt_cfg.ckpt_format == "torch_dist"'),
                    """\
if is_piecewise(model):
    from megatron.bridge.models.conversion.streaming.dcp import StreamingSaveStrategy

    save_strategy = StreamingSaveStrategy(
        save_strategy.backend, save_strategy.version, thread_count=save_strategy.thread_count
    )
""",
                ),
                # A model without weights has no state of ModelOpt, whose import takes a second and 100 MB.
                wrap(
                    "save_checkpoint",
                    m.Expr(value=call("save_sharded_modelopt_state")),
                    "if not is_piecewise(model):\n    {}",
                ),
            ],
        ),
    ],
    modules=["models/conversion/streaming/dcp.py"],
    problem=(
        "`AutoBridge.import_ckpt` holds the whole model in memory, and some of it twice: 18 GB for a model of 8B. A "
        "host with less memory can't convert the checkpoint, even if its disk could store it. This change imports "
        "with the plan and the writer of the five changes before it, in 0.8 GB for a model of any size."
    ),
    unchanged=[
        "The bytes of each tensor, and the checkpoint's keys, chunks, and metadata.",
        "Saves of a model in memory.",
    ],
    changes=[
        "By default, `AutoBridge.import_ckpt` makes the model on the meta device, and reads, converts, and "
        "writes tensor by tensor. With `streaming=False`, it converts in memory as before.",
        "A model that can't be streamed is imported in memory. A warning gives the reason.",
    ],
    tested=[
        "A streaming import writes the same as an import in memory, with Bridge 0.3.1 to 0.6.2 and core 0.16 to 0.19.",
    ],
    stands_on=["import-plan", "streaming-executor", "in-process-save"],
    tests={
        "tests/unit/bridge/random_models.py": "models/",
        "tests/unit/bridge/test_streaming_save.py": "models/",
        "tests/unit/bridge/test_streaming_families.py": "models/",
    },
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                pass_argument(
                    f"TestAutoBridge.{test}", call("AutoBridge.import_ckpt"), "streaming=False", releases=releases
                )
                for test, releases in IN_MEMORY.items()
            ],
        )
    ],
)
