# SPDX-License-Identifier: Apache-2.0
"""What Megatron-LM saves in each format and layout comes back bit for bit: `nox -s exports`.

Megatron-LM loads a release checkpoint on the ranks of a layout, and saves it in the format. For torch this is its own
conversion of formats (`--ckpt-convert-format`), which trains nothing. For torch_dist it is one idle iteration.
"""

from pathlib import Path

import models
import pytest
import steps
import torch
from chat import write_conversations
from matrix import ONE, PP2, PP2_INTERLEAVED, TP2, TP2_EP2, TP2_PP2, Layout
from reference import Tensors, differences
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.from_megatron import import_megatron_lm
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.repair.problems import problems


EP2 = Layout("EP2", 2, ep=2)
ROWS = [
    *((model, layout, "torch") for model in ("llama-3", "llama-3.2") for layout in (ONE, TP2, PP2, TP2_PP2)),
    ("llama-3", PP2_INTERLEAVED, "torch"),
    ("llama-3.2", PP2_INTERLEAVED, "torch"),
    ("qwen2", TP2, "torch"),
    ("qwen3-moe", EP2, "torch"),
    ("qwen3-moe", TP2_EP2, "torch"),
    *(("llama-3", layout, "torch_dist") for layout in (TP2, PP2, TP2_PP2, PP2_INTERLEAVED)),
    ("qwen3-moe", EP2, "torch_dist"),
]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of what the tests share."""
    return tmp_path_factory.mktemp("exports")


def release(workplace: Path, model: str) -> tuple[Path, Path]:
    """Return the Hugging Face model and its release checkpoint, and make them for the first row that asks."""
    source, out = workplace / model / "hf", workplace / model / "release"
    if not out.exists():
        models.make_model(source, model)
        AutoBridge.import_ckpt(source, out)
    return source, out


def saved(folder: Path, source: Path, out: Path, layout: Layout, written: str) -> Path:
    """Let Megatron-LM save a release checkpoint in a format, and return the root."""
    texts = [write_conversations(folder / name, 32) for name in ("train.jsonl", "valid.jsonl")]
    convert = [f"--ckpt-convert-format={written}", f"--ckpt-convert-save={folder}"] if written == "torch" else []
    training = steps.train(
        f"{layout.name} in {written}",
        folder / "log",
        steps.Chats(*texts, source),
        load=out,
        iterations=1,
        ranks=layout.ranks,
        flags=[*layout.flags(4), *steps.model_flags(out), "--lr=0", *convert],
    )
    return folder / written if convert else training.checkpoint


@pytest.mark.parametrize(("model", "layout", "written"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_what_megatron_lm_saves_comes_back(
    tmp_path: Path, workplace: Path, model: str, layout: Layout, written: str
) -> None:
    """The export has the tensors of the model that was imported, and inspect finds no damage."""
    source, out = release(workplace, model)
    root = saved(tmp_path, source, out, layout, written)
    found = examine(root)
    assert (found.payload.format, found.payload.damage, found.payload.contradictions) == (written, [], [])
    assert written != "torch" or problems(found) == []
    for streaming in (True, False):
        AutoBridge.from_hf_pretrained(source).export_ckpt(
            root, tmp_path / f"back-{streaming}", source_path=source, show_progress=False, streaming=streaming
        )
        assert differences(Tensors(source), Tensors(tmp_path / f"back-{streaming}")) == []
    import_megatron_lm(root, tmp_path / "again")
    assert problems(examine(tmp_path / "again")) == []
    first, again = (dict(steps.model_tensors(each / "release")) for each in (out, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_fsdp2_saves_comes_back(tmp_path: Path, workplace: Path) -> None:
    """Core 0.19 saves torch_dcp with FSDP2 only, and loads no torch_dist then, so the weights are random."""
    source, out = release(workplace, "llama-3")
    texts = [write_conversations(tmp_path / name, 32) for name in ("train.jsonl", "valid.jsonl")]
    training = steps.train(
        "FSDP2",
        tmp_path / "log",
        steps.Chats(*texts, source),
        load=None,
        iterations=1,
        ranks=2,
        flags=[*steps.model_flags(out, use_checkpoint_args=False), "--ckpt-format=torch_dcp", "--use-torch-fsdp2"],
    )
    found = examine(training.checkpoint)
    assert (found.payload.format, problems(found)) == ("torch_dcp", [])
    AutoBridge.from_hf_pretrained(source).export_ckpt(
        training.checkpoint, tmp_path / "back", source_path=source, show_progress=False
    )
    stored = {name.removeprefix("model."): value for name, value in steps.model_tensors(found.payload.path)}
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back["lm_head.weight"], stored["output_layer.weight"])
    for layer in range(4):
        own, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        assert torch.equal(back[f"{theirs}.mlp.down_proj.weight"], stored[f"{own}.mlp.linear_fc2.weight"])
        halves = [back[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(torch.cat(halves), stored[f"{own}.mlp.linear_fc1.weight"])
        # Two groups of two queries, a key, and a value.
        split = [back[f"{theirs}.self_attn.{name}_proj.weight"].chunk(2) for name in "qkv"]
        rows = torch.cat([part for group in zip(*split, strict=True) for part in group])
        assert torch.equal(rows, stored[f"{own}.self_attention.linear_qkv.weight"])


def test_megatron_lm_starts_with_the_flags_that_inspect_prints(tmp_path: Path, workplace: Path) -> None:
    """It loads `--ckpt-format torch` only in the parts that the files have."""
    source, out = release(workplace, "llama-3")
    root = saved(tmp_path, source, out, TP2_PP2, "torch")
    again = steps.train(
        "start from torch",
        tmp_path / "again",
        steps.Chats(tmp_path / "train.jsonl", tmp_path / "valid.jsonl", source),
        load=root,
        iterations=1,
        ranks=TP2_PP2.ranks,
        flags=[*examine(root).payload.as_saved, *steps.model_flags(out), "--finetune", "--lr=0"],
    )
    one = steps.train(
        "start from the release",
        tmp_path / "one",
        steps.Chats(tmp_path / "train.jsonl", tmp_path / "valid.jsonl", source),
        load=out,
        iterations=1,
        flags=[*steps.model_flags(out), "--lr=0"],
    )
    assert again.losses()[1] == pytest.approx(one.losses()[1], abs=1e-5)
    import_megatron_lm(root, tmp_path / "release")
    two = steps.train(
        "start from the release that was made of torch",
        tmp_path / "two",
        steps.Chats(tmp_path / "train.jsonl", tmp_path / "valid.jsonl", source),
        load=tmp_path / "release",
        iterations=1,
        flags=[*steps.model_flags(tmp_path / "release"), "--lr=0"],
    )
    assert two.losses() == one.losses()
