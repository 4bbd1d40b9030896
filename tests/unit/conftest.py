# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints in every state that people have on disk, written by PyTorch's own writer."""

import io
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner


ARGS = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "padded_vocab_size": 128,
    "layernorm_epsilon": 1e-5,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "consumed_train_samples": 0,
}
COMMON = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"a": 1}}


def _write(folder: Path, state: dict, core: str, optimizer: bool, common_pt: bool) -> None:
    """Write a payload as Megatron Core of that series does (`save` of megatron/core/dist_checkpointing).

    The same state is in common.pt and in the entry, as in a release, unless core 0.19 alone has written it.
    """
    torch.manual_seed(1)
    entries = {
        "embedding.word_embeddings.weight": torch.randn(128, 8),
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(2, 16, 8),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": io.BytesIO(b"none"),
    }
    if optimizer:
        entries["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = torch.randn(128, 8)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if core == "0.19":
        entries["common_state/shard_0_1"] = [state]
    else:
        config |= {"common_backend": "torch", "common_backend_version": 1}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    if core != "0.19" or common_pt:
        torch.save(state, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(config))


def _state(
    args: dict | None = ARGS,  # None for a common state without them
    other_args: dict | None = None,
    without_args: tuple[str, ...] = (),
    iteration: int = 0,
    common: dict | None = None,
    without: str | None = None,  # a key that the common state doesn't have
) -> dict:
    state = {**COMMON, "iteration": iteration, **(common or {})}
    state.pop(without, None)
    if args is not None:
        args = {**args, **(other_args or {})}
        state["args"] = Namespace(**{name: value for name, value in args.items() if name not in without_args})
    return state


@pytest.fixture(scope="session")
def release_args() -> Namespace:
    """Give the args that an import of the small model writes."""
    return Namespace(**ARGS)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a checkpoint root in a state."""
    made: dict[tuple, Path] = {}

    def build(
        root: Path,
        folder: str | None = "release",
        tracker: str | None = "release",
        *,
        core: str = "0.19",
        common_pt: bool = True,  # beside the entry of core 0.19
        in_common_pt: dict | None = None,  # arguments of `_state` for another content than the entry's
        optimizer: bool = False,
        run_config: bool = True,
        train_state: bool = False,
        bridge_tracker: bool = False,
        leftovers: tuple[str, ...] = (),
        **common_state: Any,
    ) -> Path:
        state = _state(**common_state)
        root.mkdir(parents=True)
        if folder is not None:
            key = (repr(state), core, optimizer, common_pt)
            if key not in made:
                made[key] = tmp_path_factory.mktemp("payload") / "payload"
                _write(made[key], state, core, optimizer, common_pt)
            shutil.copytree(made[key], root / folder)
            if in_common_pt is not None:
                torch.save(_state(**in_common_pt), root / folder / "common.pt")
            if run_config:
                (root / folder / "run_config.yaml").write_text("model: {}\n")
            if train_state:
                (root / folder / "train_state.pt").write_bytes(b"state")
        if tracker is not None:
            (root / "latest_checkpointed_iteration.txt").write_text(tracker)
        if bridge_tracker:
            (root / "latest_train_state.pt").write_bytes(b"state")
        for name in leftovers:
            (root / name / "release").mkdir(parents=True)
            (root / name / "release/__0_0.distcp").write_bytes(b"half")
            (root / name / "OWNER").write_text(f"{name} is a folder of Megatron-Bridge")
        return root

    return build
