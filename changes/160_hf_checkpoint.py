# SPDX-License-Identifier: Apache-2.0
"""Checks of a Hugging Face checkpoint before anything of it is converted or written."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    call,
    expression,
    insert_before,
    insert_first,
    pass_argument,
    replace,
)


# These name a folder that is not there; import_ckpt refuses it now before it asks the mock. A model id will do.
LOCAL_MODEL = {
    "test_import_ckpt_with_kwargs": ("", 3),
    "test_import_ckpt_preserves_existing_distributed_context": (">=0.7", 1),
    "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context": (">=0.7", 1),
}

change = Change(
    name="hf-checkpoint",
    message="""\
fix(ckpt): refuse a damaged Hugging Face checkpoint before converting it

A missing or short shard, a tensor that doesn't fit the config, or a tokenizer
larger than the embedding was found late, or not at all: transformers fills a
missing tensor with random values.

Read headers and configs first, and name what is wrong. Warn about weights
with NaN or infinity.
""",
    why="import_ckpt refuses a damaged Hugging Face checkpoint before it converts, and warns of NaN in its weights.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_first(
                    "AutoBridge.import_ckpt",
                    "from megatron.bridge.models.conversion.hf_checkpoint import (\n"
                    "    check_hf_checkpoint,\n"
                    "    has_tokenizer,\n"
                    "    local_path,\n"
                    ")\n"
                    "\n"
                    "hf_model_id = local_path(hf_model_id)\n",
                ),
                insert_before(
                    "AutoBridge.import_ckpt",
                    m.Assign(value=call("cls.from_hf_pretrained")),
                    'check_hf_checkpoint(hf_model_id, kwargs.get("trust_remote_code"))\n',
                ),
                pass_argument(
                    "AutoBridge.import_ckpt",
                    call("bridge.save_megatron_model"),
                    "hf_tokenizer_path=hf_model_id if has_tokenizer(hf_model_id) else None",
                ),
            ],
        ),
        File(
            "models/hf_pretrained/state.py",
            [
                add_import(
                    "from megatron.bridge.models.conversion.hf_checkpoint import is_finite, warn_of_non_finite"
                ),
                insert_before(
                    "SafeTensorsStateSource.load_tensors",
                    m.Return(value=m.Name("loaded_tensors")),
                    "warn_of_non_finite(name for name, tensor in loaded_tensors.items() if not is_finite(tensor))",
                ),
            ],
        ),
    ],
    modules=["models/conversion/hf_checkpoint.py"],
    limit=600,
    limit_reason="one module, and a test of each damage that it finds",
    problem=(
        "`AutoBridge.import_ckpt(hf_model, out)` of a damaged checkpoint fails late, with an error that doesn't name "
        "the file. If a tensor is missing, it doesn't fail at all: transformers fills the tensor with random "
        "values."
    ),
    changes=["`import_ckpt` refuses a damaged Hugging Face checkpoint before it converts."],
    unchanged=["How a model ID on the hub is imported, and what is written."],
    tested=["Unit tests of each damage on the CPU."],
    notes=[
        "Loading the weights takes a pass more over each tensor, for NaN and infinity; it is small beside the reading."
    ],
    tests={
        "tests/unit/bridge/test_hf_checkpoint.py": "models/test_hf_checkpoint.py",
    },
    stands_on=["release-checkpoints", "hf-files"],
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                replace(
                    f"TestAutoBridge.{test}",
                    expression('"./local_model"'),
                    '"some/model"',
                    count=count,
                    releases=releases,
                )
                for test, (releases, count) in LOCAL_MODEL.items()
            ],
        ),
    ],
    others=[
        # A folder of diffusers has no config.json of its own.
        File(
            "examples/models/wan/conversion/convert_checkpoints.py",
            [
                replace(
                    "import_hf_to_megatron",
                    expression("ValueError"),
                    "(FileNotFoundError, ValueError)",
                    releases=">=0.6",
                )
            ],
        ),
    ],
)
