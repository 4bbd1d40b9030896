# SPDX-License-Identifier: Apache-2.0
"""A release records what its import left out or could not prove."""

from fork.change import Change
from fork.edits import File, add_import, decorate, expression, insert_after


change = Change(
    name="proof",
    message="""\
feat(ckpt): record in run_config.yaml what an import could not prove

A warning of an import says what it left out and what was never compared, and
then it is gone.

Record these lines, and the result of a comparison of the logits, in a section
of the run config, for whoever uses the checkpoint later.
""",
    why="Whoever meets a checkpoint can tell what its import left out or could not prove.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.release_checkpoint import proof"),
                decorate("AutoBridge.import_ckpt", "proof.of_import"),
            ],
        ),
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.release_checkpoint import proof"),
                insert_after(
                    "save_checkpoint._post_save_global_barrier",
                    expression("writer.run(release_state.complete_payload, writer.payload, cfg)"),
                    "writer.run(proof.record_import, writer.payload)",
                ),
            ],
        ),
    ],
    modules=["release_checkpoint/proof.py"],
    problem=(
        "`AutoBridge.import_ckpt(hf_model, out)` may warn that it left something out or couldn't check something. "
        "Whoever trains from `out` later doesn't see these warnings, because the checkpoint doesn't record them."
    ),
    changes=[
        "The `run_config.yaml` of an import may end with the section `proof`, a plain mapping.",
    ],
    unchanged=[
        "The other sections of `run_config.yaml` and their readers.",
    ],
    tested=[
        "Unit tests on the CPU: the recorded section is read back, and Bridge reads its config as before.",
    ],
    tests={"tests/unit/bridge/release_checkpoint/test_proof.py": "release_checkpoint/"},
    stands_on=["release-checkpoints"],
)
