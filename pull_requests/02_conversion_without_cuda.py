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
        "Megatron Core's own Transformer Engine wrappers, over stand-ins that hold parameters only, load what was written "
        "without them and write it back. Transformer Engine itself has not been tried.",
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
