# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of models without Transformer Engine have the keys that a model with it loads."""

from fork.change import Change
from fork.edits import File, add_import, assign, call, insert_after, insert_before


change = Change(
    name="transformer-engine-keys",
    message="""\
fix(ckpt): write Transformer Engine's keys without Transformer Engine

Transformer Engine keeps norms in projections, and has an extra state in every
module.

Write these keys, too, when Bridge converts without Transformer Engine, so
that a host with it trains from the checkpoint. The other way round, export a
checkpoint that has only these keys.
""",
    why="A checkpoint is converted where there is no Transformer Engine, and trained where there is.",
    edits=[
        File(
            "models/conversion/mapping_registry.py",
            [
                add_import("from megatron.bridge.host.layout import local_expert_mappings"),
                insert_before(
                    "MegatronMappingRegistry.__init__",
                    call("self._add_separate_layernorm_mappings"),
                    "self.mappings.extend(local_expert_mappings(self.mappings))",
                ),
            ],
        ),
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.host.layout import match_checkpoint, with_transformer_engine_keys"),
                insert_before(
                    "save_checkpoint",
                    call("dist_checkpointing.save"),
                    "state_dict = with_transformer_engine_keys(state_dict)",
                ),
                insert_after(
                    "_load_model_weights_from_checkpoint",
                    assign("sharded_state_dict"),
                    "sharded_state_dict = match_checkpoint(sharded_state_dict, checkpoint_path)",
                ),
            ],
        ),
    ],
    modules=["host/layout.py"],
    issues=[3295],
    stands_on=["accelerator", "metadata"],
    problem=(
        "A mixture-of-experts or latent attention model that is converted without Transformer Engine doesn't load where "
        "Transformer Engine is: the checkpoint lacks norms by their names there, such as "
        "`self_attention.linear_q_up_proj.layer_norm_weight`, and every `_extra_state`. Experts that a bridge maps by "
        "Transformer Engine's names only are not converted at all."
    ),
    changes=[
        "Checkpoints that are written without Transformer Engine have the keys that a model with it loads.",
        "Checkpoints with these keys only can be loaded and exported without Transformer Engine.",
    ],
    unchanged=[
        "Hosts with Transformer Engine.",
        "The keys of Megatron Core's own layers, which stay beside the new ones.",
    ],
    tested=[
        "On a host without GPU and Transformer Engine, 12 families go from Hugging Face to Megatron and back bit for bit.",
        "Checkpoints of 19 models (Llama 2 to 3.2, Mistral, Qwen2, Qwen3, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3 and GLM-4.5 "
        "with and without multi-token prediction, GLM-4 MoE Lite, Gemma, Nemotron, GPT-OSS, HY-V3, OLMoE) that were "
        "written without Transformer Engine load strictly into models of Transformer Engine 2.20.2's own modules: no key "
        "is missing, every extra state is there, and every tensor is bit for bit what an import into that model gives. "
        "What these models save is exported without Transformer Engine, bit for bit.",
        "These modules were made by Transformer Engine's Python code without its compiled part, on a CPU and one rank.",
    ],
    later=[
        "What Transformer Engine computes with these weights, FP8, and several ranks with Transformer Engine have not been "
        "tried; that needs GPUs."
    ],
    tests={"tests/unit/bridge/host/test_transformer_engine_keys.py": "host/"},
)
