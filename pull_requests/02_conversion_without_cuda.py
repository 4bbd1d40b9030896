# SPDX-License-Identifier: Apache-2.0
"""Conversion without CUDA: what the pull request has beside the change."""

from fork.pull_request import PullRequest, insert_before_heading


GUIDE = """\
### Hosts without a GPU

Import and export need no GPU, no Transformer Engine and no Triton driver. Where they are missing, process groups start on
Gloo and the model is built from Megatron Core's own layers; the checkpoint has the keys that a model with Transformer
Engine asks for. Families whose layers Megatron Core has for Transformer Engine alone are refused with one line.

"""

pull_request = PullRequest(
    change="conversion-without-cuda",
    changelog=[
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
        "bridge/test_conversion_without_cuda.py": "models/test_conversion_without_cuda.py",
        "bridge/transformer_engine_stand_in.py": "models/transformer_engine_stand_in.py",
    },
    docs=[insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE)],
)
