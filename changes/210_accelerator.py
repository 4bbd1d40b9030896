# SPDX-License-Identifier: Apache-2.0
"""Process groups start on gloo, and models are built on the CPU, where there is no accelerator."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, add_import, call, decorate, expression, insert_first, pass_argument, replace, wrap


ACCELERATOR = add_import("from megatron.bridge.host import accelerator")
CALL_SET_DEVICE = m.Call(
    func=m.Attribute(value=m.Attribute(value=m.Name("torch"), attr=m.Name("cuda")), attr=m.Name("set_device"))
)
PROVIDER = "ModelProviderMixin"
PATHS = '"./megatron_checkpoint", "./hf_export"'
EXPORTS = [
    ("test_export_ckpt_basic", PATHS, ""),
    ("test_export_ckpt_preserves_existing_distributed_context", PATHS, ">=0.7"),
    ("test_export_ckpt_with_kwargs", f"{PATHS}, show_progress=False", ""),
]

change = Change(
    name="accelerator",
    message="""\
fix(model): start process groups and build models without an accelerator

Bridge started NCCL, set a CUDA device, and read CUDA's random state whatever
the host has.

Where there is no accelerator, process groups start on gloo, and models are
built on the CPU.
""",
    why="Conversion needs process groups and a model, but no accelerator.",
    edits=[
        File(
            "models/model_provider.py",
            [
                ACCELERATOR,
                *(
                    edit
                    for function in (f"{PROVIDER}.provide_distributed_model", f"{PROVIDER}.initialize_model_parallel")
                    for edit in (
                        wrap(function, m.Expr(value=CALL_SET_DEVICE), "if accelerator.is_available():\n    {}"),
                        replace(function, expression('"nccl"'), "accelerator.backend()"),
                    )
                ),
                replace(
                    f"{PROVIDER}.initialize_model_parallel",
                    expression("model_parallel_cuda_manual_seed"),
                    "accelerator.seed",
                ),
                insert_first(
                    "get_model", "use_cpu_initialization = use_cpu_initialization or not accelerator.is_available()"
                ),
            ],
        ),
        File(
            "models/conversion/param_mapping.py",
            [
                replace(
                    "ReplicatedMapping.hf_to_megatron",
                    expression("target_device.index != torch.cuda.current_device()"),
                    "torch.cuda.is_available() and target_device.index != torch.cuda.current_device()",
                )
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                ACCELERATOR,
                add_import("from contextlib import nullcontext", releases="<0.7.0"),
                decorate("AutoBridge.import_ckpt", "accelerator.with_process_group"),
                # A group of one process opens no port, which another process could take.
                decorate("AutoBridge.export_ckpt", "accelerator.with_process_group"),
                wrap(
                    "AutoBridge.export_ckpt",
                    call("temporary_distributed_context"),
                    "nullcontext() if dist.is_initialized() else {}",
                    releases="<0.7.0",
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                ACCELERATOR,
                *(
                    insert_first(function, "use_cpu_init = use_cpu_init or not accelerator.is_available()")
                    for function in ("load_megatron_model", "build_and_load_model")
                ),
            ],
        ),
        File(
            "training/checkpointing.py",
            [
                ACCELERATOR,
                replace(
                    "get_rng_state",
                    expression("torch.cuda.get_rng_state()"),
                    "torch.cuda.get_rng_state() if accelerator.is_available() else None",
                ),
                pass_argument("read_metadata", call("torch.tensor"), "device=accelerator.device()"),
            ],
        ),
    ],
    modules=["host/__init__.py", "host/accelerator.py"],
    status="asked for in issue 3295; pull request 3853 did part of it and was closed",
    issues=[3295],
    problem=(
        "On a host without a GPU, `AutoBridge.to_megatron_model()` stops at `torch.cuda.set_device`, then at NCCL, and "
        "saving stops where it reads CUDA's random state. Conversion only moves and reshapes weights, which needs no "
        "accelerator."
    ),
    changes=[
        "Without an accelerator, Bridge starts process groups on gloo and builds models on the CPU.",
        "`import_ckpt` and `export_ckpt` under `torchrun` on such a host have one group of all ranks.",
    ],
    unchanged=["Hosts with CUDA or ROCm."],
    tested=[
        "Unit tests on a CPU host; conversion on 1 and 2 ranks, with tensor, pipeline, and expert parallelism.",
        "The tests skip themselves where there is a GPU, as on the runners of the CI.",
    ],
    later=["Without Transformer Engine, Bridge must also be importable: `peft-without-transformer-engine`."],
    tests={"tests/unit/bridge/host/test_accelerator.py": "host/"},
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            # Without an accelerator, import_ckpt and export_ckpt have a group of their own.
            [
                add_import("from inspect import unwrap"),
                *(
                    wrap(
                        f"TestAutoBridge.{test}",
                        m.Expr(value=call("AutoBridge.import_ckpt")),
                        'with patch("megatron.bridge.host.accelerator.is_available", return_value=True):\n    {}',
                        releases=">=0.7",
                    )
                    for test in (
                        "test_import_ckpt_preserves_existing_distributed_context",
                        "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context",
                    )
                ),
                *(
                    replace(
                        f"TestAutoBridge.{test}",
                        expression(f"bridge.export_ckpt({arguments})"),
                        f"unwrap(AutoBridge.export_ckpt)(bridge, {arguments})",
                        releases=releases,
                    )
                    for test, arguments, releases in EXPORTS
                ),
            ],
        )
    ],
)
