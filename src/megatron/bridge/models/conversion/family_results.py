# SPDX-License-Identifier: Apache-2.0
"""What is known of each architecture that Bridge registers, on a host without Transformer Engine and accelerator.

It imports nothing of the library, so that `megatron-bridge families` answers at once.
"""

import difflib
from collections.abc import Iterable


__all__ = ["RESULTS", "counted"]

EXACT = "bit for bit"
IN_A_PROCESS = "bit for bit, in a process of its own"
HUB = "not tried: its code is on the hub, pass --trust-remote-code"


def _causal(*names: str) -> list[str]:
    return [f"{name}ForCausalLM" for name in names]


def _conditional(*names: str) -> list[str]:
    return [f"{name}ForConditionalGeneration" for name in names]


RESULTS: dict[str, str] = {
    **dict.fromkeys(
        [
            *_causal("BailingMoeV2", "DeepseekV2", "DeepseekV3", "Gemma", "Glm4Moe", "Glm4MoeLite", "GptOss", "HYV3"),
            *_causal("KimiK2", "Llama", "Mistral", "Nemotron", "Olmoe", "Qwen2", "Qwen3", "Qwen3Moe", "SarvamMoE"),
        ],
        EXACT,
    ),
    **dict.fromkeys(
        [
            *_causal("DeciLM", "Exaone4", "ExaoneMoE", "ExaoneMoe", "FalconH1", "Gemma2", "Gemma3", "Gemma4"),
            *_causal("GlmMoeDsa", "MiMo", "MiMoV2Flash", "MiniMaxM2", "NemotronH", "Qwen3Next", "Qwen3_5"),
            *_causal("Ernie4_5_Moe", "Qwen3_5Moe", "SarvamMLA", "Step3p5"),
            "NemotronLabsDiffusionModel",
            *_conditional("Ernie4_5_VLMoe", "Exaone4_5_", "Gemma3", "Gemma4", "Glm4vMoe", "Mistral3", "Qwen2Audio"),
            *_conditional("Qwen2_5_VL", "Qwen3ASR", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "Step3p7"),
        ],
        IN_A_PROCESS,
    ),
    **dict.fromkeys(
        _conditional("Qwen2_5Omni", "Qwen3OmniMoe"),
        "bit for bit without the talker, which Bridge has no mapping for: pass --no-strict to leave it out",
    ),
    "MiniMaxM3SparseForConditionalGeneration": (
        "bit for bit, in a process of its own; router gates in bfloat16 come back in float32, with the same values"
    ),
    "DeepseekV4ForCausalLM": "refused: Megatron Core 0.19 has no attention variant dsv4_hybrid",
    **dict.fromkeys(
        [*_conditional("KimiK25"), "NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Nano_VL_V2"],
        HUB,
    ),
}
"""The result of an import and an export of a tiny model, by architecture."""


def counted(supported: Iterable[str], architecture: str) -> str:
    """Return how many architectures there are, and those whose names are nearest to one that isn't among them."""
    names = list(supported)
    nearest = difflib.get_close_matches(architecture, names, n=3)
    return f"{len(names)}, of which {', '.join(nearest)} are the nearest" if nearest else str(len(names))
