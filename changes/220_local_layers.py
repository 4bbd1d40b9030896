# SPDX-License-Identifier: Apache-2.0
"""Models are built from Megatron Core's own layers where there is no Transformer Engine."""

from fork.change import Change
from fork.edits import File, add_import, call, insert_first, pass_argument, replace_in_test


# They say what a host with Transformer Engine and an accelerator does, and run without them, too.
WITH_TRANSFORMER_ENGINE = (
    "test_default_layer_spec_with_restore_modelopt_state",
    "test_default_layer_spec_with_te_full_layer_spec",
    "test_default_layer_spec_default_case",
    "test_mtp_block_spec_uses_callable_spec_directly_when_layer_specs_nonempty",
    "test_mtp_block_spec_re_derives_last_decoder_spec_when_layer_specs_empty",
    "test_mtp_block_spec_passes_vp_stage_to_callable_spec",
)
WITHOUT_A_HOST = (
    "TestTransformerConfigFinalize.test_sequence_parallel_preserved_when_tp_gt1",
    "TestTransformerConfigFinalize.test_hybridep_finalization_enables_uneven_dispatch_padding",
    "TestMLATransformerConfigFinalize.test_hybridep_finalization_enables_uneven_dispatch_padding",
    "TestHeterogeneousTransformerConfigFinalize.test_sequence_parallel_preserved_when_tp_gt1",
    "TestHeterogeneousTransformerConfigFinalize.test_hybridep_finalization_enables_uneven_dispatch_padding",
)

change = Change(
    name="local-layers",
    message="""\
fix(model): build from Megatron Core's layers without Transformer Engine

Providers ask for Transformer Engine's layers and for fusions that only it or
Apex has, and Megatron Core refuses to build such a model without them.

Replace the settings that the host doesn't support while it converts the
model. `run_config.yaml` records the original ones.
""",
    why="A model's weights can be converted without the layers and fusions that it trains with.",
    edits=[
        File(
            "models/transformer_config.py",
            [
                add_import("from megatron.bridge.host.settings import adapt_to_host"),
                *(
                    insert_first(f"{config}.finalize", "adapt_to_host(self)")
                    for config in ("TransformerConfig", "MLATransformerConfig", "HeterogeneousTransformerConfig")
                ),
            ],
        ),
        File(
            "models/gpt_provider.py",
            [
                add_import("from megatron.bridge.host.settings import local_layer_spec"),
                add_import("from megatron.core.extensions.transformer_engine import HAVE_TE"),
                insert_first("default_layer_spec", "if not HAVE_TE:\n    return local_layer_spec(config)"),
                *(
                    pass_argument(
                        "mtp_block_spec", call(function), "use_transformer_engine=HAVE_TE", releases=releases
                    )
                    # Before 0.5 the former is not called there: default_layer_spec is.
                    for function, releases in {
                        "get_gpt_decoder_layer_specs": ">=0.5",
                        "get_gpt_mtp_block_spec": "",
                    }.items()
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                add_import("from megatron.bridge.host.settings import as_recorded"),
                # A host with Transformer Engine reads run_config.yaml.
                pass_argument("save_megatron_model", call("ConfigContainer"), "model=as_recorded(model_config)"),
            ],
        ),
    ],
    modules=["host/settings.py"],
    issues=[3295],
    stands_on=["accelerator"],
    problem=(
        "Without Transformer Engine or Apex, `AutoBridge.to_megatron_model()` stops in Megatron Core's validation: Llama's "
        "bridge, for example, sets `apply_rope_fusion` and `persist_layer_norm`. The layer spec is Transformer Engine's "
        "in any case. None of this changes a weight."
    ),
    changes=[
        "Without Transformer Engine, models are built from Megatron Core's own layers, with unsupported fusions off.",
        "`run_config.yaml` records the settings as a host with Transformer Engine has them.",
    ],
    unchanged=["Hosts with an accelerator and Transformer Engine."],
    tested=["Unit tests on a CPU host without Transformer Engine, which skip themselves elsewhere."],
    tests={"tests/unit/bridge/host/test_local_layers.py": "host/"},
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_gpt_provider.py",
            [
                edit
                for test in WITH_TRANSFORMER_ENGINE
                for edit in replace_in_test(
                    f"TestGPTModelProvider.{test}",
                    "megatron.bridge.models.gpt_provider.HAVE_TE",
                    "True",
                    releases=">=0.7",
                )
            ],
        ),
        File(
            "tests/unit_tests/models/test_transformer_config.py",
            [
                edit
                for test in WITHOUT_A_HOST
                for edit in replace_in_test(
                    test, "megatron.bridge.models.transformer_config.adapt_to_host", releases=">=0.7"
                )
            ],
        ),
    ],
)
