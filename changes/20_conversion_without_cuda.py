# SPDX-License-Identifier: Apache-2.0
"""Conversion without CUDA: import and export on a host with no GPU, no Transformer Engine, no Triton driver, no Apex."""

import libcst as cst
import libcst.matchers as m

from fork.change import Change, insert_before_heading
from fork.edits import (
    File,
    Node,
    add_import,
    assign,
    call,
    decorate,
    expression,
    ifs,
    imports,
    insert_after,
    insert_before,
    insert_first,
    pass_argument,
    replace,
    wrap,
)


ACCELERATOR = add_import("from megatron.bridge.utils import accelerator")
HOST_SETTINGS = add_import("from megatron.bridge.utils import host_settings")


CALL_SET_DEVICE = m.Call(
    func=m.Attribute(value=m.Attribute(value=m.Name("torch"), attr=m.Name("cuda")), attr=m.Name("set_device"))
)

ALL_TRANSFORMER_ENGINE_CLASSES = m.Call(
    func=m.Name("all"),
    args=[m.Arg(value=m.Tuple(elements=[m.Element(value=m.Name("HAVE_TE_COL_LINEAR")), m.ZeroOrMore()]))],
)


def raising(text: str) -> Node:
    """A raise statement whose message holds `text`."""

    def matches(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.Raise) and text in cst.Module([]).code_for_node(node)

    return Node(f"raise of {text!r}", matches, (cst.Raise,), text)


# Before 0.6 the class of an adapter is made from Transformer Engine's Linear, and modules are compared with it.
WITHOUT_TE_LINEAR = [
    add_import("from types import SimpleNamespace", releases="<0.6"),
    wrap(
        "",
        imports("transformer_engine.pytorch"),
        "try:\n    {}\nexcept ImportError:\n    te = SimpleNamespace(Linear=nn.Module)",
        releases="<0.6",
    ),
]

PROVIDER = [
    ACCELERATOR,
    HOST_SETTINGS,
    *(
        edit
        for function in (
            "ModelProviderMixin.provide_distributed_model",
            "ModelProviderMixin.initialize_model_parallel",
        )
        for edit in (
            wrap(function, m.Expr(value=CALL_SET_DEVICE), "if accelerator.is_available():\n    {}"),
            replace(function, expression('"nccl"'), "accelerator.backend()"),
        )
    ),
    replace(
        "ModelProviderMixin.initialize_model_parallel",
        expression("model_parallel_cuda_manual_seed"),
        "host_settings.seed",
    ),
    add_import("from megatron.bridge.utils import host_modules"),
    decorate("_create_model", "host_modules.building_on_this_host()"),
    insert_first("get_model", "use_cpu_initialization = use_cpu_initialization or not accelerator.is_available()"),
]

LAYER_SPEC = [
    HOST_SETTINGS,
    add_import("from megatron.core.extensions.transformer_engine import HAVE_TE"),
    insert_first("default_layer_spec", "if not HAVE_TE:\n    return host_settings.local_layer_spec(config)"),
    *(
        pass_argument("mtp_block_spec", call(function), "use_transformer_engine=HAVE_TE", releases=releases)
        # Before 0.5 the former is not called there: default_layer_spec is.
        for function, releases in {"get_gpt_decoder_layer_specs": ">=0.5", "get_gpt_mtp_block_spec": ""}.items()
    ),
]

LOADING = [
    ACCELERATOR,
    HOST_SETTINGS,
    *(
        insert_first(function, "use_cpu_init = use_cpu_init or not accelerator.is_available()")
        for function in ("load_megatron_model", "build_and_load_model")
    ),
    # What holds only on this host must not reach run_config.yaml, which a host with Transformer Engine reads.
    pass_argument("save_megatron_model", call("ConfigContainer"), "model=host_settings.as_recorded(model_config)"),
]

CHECKPOINTING = [
    ACCELERATOR,
    add_import("from megatron.bridge.training import in_process_save, transformer_engine_layout"),
    replace(
        "get_rng_state",
        expression("torch.cuda.get_rng_state()"),
        "torch.cuda.get_rng_state() if accelerator.is_available() else None",
    ),
    pass_argument("read_metadata", call("torch.tensor"), "device=accelerator.device()"),
    insert_before(
        "save_checkpoint",
        ifs('ckpt_cfg.ckpt_assume_constant_structure and ckpt_cfg.ckpt_format == "torch_dist"'),
        "save_strategy = in_process_save.for_this_host(save_strategy)",
    ),
    insert_before(
        "save_checkpoint",
        call("dist_checkpointing.save"),
        "state_dict = transformer_engine_layout.with_transformer_engine_keys(state_dict)",
    ),
    insert_after(
        "_load_model_weights_from_checkpoint",
        assign("sharded_state_dict"),
        "sharded_state_dict = transformer_engine_layout.match_checkpoint(sharded_state_dict, checkpoint_path)",
    ),
]

GUIDE = """\
### Hosts without a GPU

Import and export need no GPU, no Transformer Engine and no Triton driver. Where they are missing, process groups start on
Gloo and the model is built from Megatron Core's own layers; the checkpoint has the keys that a model with Transformer
Engine asks for. Families whose layers Megatron Core has for Transformer Engine alone are refused with one line.

"""


change = Change(
    name="conversion-without-cuda",
    message="""\
fix(model): convert checkpoints on hosts without CUDA

import_ckpt, export_ckpt, export_adapter_ckpt, to_megatron_model, save_megatron_model and load_megatron_model run
where there is no GPU, no Transformer Engine, no Triton driver and no Apex. Process groups start on gloo, models are
built on the CPU from Megatron Core's own layers with the fusions off that need Transformer Engine, and checkpoints
are written in-process by PyTorch's file system writer, so that no script needs a __main__ guard. What holds only on
the converting host stays out of run_config.yaml, and the checkpoint has the keys that a model with Transformer
Engine asks for.

An architecture without a bridge is refused with one line that says what was found and what to do, in place of thirty
lines with a template of a bridge. Nothing else changes on hosts with CUDA or ROCm and Transformer Engine.""",
    why=(
        "Conversion moves and reshapes weights, which needs no accelerator, yet Bridge starts NCCL, reads CUDA's random "
        "state, builds Transformer Engine's layers and writes through a process that it spawns."
    ),
    edits=[
        File(
            "peft/lora_layers.py",
            [
                insert_before("", imports("math"), "from __future__ import annotations\n"),
                wrap(
                    "",
                    imports("transformer_engine.pytorch"),
                    "try:\n    {}\nexcept ImportError:\n    te = None",
                    releases=">=0.6",
                ),
                *WITHOUT_TE_LINEAR,
            ],
        ),
        File("peft/lora.py", WITHOUT_TE_LINEAR),
        File(
            "peft/utils.py",
            [
                # Megatron Core has names for Transformer Engine's classes where it has none of them.
                add_import("from megatron.core.extensions.transformer_engine import HAVE_TE as MCORE_HAVE_TE"),
                wrap("", ALL_TRANSFORMER_ENGINE_CLASSES, "MCORE_HAVE_TE and {}"),
            ],
        ),
        File("models/model_provider.py", PROVIDER),
        File(
            "models/transformer_config.py",
            [
                HOST_SETTINGS,
                *(
                    insert_first(f"{config}.finalize", "host_settings.adapt(self)")
                    for config in ("TransformerConfig", "MLATransformerConfig", "HeterogeneousTransformerConfig")
                ),
            ],
        ),
        File("models/gpt_provider.py", LAYER_SPEC),
        File(
            "models/conversion/param_mapping.py",
            [
                replace(
                    "ReplicatedMapping.hf_to_megatron",
                    expression("target_device.index != torch.cuda.current_device()"),
                    "torch.cuda.is_available() and target_device.index != torch.cuda.current_device()",
                )
            ],
        ),
        File(
            "models/conversion/mapping_registry.py",
            [
                add_import("from megatron.bridge.models.conversion.local_experts import local_expert_mappings"),
                insert_before(
                    "MegatronMappingRegistry.__init__",
                    call("self._add_separate_layernorm_mappings"),
                    "self.mappings.extend(local_expert_mappings(self.mappings))",
                ),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                ACCELERATOR,
                add_import("from megatron.bridge.utils import host_modules"),
                # From 0.7 on it starts a gloo group itself.
                decorate("AutoBridge.import_ckpt", "accelerator.with_process_group", releases="<0.7"),
                decorate("AutoBridge.to_megatron_model", "host_modules.explain_missing"),
                decorate("AutoBridge.load_megatron_model", "host_modules.explain_missing"),
                # One line each: what was found, what was expected, what to do.
                replace(
                    "AutoBridge._validate_config",
                    raising("Model architecture not supported by AutoBridge"),
                    """raise ValueError(
    f"Model architecture not supported by AutoBridge: {path} has {architectures}, "
    f"expected one that ends in {SUPPORTED_HF_ARCHITECTURES_DISPLAY}"
)""",
                ),
                replace(
                    "AutoBridge._validate_config",
                    raising("is not yet supported"),
                    """raise ValueError(
    f"{path} has the architecture {architecture}, which is not yet supported: "
    "Megatron Bridge has no bridge for it, "
    f"AutoBridge.list_supported_models() names the {len(supported_models)} that it has"
) from None""",
                ),
                wrap(
                    "AutoBridge.export_ckpt",
                    call("temporary_distributed_context"),
                    "nullcontext() if dist.is_initialized() else {}",
                    releases="<0.7.0",
                ),
            ],
        ),
        File("training/model_load_save.py", LOADING),
        File("training/checkpointing.py", CHECKPOINTING),
    ],
    modules=[
        "models/conversion/local_experts.py",
        "training/in_process_save.py",
        "training/transformer_engine_layout.py",
        "utils/accelerator.py",
        "utils/host_modules.py",
        "utils/host_settings.py",
    ],
    status="asked for in issue 3295; pull request 3853 did part of it and was closed",
    changes=[
        "`import_ckpt`, `export_ckpt`, `to_megatron_model`, `load_megatron_model` and `save_megatron_model` run on a host "
        "without CUDA, Transformer Engine, Triton and Apex.",
        "Checkpoints are written within the process there, so that a script needs no `__main__` guard.",
        "`AutoBridge` refuses an architecture that it has no bridge for with one line, which names "
        "`list_supported_models()`, in place of the list and a template of a bridge.",
        "Nothing else changes where CUDA or ROCm and Transformer Engine are.",
    ],
    tested=[
        "On a host without GPU and Transformer Engine, 12 families go from Hugging Face to Megatron and back bit for bit.",
        "Checkpoints of 19 models (Llama 2 to 3.2, Mistral, Qwen2, Qwen3, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3 and GLM-4.5 "
        "with and without multi-token prediction, GLM-4 MoE Lite, Gemma, Nemotron, GPT-OSS, HY-V3, OLMoE) that were "
        "written without Transformer Engine load strictly into models of Transformer Engine 2.20.2's own modules: no key "
        "is missing, every extra state is there, and every tensor is bit for bit what an import into that model gives. "
        "What these models save is exported without Transformer Engine, bit for bit.",
        "These modules were made by Transformer Engine's Python code without its compiled part, on a CPU and one rank. "
        "What they compute, FP8, and several ranks with Transformer Engine have not been tried; that needs GPUs.",
        "The test in this pull request does the same over stand-ins that hold parameters only, so that it needs neither.",
    ],
    notes=[
        "The tests of this change skip themselves where a GPU or Transformer Engine is found, as on the runners of the "
        "CI: a job with `CUDA_VISIBLE_DEVICES=` and without Transformer Engine would run them.",
    ],
    issues=[3295],
    stands_on=["release-checkpoints"],
    tests={
        "tests/unit/bridge/test_conversion_without_cuda.py": "models/test_conversion_without_cuda.py",
        "tests/unit/bridge/transformer_engine_stand_in.py": "models/transformer_engine_stand_in.py",
    },
    docs=[insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE)],
)
