# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4 has sliding windows in its local layers, and no positions in its global ones."""

from fork.change import Change
from fork.edits import File, assign, insert_after


LAYERS = """\
if getattr(hf_config, "sliding_window", None) is not None:
    # As `Exaone4Attention` of transformers decides.
    local = [kind == "sliding_attention" for kind in hf_config.layer_types]
    provider.no_rope_freq = [int(not each) for each in local]
    if any(local):
        provider.window_size = (hf_config.sliding_window - 1, 0)
        provider.window_attn_skip_freq = [int(each) for each in local]
"""

change = Change(
    name="exaone4-layers",
    message="""\
fix(model): build the local and global layers of EXAONE 4

EXAONE 4 32B has sliding windows in three of four layers, and no positions in
the others. The bridge gave every layer positions, and none a window.

Give each layer the positions and the window that the config names.
""",
    why="EXAONE 4 with sliding windows is the model that its config says.",
    edits=[
        File(
            "models/exaone/exaone4/exaone4_bridge.py",
            [
                insert_after(
                    "Exaone4Bridge.provider_bridge", assign("provider.autocast_dtype"), LAYERS, releases=">=0.6"
                )
            ],
        )
    ],
    problem="`AutoBridge.import_ckpt` of EXAONE 4 32B ends without an error, and the logits are another model's.",
    changes=["Exaone4Bridge follows `layer_types` and `sliding_window`, as Exaone45Bridge does."],
    unchanged=["EXAONE 4 1.2B, which has no sliding windows."],
    tested=["Logits of a tiny model beside transformers', on the CPU."],
    tests={"tests/unit/bridge/test_exaone4_layers.py": "models/exaone/"},
    stands_on=["config-check"],
)
