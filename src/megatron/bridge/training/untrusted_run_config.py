# SPDX-License-Identifier: Apache-2.0
"""Instantiate a `run_config.yaml` without running code that somebody may have put into it.

The file names classes and functions, and `instantiate` calls what a `_target_` names.
"""

import dataclasses
import enum
import os
import pydoc
import re
import sys
import types
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron.bridge.training.untrusted_checkpoint import TRUST, is_trusted


def vet_run_config(run_config: Any, section: str, path: str | os.PathLike) -> None:
    """Refuse a `run_config.yaml` that names what no model or tokenizer of Megatron needs.

    `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` lifts this. A model provider outside of Megatron needs it.

    Args:
        run_config: The content of the file, in dicts and lists.
        section: The section that is about to be instantiated. The others are not checked.
        path: The file, for the error.

    Raises:
        ValueError: A `_target_` could run code, or is computed by an interpolation.
    """
    if isinstance(run_config, dict) and not is_trusted():
        _vet_node(run_config.get(section), path)


def _vet_node(node: Any, path: str | os.PathLike) -> None:
    if isinstance(node, dict):
        refused = node.get("_target_") if "_target_" in node and not _is_harmless(node) else None
        if "_builder_" in node and not _is_builder(_locate(node["_builder_"])):
            refused = node["_builder_"]
        # `load_tokenizer` decides about a tokenizer's, since it knows what the caller trusts.
        if node.get("trust_remote_code") and not str(node.get("_target_")).endswith(".TokenizerConfig"):
            refused = "trust_remote_code"
        children = [value for key, value in node.items() if key != "_target_"]
    else:
        # OmegaConf would evaluate it, possibly to a node with another `_target_`.
        refused = node if isinstance(node, str) and "${" in node else None
        children = node if isinstance(node, list) else []
    if refused is not None:
        raise ValueError(
            f"{path}: it names {str(refused)[:200]!r}, which no model's config needs and which could run code. "
            f"Don't load it, or set {TRUST}=1 if you trust its source."
        )
    for child in children:
        _vet_node(child, path)


# Functions of tensors, such as activations and initializations.
_OF_TENSORS = ("torch.nn.functional", "torch._C._nn", "torch.nn.init")
_DEFINED_IN = ("megatron.core.", "megatron.bridge.", "megatron.training.")
# Functions of which a config may bind arguments. Those of other functions are Megatron's own.
_BOUND = re.compile(r"\w+_specs?|finalize_model_grads\w*|multimodule_no_sync")
_QUANTIZATION = "megatron.core.quantization.quant_config"
_HF_CONFIGS = ("PretrainedConfig", "PreTrainedConfig", "GenerationConfig")


def _is_harmless(node: dict[str, Any]) -> bool:
    """Return whether a node with `_target_` makes something that a config of Megatron has."""
    found = _locate(node["_target_"])
    home = str(getattr(found, "__module__", ""))
    is_own = home.startswith(_DEFINED_IN)
    is_function = is_own and isinstance(found, types.FunctionType)
    is_module = isinstance(found, type) and issubclass(found, torch.nn.Module)
    is_data = is_own and isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
    of_tensors = home in _OF_TENSORS and callable(found)
    if not node.get("_call_", True):
        # Megatron calls it later, with arguments of its own. Some norms of Megatron Core are no modules.
        is_class = is_module or is_data or isinstance(found, type) and home.startswith("megatron.core.")
        is_named = is_function or is_class or of_tensors or isinstance(found, torch.dtype)
        return is_named and node.keys() == {"_target_", "_call_"}
    if node.get("_partial_", False):
        return of_tensors or is_own and is_module or is_function and _BOUND.fullmatch(found.__name__) is not None
    if isinstance(found, type) and issubclass(found, ModuleSpec):
        # A pair of names would import any module, and a method would be called.
        module = node.get("module")
        return isinstance(module, dict) and isinstance(_locate(module.get("_target_")), type | types.FunctionType)
    if isinstance(found, types.MethodType) and found.__name__ == "from_dict":
        return _is_hf_config(found.__self__)
    return is_data or _is_hf_config(found) or isinstance(found, type) and home == _QUANTIZATION


def _is_hf_config(found: Any) -> bool:
    bases = found.__mro__ if isinstance(found, type) else ()
    return any(each.__module__.startswith("transformers.") and each.__name__ in _HF_CONFIGS for each in bases)


def _is_builder(found: Any) -> bool:
    bases = found.__mro__ if isinstance(found, type) else ()
    return any(each.__module__.startswith(_DEFINED_IN) and each.__name__ == "ModelBuilder" for each in bases)


def _locate(target: Any) -> Any:
    """Return what a `_target_` names, or None if it is refused without being imported."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target) or "__" in target:
        return None
    module, _, name = target.rpartition(".")
    if module == "torch":
        found = getattr(torch, name, None)
        return found if isinstance(found, torch.dtype) else None
    if target.startswith("transformers_modules."):
        return _hub_config(target)
    if module in _OF_TENSORS or target.startswith((*_DEFINED_IN, "torch.nn.modules.", "transformers.")):
        try:
            return pydoc.locate(target)
        except pydoc.ErrorDuringImport:
            return None
    return None


def _hub_config(target: str) -> Any:
    """Return `from_dict` of a config class of the hub that this process runs already, and let `instantiate` call it.

    The caller has trusted this code to read the Hugging Face model. Nothing is imported here.
    """
    path, _, method = target.rpartition(".")
    module, _, name = path.rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None)
    if method != "from_dict" or not _is_hf_config(found):
        return None
    try:
        from megatron.bridge.utils.instantiate_utils import target_allowlist
    except ImportError:  # before 0.6, nothing is refused there
        return found.from_dict
    target_allowlist.add_exact(target)
    return found.from_dict
