# SPDX-License-Identifier: Apache-2.0
"""The classes that wrap a model of transformers."""

from megatron.bridge.models import hf_pretrained


WRAPPERS: tuple[type, ...] = tuple(getattr(hf_pretrained, name) for name in hf_pretrained.__all__)
