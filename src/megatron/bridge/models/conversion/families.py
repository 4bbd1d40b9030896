# SPDX-License-Identifier: Apache-2.0
"""Which module registers the bridge of an architecture, so that it is imported when the architecture is asked for."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


FAMILIES = {
    "BailingMoeV2ForCausalLM": "models.bailing.bailing_moe2_bridge",
    "DeciLMForCausalLM": "models.llama_nemotron.llama_nemotron_bridge",
    "DeepseekV2ForCausalLM": "models.deepseek.deepseek_v2_bridge",
    "DeepseekV3ForCausalLM": "models.deepseek.deepseek_v3_bridge",
    "DeepseekV4ForCausalLM": "models.deepseek.deepseek_v4_bridge",
    "Ernie4_5_MoeForCausalLM": "models.ernie.ernie_45_bridge",
    "Ernie4_5_VLMoeForConditionalGeneration": "models.ernie_vl.ernie45_vl_bridge",
    "Exaone4ForCausalLM": "models.exaone.exaone4.exaone4_bridge",
    "Exaone4_5_ForConditionalGeneration": "models.exaone.exaone45.exaone45_bridge",
    "ExaoneMoEForCausalLM": "models.exaone.exaone_moe.exaone_moe_bridge",
    "ExaoneMoeForCausalLM": "models.exaone.exaone_moe.exaone_moe_bridge",
    "FalconH1ForCausalLM": "models.falcon_h1.falconh1_bridge",
    "Gemma2ForCausalLM": "models.gemma.gemma2_bridge",
    "Gemma3ForCausalLM": "models.gemma.gemma3_bridge",
    "Gemma3ForConditionalGeneration": "models.gemma_vl.gemma3_vl_bridge",
    "Gemma4ForCausalLM": "models.gemma.gemma4_bridge",
    "Gemma4ForConditionalGeneration": "models.gemma_vl.gemma4_vl_bridge",
    "GemmaForCausalLM": "models.gemma.gemma_bridge",
    "Glm4MoeForCausalLM": "models.glm.glm45_bridge",
    "Glm4MoeLiteForCausalLM": "models.glm.glm47_flash_bridge",
    "Glm4vMoeForConditionalGeneration": "models.glm_vl.glm_45v_bridge",
    "GlmMoeDsaForCausalLM": "models.glm_moe_dsa.glm5_bridge",
    "GptOssForCausalLM": "models.gpt_oss.gpt_oss_bridge",
    "HYV3ForCausalLM": "models.hy_v3.hy_v3_bridge",
    "KimiK25ForConditionalGeneration": "models.kimi_vl.kimi_k25_vl_bridge",
    "KimiK2ForCausalLM": "models.kimi.kimi_bridge",
    "KimiK3ForConditionalGeneration": "models.kimi.kimi_k3_bridge",
    "LlamaForCausalLM": "models.llama.llama_bridge",
    "MiMoForCausalLM": "models.mimo.mimo_bridge",
    "MiMoV2FlashForCausalLM": "models.mimo_v2_flash.mimo_v2_flash_bridge",
    "MiniMaxM2ForCausalLM": "models.minimax_m2.minimax_m2_bridge",
    "MiniMaxM3SparseForConditionalGeneration": "models.minimax_m3.minimax_m3_bridge",
    "Mistral3ForConditionalGeneration": "models.ministral3.ministral3_bridge",
    "MistralForCausalLM": "models.mistral.mistral_bridge",
    "NemotronForCausalLM": "models.nemotron.nemotron_bridge",
    "NemotronHForCausalLM": "models.nemotronh.nemotron_h_bridge",
    "NemotronH_Nano_Omni_Reasoning_V3": "models.nemotron_omni.nemotron_omni_bridge",
    "NemotronH_Nano_VL_V2": "models.nemotron_vl.nemotron_vl_bridge",
    "NemotronH_Super_Omni_Reasoning_V3": "models.nemotron_omni.nemotron_omni_bridge",
    "NemotronLabsDiffusionModel": "diffusion.conversion.nemotron_labs_diffusion.nemotron_labs_diffusion_bridge",
    "OlmoeForCausalLM": "models.olmoe.olmoe_bridge",
    "Qwen2AudioForConditionalGeneration": "models.qwen_audio.qwen2_audio_bridge",
    "Qwen2ForCausalLM": "models.qwen.qwen2_bridge",
    "Qwen2_5OmniForConditionalGeneration": "models.qwen_omni.qwen25_omni_bridge",
    "Qwen2_5_VLForConditionalGeneration": "models.qwen_vl.qwen25_vl_bridge",
    "Qwen3ASRForConditionalGeneration": "models.qwen3_asr.qwen3_asr_bridge",
    "Qwen3ForCausalLM": "models.qwen.qwen3_bridge",
    "Qwen3MoeForCausalLM": "models.qwen.qwen3_moe_bridge",
    "Qwen3NextForCausalLM": "models.qwen.qwen3_next_bridge",
    "Qwen3OmniMoeForConditionalGeneration": "models.qwen_omni.qwen3_omni_bridge",
    "Qwen3VLForConditionalGeneration": "models.qwen_vl.qwen3_vl_bridge",
    "Qwen3VLMoeForConditionalGeneration": "models.qwen_vl.qwen3_vl_bridge",
    "Qwen3_5ForCausalLM": "models.qwen.qwen35_bridge",
    "Qwen3_5ForConditionalGeneration": "models.qwen_vl.qwen35_vl_bridge",
    "Qwen3_5ForTokenClassification": "models.qwen_vl.qwen35_vl_bridge",
    "Qwen3_5MoeForCausalLM": "models.qwen.qwen35_bridge",
    "Qwen3_5MoeForConditionalGeneration": "models.qwen_vl.qwen35_vl_bridge",
    "SarvamMLAForCausalLM": "models.sarvam.sarvam_mla_bridge",
    "SarvamMoEForCausalLM": "models.sarvam.sarvam_moe_bridge",
    "Step3p5ForCausalLM": "models.stepfun.step35_bridge",
    "Step3p7ForConditionalGeneration": "models.stepfun.step37_bridge",
}
"""The module below megatron.bridge that registers an architecture.

An architecture that is missing here is found by importing all modules. Some versions of Bridge lack some of these.
"""

_WITH_CONFIGS = (
    "models.bailing.bailing_moe2_bridge",
    "models.qwen3_asr",
    "models.stepfun.step35_bridge",
    "models.stepfun.step37_bridge",
)
"""The modules that register a configuration with transformers, which is read before the architecture is known."""

_CONFIGS = {
    "bailing_moe_v2": "models.bailing.configuration_bailing_moe_v2.BailingMoeV2Config",
    "step3p5": "models.stepfun.configuration_step35.Step35Config",
    "step3p7": "models.stepfun.configuration_step37.Step37Config",
}
"""Those of the configurations that can be imported without their families."""

_GATHERING = ("models", "diffusion.models")
"""The packages below megatron.bridge that import every module with a bridge."""


def import_family(architecture: type | str) -> None:
    """Import the module that registers the bridge of an architecture, unless it is registered.

    Args:
        architecture: A model class of transformers, or the name of one. If no bridge has this name, every module with
            a bridge is imported.
    """
    name = architecture if isinstance(architecture, str) else architecture.__name__
    if _is_registered(name):
        return
    if name in FAMILIES:
        with _keeping_registrations():
            _import(FAMILIES[name])
    if not _is_registered(name):
        import_all()


def register_configs() -> None:
    """Register with transformers the configurations that need no import of a family."""
    from transformers import AutoConfig

    for model_type, name in _CONFIGS.items():
        module, _, kind = name.rpartition(".")
        if (found := _import(module)) is not None:
            AutoConfig.register(model_type, getattr(found, kind), exist_ok=True)


def import_configs() -> None:
    """Import the modules that register configurations with transformers."""
    for module in _WITH_CONFIGS:
        _import(module)


def import_all() -> None:
    """Import every module that registers a bridge."""
    with _keeping_registrations():
        for package in map(_import, _GATHERING):
            # Each name that such a package gathers is imported when it is used.
            for name in dir(package):
                getattr(package, name)


def _import(name: str) -> ModuleType | None:
    """Import a module below megatron.bridge, if this version of Bridge has it."""
    module = f"megatron.bridge.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return None
        raise


def _is_registered(name: str) -> bool:
    from megatron.bridge.models.conversion import model_bridge

    return any(getattr(key, "__name__", key) == name for key in model_bridge.get_model_bridge._exact_types)


@contextmanager
def _keeping_registrations() -> Iterator[None]:
    """Let what was registered before win, for a user's own bridge replaces Bridge's."""
    from megatron.bridge.models.conversion import model_bridge
    from megatron.bridge.models.decorators.dispatch import _Dispatch

    dispatchers = [value for value in vars(model_bridge).values() if isinstance(value, _Dispatch)]
    before = [dict(each._exact_types) for each in dispatchers]
    try:
        yield
    finally:
        for each, kept in zip(dispatchers, before, strict=True):
            each._exact_types.update(kept)
            each._dispatch_cache.clear()
