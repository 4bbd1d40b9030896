# SPDX-License-Identifier: Apache-2.0
"""The pieces of the benchmark: checkpoints, memory of processes, plans, ratios. Nothing is timed."""

import json
import mmap
import os
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors import safe_open

from benchmarks import cache, memory, results
from benchmarks.memory import Memory, Run
from benchmarks.plan import plan
from benchmarks.results import BARS, GB, Measurement
from benchmarks.shapes import SHAPES, llama
from benchmarks.weights import write_checkpoint, write_plan


SMALL = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY = llama("1b", **SMALL)

ROLLUP = """\
55c9e6a2d000-7ffe6a9f2000 ---p 00000000 00:00 0                          [rollup]
Rss:              100 kB
Pss:               90 kB
Pss_Anon:          60 kB
Shared_Clean:      30 kB
Anonymous:         60 kB
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, TINY, shard_bytes=100_000)
    return folder


def test_shapes_have_the_parameters_that_their_names_say():
    parameters = {name: llama(name).bytes / 2 / 1e9 for name in SHAPES}
    assert parameters == pytest.approx({"1b": 1.498, "3b": 3.607, "8b": 8.030, "70b": 70.55, "405b": 405.85}, rel=1e-3)


def test_transformers_loads_what_is_written(checkpoint):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == TINY.tensors


def test_weights_are_small_numbers_and_no_two_rows_are_the_same(checkpoint):
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                tensor = file.get_tensor(name).float()
                assert tensor.isfinite().all() and 0 < tensor.abs().max() < 0.2
                assert tensor.ndim == 1 or len(tensor.unique(dim=0)) == len(tensor)


def test_shards_keep_their_size_and_the_index_names_them(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == TINY.bytes
    assert set(index["weight_map"]) == set(TINY.tensors)
    shards = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    assert set(shards) == set(index["weight_map"].values()) and len(shards) > 2
    assert max(shards.values()) < 110_000


def test_a_plan_has_shards_of_full_size_without_values_on_the_disk(tmp_path, checkpoint):
    write_plan(tmp_path, TINY, 100_000)
    shards = {path.name: path.stat() for path in tmp_path.glob("*.safetensors")}
    assert {name: shard.st_size for name, shard in shards.items()} == {
        path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")
    }
    assert sum(shard.st_blocks * 512 for shard in shards.values()) < TINY.bytes / 2


# 80 and 126 layers of 7 tensors each, and embedding, last norm and head.
@pytest.mark.parametrize(
    ("size", "items", "largest"), [("70b", 563, 128256 * 8192 * 2), ("405b", 885, 128256 * 16384 * 2)]
)
def test_what_would_be_written_is_what_the_checkpoint_has(size, items, largest):
    shape = llama(size)
    planned = plan(shape)
    assert planned.bytes == shape.bytes
    assert (planned.items, planned.largest) == (items, largest)
    assert planned.block < 1 << 28
    assert not torch.distributed.is_initialized()


def test_kilobytes_are_read_by_name():
    assert memory.read_kilobytes(ROLLUP, "Rss", "Anonymous") == [100 * 1024, 60 * 1024]
    with pytest.raises(ValueError, match="found .*Rss.*, expected Swap among them"):
        memory.read_kilobytes(ROLLUP, "Swap")


# Allocates 300 MB and maps a file of 100 MB.
CHILD = """
import mmap, os, sys, time
with open(sys.argv[2], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
values = bytearray(os.urandom(1 << 20)) * 300
seen = sum(mapped[at] for at in range(0, len(mapped), mmap.PAGESIZE))
os.mkdir(sys.argv[3])
time.sleep(1)
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"


def test_memory_of_descendants_is_told_apart_and_the_marker_is_seen(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(1 << 20) * 100)
    command = [sys.executable, "-c", PARENT, CHILD, "-", str(tmp_path / "file"), str(tmp_path / "marker")]
    run = memory.run(command, tmp_path / "log", tmp_path / "marker")
    assert 0 < run.started < run.wall
    assert 300 << 20 < run.peak("anonymous") < 400 << 20
    assert 100 << 20 < run.peak("file") < 200 << 20
    assert run.peak("resident") >= run.peak("anonymous") + (100 << 20)


def test_a_command_that_fails_is_an_error_with_its_last_line(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3: no such model"):
        memory.run([sys.executable, "-c", "print('no such model\\n'); exit(3)"], tmp_path / "log")


def test_the_peak_of_the_resident_set_is_the_kernels_where_samples_missed_it():
    run = Run(1.0, None, [(0.0, Memory(5, 2)), (0.5, Memory(4, 4))], high_water=9)
    assert (run.peak("anonymous"), run.peak("file"), run.peak("resident")) == (5, 4, 9)


def test_dropped_files_leave_the_page_cache(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8 << 20))
    if cache.cached(tmp_path) != 1.0:
        pytest.skip("this file system can't tell what it has cached")
    cache.drop(tmp_path)
    # It is an advice: the kernel keeps pages that it is busy with.
    assert cache.cached(tmp_path) < 0.1


def test_each_page_is_probed_once_and_files_count_by_their_bytes(tmp_path, monkeypatch):
    """A probe brings in the page that it misses, so a second one of it would find it."""
    sizes = {"config.json": 700, "index.json": 3 * mmap.PAGESIZE, "shard": 1000 * mmap.PAGESIZE, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    probed = []
    warm = {"config.json", "index.json"}

    def read(descriptor, buffers, offset, flags):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        probed.append((path.name, offset // mmap.PAGESIZE))
        if path.name not in warm:
            raise BlockingIOError

    monkeypatch.setattr(cache.os, "preadv", read)
    assert cache.cached(tmp_path) == pytest.approx((700 + 3 * mmap.PAGESIZE) / sum(sizes.values()))
    assert len(probed) == len(set(probed)) == 1 + 3 + 64
    warm.add("shard")
    assert cache.cached(tmp_path) == 1


MEASURED = Measurement(
    "8b", "streaming", 1, 24.0, 4.0, 1.0, 0.0, int(1.8e9), int(1.2e9), int(0.7e9), int(1.8e9), [(0.0, 1, 1)]
)


def round_of(number: int, **changes: float) -> list[Measurement]:
    streaming = replace(MEASURED, round=number, **changes)
    return [
        streaming,
        replace(streaming, size="1b", resident=int(1.75e9)),
        replace(streaming, flow="cp -r", started=None, wall=16.0),
        replace(streaming, flow="upstream", wall=60.0),
    ]


def test_bars_are_computed_within_a_round_and_over_rounds():
    measured = {
        bar.name: spread
        for bar, spread in results.compare([*round_of(1), *round_of(2, wall=30.0), *round_of(3, wall=24.5)])
    }
    start, peak, ratio, copy, upstream = list(measured.values())[:5]
    assert (start.min, start.median, start.max) == (4.0, 4.0, 4.0)
    assert peak.median == 1.8
    assert ratio.median == pytest.approx(1.8 / 1.75)
    assert (copy.min, copy.median, copy.max) == (20 / 16, 20.5 / 16, 26 / 16)
    assert upstream.max == 0.5
    assert list(measured.values())[5:] == [None] * 9


def test_an_export_is_compared_with_the_import_and_with_a_copy_back():
    export = replace(MEASURED, flow="streaming export", started=4.4, resident=int(0.95e9))
    runs = [
        replace(MEASURED, size="8b-6"),
        replace(export, size="8b-6"),
        replace(export, size="8b-2", resident=int(0.93e9)),
        replace(export, size="8b-6", flow="cp -r back", started=None, wall=16.0),
        replace(export, size="8b-6", flow="upstream export", started=None, wall=80.0),
        replace(export, size="8b-6", flow=results.EXPORT_TWO, wall=12.0, process=int(1.98e9)),
    ]
    start, peak, layers, copy, upstream, *two = [spread for bar, spread in results.compare(runs)][5:]
    assert two[:2] == [None, None] and [each.median for each in two[2:]] == pytest.approx([0.5, 1.1])
    assert start.median == pytest.approx(1.1) and peak.median == pytest.approx(0.95)
    assert layers.median == pytest.approx(95 / 93)
    assert copy.median == pytest.approx(19.6 / 16) and upstream.median == pytest.approx(0.3)


def test_a_bar_without_its_runs_is_not_measured_and_a_missed_one_says_so():
    measurements = [each for each in round_of(1, resident=int(3e9)) if each.flow == "streaming"]
    console = Console(record=True, width=150)
    results.show(
        measurements, {"70b": {"items": 723, "bytes": 141 * GB, "largest": 3 * GB, "block": 16 << 20}}, console
    )
    text = console.export_text()
    assert text.count("not measured") == 2 + 9  # nothing was exported
    assert text.count("MISSED") == 2  # of the resident set, and against the 1.5B shape
    report = results.as_json(measurements, {}, {})
    assert json.loads(results.dumps(report)) == json.loads(json.dumps(report))
    bars = report["bars"]
    assert [bar["holds"] for bar in bars] == [True, False, False, None, None] + [None] * 9
    assert [bar["name"] for bar in bars] == [bar.name for bar in BARS]


def test_the_plot_is_small_and_says_what_its_axes_are(tmp_path):
    run = Run(30.0, 4.0, [(at / 10, Memory(at % 7 * GB, GB // 2)) for at in range(300)], 0)
    samples = results.measurement("8b", "streaming", 1, run, 0.0, 0.0).samples
    assert len(samples) <= 120 and max(anonymous for _, anonymous, _ in samples) == 6 * GB
    results.plot([replace(each, samples=samples) for each in round_of(1)], tmp_path / "memory.svg")
    assert (tmp_path / "memory.svg").stat().st_size < 60_000
    text = " ".join(xml.etree.ElementTree.parse(tmp_path / "memory.svg").getroot().itertext())
    for label in ("(s)", "(GB)", "Import", "Export", "8B", "upstream", "streaming", "cp -r"):
        assert label in text
