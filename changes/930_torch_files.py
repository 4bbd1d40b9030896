# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models whose weights are in pytorch_model.bin are imported, and exported as safetensors."""

from fork.change import Change
from fork.edits import File, add_import, expression, wrap


change = Change(
    name="torch-files",
    message="""\
feat(model): import weights in pytorch_model.bin

A model without safetensors files was refused.

Read its files with the `weights_only` of `torch.load`, which runs none of
their code. The place of each value is read from the file, so that such an
import streams, too. An export writes safetensors.
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
    problem=(
        "`AutoBridge.import_ckpt(hf_model, out)` finds no weights if the model has only `pytorch_model.bin`. Users "
        "have to load the model with transformers and save it as safetensors first, in the memory of the whole "
        "model."
    ),
    changes=[
        "`import_ckpt` reads `pytorch_model.bin`, or the files of its index, if a model has no safetensors. It "
        "refuses a file whose pickle names anything that could run code.",
        "An export of such a model writes safetensors.",
        "`revision`, `token`, and `cache_dir` also apply to the weights of a model on the hub.",
    ],
    unchanged=["Models that have safetensors, with or without other files."],
    tested=[
        "Every tensor of a release checkpoint equals that of the same model in safetensors, in one file and in "
        "several.",
    ],
    tests={
        "tests/unit/bridge/test_torch_files.py": "models/",
        "tests/unit/bridge/test_weight_source.py": "models/hf_pretrained/",
    },
    stands_on=["streaming-export", "hub"],
)
