# SPDX-License-Identifier: Apache-2.0
"""Pickles of a checkpoint are read, and those that would run code, or fill the memory, are not."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.bridge.release_checkpoint.metadata import (
    MAX_COMMON_STATE,
    MAX_METADATA,
    read_common_state,
    read_metadata,
)
from megatron.bridge.release_checkpoint.pickles import RefusedPickle, UnreadablePickle, load, stand_ins


class Payload:
    """Pickles to a call that leaves a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def calling(module: str, name: str, *arguments) -> bytes:
    """A pickle that calls `module.name`, in protocol 2, as torch.save has it."""
    packed = pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + packed + b"R."


def save(state: dict, folder: Path) -> None:
    """Writes a checkpoint as Megatron Core does: an object is one entry, whatever is in it."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of PyTorch's writer: two tensors and an object."""
    folder = tmp_path / "checkpoint"
    state = {"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.bfloat16), "common_state/shard_0_1": [{"x": 1}]}
    save(state, folder)
    return folder


def saved(path: Path, state) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("where", ["common.pt", "common state", ".metadata", "inside .metadata"])
def test_payload_does_not_run(checkpoint: Path, tmp_path: Path, where: str):
    trace = tmp_path / "trace"
    reading = checkpoint / "common.pt"
    read = read_common_state
    if where == "common.pt":
        torch.save({"args": Payload(trace)}, reading)
    elif where == "common state":
        state = {"common_state/shard_0_1": [{"args": Payload(trace)}]}
        save(state, checkpoint)
        (shard,) = read_metadata(checkpoint / ".metadata").shards
        reading = checkpoint / shard.file
    elif where == ".metadata":
        reading, read = checkpoint / ".metadata", read_metadata
        reading.write_bytes(pickle.dumps(Payload(trace)))
    else:
        reading, read = checkpoint / ".metadata", read_metadata
        metadata = pickle.loads(reading.read_bytes())
        metadata.planner_data = {"a": Payload(trace)}
        reading.write_bytes(pickle.dumps(metadata))
    with pytest.raises(RefusedPickle) as error:
        read(reading)
    assert not trace.exists()
    assert str(reading) in str(error.value)
    assert "names posix.mkdir" in str(error.value)


def test_payload_of_the_test_would_run(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
        ("pathlib", "Path.touch"),
        ("pathlib", "os.system"),
        ("collections", "namedtuple"),
        ("torch.distributed.checkpoint.metadata", "os.getenv"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
    ],
)
def test_what_is_not_on_the_list_is_refused(tmp_path: Path, module: str, name: str):
    path = tmp_path / ".metadata"
    for data in (calling(module, name, "x"), _stack_global(module, name)):
        path.write_bytes(data)
        with pytest.raises(RefusedPickle, match="Don't load it. Get the checkpoint from a source that you trust."):
            read_metadata(path)


def _stack_global(module: str, name: str) -> bytes:
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93."


def test_metadata_that_is_cut_off_is_refused_wherever(checkpoint: Path):
    path = checkpoint / ".metadata"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UnreadablePickle):
            read_metadata(path)


def _zip(name: str, data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def _many_entries() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(20_000):
            archive.writestr(str(number), b"")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not what torch.save writes"),
        (b"not a zip", "is not what torch.save writes"),
        (_zip("archive/other", b""), "holds no data.pkl"),
        (_zip("archive/data.pkl", bytes(100 << 20), zipfile.ZIP_DEFLATED), "is compressed"),
        (_many_entries(), "more than 10000 entries"),
        (_zip("archive/data.pkl", b"\x80\x02N"), "cut off"),
        (_zip("archive/data.pkl", b"\x80\x02Nr\xff\xff\xff\x7f."), "asks for more memory"),
        (_zip("archive/data.pkl", b"\x80\x02Nr\xff\0\0\0" + b"N" * 1000 + b"."), "asks for more memory"),
        (_zip("archive/data.pkl", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x."), "cut off"),
        (_zip("archive/data.pkl", b"\x80\x02ios\nsystem\n."), "no opcode of a checkpoint's pickle"),
        (_zip("archive/data.pkl", b"\x80\x02\x82\x01."), "no opcode of a checkpoint's pickle"),
        (_zip("archive/data.pkl", bytes(9 << 20)), "bytes of state"),
    ],
    ids=[
        "empty",
        "text",
        "no pickle",
        "bomb",
        "entries",
        "cut",
        "memo",
        "small memo",
        "length",
        "old opcode",
        "extension",
        "long",
    ],
)
def test_broken_common_state_is_refused_in_little_memory(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "common.pt"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadablePickle, match=message) as error:
        read_common_state(path)
    assert str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -5), (10, 1 << 50), (1 << 50, 1)])
def test_range_outside_of_the_file_is_refused(tmp_path: Path, offset: int, length: int):
    path = saved(tmp_path / "common.pt", {})
    with pytest.raises(UnreadablePickle, match="Copy or download the checkpoint again"):
        read_common_state(path, offset, length)


def test_file_that_is_too_large_is_refused_unread(tmp_path: Path):
    for name, most, read in [
        ("common.pt", MAX_COMMON_STATE, read_common_state),
        (".metadata", MAX_METADATA, read_metadata),
    ]:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, most + 1)
        with pytest.raises(UnreadablePickle, match="at most"):
            read(tmp_path / name)


# Opcodes by their names in pickletools.
NONE, MARK, TUPLE, TUPLE1, EMPTY_DICT, EMPTY_LIST, APPEND = b"N", b"(", b"t", b"\x85", b"}", b"]", b"a"
EMPTY_TUPLE, REDUCE, NEWOBJ, BUILD, SETITEM, MEMOIZE, STOP = b")", b"R", b"\x81", b"b", b"s", b"\x94", b"."
DCP = "torch.distributed.checkpoint.metadata"


def of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def memoized(value: bytes, at: int) -> bytes:
    return value + b"r" + at.to_bytes(4, "little")


def repeated_call(cls: bytes, arguments: bytes, times: int) -> bytes:
    """A pickle that calls a class with the same arguments again and again."""
    start = b"\x80\x02" + memoized(cls, 0) + memoized(arguments, 1)
    return start + EMPTY_LIST + (b"h\x00h\x01" + REDUCE + APPEND) * times + STOP


MANY = MARK + NONE * 20_000 + TUPLE
PAIRS = b"".join(b"M" + each.to_bytes(2, "little") + NONE + b"\x86" for each in range(20_000))
PAIRS = EMPTY_LIST + MARK + PAIRS + b"e" + TUPLE1
# The modulus of Python's hash of numbers.
P = (1 << 61) - 1
HOSTILE = {
    "instances of a class with many arguments": repeated_call(of(DCP, "MetadataIndex"), MANY, 5_000),
    "sizes of many dimensions": repeated_call(of("torch", "Size"), MANY + TUPLE1, 5_000),
    "ordered dicts of many pairs": repeated_call(of("collections", "OrderedDict"), PAIRS, 5_000),
    "memo numbers as large as the file": b"\x80\x02" + memoized(NONE, 3_000_000) + NONE * 3_000_000 + STOP,
    "nested tuples as a key": b"\x80\x04" + EMPTY_DICT + EMPTY_TUPLE + TUPLE1 * 3_000_000 + NONE + SETITEM + STOP,
    "the same in pairs": b"\x80\x04" + EMPTY_DICT + EMPTY_TUPLE + (NONE + b"\x86") * 10**6 + NONE + SETITEM + STOP,
    "nested tuples": b"\x80\x04" + EMPTY_TUPLE + TUPLE1 * 3_000_000 + STOP,
    "nested marks": b"\x80\x04" + MARK * 3_000_000 + STOP,
    "nested instances": b"\x80\x04" + of(DCP, "Metadata") + EMPTY_TUPLE + NEWOBJ
    + (MEMOIZE + of(DCP, "Metadata") + b"h\x00" + TUPLE1 + REDUCE) * 30_000 + STOP,
    "empty dicts": b"\x80\x04" + EMPTY_DICT * 3_000_000 + STOP,
    "dicts of a key": b"\x80\x04" + (EMPTY_DICT + NONE + NONE + SETITEM) * 700_000 + STOP,
    "empty lists": b"\x80\x04" + EMPTY_LIST * 3_000_000 + STOP,
    "memoized": b"\x80\x04" + NONE + MEMOIZE * 3_000_000 + STOP,
    "short strings": b"\x80\x04" + b"\x8c\x02ab" * 700_000 + STOP,
    "numbers of one hash as keys": b"\x80\x02" + EMPTY_DICT
    + b"".join(b"\x8a\x14" + (each * P << 64).to_bytes(20, "little") + NONE + SETITEM for each in range(100_000))
    + STOP,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_in_bounded_memory_and_time(tmp_path: Path, name: str):
    """Read in a process of its own: what overflows the stack ends it."""
    assert len(HOSTILE[name]) <= 4 << 20
    (tmp_path / ".metadata").write_bytes(HOSTILE[name])
    (tmp_path / "common.pt").write_bytes(_zip("archive/data.pkl", HOSTILE[name]))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from megatron.bridge.release_checkpoint.metadata import read_common_state, read_metadata
        from megatron.bridge.release_checkpoint.pickles import UnreadablePickle
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        for name, read in (".metadata", read_metadata), ("common.pt", read_common_state):
            try:
                read(Path(sys.argv[1], name))
            except UnreadablePickle as error:
                assert name in str(error) and chr(10) not in str(error), error
                print(str(error)[:200])
            else:
                assert name == "common.pt"
            # In KiB; the process itself takes some 15 MB.
            most = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
            assert most < 200 << 10, most
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout


def with_a_key(key: bytes) -> bytes:
    """A pickle of an instance that has this as the name of a field; most of a metadata has this form."""
    start = b"\x80\x04" + of(DCP, "MetadataIndex") + MEMOIZE + key + MEMOIZE
    return (
        start + b"h\x00" + EMPTY_TUPLE + NEWOBJ + MEMOIZE + EMPTY_DICT + MEMOIZE + MARK + b"h\x01K\x01u" + BUILD + STOP
    )


@pytest.mark.parametrize("key", [NONE + TUPLE1 + TUPLE1, b"\x8a\x09" + bytes(8) + b"\x01", MARK + NONE * 17 + TUPLE])
def test_keys_of_an_instance_are_checked_like_those_of_a_dict(key: bytes):
    assert load(with_a_key(b"\x8c\x03fqn"), "file", stand_ins({DCP: "MetadataIndex"})).state == {"fqn": 1}
    for data in (with_a_key(key), b"\x80\x04" + EMPTY_DICT + key + NONE + SETITEM + STOP):
        with pytest.raises(UnreadablePickle, match="a key of a dict"):
            load(data, "file", stand_ins({DCP: "MetadataIndex"}))


def test_a_pickle_that_is_cut_off_is_refused_wherever():
    whole = pickle.dumps({"a": [1, 2.5, ("x", b"y")], "b": {1: None}})
    for length in range(len(whole)):
        with pytest.raises(UnreadablePickle, match="^file: the pickle is cut off or damaged"):
            load(whole[:length], "file", {})


def _metadata_of(shards: int) -> bytes:
    """The metadata of a model with this many shards, as torch 2.11 has it."""
    tensors, stored = {}, {}
    properties = TensorProperties(dtype=torch.bfloat16)
    for tensor in range(shards // 64):
        places = [torch.Size([part, 0, 0]) for part in range(64)]
        chunks = [ChunkStorageMetadata(offsets=place, sizes=torch.Size([1, 64, 64])) for place in places]
        tensors[f"weight{tensor}"] = TensorStorageMetadata(properties, torch.Size([64, 64, 64]), chunks)
        for part, place in enumerate(places):
            file = f"__{part % 8}_0.distcp"
            stored[MetadataIndex(f"weight{tensor}", place, part)] = _StorageInfo(file, part << 20, 1 << 20)
    return pickle.dumps(Metadata(tensors, {name: ("model", name, 0) for name in tensors}, stored))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_of_many_shards_is_read_in_memory_of_its_size(tmp_path: Path, protocol: int):
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(_metadata_of(1280)), protocol))
    tracemalloc.start()
    metadata = read_metadata(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(metadata.shards) == 1280
    assert metadata.tensors["weight7"] == ((64, 64, 64), "bfloat16")
    assert (metadata.shards[65].entry, metadata.shards[65].file) == ("weight1", "__1_0.distcp")
    assert (metadata.shards[65].offset, metadata.shards[65].length) == (1 << 20, 1 << 20)
    assert most < 24 * path.stat().st_size


# --- values of a common state, as `inspect` has them ---------------------------------------------------------------


def _inspect(root: Path) -> dict:
    """What `inspect --json` prints, in an address space that it needs not much of."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2);"
    limited += "from megatron.bridge.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", limited, "inspect", str(root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr[-500:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("values", "iteration"),
    [
        ({"iteration": 10**400}, 2**63 - 1),
        ({"iteration": -(10**400)}, 0),
        ({"checkpoint_version": 10**400}, 0),
        ({"checkpoint_version": float("nan")}, 0),
        ({"checkpoint_version": float("inf")}, 0),
    ],
    ids=["iteration", "negative iteration", "version", "NaN", "infinity"],
)
def test_numbers_that_no_checkpoint_has_do_no_harm(build, tmp_path: Path, values: dict, iteration: int):
    document = _inspect(build(tmp_path / "c", core="0.18", common=values))
    assert document["payload"]["iteration"] == iteration
    assert document["payload"]["args"]["num_layers"]


def test_args_that_are_not_plain_are_left_out(build, tmp_path: Path):
    root = build(tmp_path / "c", core="0.18")
    path = root / "release/common.pt"
    state = torch.load(path, weights_only=False)
    word = "\N{BELL}" * 30_000
    shared = [[word] * 1000] * 1000
    vars(state["args"]).update(
        {7: 1, "huge": 10**400, "infinite": float("inf"), "shared": shared, "plain": [1, ["x"]]}
    )
    vars(state["args"]).update({f"slow{each}": [*shared[:-1], [shared]] for each in range(500)})
    torch.save(state, path)
    before = path.stat().st_size
    args = _inspect(root)["payload"]["args"]
    assert before < 8 << 20
    assert args["plain"] == [1, ["x"]]
    assert args["num_layers"]
    assert not {7, "7", "huge", "infinite", "shared", "slow1"} & args.keys()


def test_a_number_of_thousands_of_digits_is_damage(build, tmp_path: Path):
    root = build(tmp_path / "c", core="0.18")
    torch.save({"iteration": 10**5000}, root / "release/common.pt")
    document = _inspect(root)
    assert any("no opcode of a checkpoint's pickle" in each["what"] for each in document["problems"])
