# SPDX-License-Identifier: Apache-2.0
"""What a streaming import writes is what the import in memory writes, whatever the family, the ranks, the threads.

And it needs no memory for the model, and leaves nothing where it fails.
"""

import errno
import io
import itertools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
import steps
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from rich.console import Console

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.cli.terminal import Terminal as CommandTerminal
from megatron.bridge.cli.terminal import progress
from megatron.bridge.models.conversion import model_bridge, param_mapping
from megatron.bridge.models.conversion.streaming import execute, plan


def layout(payload: Path) -> dict[str, Any]:
    """Return what the metadata says of each key: dtype, shape, and offset and size of each chunk."""
    metadata = dcp.FileSystemReader(payload).read_metadata().state_dict_metadata
    return {
        key: (entry.properties.dtype, entry.size, sorted((chunk.offsets, chunk.sizes) for chunk in entry.chunks))
        if hasattr(entry, "chunks")
        else "bytes"
        for key, entry in metadata.items()
    }


def items(payload: Path) -> dict[tuple[str, Any], tuple]:
    """Return each item as it lies in the files: bytes of an object; dtype, shape and values of a tensor, and length.

    The archives that `torch.save` makes of tensors are checked against the sums in them on the way.
    """
    metadata = dcp.FileSystemReader(payload).read_metadata()
    result = {}
    for index, info in metadata.storage_data.items():
        with (payload / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        if hasattr(metadata.state_dict_metadata[index.fqn], "chunks"):
            tensor = torch.load(io.BytesIO(content), weights_only=True)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            values = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert archive.testzip() is None
            result[index.fqn, index.offset] = (tensor.dtype, tensor.shape, values, info.length)
        else:
            result[index.fqn, index.offset] = (content,)
    return result


def other_files(root: Path) -> dict[Path, bytes]:
    """Return run config, tokenizer, tracker and the like; where the checkpoint was written to is left out."""
    return {
        path.relative_to(root): path.read_bytes().replace(str(root).encode(), b"ROOT")
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".distcp" and path.name != ".metadata"
    }


def assert_same(one: Path, other: Path) -> None:
    """Compare two checkpoint roots entry by entry."""
    payloads = [root / name for root in (one, other) for name in steps.payloads(root)]
    assert len(payloads) == 2
    assert layout(payloads[0]) == layout(payloads[1])
    left, right = (items(payload) for payload in payloads)
    assert left.keys() == right.keys()
    assert [key for key in left if left[key] != right[key]] == []
    assert other_files(one) == other_files(other)


def is_streamed(caplog: pytest.LogCaptureFixture) -> bool:
    return not [record for record in caplog.records if "not streamed" in record.getMessage()]


def fallen_back(model: Path) -> str:
    """Return the warning that a model is imported in memory."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return (
        f"{model} is imported in memory, not streamed: its bridge has a loader of its own. "
        f"It takes about {size / 1e6:,.0f} MB of memory, the size of its weights."
    )


@pytest.fixture
def in_memory(tmp_path: Path, llama: Path) -> Path:
    """Import the small Llama the other way."""
    AutoBridge.import_ckpt(llama, tmp_path / "in-memory", streaming=False)
    return tmp_path / "in-memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_streams_what_the_import_in_memory_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, dtype: torch.dtype
) -> None:
    source = models.make_model(tmp_path / "hf", family, dtype, num_hidden_layers=2)
    AutoBridge.import_ckpt(source, tmp_path / "in-memory", streaming=False)
    AutoBridge.import_ckpt(source, tmp_path / "streamed")
    assert is_streamed(caplog)
    assert_same(tmp_path / "in-memory", tmp_path / "streamed")


@pytest.mark.parametrize("release", [True, False], ids=["release", "training checkpoint"])
def test_streams_in_another_dtype(tmp_path: Path, llama: Path, release: bool) -> None:
    for streaming in (False, True):
        AutoBridge.import_ckpt(
            llama, tmp_path / str(streaming), streaming=streaming, release=release, torch_dtype=torch.bfloat16
        )
    assert_same(tmp_path / "False", tmp_path / "True")


def test_threads_write_the_same_in_files_of_their_own(
    tmp_path: Path, llama: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "processors", lambda: 3)
    monkeypatch.setattr(execute, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(execute, "BLOCK_BYTES", 1000)
    AutoBridge.import_ckpt(llama, tmp_path / "streamed")
    assert {path.name for path in tmp_path.rglob("streamed/release/*.distcp")} == {f"__0_{n}.distcp" for n in range(3)}
    assert_same(in_memory, tmp_path / "streamed")


IMPORT = """
import sys
from megatron.bridge.utils.deferred import lean_imports

with lean_imports():
    from megatron.bridge import AutoBridge
AutoBridge.import_ckpt(*sys.argv[1:])
"""


def test_ranks_write_the_same_each_its_share(tmp_path: Path, llama: Path, in_memory: Path) -> None:
    script = tmp_path / "import.py"
    script.write_text(IMPORT)
    command = [*steps.launch(script, ranks=2), str(llama), str(tmp_path / "streamed")]
    steps.Step("import on two ranks", command, tmp_path / "log.txt").run()
    shares = {path.name: path.stat().st_size for path in tmp_path.rglob("streamed/release/*.distcp")}
    assert shares.keys() == {"__0_0.distcp", "__1_0.distcp"}
    assert min(shares.values()) > max(shares.values()) / 2
    assert_same(in_memory, tmp_path / "streamed")


def test_a_bridge_with_a_loader_of_its_own_falls_back(
    tmp_path: Path, llama: Path, in_memory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = type(AutoBridge.from_hf_pretrained(llama)._model_bridge)

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        return model_bridge.MegatronModelBridge.load_weights_hf_to_megatron(self, *args, **kwargs)

    monkeypatch.setattr(bridge, "load_weights_hf_to_megatron", load)
    AutoBridge.import_ckpt(llama, tmp_path / "fallen-back")
    (line,) = [record for record in caplog.records if record.name == plan.__name__]
    assert line.levelno == logging.WARNING
    assert line.getMessage() == fallen_back(llama)
    assert_same(in_memory, tmp_path / "fallen-back")


def test_a_parameter_without_mapping_is_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = model_bridge.MegatronModelBridge.build_conversion_tasks
    monkeypatch.setattr(
        model_bridge.MegatronModelBridge,
        "build_conversion_tasks",
        lambda self, *args, **kwargs: build(self, *args, **kwargs)[1:],
    )
    with pytest.raises(ValueError, match="has no source for 1 parameters of the Megatron model"):
        AutoBridge.import_ckpt(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mapping_that_makes_a_parameter_on_the_models_device_streams(
    tmp_path: Path,
    llama: Path,
    in_memory: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def convert(self: Any, weights: torch.Tensor, module: Any) -> torch.Tensor:
        return torch.empty(weights.shape, device=module.weight.device).copy_(weights)

    monkeypatch.setattr(param_mapping.ReplicatedMapping, "hf_to_megatron", convert)
    AutoBridge.import_ckpt(llama, tmp_path / "streamed")
    assert is_streamed(caplog)
    assert_same(in_memory, tmp_path / "streamed")


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import torch
from megatron.bridge.utils.deferred import lean_imports

with lean_imports():
    from megatron.bridge import AutoBridge

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

small, large, out = sys.argv[1:]
AutoBridge.import_ckpt(small, out + "-small", torch_dtype=torch.bfloat16)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
AutoBridge.import_ckpt(large, out + "-large", torch_dtype=torch.bfloat16)
print("GREW", status("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_embedding(tmp_path: Path, llama: Path) -> None:
    """Anonymous memory and mapped pages together, of an import that converts what it reads."""
    large = models.make_model(tmp_path / "large", vocab_size=200_000, hidden_size=512, num_hidden_layers=1)
    embedding = 200_000 * 512 * 4
    command = [sys.executable, "-c", PEAK, str(llama), str(large), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env=steps.environment(), check=True)
    grew = int(run.stdout.rpartition("GREW ")[2])
    assert grew < embedding / 4


# --- failure ---------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "processors", lambda: 2)
    monkeypatch.setattr(execute, "BYTES_PER_THREAD", 1)


def test_a_full_disk_leaves_nothing(tmp_path: Path, llama: Path, threads: None) -> None:
    with full_disk(100_000), pytest.raises(OSError) as caught:
        AutoBridge.import_ckpt(llama, tmp_path / "out")
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_cut_off_after_the_first_look_leaves_nothing(
    tmp_path: Path, llama: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models.copy_model(llama, tmp_path / "hf")
    make_plan = plan.plan_import

    def cut_off(*args: Any) -> Any:
        model = make_plan(*args)
        (file,) = source.glob("*.safetensors")
        os.truncate(file, file.stat().st_size * 2 // 3)
        return model

    monkeypatch.setattr(plan, "plan_import", cut_off)
    with pytest.raises(ValueError, match="download it again") as caught:
        AutoBridge.import_ckpt(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from megatron.bridge.utils.deferred import lean_imports

with lean_imports():
    from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.streaming import dcp

write = dcp.write_tensor
written = []
def killed(*args):
    finite = write(*args)
    written.append(args)
    if len(written) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return finite
dcp.write_tensor = killed
AutoBridge.import_ckpt(*sys.argv[1:])
"""


def test_a_kill_leaves_the_checkpoint_that_was_there(tmp_path: Path, llama: Path, in_memory: Path) -> None:
    before = items(in_memory / "release")
    command = [sys.executable, "-c", KILLED, str(llama), str(in_memory)]
    run = subprocess.run(command, capture_output=True, env=steps.environment(), check=False)
    assert run.returncode == -signal.SIGKILL
    assert list(in_memory.rglob("*.incomplete.*/release/*.distcp"))
    assert steps.tracker(in_memory) == "release"
    assert items(in_memory / "release") == before
    AutoBridge.import_ckpt(llama, in_memory)
    assert steps.payloads(in_memory) == ["release"]
    assert items(in_memory / "release") == before


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_for_terminals(
    tmp_path: Path, llama: Path, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        execute,
        "Console",
        lambda **kwargs: Console(file=shown, force_terminal=is_terminal, width=120),
    )
    AutoBridge.import_ckpt(llama, tmp_path / "out")
    assert ("importing" in shown.getvalue()) == is_terminal
    if is_terminal:
        assert "/s" in shown.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_commands_bar_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    shown = Terminal()
    sizes = itertools.count(0, 1_000_000)
    terminal = CommandTerminal(shown, shown, False)
    with progress(terminal, "Importing", lambda: next(sizes), 100_000_000):
        terminal.note("it takes long")
        for _ in range(200):
            time.sleep(0.1)
            text = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
            if seen := re.search(r"\d \w+/s \d:\d\d:\d\d \d:\d\d:\d\d", text):
                break
    assert seen
    assert "\r\x1b[KNote: it takes long\n" in shown.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_that_a_model_is_not_streamed(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    bridge = type(AutoBridge.from_hf_pretrained(llama)._model_bridge)

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        return model_bridge.MegatronModelBridge.load_weights_hf_to_megatron(self, *args, **kwargs)

    for name in ("streamed", "in-memory"):
        arguments = ["import", str(llama), str(tmp_path / name), *(["--json"] if as_json else [])]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        line = fallen_back(llama)
        assert result.stderr == ("" if name == "streamed" else f"Note: {line}\n")
        if as_json:
            assert (line in json.loads(result.stdout)["notes"]) == (name == "in-memory")
        monkeypatch.setattr(bridge, "load_weights_hf_to_megatron", load)
