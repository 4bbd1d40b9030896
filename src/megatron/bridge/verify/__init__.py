# SPDX-License-Identifier: Apache-2.0
"""Proves a checkpoint: the logits of Megatron-LM, started as a person would start it, beside those of transformers.

`proof.verify` is the function to call. It starts processes (`process.py`, `__main__.py`), which build Megatron Core's
models (`megatron_models.py`, `without_cuda.py`) and make twins (`twin.py`).
"""

__all__: list[str] = []
