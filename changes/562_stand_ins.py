# SPDX-License-Identifier: Apache-2.0
"""There are stand-ins for Transformer Engine's modules."""

from fork.change import Change


change = Change(
    name="stand-ins",
    message="""\
feat(model): add stand-ins for Transformer Engine's modules

Most families build their models from modules of Transformer Engine, FLA,
mamba-ssm, or causal-conv1d, or ask for CUDA while they are built.

A conversion needs only the parameters, extra states, and names of these
modules. Add stand-ins that have these, and compute nothing.
""",
    why="A checkpoint has the layout of Transformer Engine's modules, and a conversion computes nothing with them.",
    modules=["host/stand_ins.py"],
    issues=[3295],
    stands_on=["accelerator", "lazy-models"],
    problem=(
        "On a host without Transformer Engine or a GPU, most architectures of AutoBridge can't be converted: Gemma 2 and 3, "
        "EXAONE 4, MiniMax-M2, ERNIE 4.5, Qwen3-Next, Qwen3-VL, Nemotron-H, and others ask for its modules by name."
    ),
    changes=["Nothing yet: `layout-families` uses them."],
    unchanged=["Every process that doesn't install them."],
    tested=["Shapes, dtypes, and extra states of each module; Megatron Core takes them for Transformer Engine."],
    tests={"tests/unit/bridge/host/test_stand_ins.py": "host/"},
)
