# SPDX-License-Identifier: Apache-2.0
"""The mask of Nemotron-Labs-Diffusion is made when it is used."""

from fork.change import Change
from fork.edits import File, assign, call, insert_before, replace


ATTENTION = "NemotronLabsDiffusionAttention"

change = Change(
    name="diffusion-mask",
    message="""\
perf(model): make the mask of Nemotron-Labs-Diffusion when it is used

Each layer made a mask of all pairs of positions while the model was built: 19
GB on a CPU at the default length of 32768, and minutes. A conversion never
uses it.

Make the mask in the first forward pass.
""",
    why="A conversion of Nemotron-Labs-Diffusion takes the memory of its weights.",
    edits=[
        File(
            "diffusion/models/common/nemotron_labs_diffusion_attention.py",
            [
                replace(f"{ATTENTION}.__init__", assign("self.mask"), "self.mask = None", releases=">=0.6"),
                insert_before(
                    f"{ATTENTION}.forward",
                    call("fused_flex_attention"),
                    "if self.mask is None:\n"
                    "    self.mask = compute_block_mask(\n"
                    '        block_size=getattr(self.config, "block_size", 16), max_seq_length=self.config.seq_length\n'
                    "    )",
                    releases=">=0.6",
                ),
            ],
        )
    ],
    problem="`AutoBridge.import_ckpt` of a tiny Nemotron-Labs-Diffusion takes 19 GB on a CPU, for masks of its attention.",
    changes=["The mask of a layer is made in its first forward pass."],
    unchanged=["What the model computes."],
    tested=["A layer has no mask until its forward pass, and then one of its own sizes."],
    tests={"tests/unit/bridge/test_diffusion_mask.py": "diffusion/"},
)
