# SPDX-License-Identifier: Apache-2.0
"""The config of an export says what was trained, by the args of the checkpoint."""

from fork.change import Change
from fork.edits import File, add_import, call, decorate, pass_argument


# They load a checkpoint that isn't there, and so overrides nothing.
LOADS = {
    "test_export_ckpt_basic": ("mock_load_megatron_model", ""),
    "test_export_ckpt_with_kwargs": ("mock_load_megatron_model", ""),
    "test_export_ckpt_preserves_existing_distributed_context": ("mock_load", ">=0.7"),
}

change = Change(
    name="trained-config",
    message="""\
fix(ckpt)!: export the config that was trained, by the checkpoint's args

An export wrote the config of the model that was imported. A training with
another rotary base, RoPE scaling, norm epsilon or vocabulary ended as a
model that computes something else; rows that the checkpoint lacks were
zeros, and rows that the config lacks were dropped.

Compare the args of the checkpoint with the model of the config, write what
the config can say, and refuse what it can't.
""",
    why="The config of an export says what the checkpoint's own args say, or the export is refused.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import trained_config"),
                decorate("AutoBridge.export_ckpt", "trained_config.follow_checkpoint"),
                pass_argument(
                    "AutoBridge.export_ckpt",
                    call("self.load_megatron_model"),
                    "mp_overrides=trained_config.overrides(self)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/trained_config.py"],
    limit=600,
    limit_reason="one module, and a test of each value that a config can say or can't",
    problem=(
        "`AutoBridge.export_ckpt` writes the config of the model that was imported. If Megatron-LM trained with "
        "`--rotary-base 20000`, for example, config.json has the old `rope_theta`: transformers then computes "
        "something else than what was trained, and no warning says so."
    ),
    changes=[
        "`export_ckpt` takes RoPE base and scaling, norm epsilon, tied embeddings, sizes, and the rows of the "
        "vocabulary from the args of the checkpoint, and names each key that it changes. It takes a larger "
        "context length, but not a smaller one.",
        "If config.json can't say what was trained, or the args don't fit the weights, `export_ckpt` refuses "
        "before it reads a weight.",
        "The weights of an export have the dtype in which they are stored.",
        "Rows of the vocabulary are left out only if a tokenizer shows that they are padding.",
    ],
    unchanged=[
        "The export of a checkpoint whose args agree with its config.",
    ],
    tested=[
        "Megatron-LM trains with changed values on the CPU. The logits of the exports in transformers equal "
        "Megatron-LM's.",
    ],
    stands_on=["trained-keys", "trained-checkpoints", "config-check", "payload-facts", "source-config"],
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                pass_argument(
                    f"TestAutoBridge.{test}",
                    call(f"{mock}.assert_called_once_with"),
                    "mp_overrides={}",
                    releases=releases,
                )
                for test, (mock, releases) in LOADS.items()
            ],
        )
    ],
    tests={"tests/unit/bridge/test_trained_config.py": "models/conversion/test_trained_config.py"},
)
