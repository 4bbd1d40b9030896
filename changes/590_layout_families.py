# SPDX-License-Identifier: Apache-2.0
"""Every family converts without Transformer Engine and without an accelerator."""

from fork.change import Change
from fork.edits import File, add_import, decorate


change = Change(
    name="layout-families",
    message="""\
feat(ckpt): convert every family on any host

Most families ask for modules of Transformer Engine, FLA, mamba-ssm, or
causal-conv1d, or for CUDA while their models are built.

On a host that lacks them, run `import_ckpt` and `export_ckpt` of such a
family in a process with stand-ins for these modules. Families that Megatron
Core's own layers make stay in the calling process.
""",
    why="import_ckpt and export_ckpt convert every family on a host without Transformer Engine or an accelerator.",
    edits=[
        File(
            "models/model_provider.py",
            [
                add_import("from megatron.bridge.host.stand_in_models import of_stand_ins"),
                decorate("_create_model", "of_stand_ins"),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion.layout_families import in_layout_process"),
                # Earlier upstream versions were not tried.
                *(
                    decorate(f"AutoBridge.{method}", "in_layout_process", outermost=True, releases=">=0.6")
                    for method in ("import_ckpt", "export_ckpt")
                ),
            ],
        ),
    ],
    modules=[
        "host/stand_in_models.py",
        "models/conversion/family_results.py",
        "models/conversion/layout_families.py",
    ],
    issues=[3295],
    stands_on=["own-process", "families", "host-modules", "conversion-errors"],
    problem=(
        "`AutoBridge.import_ckpt` of Gemma 3, Qwen3-VL, Qwen3-Next, Nemotron-H, MiniMax-M2, ERNIE 4.5 and others fails on a "
        "host without Transformer Engine or without a GPU, though a conversion computes nothing with their modules."
    ),
    changes=[
        "On such a host, `import_ckpt` and `export_ckpt` of these families run in a process of their own. Their arguments "
        "must be picklable. The command converts in its own process.",
    ],
    unchanged=[
        "Hosts with an accelerator and Transformer Engine, and the calling process.",
        "Families that Megatron Core's own layers make.",
    ],
    tested=["Every family that has a tiny model goes out and back bit for bit on a CPU host."],
    later=["Training such a model without Transformer Engine, and `to_megatron_model`."],
    tests={"tests/unit/bridge/test_layout_families.py": "models/"},
)
