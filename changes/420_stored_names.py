# SPDX-License-Identifier: Apache-2.0
"""A checkpoint converts whatever spelling of its names transformers takes."""

from fork.change import Change
from fork.edits import File, add_import, call, wrap


change = Change(
    name="stored-names",
    message="""\
fix(ckpt): find tensors under each name that transformers reads

transformers saves some models under other names than they have on the hub,
and reads both by its own table: Nemotron-H and Qwen2-Audio, for example. A
bridge knows one of them, and found no source for a parameter.

Where a name is missing, use the one that transformers reads into the same
parameter.
""",
    why="Checkpoints convert as published and as transformers saves them.",
    edits=[
        File(
            "models/conversion/model_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion.stored_names import with_stored_names"),
                wrap(
                    "MegatronModelBridge.build_conversion_tasks",
                    call("mapping_registry.megatron_to_hf_lookup"),
                    "with_stored_names({}, hf_pretrained, hf_keys)",
                    count=2,
                ),
            ],
        )
    ],
    modules=["models/conversion/stored_names.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a Nemotron-H or Qwen2-Audio that transformers 5 has saved finds no source for some "
        "parameters, because it looks for the names that the model has on the hub."
    ),
    changes=[
        "If a checkpoint lacks a name that a bridge knows, the name that transformers reads into the same "
        "parameter is used.",
        "A tied model that has only `lm_head.weight` is imported.",
    ],
    unchanged=[
        "Checkpoints with the names that a bridge knows.",
        "Models that transformers doesn't have.",
    ],
    tested=["Tiny models of both spellings, imported and exported bit for bit."],
    tests={"tests/unit/bridge/test_stored_names.py": "models/"},
    stands_on=["accounting"],
)
