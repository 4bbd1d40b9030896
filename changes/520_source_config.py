# SPDX-License-Identifier: Apache-2.0
"""The config.json of an export is the model's own, with what conversion or training changed."""

from fork.change import Change
from fork.edits import File, call, insert_after, insert_before


change = Change(
    name="source-config",
    message="""\
fix(ckpt): export the model's own config.json, in its own spelling

An export wrote the config as the installed transformers spells it.
transformers 5 writes rope_parameters alone, and 4.57 then reads a
rope_theta of 10000, without a word.

export_ckpt now writes the config that the release keeps, or that of
source_path, and changes in it what conversion or training changed: the
dtype of the weights, quantization_config, and what the bridge's config says
otherwise than its source.
""",
    why="The config of an export is the model's own, so that every transformers reads it as it reads the source's.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_before(
                    "AutoBridge.export_ckpt",
                    call("self.save_hf_pretrained"),
                    "from megatron.bridge.models.hf_pretrained import source_config\n"
                    "\n"
                    "own_config = source_config.own_config(own_files)",
                ),
                insert_after(
                    "AutoBridge.export_ckpt",
                    call("own_files.give_back"),
                    "if own_config is not None:\n    own_config.give_back(self)",
                ),
            ],
        ),
    ],
    modules=["models/hf_pretrained/source_config.py"],
    problem="""\
`bridge.export_ckpt("out", "hf")` writes config.json as the installed transformers spells it. transformers 5 writes
`rope_parameters` only. transformers 4.57 doesn't read that key, takes a `rope_theta` of 10000 without a warning, and the
exported model computes something else.
""",
    unchanged=["The weights of an export.", "Exports of a checkpoint that has kept no config."],
    changes=[
        "`AutoBridge.export_ckpt` writes the model's own config.json in its own spelling (`rope_theta` or "
        "`rope_parameters`, `torch_dtype` or `dtype`), with what conversion or training changed in it.",
    ],
    tested=["Configs in the spellings of transformers 4 and 5 come back equal key by key, and byte for byte."],
    tests={"tests/unit/bridge/test_source_config.py": "models/hf_pretrained/test_source_config.py"},
    stands_on=["export-model-files", "safetensors-header"],
)
