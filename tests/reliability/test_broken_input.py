# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile Hugging Face checkpoints: each gets a one-line error in bounded memory, and leaves nothing."""

import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from broken import BROKEN, INDEX, NORM, SHARD, pickled, raw_header, tensors, traces
from checkpoints import TRACKER, AutoBridge, alone, names, on_two_ranks, run, save_hf_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import BY_TWO, run_in_two
from test_hf_checkpoint import sound  # noqa: F401 - a fixture

from megatron.bridge.models.conversion.hf_checkpoint import check_hf_checkpoint


# The largest header that safetensors takes has 100 MB.
MEMORY = 400 << 20
LIMIT = 4 << 30


def import_bounded(hf: Path, out: Path) -> dict:
    """Import with an end to its memory; returns what an error says, and whether its peak has grown little."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LIMIT, mapped + LIMIT))
    try:
        AutoBridge.import_ckpt(hf, out)
        error, message = "", ""
    except (OSError, ValueError) as caught:
        error, message = type(caught).__name__, str(caught)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return {"error": error, "message": message, "is_lean": grown < MEMORY}


def refused(hf: Path, out: Path, message: str, road: Callable[[Callable[[], dict]], dict] = alone) -> None:
    """Assert that an import of `hf` is refused as it should be."""
    answer = run(partial(road, partial(import_bounded, hf, out)))
    seen = answer.get("result", answer)
    assert seen["error"] and message in seen["message"], seen
    assert "\n" not in seen["message"]
    assert not out.exists()
    assert not traces(hf).exists(), "code of the checkpoint was run"
    assert seen["is_lean"]


@pytest.fixture
def hf(sound, tmp_path):  # noqa: F811
    return Path(shutil.copytree(sound, tmp_path / "hf"))


@pytest.mark.parametrize("road", [alone, pytest.param(on_two_ranks, marks=BY_TWO)])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(hf, tmp_path, name, road, record_property):
    break_it, message = BROKEN[name]
    break_it(hf)
    refused(hf, tmp_path / "out", message, road)
    record_property("count of broken Hugging Face checkpoints refused", 1)


def test_there_are_more_than_40_of_them():
    assert len(BROKEN) > 40


def flip(data: bytes, bits: list[int]) -> bytes:
    flipped = bytearray(data)
    for bit in bits:
        flipped[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(flipped)


# In the length of the header, and in its JSON, which here takes less than 2 kB.
HEADER_BITS = st.lists(st.integers(0, 8 * 1000 - 1), min_size=1, max_size=4)
FILES = st.sampled_from([SHARD, INDEX, "config.json"])


def checked(hf: Path) -> str:
    """What the check says of a checkpoint; anything but one line of OSError or ValueError is an error of its own."""
    try:
        check_hf_checkpoint(hf)
    except (OSError, ValueError) as error:
        assert "\n" not in str(error) and str(hf) in str(error)
        return str(error)
    return ""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=FILES, bits=HEADER_BITS)
def test_flipped_bits(hf, sound, record_property, file, bits):  # noqa: F811
    record_property("count of checkpoints with flipped bits", 1)
    (hf / file).write_bytes(flip((sound / file).read_bytes(), bits))
    checked(hf)
    shutil.copy(sound / file, hf / file)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=FILES, part=st.floats(0, 0.999))
def test_cut_short(hf, sound, record_property, file, part):  # noqa: F811
    record_property("count of checkpoints with a file cut short", 1)
    data = (sound / file).read_bytes()
    # A config without the brace that closes it is no JSON, nor is any other part of one. A line may end behind it.
    (hf / file).write_bytes(data[: min(int(part * len(data)), len(data) - 2)])
    assert checked(hf)
    shutil.copy(sound / file, hf / file)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_for_a_header(hf, record_property, header, length):
    record_property("count of checkpoints with any bytes for a header", 1)
    raw_header(header, length)(hf)
    assert SHARD in checked(hf)


# name: (what is done to a sound checkpoint, what the log says)
ACCEPTED = {
    "NaN": (
        tensors(lambda content: content[NORM][3:4].fill_(float("nan"))),
        "norm.weight holds NaN or infinite weights",
    ),
    "infinity": (
        tensors(lambda content: content[NORM][3:4].fill_(float("inf"))),
        "norm.weight holds NaN or infinite weights",
    ),
    "two sound shards": (lambda hf: None, ""),
    "large but finite": (tensors(lambda content: content[NORM].fill_(3e38)), ""),
    "a pickle beside the shards": (pickled("pytorch_model.bin"), ""),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_imported_with_or_without_a_warning(hf, tmp_path, caplog, name, streaming):
    break_it, warning = ACCEPTED[name]
    break_it(hf)
    AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming)
    assert names(tmp_path / "out") == {"release", TRACKER}
    assert not traces(hf).exists()
    ours = [record.getMessage() for record in caplog.records if record.name.endswith("hf_checkpoint")]
    assert len(ours) == bool(warning) and warning in "".join(ours)


@BY_TWO
@pytest.mark.parametrize("name", ["NaN", "two sound shards"])
def test_two_processes_warn_once(hf, tmp_path, name):
    """Whichever of them has read the tensor."""
    break_it, warning = ACCEPTED[name]
    break_it(hf)
    code, said, error = run_in_two(["import", hf, tmp_path / "out"])
    assert code == 0 and said.count("Wrote") == 1, (said, error)
    assert error.count("\n") == bool(warning) and warning in error, error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tensor_too_many_is_refused_or_told(hf, tmp_path, caplog, streaming):
    tensors(lambda content: content.update({"extra": torch.ones(2)}))(hf)
    message = "has 1 tensors that the Megatron model has no place for, 'extra'"
    with pytest.raises(ValueError, match=message):
        AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming)
    assert not (tmp_path / "out").exists()
    AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming, strict=False)
    assert names(tmp_path / "out") == {"release", TRACKER}
    assert f"{message}: left out" in caplog.text


def test_one_expert_that_differs_is_named(tmp_path):
    hf = save_hf_model(tmp_path / "hf", "qwen3-moe")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors(lambda content: content.update({name: torch.zeros(3, 5)}))(hf)
    refused(hf, tmp_path / "out", f"{name} has shape [3, 5], other experts [64, 32]")
