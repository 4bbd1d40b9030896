# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL, GLM-4.5V, and Qwen-Omni have the positions that their config says."""

from fork.change import Change
from fork.edits import File, add_import, assign, call, insert_after, pass_argument


SECTIONS = """\
rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
provider.mrope_section = rope.get("mrope_section", provider.mrope_section)
"""
BASE = "from megatron.bridge.models.conversion.transformers_compat import rope_theta_from_hf"

change = Change(
    name="multimodal-positions",
    message="""\
fix(model): follow the config for multimodal positions

The bridges of Qwen2.5-VL and GLM-4.5V left mrope_section out, and those of
Qwen-Omni looked for rope_theta where transformers 5 doesn't have it. Both
took the values of the published models instead.
""",
    why="Multimodal models have the RoPE base and sections of their config.",
    edits=[
        File(
            "models/qwen_vl/qwen25_vl_bridge.py",
            [insert_after("Qwen25VLBridge.provider_bridge", assign("provider"), SECTIONS, releases=">=0.6")],
        ),
        File(
            "models/glm_vl/glm_45v_bridge.py",
            [insert_after("GLM45VBridge.provider_bridge", assign("provider"), SECTIONS, releases=">=0.6")],
        ),
        *(
            File(
                f"models/qwen_omni/{name}_omni_bridge.py",
                [
                    add_import(BASE, releases=">=0.6"),
                    pass_argument(
                        f"{name.title()}OmniBridge.provider_bridge",
                        call(f"{name.title()}OmniModelProvider"),
                        "rotary_base=rope_theta_from_hf(text_config)",
                        releases=">=0.6",
                    ),
                ],
            )
            for name in ("qwen25", "qwen3")
        ),
    ],
    problem="With transformers 5, `AutoBridge.import_ckpt` of a Qwen3-Omni whose `rope_theta` isn't 1e6 ends without an "
    "error, and the model has a base of 1e6. A Qwen2.5-VL or GLM-4.5V has the sections of the published model.",
    changes=["The four bridges read `rope_parameters` of the text config."],
    unchanged=["Published models, whose values were the fixed ones."],
    tested=["What the bridges make of small configs; logits of tiny models, on the CPU."],
    tests={"tests/unit/bridge/test_multimodal_positions.py": "models/"},
)
