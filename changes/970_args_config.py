# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that names no Hugging Face model is exported by its args."""

from fork.change import Change
from fork.edits import File, define, insert_before


# The docstring stands as deep as in the class.
FROM_ARGS = '''\
@classmethod
def from_megatron_args(cls, megatron_path: str | Path) -> "AutoBridge":
    """Create an AutoBridge from the args of a checkpoint that Megatron-LM has saved.

        The config is that of the first family whose model has all values of the args. It has no special tokens.

        Args:
            megatron_path: Checkpoint root or payload folder.

        Raises:
            ValueError: The args don't say enough, or are those of another model.
        """
    from megatron.bridge.models.conversion.args_config import config_of_args

    return cls.from_hf_config(config_of_args(megatron_path))
'''

change = Change(
    name="args-config",
    message="""\
feat(ckpt): export a checkpoint by its args alone

A checkpoint that Megatron-LM trained from scratch names no Hugging Face
model. To export it, somebody had to write its config.json by hand.

`AutoBridge.from_megatron_args` makes the config from the args of the
checkpoint, if they describe a Llama, Mistral, Qwen 2, Qwen 3, Qwen 3 MoE,
Nemotron, GLM-4.5, or DeepSeek-V3.
""",
    why="A checkpoint from scratch is exported without a Hugging Face model.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [insert_before("AutoBridge", define("from_hf_pretrained"), FROM_ARGS, done=define("from_megatron_args"))],
        ),
    ],
    modules=["models/conversion/args_config.py"],
    problem=(
        "A model that Megatron-LM trained from scratch has no Hugging Face model that "
        "`AutoBridge.from_hf_pretrained(...)` could take, so `export_ckpt` can't be called. Users have to write a "
        "config.json by hand, and a mistake in it makes a different model."
    ),
    changes=[
        "`AutoBridge.from_megatron_args(checkpoint)` makes the config from the args of the checkpoint. "
        "`export_ckpt` of this bridge then exports it.",
    ],
    unchanged=[
        "Exports with a Hugging Face model.",
    ],
    tested=[
        "Megatron-LM saves a model of each family. The logits of the exports in transformers equal Megatron-LM's.",
    ],
    later=[
        "Other architectures. Their args are refused by name.",
    ],
    stands_on=["trained-config", "export-account"],
    tests={"tests/unit/bridge/test_args_config.py": "models/conversion/test_args_config.py"},
)
