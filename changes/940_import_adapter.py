# SPDX-License-Identifier: Apache-2.0
"""An import merges a LoRA adapter of PEFT into its base."""

from fork.change import Change
from fork.edits import File, add_parameter, call, insert_before


ADAPTER_DOC = (
    "The folder of a LoRA adapter of PEFT, which is merged into the model: each tensor is that of PEFT's "
    "`merge_and_unload` on the model in float32, cast once."
)

change = Change(
    name="import-adapter",
    message="""\
feat(ckpt): merge a PEFT adapter at import

To go on training a model that was tuned with LoRA, users had to merge the
adapter first, in the memory of the whole model, and to store the result.

`import_ckpt` takes the adapter beside its base, and merges each tensor
while it is read, with PEFT's own code.
""",
    why="An adapter and its base are imported as the model that PEFT merges of them.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_parameter(
                    "AutoBridge.import_ckpt",
                    "adapter: str | Path | None = None",
                    keyword_only=True,
                    doc=ADAPTER_DOC,
                ),
                insert_before(
                    "AutoBridge.import_ckpt",
                    call("at_import.start"),
                    "if adapter is not None:\n"
                    "    from megatron.bridge.models.conversion.adapter import merge_adapter\n\n"
                    "    merge_adapter(bridge.hf_pretrained, adapter)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/adapter.py"],
    problem=(
        "`AutoBridge.import_ckpt(hf_model, out)` takes no adapter. To import a model that was tuned with LoRA, users "
        "have to merge the adapter with PEFT first, which takes the memory of the whole model and a second copy of "
        "it on disk."
    ),
    changes=[
        "`import_ckpt(adapter=…)` merges a PEFT adapter into the model that it imports.",
    ],
    unchanged=["Imports without an adapter."],
    tested=[
        "Every tensor equals that of PEFT's `merge_and_unload`, for LoRA, rsLoRA, DoRA, rank patterns, and "
        "modules that are saved whole.",
    ],
    tests={"tests/unit/bridge/test_adapter.py": "models/"},
    stands_on=["torch-files", "verify-at-import"],
)
