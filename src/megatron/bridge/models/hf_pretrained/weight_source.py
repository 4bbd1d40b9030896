# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a Hugging Face model are: in safetensors files, or in files of `torch.save`."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.models.conversion import torch_files
from megatron.bridge.models.conversion.hf_checkpoint import is_finite, warn_of_non_finite
from megatron.bridge.models.conversion.hf_files import read_json, weight_names
from megatron.bridge.models.conversion.streaming.safetensors_files import save_index, save_like
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from megatron.bridge.utils.hub import download


def weight_source(source: SafeTensorsStateSource, options: Mapping[str, Any]) -> SafeTensorsStateSource:
    """Return a source of the same weights, which may be in files of `torch.save`, too.

    Args:
        source: Weights in safetensors files, by a folder or a name on the hub.
        options: What the model is loaded with: "revision", "token", and "cache_dir" say what the hub is asked for.
    """
    return source if type(source) is not SafeTensorsStateSource else WeightSource(source.model_name_or_path, options)


class WeightSource(SafeTensorsStateSource):
    """Weights in safetensors files, or in `pytorch_model.bin` or several such files. An export writes safetensors.

    Args:
        model: The folder, or the name on the hub. The model is downloaded when a weight or a name is first needed.
        options: As for `weight_source`.
    """

    def __init__(self, model: str | Path, options: Mapping[str, Any]) -> None:
        super().__init__(model)
        self._options = {name: options.get(name) for name in ("revision", "token", "cache_dir")}

    @property
    def path(self) -> Path:
        """The folder of the weights."""
        if self._resolved_path_cache is None:
            folder = Path(self.model_name_or_path)
            self._resolved_path_cache = folder if folder.is_dir() else download(str(folder), **self._options)
        return self._resolved_path_cache

    @cached_property
    def _of_torch(self) -> bool:
        return weight_names(self.path)[0].endswith(torch_files.SUFFIX)

    @property
    def key_to_filename_map(self) -> dict[str, str]:
        """The file of each tensor."""
        if not self._of_torch:
            return super().key_to_filename_map
        if self._key_to_filename_map_cache is None:
            single, index = (self.path / name for name in weight_names(self.path))
            self._key_to_filename_map_cache = (
                dict(read_json(index, "")["weight_map"])
                if index.is_file()
                else dict.fromkeys(torch_files.read_torch_file(single), single.name)
            )
        return self._key_to_filename_map_cache

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, torch.Tensor]:
        """Return tensors by name. Files of `torch.save` are mapped into memory."""
        if not self._of_torch:
            return super().load_tensors(keys_to_load)
        files = self.key_to_filename_map
        loaded = {name: torch_files.load(self.path / files[name])[name] for name in keys_to_load}
        warn_of_non_finite(name for name, tensor in loaded.items() if not is_finite(tensor))
        return loaded

    def save_generator(
        self,
        generator: Iterable[tuple[str, torch.Tensor]],
        output_path: str | Path,
        strict: bool = True,
        *arguments: Any,
        ignored_source_key_prefixes: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        """Save tensors as safetensors, divided as the files of this source. Rank 0 writes; all ranks call it."""
        if not self._of_torch:
            if ignored_source_key_prefixes is not None:
                options["ignored_source_key_prefixes"] = ignored_source_key_prefixes
            return super().save_generator(generator, output_path, strict, *arguments, **options)
        tensors = dict(generator)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        ignored = tuple(ignored_source_key_prefixes or ())
        files = {
            name: f"{Path(file).stem.replace('pytorch_model', 'model', 1)}.safetensors"
            for name, file in self.key_to_filename_map.items()
            if not name.startswith(ignored) and (name in tensors or not self._is_alias(name, tensors))
        }
        save_like(self.path, files, tensors, output_path, strict)
        written = {name: file for name, file in files.items() if name in tensors}
        if len(set(written.values())) > 1:
            save_index({"total_size": sum(tensors[name].nbytes for name in written)}, written, output_path, indent=2)

    def _is_alias(self, name: str, others: Iterable[str]) -> bool:
        """Return whether a tensor is the same as another one, as a tied head is; safetensors have one of them."""
        file = self.key_to_filename_map[name]
        stored = torch_files.read_torch_file(self.path / file)
        own = stored[name]
        return own.start >= 0 and any(
            self.key_to_filename_map.get(each) == file and stored[each] == own for each in others
        )
