# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM judges what `import_ckpt` writes: it loads it, asked for no leniency, and keeps every weight.

Hugging Face's model is the second judge, of the first loss. `matrix.py` has what training adds: save, resume, export.
"""

import shutil
import sys
from pathlib import Path

import models
import pytest
import steps
import torch
from reference import Tensors, differences, hf_loss
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.release_checkpoint.layout import is_link_to_release
from megatron.bridge.training.release_options import set_link


LOSS_TOLERANCE = 1e-4  # float32: two implementations of the same arithmetic


@pytest.fixture(scope="module")
def imported(workplace: Path, llama: Path) -> Path:
    AutoBridge.import_ckpt(llama, workplace / "imported")
    return workplace / "imported"


@pytest.fixture(scope="module")
def flags(imported: Path) -> list[str]:
    """Give what Bridge says that Megatron-LM needs: what it doesn't read from the checkpoint, and nothing else."""
    return steps.model_flags(imported)


@pytest.fixture(scope="module")
def all_flags(imported: Path) -> list[str]:
    """Give the whole command line that Bridge says describes this model, without help from the checkpoint."""
    return steps.model_flags(imported, use_checkpoint_args=False)


@pytest.fixture(scope="module")
def idle(workplace: Path, imported: Path, flags: list[str], chats: steps.Chats) -> steps.Training:
    """Load, run one iteration with learning rate 0, save."""
    return steps.train(
        "one idle iteration", workplace / "idle", chats, load=imported, iterations=1, flags=[*flags, "--lr=0"]
    )


def test_layout(imported: Path) -> None:
    assert steps.tracker(imported) == "release"
    assert steps.payloads(imported) == ["release"]


def test_flags_ask_for_no_leniency(flags: list[str]) -> None:
    assert flags[0] == "--use-checkpoint-args"
    assert not [
        flag for flag in flags if flag.startswith(("--finetune", "--no-load", "--num-layers", "--hidden-size"))
    ]


def test_first_loss_is_hugging_face_s(idle: steps.Training, llama: Path) -> None:
    assert idle.losses()[1] == pytest.approx(hf_loss(llama, idle.batches(1)), abs=LOSS_TOLERANCE)


def test_loss_is_on_the_assistant_alone(idle: steps.Training, chats: steps.Chats) -> None:
    assert chats.said_by_others(idle.batches(1)) == []


@pytest.mark.parametrize("said", [True, False], ids=["said", "left out"])
def test_padding_of_the_vocabulary(
    workplace: Path, imported: Path, llama: Path, all_flags: list[str], chats: steps.Chats, said: bool
) -> None:
    """`--padded-vocab-size` keeps Megatron-LM from adding rows; without it they are random, and raise the loss."""
    place = all_flags.index("--padded-vocab-size")
    flags = all_flags if said else [*all_flags[:place], *all_flags[place + 2 :]]
    training = steps.train(
        f"vocabulary padded, {said}",
        workplace / f"padding-{said}",
        chats,
        load=imported,
        iterations=1,
        # As with four tensor parallel ranks: 384 tokens would become 512.
        flags=[*flags, "--make-vocab-size-divisible-by=512", "--lr=0"],
    )
    excess = training.losses()[1] - hf_loss(llama, training.batches(1))
    assert abs(excess) < LOSS_TOLERANCE if said else excess > 0.1


def test_idle_iteration_keeps_every_weight(idle: steps.Training, imported: Path) -> None:
    before = dict(steps.model_tensors(imported / "release"))
    after = dict(steps.model_tensors(idle.checkpoint / "iter_0000001"))
    assert before
    assert differences(before, after) == []


def test_training_in_a_folder_with_a_link_leaves_it_alone(
    workplace: Path, imported: Path, idle: steps.Training, flags: list[str], chats: steps.Chats
) -> None:
    """Megatron-LM starts, saves and resumes there as it does without the link."""
    root = Path(shutil.copytree(imported, workplace / "linked"))
    set_link(root, wanted=True)
    losses = {}
    for name, stop in (("start", ["--exit-interval=1"]), ("resume", [])):
        losses |= steps.train(
            f"{name} beside a link",
            workplace / f"linked-{name}",
            chats,
            load=root,
            save=root,
            iterations=2,
            flags=[*flags, "--lr=0", *stop],
        ).losses()
    assert list(losses) == [1, 2] and losses[1] == idle.losses()[1]
    assert steps.tracker(root) == "2"
    assert steps.payloads(root) == ["iter_0000000", "iter_0000001", "iter_0000002", "release"]
    assert is_link_to_release(root / "iter_0000000")
    before, after = (dict(steps.model_tensors(each / "release")) for each in (imported, root))
    assert differences(before, after) == []


def test_untrained_weights_come_back_bit_for_bit(workplace: Path, imported: Path, llama: Path) -> None:
    AutoBridge.from_hf_pretrained(llama).export_ckpt(imported, workplace / "untrained")
    assert differences(Tensors(llama), Tensors(workplace / "untrained")) == []


def test_two_processes_convert_for_megatron_lm_and_transformers(
    workplace: Path, imported: Path, idle: steps.Training, llama: Path, flags: list[str], chats: steps.Chats
) -> None:
    """Megatron-LM loads and keeps the same weights; transformers loads the same files."""
    command = Path(sys.executable).with_name("megatron-bridge")
    folders = {name: workplace / f"by-two-{name}" for name in ("checkpoint", "hf", "one-hf")}
    for name, arguments in {
        "checkpoint": ["import", llama, folders["checkpoint"], "--processes=2"],
        "hf": ["export", folders["checkpoint"], folders["hf"], "--max-shard-size=200KB", "--processes=2"],
        "one-hf": ["export", imported, folders["one-hf"], "--max-shard-size=200KB"],
    }.items():
        steps.Step(f"two processes, {name}", [str(command), *map(str, arguments)], workplace / f"{name}.log").run()
    assert len(list(folders["checkpoint"].glob("release/*.distcp"))) == 2
    trained = steps.train(
        "one idle iteration from two files",
        workplace / "idle-by-two",
        chats,
        load=folders["checkpoint"],
        iterations=1,
        flags=[*flags, "--lr=0"],
    )
    assert trained.losses() == idle.losses()
    before = dict(steps.model_tensors(imported / "release"))
    assert differences(before, dict(steps.model_tensors(trained.checkpoint / "iter_0000001"))) == []
    files = {name: {path.name: path.read_bytes() for path in folders[name].iterdir()} for name in ("hf", "one-hf")}
    assert files["hf"] == files["one-hf"] and len(list(folders["hf"].glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(folders["hf"], output_loading_info=True)
    assert not any(info.values())
    assert differences(Tensors(llama), model.state_dict()) == []


def test_bf16_with_the_command_line_that_bridge_gives(workplace: Path, chats: steps.Chats) -> None:
    """The way of a GPU host: weights in bf16, and Megatron-LM's mixed precision with its float32 copy of them."""
    source = models.make_model(workplace / "hf" / "bf16", dtype=torch.bfloat16)
    AutoBridge.import_ckpt(source, workplace / "bf16")
    flags = steps.model_flags(workplace / "bf16")
    assert "--bf16" in flags
    idle = steps.train(
        "one idle iteration in bf16",
        workplace / "idle-bf16",
        chats,
        load=workplace / "bf16",
        iterations=1,
        flags=[*flags, "--lr=0"],
    )
    assert idle.losses()[1] == pytest.approx(hf_loss(source, idle.batches(1)), abs=0.02)
    before = dict(steps.model_tensors(workplace / "bf16" / "release"))
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    assert differences(before, dict(steps.model_tensors(idle.checkpoint / "iter_0000001"))) == []


@pytest.fixture(scope="module")
def unpatched(workplace: Path, llama: Path) -> Path:
    AutoBridge.import_ckpt(llama, workplace / "unpatched", release=False)
    return workplace / "unpatched"


@pytest.mark.parametrize(
    ("asking", "error"),
    [
        # With the whole command line it gets as far as the weights, and looks for an optimizer beside them.
        ("all_flags", "KeyError: .*optimizer"),
        ("flags", "AssertionError: either num-layers or encoder-num-layers should be specified"),
    ],
)
def test_upstream_s_layout_fails(
    workplace: Path, unpatched: Path, chats: steps.Chats, asking: str, error: str, request: pytest.FixtureRequest
) -> None:
    """The opposite: Megatron-LM doesn't load what upstream writes."""
    assert steps.payloads(unpatched) == ["iter_0000000"]
    assert steps.tracker(unpatched) == "0"
    folder = workplace / f"unpatched-{asking}"
    with pytest.raises(steps.StepFailed, match=error):
        flags = request.getfixturevalue(asking)
        steps.train("training from upstream's layout", folder, chats, load=unpatched, iterations=1, flags=flags)
    assert not (folder / "losses.jsonl").exists()
