# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models whose weights are in pytorch_model.bin are imported, and exported as safetensors."""

from fork.change import Change
from fork.edits import File, add_import, expression, wrap


change = Change(
    name="torch-files",
    message="""\
feat(model): import weights in pytorch_model.bin

A model without safetensors was refused. Its files are now read with
torch.load's weights_only, which runs no code of theirs, and where the values
lie is read from the file, so that an import streams. An export writes
safetensors.
""",
    why="A Hugging Face model that has only pytorch_model*.bin is imported, and no code of its files runs.",
    edits=[
        File(
            "models/hf_pretrained/base.py",
            [
                wrap(
                    "PreTrainedBase.state",
                    expression("SafeTensorsStateSource(self.model_name_or_path)"),
                    "weight_source.weight_source({}, self.init_kwargs)",
                ),
                add_import("from megatron.bridge.models.hf_pretrained import weight_source"),
            ],
        ),
    ],
    modules=["models/hf_pretrained/weight_source.py"],
    problem="`AutoBridge.import_ckpt` of a model that has only `pytorch_model.bin` finds no weights.",
    changes=[
        "`import_ckpt` reads `pytorch_model.bin`, or the files of its index, where a model has no safetensors. A file "
        "that names what could run code is refused.",
        "An export of such a model writes safetensors.",
        "Of a model on the hub, `revision`, `token`, and `cache_dir` hold for the weights, too.",
    ],
    unchanged=["Models that have safetensors, with or without other files."],
    tested=["Every tensor of a release is that of the same model in safetensors, in one file and in several."],
    tests={
        "tests/unit/bridge/test_torch_files.py": "models/",
        "tests/unit/bridge/test_weight_source.py": "models/hf_pretrained/",
    },
    stands_on=["streaming-export", "hub"],
)
