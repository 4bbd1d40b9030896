# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM judges what `import_ckpt` writes: it loads, trains, saves, resumes, with no flag that asks for leniency.

Hugging Face's model is the second judge: of the first loss, and of what comes back after training.
"""

import shutil
from pathlib import Path

import models
import pytest
import steps
import torch
from reference import Tensors, differences, hf_loss

from megatron.bridge import AutoBridge


HALF, WHOLE = 6, 12
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


@pytest.fixture(scope="module")
def in_one_go(workplace: Path, imported: Path, all_flags: list[str], chats: steps.Chats) -> steps.Training:
    return steps.train(
        "training in one go", workplace / "whole", chats, load=imported, iterations=WHOLE, flags=all_flags
    )


@pytest.fixture(scope="module")
def first_half(workplace: Path, imported: Path, flags: list[str], chats: steps.Chats) -> steps.Training:
    """Train with the same plan, but stop and save half way, beside the release."""
    run = Path(shutil.copytree(imported, workplace / "run"))
    return steps.train(
        "training, first half",
        workplace / "first",
        chats,
        load=run,
        save=run,
        iterations=WHOLE,
        flags=[*flags, f"--exit-interval={HALF}"],
    )


@pytest.fixture(scope="module")
def second_half(workplace: Path, flags: list[str], chats: steps.Chats, first_half: steps.Training) -> steps.Training:
    """Go on in a new process, from what Megatron-LM saved."""
    run = first_half.checkpoint
    return steps.train(
        "training, second half", workplace / "second", chats, load=run, save=run, iterations=WHOLE, flags=flags
    )


@pytest.fixture(scope="module")
def fine_tuned(workplace: Path, llama: Path, second_half: steps.Training) -> Path:
    """Export what Megatron-LM saved last."""
    AutoBridge.from_hf_pretrained(llama).export_ckpt(second_half.checkpoint, workplace / "fine-tuned")
    return workplace / "fine-tuned"


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


def test_whole_command_line_builds_the_same_model(in_one_go: steps.Training, idle: steps.Training) -> None:
    assert in_one_go.losses()[1] == idle.losses()[1]


def test_loss_is_on_the_assistant_alone(idle: steps.Training, chats: steps.Chats) -> None:
    shares = [batch["loss_mask"].mean().item() for batch in idle.batches(1)]
    assert all(0 < share < 0.5 for share in shares)


def test_idle_iteration_keeps_every_weight(idle: steps.Training, imported: Path) -> None:
    before = dict(steps.model_tensors(imported / "release"))
    after = dict(steps.model_tensors(idle.checkpoint / "iter_0000001"))
    assert before
    assert differences(before, after) == []


def test_loss_falls(in_one_go: steps.Training) -> None:
    losses = in_one_go.losses()
    assert sorted(losses) == list(range(1, WHOLE + 1))
    assert losses[WHOLE] < losses[1] - 1


def test_resume_goes_on_as_if_never_stopped(
    in_one_go: steps.Training, first_half: steps.Training, second_half: steps.Training
) -> None:
    """Wrong optimizer state, data position or learning rate would bend the curve."""
    started, resumed = first_half.losses(), second_half.losses()
    assert sorted(started) == list(range(1, HALF + 1))
    assert sorted(resumed) == list(range(HALF + 1, WHOLE + 1))
    assert started | resumed == pytest.approx(in_one_go.losses(), abs=1e-6)


def test_tracker_and_folders_after_each_stage(first_half: steps.Training, second_half: steps.Training) -> None:
    run = second_half.checkpoint
    assert steps.tracker(run) == str(WHOLE)
    assert steps.payloads(run) == [f"iter_{HALF:07d}", f"iter_{WHOLE:07d}", "release"]


def test_untrained_weights_come_back_bit_for_bit(workplace: Path, imported: Path, llama: Path) -> None:
    AutoBridge.from_hf_pretrained(llama).export_ckpt(imported, workplace / "untrained")
    assert differences(Tensors(llama), Tensors(workplace / "untrained")) == []


def test_trained_weights_come_back_as_the_same_model(fine_tuned: Path, second_half: steps.Training) -> None:
    """On conversations that nobody trained on, Hugging Face has the loss that Megatron-LM ended with."""
    held_out = second_half.batches(WHOLE, "valid")
    assert held_out
    assert hf_loss(fine_tuned, held_out) == pytest.approx(second_half.losses("valid")[WHOLE], abs=LOSS_TOLERANCE)


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
