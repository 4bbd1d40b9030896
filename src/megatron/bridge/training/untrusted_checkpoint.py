# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint without running what somebody may have put into it.

PyTorch's distributed checkpoints force pickle in two places. `.metadata` is unpickled whole
(torch/distributed/checkpoint/filesystem.py, FileSystemReader.read_metadata), and every entry that is not a tensor,
Megatron-LM's common state among them, is loaded with `weights_only=False` (default_planner.py,
DefaultLoadPlanner.load_bytes; PyTorch 2.11). Both are what Megatron Core 0.19 loads with (load_common_state_dict,
TorchDistLoadShardedStrategy). Where `.metadata` is missing or can't be unpickled, PyTorch takes
the metadata of one rank, `__0.metadata` (state_dict_loader.py, _load_state_dict), and unpickles that.

`run_config.yaml` names classes and functions, too: `instantiate` calls what a `_target_` says.
"""

import dataclasses
import enum
import os
import pickle
import pydoc
import re
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.safe_globals import register_safe_globals
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.distributed.checkpoint.api import CheckpointException

from megatron.bridge_cli.safe_pickle import check_metadata


# PyTorch's own switches: the first overrules `weights_only=False` of a caller, the second is the user's to set.
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# FileSystemReader._get_metadata_path; some file systems don't tell capitals.
_METADATA = re.compile(r"(__.*)?\.metadata", re.DOTALL | re.IGNORECASE)


@contextmanager
def reading(folder: str | os.PathLike) -> Iterator[None]:
    """Let nothing that is loaded within run code.

    The metadata is vetted, and whatever PyTorch unpickles within, in this process, is restricted to PyTorch's own
    types and the classes that Megatron Core registers. `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` lifts the latter for a
    checkpoint that one trusts.

    Args:
        folder: Payload folder, a local path or a MultiStorageClient URL.

    Raises:
        ValueError: The checkpoint names a class that none needs, or its metadata or `common.pt` is damaged.
    """
    vet(folder)
    if _is_trusted():
        yield
        return
    register_safe_globals()
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    except (CheckpointException, Exception) as error:
        is_pickles = isinstance(error, (CheckpointException, pickle.UnpicklingError))
        refused = re.search(r"GLOBAL (\S+)|find_class: (\S+)", str(error)) if is_pickles else None
        if refused is None:
            if (damage := _damage(Path(folder, "common.pt"))) is not None:
                raise ValueError(damage) from error
            raise
        raise ValueError(
            f"{folder} names {refused[1] or refused[2]}, which is none of the classes of a checkpoint and could run "
            f"code: don't load it, or set {_TRUST}=1 if you trust its source"
        ) from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _damage(common_pt: Path) -> str | None:
    """Say why torch can't read a common state, which its own errors don't name; None where that is not to blame."""
    if not common_pt.is_file():
        return None
    try:
        torch.load(common_pt, weights_only=True, map_location="cpu")
    except OSError:
        # It says which file.
        return None
    except Exception as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{common_pt} is not what torch.save writes ({found}): get the checkpoint anew"
    return None


def _is_trusted() -> bool:
    return os.environ.get(_TRUST, "0") not in ("", "0")


def vet(folder: str | os.PathLike) -> None:
    """Refuse a payload with a `.metadata`, or that of a rank, which PyTorch must not unpickle.

    Args:
        folder: Payload folder, a local path or a MultiStorageClient URL. Nothing is asked of one without metadata.

    Raises:
        ValueError: The metadata names a class that no checkpoint needs, or is damaged.
    """
    if MultiStorageClientFeature.is_enabled() and str(folder).startswith("msc://"):
        remote = MultiStorageClientFeature.import_package().Path(str(folder))
        for path in _metadata(remote):
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(path.read_bytes())
                copy.flush()
                try:
                    check_metadata(copy.name)
                except ValueError as error:
                    raise ValueError(str(error).replace(copy.name, str(path))) from None
        return
    for path in _metadata(Path(folder)):
        seen = path.stat()
        # The time of the last change, which nobody sets: an archive sets that of the last modification.
        _vet_once(str(path.resolve()), seen.st_ino, seen.st_ctime_ns, seen.st_size)


def _metadata(folder: Path) -> list[Path]:
    """Return what PyTorch may take for the metadata: `.metadata`, and `__RANK.metadata`."""
    try:
        return [path for path in folder.iterdir() if _METADATA.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


@lru_cache(maxsize=8)
def _vet_once(path: str, inode: int, changed: int, size: int) -> None:
    """Vet a file once for all the times that a load reads it; that of a large training has some hundred MB."""
    check_metadata(path)


def vet_run_config(run_config: Any, section: str, path: str | os.PathLike) -> None:
    """Refuse a `run_config.yaml` that names what no model or tokenizer of Megatron needs.

    `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` lifts this for a checkpoint that one trusts, which a model provider outside of
    Megatron needs.

    Args:
        run_config: The content of the file, in dicts and lists.
        section: The section that is about to be instantiated; nothing is asked of the others.
        path: The file, for the error.

    Raises:
        ValueError: A `_target_` could run code, or is computed by an interpolation.
    """
    if isinstance(run_config, dict) and not _is_trusted():
        _vet_node(run_config.get(section), path)


def _vet_node(node: Any, path: str | os.PathLike) -> None:
    if isinstance(node, dict):
        refused = node.get("_target_") if "_target_" in node and not _is_harmless(node) else None
        if "_builder_" in node and not _is_builder(_locate(node["_builder_"])):
            refused = node["_builder_"]
        # A tokenizer's own is for `load_tokenizer` to weigh, which knows what the caller trusts.
        if node.get("trust_remote_code") and not str(node.get("_target_")).endswith(".TokenizerConfig"):
            refused = "trust_remote_code"
        children = [value for key, value in node.items() if key != "_target_"]
    else:
        # OmegaConf would compute what it says, a node with another `_target_` even.
        refused = node if isinstance(node, str) and "${" in node else None
        children = node if isinstance(node, list) else []
    if refused is not None:
        raise ValueError(
            f"{path} names {str(refused)[:200]!r}, which is none of the classes and functions of a model's config and "
            f"could run code: don't load it, or set {_TRUST}=1 if you trust its source"
        )
    for child in children:
        _vet_node(child, path)


# Functions of tensors, as activations and initializations.
_OF_TENSORS = ("torch.nn.functional", "torch._C._nn", "torch.nn.init")
_DEFINED_IN = ("megatron.core.", "megatron.bridge.", "megatron.training.")
# Of other functions in a config the arguments are Megatron's own; of these the config may bind some.
_BOUND = re.compile(r"\w+_specs?|finalize_model_grads\w*|multimodule_no_sync")
_QUANTIZATION = "megatron.core.quantization.quant_config"
_HF_CONFIGS = ("PretrainedConfig", "PreTrainedConfig", "GenerationConfig")


def _is_harmless(node: dict[str, Any]) -> bool:
    """Tell whether what a node with `_target_` makes is what a config of Megatron has, by the way it is made."""
    found = _locate(node["_target_"])
    home = str(getattr(found, "__module__", ""))
    is_own = home.startswith(_DEFINED_IN)
    is_function = is_own and isinstance(found, types.FunctionType)
    is_module = isinstance(found, type) and issubclass(found, torch.nn.Module)
    is_data = is_own and isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
    of_tensors = home in _OF_TENSORS and callable(found)
    if not node.get("_call_", True):
        # Named and not called: Megatron does that later, with arguments of its own. Norms of its core are no modules.
        is_class = is_module or is_data or isinstance(found, type) and home.startswith("megatron.core.")
        is_named = is_function or is_class or of_tensors or isinstance(found, torch.dtype)
        return is_named and node.keys() == {"_target_", "_call_"}
    if node.get("_partial_", False):
        return of_tensors or is_own and is_module or is_function and _BOUND.fullmatch(found.__name__) is not None
    if isinstance(found, type) and issubclass(found, ModuleSpec):
        # As a pair of names its module would be imported, whatever it is; as a method it would be called.
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
    """Return what a `_target_` names, None where that need not even be imported to refuse it."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target) or "__" in target:
        return None
    module, _, name = target.rpartition(".")
    if module == "torch":
        found = getattr(torch, name, None)
        return found if isinstance(found, torch.dtype) else None
    if module in _OF_TENSORS or target.startswith((*_DEFINED_IN, "torch.nn.modules.", "transformers.")):
        try:
            return pydoc.locate(target)
        except pydoc.ErrorDuringImport:
            return None
    return None
