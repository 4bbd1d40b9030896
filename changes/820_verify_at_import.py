# SPDX-License-Identifier: Apache-2.0
"""An import of what nobody has compared proves itself before it publishes."""

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    add_parameter,
    call,
    decorate,
    expression,
    insert_after,
    insert_before,
    replace_in_test,
)


VERIFY_DOC = (
    "True compares the logits of Megatron-LM with those of transformers before the checkpoint is published: of the whole "
    "model if it fits in memory, otherwise of a small twin. False compares nothing. By default a twin is compared, in a "
    "process of its own beside the conversion, if the config is of a kind that nobody has compared. A model that differs "
    "is refused."
)
# Their bridge is a mock, without a config.
MOCKS = (
    "test_import_ckpt_basic",
    "test_import_ckpt_with_kwargs",
    "test_import_ckpt_with_low_memory_save",
    "test_import_ckpt_preserves_existing_distributed_context",
    "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context",
)

change = Change(
    name="verify-at-import",
    message="""\
feat(ckpt): prove an import whose kind of config was never compared

A config of a kind that no comparison had covered was imported on trust.

During such an import, compare a small twin of the model with transformers,
and publish nothing if Megatron Core computes something else. A table lists
the kinds of configs that are proved already: their imports take no longer.
`verify=True` compares at every import, `verify=False` at none.
""",
    why="An import is proved by a comparison of logits, its own or that of a model of the same kind.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.verify import at_import"),
                decorate("AutoBridge.import_ckpt", "at_import.ends_with"),
                add_parameter(
                    "AutoBridge.import_ckpt", "verify: bool | None = None", keyword_only=True, doc=VERIFY_DOC
                ),
                insert_after(
                    "AutoBridge.import_ckpt",
                    call("check_config"),
                    "at_import.start(bridge, hf_model_id, verify if release else False, strict, **kwargs)",
                ),
            ],
        ),
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.verify import at_import"),
                insert_before(
                    "save_checkpoint._post_save_global_barrier",
                    expression("writer.run(proof.record_import, writer.payload)"),
                    "writer.run(at_import.conclude, writer.payload)",
                ),
            ],
        ),
    ],
    modules=["verify/at_import.py", "verify/beside.py", "verify/proved.py"],
    problem=(
        "Bridge converts any config of a family that it knows, including values that nobody has compared with "
        "transformers. If Megatron Core computes something else for such a value, `AutoBridge.import_ckpt(hf_model, "
        "out)` writes a different model and reports success."
    ),
    changes=[
        "`import_ckpt` takes `verify`. By default it compares a twin of the model if no comparison has covered "
        "its kind of config, and refuses to publish a model that differs.",
    ],
    unchanged=[
        "The duration of an import whose kind of config is proved already: it starts no further process.",
    ],
    tested=[
        "Every verdict, with stand-ins for the models, and twins of real families on the CPU.",
    ],
    tests={"tests/unit/bridge/test_verify_at_import.py": "verify/"},
    limit=600,
    limit_reason="proved.py is a table of 14 families, and means nothing without what asks it.",
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                edit
                for test in MOCKS
                for edit in replace_in_test(
                    f"TestAutoBridge.{test}", "megatron.bridge.verify.at_import.start", releases=">=0.7"
                )
            ],
        )
    ],
    stands_on=["command-verify", "config-check", "proof", "layout-families"],
)
