# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts models and latent attention are built on the CPU."""

from fork.change import Change
from fork.edits import File, add_import, decorate


change = Change(
    name="host-modules",
    message="""\
fix(model): build routers, YaRN, and latent attention on the CPU

Megatron Core places an expert bias, two rotary embeddings, and the embedding
that pipeline stages share on the current CUDA device, and it builds latent
attention with Transformer Engine only.

Replace the constructors of Megatron Core while Bridge builds a model on a
host that lacks these devices or Transformer Engine.
""",
    why="Megatron Core ties some modules to CUDA or Transformer Engine.",
    edits=[
        File(
            "models/model_provider.py",
            [
                add_import("from megatron.bridge.host.modules import building_on_this_host"),
                decorate("_create_model", "building_on_this_host()"),
            ],
        )
    ],
    modules=["host/modules.py"],
    issues=[3295],
    stands_on=["accelerator"],
    problem=(
        "On a host without a GPU, `AutoBridge.to_megatron_model()` of DeepSeek-V3 stops in Megatron Core: the router's "
        "expert bias and the rotary embedding are created on the current CUDA device. Without Transformer Engine, latent "
        "attention passes arguments that Megatron Core's attention doesn't accept."
    ),
    changes=["DeepSeek-V2 and V3, GLM-4.5, and GPT-OSS can be built on a CPU host."],
    unchanged=["Hosts with an accelerator and Transformer Engine.", "Megatron Core after the model is built."],
    tested=["Unit tests on a CPU host without Transformer Engine, which skip themselves elsewhere."],
    later=["Megatron-LM's pull request 6270 makes the same changes in Megatron Core; with it, this module can go."],
    tests={"tests/unit/bridge/host/test_host_modules.py": "host/"},
)
