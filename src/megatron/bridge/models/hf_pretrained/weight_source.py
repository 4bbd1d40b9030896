# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a Hugging Face model are: in safetensors files, or in files of `torch.save`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.models.conversion import torch_files
from megatron.bridge.models.conversion.hf_checkpoint import is_finite, warn_of_non_finite
from megatron.bridge.models.conversion.hf_files import read_json, weight_names
from megatron.bridge.models.conversion.streaming.safetensors_files import save_index, save_like
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource


def weight_source(model: str | Path) -> SafeTensorsStateSource:
    """Return the weights of a model.

    Args:
        model: The model's folder, or its name on the hub.
    """
    folder = Path(model)
    is_torch = folder.is_dir() and weight_names(folder)[0].endswith(torch_files.SUFFIX)
    return TorchStateSource(model) if is_torch else SafeTensorsStateSource(model)


class TorchStateSource(SafeTensorsStateSource):
    """Weights in `pytorch_model.bin`, or in several such files with an index. An export writes safetensors."""

    @property
    def key_to_filename_map(self) -> dict[str, str]:
        """The file of each tensor."""
        if self._key_to_filename_map_cache is None:
            single, index = (self.path / name for name in weight_names(self.path))
            self._key_to_filename_map_cache = (
                dict(read_json(index, "")["weight_map"])
                if index.is_file()
                else dict.fromkeys(torch_files.read_torch_file(single), single.name)
            )
        return self._key_to_filename_map_cache

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, torch.Tensor]:
        """Return tensors by name; their files are mapped into memory."""
        files = self.key_to_filename_map
        loaded = {name: torch_files.load(self.path / files[name])[name] for name in keys_to_load}
        warn_of_non_finite(name for name, tensor in loaded.items() if not is_finite(tensor))
        return loaded

    def save_generator(
        self,
        generator: Iterable[tuple[str, torch.Tensor]],
        output_path: str | Path,
        strict: bool = True,
        *_: Any,
        ignored_source_key_prefixes: Iterable[str] | None = None,
        **__: Any,
    ) -> None:
        """Save tensors as safetensors, divided as the files of this source. Rank 0 writes; all ranks call it."""
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
