# SPDX-License-Identifier: Apache-2.0
"""The weights of Megatron-LM's format before distributed checkpoints, `--ckpt-format torch`: a file for each rank.

Each rank saves its part of each layer, and counts its layers and experts from 0. `Ranks.weights` says which parts of
which files make each tensor of the whole model. The rules are those of megatron/training/checkpointing.py
(get_checkpoint_name), megatron/core/parallel_state.py, and megatron/core/transformer/ (core 0.12 to 0.19).
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint.pickles import UnreadablePickle
from megatron.bridge.release_checkpoint.rank_files import SavedFile, Stored
from megatron.bridge.release_checkpoint.state import plain_args


RANK_FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model(\d*)")
_LAYER = re.compile(r"(.*?\b(?:decoder|encoder)\.layers\.)(\d+)(\..+)")
_EXPERT = re.compile(r"(.*\.experts\.local_experts\.)(\d+)(\..+)")

# Where Transformer Engine's modules and Megatron Core's own name a parameter differently, here it has the second name.
_OWN_NAMES = (
    (re.compile(r"\.self_attention\.(?:linear_qkv|in_proj)\.layer_norm_"), ".input_layernorm."),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_"), ".pre_mlp_layernorm."),
    (re.compile(r"\.linear_(q|kv)_up_proj\.layer_norm_"), r".\1_layernorm."),
    (re.compile(r"\.mixer\.in_proj\.layer_norm_"), ".norm."),
    (re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"), r".experts.local_experts.\3.\1.\2"),
)

# How a tensor is split over tensor parallel ranks, by the module that it belongs to.
_ROWS = re.compile(
    r"(?:.*\.)?(?:word_embeddings\.weight|(?:output_layer|linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_up_proj|"
    r"linear_kv_up_proj|linear_fc1|eh_proj)\.(?:weight|bias)|softmax_offset)"
)
_COLUMNS = re.compile(r".*\.(?:linear_proj|linear_fc2)\.weight")
_WHOLE = re.compile(
    r"(?:.*\.)?(?:\w*norm\.(?:weight|bias)|(?:linear_proj|linear_fc2)\.bias|router\.(?:weight|bias|expert_bias)|"
    r"gate_weight|position_embeddings\.weight)"
)
_LATENT = re.compile(r".*\.linear_(q|kv)_down_proj\.weight")
_SPLITTING = {
    "--tensor-model-parallel-size": "tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "--num-layers-per-virtual-pipeline-stage": "num_layers_per_virtual_pipeline_stage",
    "--num-virtual-stages-per-pipeline-rank": "num_virtual_stages_per_pipeline_rank",
    "--decoder-first-pipeline-num-layers": "decoder_first_pipeline_num_layers",
    "--decoder-last-pipeline-num-layers": "decoder_last_pipeline_num_layers",
    "--pipeline-model-parallel-layout": "pipeline_model_parallel_layout",
    "--expert-model-parallel-size": "expert_model_parallel_size",
}
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class UnmergeableRanks(ValueError):
    """The files of the ranks make no model, or it is not known how they do."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the whole model.

    Attributes:
        parts: The parts, by their rank in the tensor parallel group.
        dimension: Along which they lie one behind the other.
        gated: Each part has rows of the gate in its first half and of the up projection in its second.
        copies: Pairs of a part and of a copy of it in another file.
    """

    parts: tuple[Stored, ...]
    dimension: int = 0
    gated: bool = False
    copies: tuple[tuple[Stored, Stored], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.dimension] *= len(self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> str:
        """The name of the dtype."""
        return self.parts[0].dtype


class Ranks:
    """The files of all ranks in a payload folder.

    Attributes:
        files: Each file by its ranks in the tensor, pipeline and expert parallel groups.
        sizes: The sizes of these groups.
        state: What the first file has beside the weights, without the optimizer.
        missing: Files that should be there.
    """

    def __init__(self, folder: Path) -> None:
        """Read all files without their values. Raises what `SavedFile` does."""
        found = [(path, match) for path in sorted(folder.iterdir()) if (match := _FOLDER.fullmatch(path.name))]
        self.missing = [f"{path.name}/{RANK_FILE}" for path, _ in found if not (path / RANK_FILE).is_file()]
        files = [(SavedFile(path / RANK_FILE), match) for path, match in found if (path / RANK_FILE).is_file()]
        if not files:
            raise UnreadablePickle(folder, f"no folder of a rank has a {RANK_FILE}")
        for file, _ in files:
            if not isinstance(file.state, dict):
                raise UnreadablePickle(file.path, f"it holds a {type(file.state).__name__}, expected a dict")
            if "optimizer" in file.state:
                # Nobody asks for more than whether there is one.
                file.state["optimizer"] = None
        self.state = {name: value for name, value in files[0][0].state.items() if not _CHUNK.fullmatch(str(name))}
        self._args = plain_args(self.state) or Namespace()
        said = [self._said(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline", "expert")]
        # A second number is the rank in the pipeline, unless there is none.
        places = (0, 2, 1) if said[2] > 1 == said[1] else (0, 1, 2)
        self.files = {}
        for file, match in files:
            numbers = [int(number or 0) for number in match.groups()]
            self.files[tuple(numbers[place] for place in places)] = file
        self.sizes = [max(size, 1 + max(ranks)) for size, *ranks in zip(said, *self.files, strict=True)]
        self._expert_tensor_size = self._said("expert_tensor_parallel_size", self.sizes[0])
        self.missing += sorted(set(self._absent()) - set(self.missing))

    def _said(self, name: str, default: int) -> int:
        value = getattr(self._args, name, None)
        return value if type(value) is int and 0 < value < 1 << 16 else default

    def _absent(self) -> Iterator[str]:
        """Name the files without which a part of the model is nowhere.

        The ranks of a data parallel group save the same dense weights. So not every pair of a tensor and an expert
        parallel rank has a file (`save_checkpoint` in megatron/training/checkpointing.py, core 0.19).
        """
        tensor, pipeline, expert = self.sizes
        for stage in range(pipeline):
            there = [ranks for ranks in self.files if ranks[1] == stage]
            dense = {ranks[0] for ranks in there}
            experts = {(ranks[0] % self._expert_tensor_size, ranks[2]) for ranks in there}
            wanted = [(rank, 0) for rank in range(tensor) if rank not in dense]
            for expert_rank in range(expert):
                ranks = range(min(tensor, self._expert_tensor_size))
                wanted += [(rank, expert_rank) for rank in ranks if (rank, expert_rank) not in experts]
            for rank, expert_rank in wanted:
                numbers = [f"{stage:03d}"] * (pipeline > 1) + [f"{expert_rank:03d}"] * (expert > 1)
                yield "_".join([f"mp_rank_{rank:02d}", *numbers]) + f"/{RANK_FILE}"

    @property
    def flags(self) -> list[str]:
        """The flags with which Megatron-LM builds a model of these parts."""
        words = []
        for flag, name in _SPLITTING.items():
            value = getattr(self._args, name, None)
            if value and (value != 1 or not flag.endswith("parallel-size")):
                words += [flag, str(value)]
        if self._expert_tensor_size != self.sizes[0]:
            words += ["--expert-tensor-parallel-size", str(self._expert_tensor_size)]
        # Names of parameters differ from those of Transformer Engine's modules.
        is_local = getattr(self._args, "transformer_impl", None) == "local"
        return [*words, "--transformer-impl", "local"] if is_local else words

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The tensors of the whole model, by the names of Megatron Core's own modules.

        Raises:
            UnmergeableRanks: The files don't fit together, or it is not known how a tensor is split.
            UnreadablePickle: A file is cut off.
        """
        iterations = {file.state.get("iteration") for file in self.files.values()}
        if len(iterations) > 1:
            raise UnmergeableRanks(f"the ranks are of the iterations {', '.join(sorted(map(str, iterations)))}")
        found: dict[str, dict[int, list[Stored]]] = {}
        for tensor_rank, name, stored in self._tensors():
            rank = tensor_rank % self._expert_tensor_size if _EXPERT.fullmatch(name) else tensor_rank
            found.setdefault(name, {}).setdefault(rank, []).append(stored)
        tied = not getattr(self._args, "untie_embeddings_and_output_weights", True)
        if tied and _EMBEDDING in found and _HEAD in found:
            # The last stage of a pipeline has a copy of a tied embedding under this name.
            for rank, copies in found.pop(_HEAD).items():
                found[_EMBEDDING].setdefault(rank, []).extend(copies)
        return {name: self._merge(name, parts, found) for name, parts in found.items()}

    def _merge(self, name: str, parts: dict[int, list[Stored]], found: dict[str, dict[int, list[Stored]]]) -> Weight:
        size = self._expert_tensor_size if _EXPERT.fullmatch(name) else self.sizes[0]
        each = [stored for rank in sorted(parts) for stored in parts[rank]]
        if len({(stored.shape, stored.dtype) for stored in each}) > 1:
            raise UnmergeableRanks(f"the ranks have {name} in different shapes or dtypes")
        dimension = self._dimension(name, each[0].shape) if size > 1 else None
        if dimension is None:
            return Weight((each[0],), copies=tuple((each[0], copy) for copy in each[1:]))
        if sorted(parts) != list(range(size)):
            raise UnmergeableRanks(f"of {size} tensor parallel ranks, only {sorted(parts)} have {name}")
        gated = False
        if match := re.fullmatch(r"(.*linear_fc)1\.(?:weight|bias)", name):
            # A gate doubles the rows of the first projection and not the columns of the second.
            second = next(iter(found[f"{match[1]}2.weight"].values()))[0]
            gated = each[0].shape[0] == 2 * second.shape[1]
        copies = tuple((parts[rank][0], copy) for rank in sorted(parts) for copy in parts[rank][1:])
        return Weight(tuple(parts[rank][0] for rank in range(size)), dimension, gated, copies)

    def _dimension(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Return along which dimension the ranks split a tensor, None if each has it whole."""
        if match := _LATENT.fullmatch(name):
            # Transformer Engine's module has it whole, Megatron Core's own splits it by rows.
            rows = self._said("q_lora_rank", 0) or None
            if match[1] == "kv":
                rows = self._said("kv_lora_rank", 512) + self._said("qk_pos_emb_head_dim", 64)
            return None if shape[0] == rows else 0
        for dimension, pattern in ((0, _ROWS), (1, _COLUMNS), (None, _WHOLE)):
            if pattern.fullmatch(name):
                return dimension
        raise UnmergeableRanks(f"it is not known how {self.sizes[0]} tensor parallel ranks split {name}")

    def _tensors(self) -> Iterator[tuple[int, str, Stored]]:
        """Yield tensor parallel rank, name and place of each tensor, with the numbers of the whole model."""
        first_layers = self._first_layers()
        local_experts = self._said("num_experts", 0) // self.sizes[2]
        for (tensor_rank, stage, expert_rank), file in self.files.items():
            for chunk, name, value in _entries(file):
                if (stored := file.tensor(value)) is None:
                    if value is None or name.endswith("_extra_state"):
                        continue
                    raise UnmergeableRanks(f"{name} of {file.path} is no tensor: save it with Megatron Core's models")
                if name.endswith("_extra_state"):
                    continue
                if match := _LAYER.fullmatch(name):
                    name = f"{match[1]}{int(match[2]) + first_layers[chunk, stage, match[1]]}{match[3]}"
                for local, part in _single_experts(name, stored, local_experts):
                    if match := _EXPERT.fullmatch(local):
                        local = f"{match[1]}{int(match[2]) + expert_rank * local_experts}{match[3]}"
                    yield tensor_rank, local, part

    def _first_layers(self) -> dict[tuple[int, int, str], int]:
        """Return the number of layers before those of each chunk of each stage.

        Stages may have different numbers of layers. Chunk 1 of the first stage follows chunk 0 of the last.
        """
        last: dict[tuple[int, int, str], int] = {}
        for (_, stage, _), file in self.files.items():
            for chunk, name, _ in _entries(file):
                if match := _LAYER.fullmatch(name):
                    key = chunk, stage, match[1]
                    last[key] = max(last.get(key, 0), int(match[2]))
        return {key: sum(1 + last[other] for other in last if other[2] == key[2] and other < key) for key in last}


def _entries(file: SavedFile) -> Iterator[tuple[int, str, Any]]:
    """Yield chunk, name and value of each entry of a file's model, by the names of Megatron Core's own modules."""
    for key, chunk in file.state.items():
        if not (match := _CHUNK.fullmatch(str(key))):
            continue
        if not isinstance(chunk, dict) or any(isinstance(value, dict) for value in chunk.values()):
            raise UnmergeableRanks(
                f"{file.path} has a model of megatron.legacy: convert it with Megatron-LM's tools/checkpoint first"
            )
        for name, value in chunk.items():
            yield int(match[1] or 0), own_name(name.removeprefix("module.")), value


def own_name(name: str) -> str:
    """Return the name that a parameter has in Megatron Core's own modules."""
    for pattern, own in _OWN_NAMES:
        name = pattern.sub(own, name)
    return name


def _single_experts(name: str, stored: Stored, count: int) -> Iterator[tuple[str, Stored]]:
    """Yield the tensor, or that of each expert if it has those of all experts of a rank.

    `GroupedMLP` of Megatron Core up to 0.18 has the experts' transposed weights one behind the other (forward in
    megatron/core/transformer/moe/experts.py).
    """
    if not (match := re.fullmatch(r"(.*\.experts\.)weight([12])", name)):
        yield name, stored
        return
    rows, columns = stored.shape
    shape = (rows, columns // max(count, 1)) if match[2] == "1" else (rows // max(count, 1), columns)
    for expert in range(count):
        offset = stored.offset + expert * stored.nbytes // count
        part = stored._replace(shape=(shape[1], shape[0]), offset=offset, transposed=True)
        yield f"{match[1]}local_experts.{expert}.linear_fc{match[2]}.weight", part
