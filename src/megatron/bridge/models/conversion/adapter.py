# SPDX-License-Identifier: Apache-2.0
"""Merges a LoRA adapter of PEFT into the tensors of its base model while they are read, each by PEFT's own code."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron.bridge.models.conversion import torch_files
from megatron.bridge.models.conversion.hf_files import read_json, some
from megatron.bridge.models.conversion.quantized import FLOAT8
from megatron.bridge.models.conversion.safetensors_header import in_one_line, read_header
from megatron.bridge.models.conversion.stored_tensors import StoredTensors
from megatron.bridge.models.conversion.streaming.convert import Computed
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.models.conversion.wrapped import ADAPTER_CONFIG
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from megatron.bridge.release_checkpoint.proof import noted


_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(?:(?:A|B)\.weight|embedding_A|embedding_B|magnitude_vector(?:\.weight)?)")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|embed_in|embed_out|word_embeddings|wte|lm_head)\.weight$")
# Keys of LoraConfig whose values, whatever they are, let PEFT merge each layer on its own.
_MERGED = {
    *("peft_type", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision"),
    *("auto_mapping", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias"),
    *("fan_in_fan_out", "init_lora_weights", "runtime_config", "loftq_config", "eva_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# With any other initialization, making the adapter has changed the base.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")


def merge_adapter(hf_pretrained: Any, folder: str | os.PathLike) -> None:
    """Let a base model read its tensors as float32 with an adapter merged into them.

    Args:
        hf_pretrained: The base model. Its weights are in files, which don't change.
        folder: The folder of the adapter, as `save_pretrained` of PEFT writes it.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: This kind of adapter can't be merged, or it doesn't fit the base.
    """
    source, adapter = hf_pretrained.state.source, Adapter(Path(folder))
    if not isinstance(source, SafeTensorsStateSource):
        raise ValueError("the weights of an adapter's base must be in files: pass its folder, or its name on the hub")
    tied = getattr(hf_pretrained.config.get_text_config(), "tie_word_embeddings", False)
    adapter.check(hf_pretrained.model_name_or_path, StoredTensors(hf_pretrained.state), tied)
    if (proof := noted()) is not None:
        proof.adapter = os.path.abspath(folder)
    hf_pretrained.state.source = AdaptedSource(source, adapter)


class AdaptedSource(SafeTensorsStateSource):
    """The weights of a base model as float32, with an adapter merged into them."""

    def __init__(self, base: SafeTensorsStateSource, adapter: "Adapter") -> None:
        super().__init__(base.model_name_or_path)
        self._base, self._adapter = base, adapter
        self.merged = adapter.merged_piecewise

    @property
    def path(self) -> Path:  # noqa: D102
        return self._base.path

    @property
    def key_to_filename_map(self) -> dict[str, str]:  # noqa: D102
        return self._base.key_to_filename_map

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, torch.Tensor]:  # noqa: D102
        loaded = self._base.load_tensors(keys_to_load)
        return {name: self._adapter.merged(name, tensor) for name, tensor in loaded.items()}


class Adapter:
    """A LoRA adapter: low-rank updates of some layers, and whole tensors that take the place of the base's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _read_config(folder)
        self._layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self._replaced: dict[str, torch.Tensor] = {}
        for key, tensor in _read_weights(folder).items():
            name = key.removeprefix(_PREFIX)
            if name == key:
                raise ValueError(f"{folder} has {key!r}, expected names that begin with {_PREFIX}: save it with PEFT")
            if (found := _LORA.fullmatch(name)) is not None:
                self._layers[f"{found[1]}.weight"][name] = tensor
            else:
                self._replaced[name.replace(".base_layer.", ".")] = tensor

    def check(self, base: Any, stored: Mapping[str, torch.Tensor], tied: bool) -> None:
        """Raise ValueError if the adapter doesn't fit a base model. Merges nothing."""
        touched = {*self._layers, *self._replaced}
        if lacking := [name for name in touched if name not in stored]:
            raise ValueError(f"{self._folder} adapts {some(lacking)}, which {base} lacks: {self._remedy}")
        if quantized := [name for name, tensor in stored.items() if tensor.dtype in FLOAT8]:
            raise ValueError(
                f"{base} is quantized ({some(quantized)}), expected plain weights to merge {self._folder} into: "
                "import the unquantized model"
            )
        if tied and (shared := [name for name in touched if _EMBEDDINGS.search(name)]):
            raise ValueError(
                f"{self._folder} adapts {some(shared)}, which the embedding and the head of {base} share: merge it "
                "with merge_and_unload() of peft, and import what save_pretrained() writes"
            )
        shapes = [(name, tuple(tensor.shape)) for name, tensor in self._replaced.items()]
        for name, found in [*shapes, *((name, self._shape(name)) for name in self._layers)]:
            wanted = tuple(stored[name].shape)
            if found != wanted:
                what = f"{self._folder} adapts {name!r} in the shape {list(found)}, {base} has {list(wanted)}"
                raise ValueError(f"{what}: {self._remedy}")

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base in float32, merged if the adapter touches it."""
        # With an embedding that it adapts, PEFT saves the whole embedding, too.
        base = self._replaced.get(name, tensor)
        if not base.dtype.is_floating_point:
            return base
        return self._merge(name, base.to(torch.float32, copy=True)) if name in self._layers else base.float()

    def merged_piecewise(self, name: str, tensor: PiecewiseTensor) -> PiecewiseTensor:
        """Return the same as a tensor that is read, and merged, when its values are used."""
        if name in self._layers or name in self._replaced:
            compute = partial(self._compute, name, tensor)
            return PiecewiseTensor.of(Computed(compute, torch.float32), tensor.shape)
        return tensor.cast(torch.float32) if tensor.dtype.is_floating_point else tensor

    def _compute(self, name: str, tensor: PiecewiseTensor) -> PiecewiseTensor:
        return PiecewiseTensor.wrap(self.merged(name, tensor.materialize()))

    def _merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Merge one layer in place, as PEFT does: a model that has this layer alone, under its full name."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        path, state = name.removesuffix(".weight"), self._layers[name]
        with torch.device("meta"):
            is_embedding = any(".lora_embedding_" in key for key in state)
            layer: Any = torch.nn.Embedding(*weight.shape) if is_embedding else torch.nn.Linear(*weight.shape[::-1])
        layer.weight, layer.bias = torch.nn.Parameter(weight, requires_grad=False), None
        model = root = torch.nn.Module()
        *parents, last = path.split(".")
        for parent in parents:
            model.add_module(parent, torch.nn.Module())
            model = model.get_submodule(parent)
        model.add_module(last, layer)
        config = copy(self._config)
        config.target_modules, config.modules_to_save, config.bias = {path}, None, "none"
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        try:
            inject_adapter_in_model(config, root)
            set_peft_model_state_dict(root, dict(state))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self._folder} doesn't fit {name} ({in_one_line(error)}): {self._remedy}") from None
        merged: Any = root.get_submodule(path)
        merged.merge()
        return merged.get_base_layer().weight.detach()

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that has a low-rank update."""
        parts = {
            key.partition(".lora_")[2].removesuffix(".weight"): tensor for key, tensor in self._layers[name].items()
        }
        try:
            if "embedding_A" in parts:
                return parts["embedding_A"].shape[1], parts["embedding_B"].shape[0]
            return parts["B"].shape[0], parts["A"].shape[1]
        except (KeyError, IndexError):
            raise ValueError(
                f"{self._folder} has only {some(self._layers[name])} of {name}: download it again"
            ) from None

    @property
    def _remedy(self) -> str:
        base = self._config.base_model_name_or_path
        return f"pass the model that it was trained on{f', {base}' if base else ''}"


def _read_config(folder: Path) -> Any:
    content = read_json(folder / ADAPTER_CONFIG, "so it is not a PEFT adapter: pass the folder of one (--adapter)")
    kind = content.get("peft_type")
    if kind != "LORA":
        what = f"{folder} is an adapter of the type {kind}, expected LORA"
        raise ValueError(f"{what}: merge it with merge_and_unload() of peft, and import what save_pretrained() writes")
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    other = [key for key, value in content.items() if key not in _MERGED and value and value != usual.get(key)]
    if content.get("init_lora_weights", True) not in _INITIALIZATIONS:
        other.append("init_lora_weights")
    if other:
        said = ", ".join(f"{key}={json.dumps(content[key])[:80]}" for key in sorted(other))
        raise ValueError(
            f"{folder} was made with {said}, which is not merged here: merge it with merge_and_unload() of peft, and "
            "import what save_pretrained() writes"
        )
    return LoraConfig(
        **{key: value for key, value in content.items() if key in _MERGED & usual.keys() - {"peft_type"}}
    )


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no {_WEIGHTS[0]}: download the whole adapter")
    if path.suffix == torch_files.SUFFIX:
        torch_files.read_torch_file(path)
        return torch_files.load(path)
    read_header(path)
    return load_file(path)
