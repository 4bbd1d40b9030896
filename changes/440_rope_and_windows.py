# SPDX-License-Identifier: Apache-2.0
"""RoPE scaling and sliding windows of config.json reach the model provider, whatever the family."""

from fork.change import Change
from fork.edits import File, assign, expression, insert_after, insert_before, replace, replace_in_test


# What MistralModelProvider has no field for.
MISTRAL_FACTOR = {
    "<0.4": 'hf_config.rope_scaling.get("factor", 8.0)',
    ">=0.4": "rope_scaling_factor_from_hf(hf_config, default=8.0)",
}
ROPE_SCALING = "megatron.bridge.models.conversion.rope_scaling"
# Their providers are mocks, without RoPE.
MOCKS = {
    "test_auto_bridge.py": [
        "TestAutoBridge.test_to_megatron_provider_basic",
        "TestAutoBridge.test_to_megatron_provider_with_custom_kwargs",
        "TestAutoBridge.test_to_megatron_provider_persists_hf_model_revision",
    ],
    "llama/test_llama_bridge.py": ["TestAutoBridgeIntegration.test_from_pretrained_multiple_models"],
}

change = Change(
    name="rope-and-windows",
    message="""\
fix(model): carry RoPE scaling and sliding windows into the provider

Bridge read rope_scaling for YaRN and, with Llama alone, for Llama 3's and
the linear scaling. It dropped YaRN's attention_factor, took mscale without
mscale_all_dim, hard-coded GPT-OSS's YaRN and layer pattern, left out Qwen's
sliding windows and any partial_rotary_factor in rope_parameters, and stopped
at Mistral's YaRN with a TypeError.

Take frequencies, factor and windows from the config for every family of
GPTModelProvider with one RoPE.
""",
    why="RoPE scaling and sliding windows of the config reach Megatron Core, and no family has them hard-coded.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_before(
                    "AutoBridge.to_megatron_provider",
                    assign("provider"),
                    "from megatron.bridge.models.conversion.rope_scaling import check_windows\n"
                    "\n"
                    "check_windows(self.hf_pretrained)\n",
                ),
                insert_after(
                    "AutoBridge.to_megatron_provider",
                    assign("provider"),
                    "from megatron.bridge.models.conversion.rope_scaling import carry_over\n"
                    "\n"
                    "carry_over(provider, self.hf_pretrained)\n",
                ),
            ],
        ),
        File(
            "models/mistral/mistral_bridge.py",
            [
                replace(
                    "MistralBridge.provider_bridge",
                    expression(f"partial(MistralModelProvider, scale_factor={factor})"),
                    "MistralModelProvider",
                    releases=releases,
                )
                for releases, factor in MISTRAL_FACTOR.items()
            ],
        ),
    ],
    modules=["models/conversion/rope_scaling.py"],
    issues=[5627],
    problem=(
        "`AutoBridge.from_hf_pretrained` of a Qwen2 with `use_sliding_window`, a Mistral with linear RoPE scaling or a "
        "GPT-OSS with another YaRN gives a provider of another model, without a word. Mistral with YaRN is a TypeError."
    ),
    changes=[
        "RoPE scaling of the types linear, llama3 and yarn, with YaRN's attention_factor, and partial_rotary_factor reach "
        "the provider in every family of GPTModelProvider with one RoPE.",
        "Sliding windows with and without a layer pattern reach the provider (Qwen2, Qwen3, Qwen3-MoE, GPT-OSS).",
    ],
    unchanged=["Providers of the published models."],
    tested=["Logits of Megatron-LM and transformers on tiny models with peaked attention, on the CPU, within 1e-4."],
    tests={
        "tests/unit/bridge/test_rope_scaling.py": "models/test_rope_scaling.py",
        "tests/unit/bridge/test_gemma3_layers.py": "models/test_gemma3_layers.py",
    },
    upstream_tests=[
        File(
            f"tests/unit_tests/models/{file}",
            [
                edit
                for test in tests
                for function in ("check_windows", "carry_over")
                for edit in replace_in_test(test, f"{ROPE_SCALING}.{function}", releases=">=0.7")
            ],
        )
        for file, tests in MOCKS.items()
    ],
    limit=500,
    limit_reason="One module has both, and its test compares each scaling with what transformers computes.",
    stands_on=["release-checkpoints"],
)
