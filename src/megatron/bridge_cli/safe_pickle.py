# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles of a checkpoint without running them, and without torch.

A pickle can call any function that it names, and Python's own unpickler calls it. This one calls nothing: every class
comes from a list of names, each an inert stand-in, and anything else is an error that names file and class. It knows
the opcodes that Python writes and no others, takes nothing for there that is beyond the end of the file, and accounts
for what it makes while it makes it, so a hostile file ends in an error and not in a full memory.

The lists are the classes that PyTorch's DCP puts into `.metadata` (torch/distributed/checkpoint/metadata.py and
filesystem.py, 2.1 to 2.11) and those that Megatron-LM puts into the common state (SAFE_GLOBALS in
megatron/core/safe_globals.py, core 0.19).
"""

import gc
import io
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any


MAX_METADATA = 1 << 30
"""Bytes of a `.metadata`; those of the largest trainings have some hundred MB."""

MAX_COMMON_STATE = 64 << 20
"""Bytes of a common state, which holds args and bookkeeping and no weights."""

_MAX_COMMON_PICKLE = 8 << 20
_MAX_ZIP_ENTRIES = 10_000
# Bytes of containers for a byte of the pickle. Those of real checkpoints take up to 16.
_MAX_EXPANSION = 32


class UnreadablePickle(ValueError):
    """A file is not what a checkpoint has at this place."""

    @property
    def finding(self) -> str:
        """What was found, without the advice to get the checkpoint anew: it may have the same elsewhere."""
        return re.sub(r"[:;] get the checkpoint anew$", "", str(self))


class RefusedPickle(UnreadablePickle):
    """A pickle names what no checkpoint needs: reading it could run code."""


class Inert:
    """Stands for an instance of a class of the list: it keeps what the pickle says of it and does nothing.

    Attributes:
        args: Arguments that the class would have been called with.
        state: What `__setstate__` or the instance's `__dict__` would have got.
    """

    __slots__ = ("args", "state")
    name = kind = ""

    def __init__(self, args: tuple = ()):
        self.args, self.state = args, None

    def get(self, name: str) -> Any:
        """Return an attribute of the instance, None where the pickle has none."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    def __repr__(self) -> str:
        return f"<{self.name}>"


class StoredTensor(Inert):
    """A tensor of a common state, without its values."""

    __slots__ = ()
    name = "tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as `torch._utils._rebuild_tensor_v2` gets it."""
        return _shape(self.args[2])

    @property
    def dtype(self) -> str:
        """The name of the dtype."""
        storage = self.args[0][1]
        return _STORAGES.get(storage.__name__, storage.__name__)


def _inert(*names: str) -> dict[tuple[str, str], type]:
    stand_ins = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        stand_ins[module, attribute] = type(attribute, (Inert,), {"__slots__": (), "name": name, "kind": attribute})
    return stand_ins


_DTYPES = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "qint8",
    "quint8",
    "qint32",
]

_STORAGES = {
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

METADATA_CLASSES = {
    # A tuple, and a dict, for all that is read of them.
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **_inert(*(f"torch.{dtype}" for dtype in _DTYPES)),
    **_inert(
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
        # Where PyTorch up to 2.3 had them.
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.serialization._get_layout",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        # pathlib's own module name from Python 3.13 on.
        "pathlib._local.PosixPath",
    ),
}

_COMMON_CLASSES = {
    **METADATA_CLASSES,
    **_inert(
        "_codecs.encode",
        "argparse.Namespace",
        "types.SimpleNamespace",
        "io.BytesIO",
        "_io.BytesIO",
        "signal.Signals",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.dtypes.UInt32DType",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        "megatron.core.enums.ModelType",
        "megatron.core.optimizer.OptimizerConfig",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
        *(
            f"megatron.core.transformer.enums.{name}"
            for name in ("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")
        ),
        "torch.device",
        "torch._utils._rebuild_parameter",
        "torch._C.Generator",
        *(f"torch.{storage}" for storage in _STORAGES),
        "torch.storage.UntypedStorage",
    ),
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
}


@dataclass(frozen=True)
class Shard:
    """Where one entry of a checkpoint lies.

    Attributes:
        entry: Name of the entry.
        file: Name of the file, relative to the payload folder.
        offset: Bytes from the start of the file.
        length: Bytes.
    """

    entry: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says of a checkpoint.

    Attributes:
        tensors: Shape and dtype of each tensor by name.
        objects: Names of the entries that are not tensors.
        shards: Where the entries lie; a tensor may have several.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    objects: tuple[str, ...]
    shards: tuple[Shard, ...]


def read_metadata(path: str | os.PathLike) -> Metadata:
    """Read a `.metadata` of PyTorch's DCP, without torch.

    Args:
        path: The file.

    Raises:
        RefusedPickle: It names a class that no checkpoint needs.
        UnreadablePickle: It is no such metadata, is cut off, or points outside of its folder.
        OSError: It can't be read.
    """
    path = Path(path)
    with _no_collection():
        found = _load(_read(path, MAX_METADATA), str(path), METADATA_CLASSES)
        try:
            return _as_metadata(found)
        except UnreadablePickle as error:
            raise UnreadablePickle(f"{path}: {error}; get the checkpoint anew") from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"{path} is not the metadata of a checkpoint ({error})"
            raise UnreadablePickle(f"{what}: get the checkpoint anew") from None


def check_metadata(path: str | os.PathLike) -> None:
    """Refuse a `.metadata` that torch's own reader must not open, for that unpickles whatever the file holds.

    Args:
        path: The file.

    Raises:
        RefusedPickle: It names a class that no checkpoint needs.
        UnreadablePickle: It is no such metadata, is cut off, or points outside of its folder.
        OSError: It can't be read.
    """
    read_metadata(path)


def read_common_state(path: str | os.PathLike, offset: int = 0, length: int | None = None) -> Any:
    """Read a common state: `common.pt` (core 0.18 and before), or the bytes of a `.distcp` file that hold it (0.19).

    Args:
        path: The file.
        offset: Bytes before the common state.
        length: Bytes of the common state; up to the end of the file if not given.

    Returns:
        What was saved, in dicts, lists, tuples and plain values; `argparse.Namespace` and other instances are `Inert`
        with their fields in `state`, tensors are `StoredTensor`.

    Raises:
        RefusedPickle: It names a class that no common state needs.
        UnreadablePickle: It is not what `torch.save` writes, or too large.
        OSError: It can't be read.
    """
    path = Path(path)
    data = _read(path, MAX_COMMON_STATE, offset, length)
    # zipfile makes an object of each of the directory's entries before one can ask for their number.
    if data.count(b"PK\x01\x02") > _MAX_ZIP_ENTRIES:
        raise UnreadablePickle(f"{path} has more than {_MAX_ZIP_ENTRIES} entries: it is no common state")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            entry = archive.getinfo(name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise UnreadablePickle(f"{path} is compressed, torch.save does not do that: get the checkpoint anew")
            if entry.file_size > _MAX_COMMON_PICKLE:
                raise UnreadablePickle(
                    f"{path}: {entry.file_size} bytes of state, expected {_MAX_COMMON_PICKLE} at most"
                )
            pickled = archive.read(entry)
    except UnreadablePickle:
        raise
    except StopIteration:
        raise UnreadablePickle(f"{path} holds no data.pkl, expected what torch.save writes") from None
    except (
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        ValueError,
        OSError,
    ) as error:
        raise UnreadablePickle(f"{path} is not what torch.save writes ({error}): get the checkpoint anew") from None
    with _no_collection():
        return _load(pickled, str(path), _COMMON_CLASSES)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the collector from walking, again and again, the objects of a large file, of which none is garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _read(path: Path, most: int, offset: int = 0, length: int | None = None) -> bytes:
    size = path.stat().st_size
    length = size - offset if length is None else length
    if offset < 0 or length < 0 or offset + length > size:
        raise UnreadablePickle(f"{path} has {size} bytes, expected {length} from {offset} on: get the checkpoint anew")
    if length > most:
        raise UnreadablePickle(f"{path}: {length} bytes where at most {most} were expected: it is no checkpoint's")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _load(data: bytes, name: str, classes: Mapping[tuple[str, str], type]) -> Any:
    try:
        return _unpickle(data, name, classes)
    except RefusedPickle:
        raise
    except UnreadablePickle as error:
        raise UnreadablePickle(f"{name}: {error}; get the checkpoint anew") from None
    except (IndexError, struct.error):
        raise UnreadablePickle(f"{name}: the pickle is cut off; get the checkpoint anew") from None
    except (TypeError, ValueError, AttributeError) as error:
        # What a broken pickle raises depends on where it is broken.
        raise UnreadablePickle(f"{name} is not a whole pickle ({error}): get the checkpoint anew") from None


_KEYS = (Inert, type, float, type(None), bytes)
# Bytes of the width of the length, by opcode.
_TEXTS = {0x8C: 1, 0x58: 4, 0x8D: 8}
_BYTES = {0x43: 1, 0x42: 4, 0x8E: 8, 0x96: 8}
# What comes after a tuple that becomes a torch.Size, and after the empty tuple of a new instance with fields: a large
# file is made of these. MEMOIZE TUPLE1 MEMOIZE REDUCE MEMOIZE, and NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK.
_TO_SIZE, _TO_INSTANCE = b"\x94\x85\x94R\x94", b"\x81\x94}\x94("
_STEP = 1 << 16


def _unpickle(data: bytes, name: str, classes: Mapping[tuple[str, str], type]) -> Any:
    """Return what a pickle holds: plain values and stand-ins.

    The opcodes are those that Python's pickler writes in the protocols 2 to 5, and do what pickletools.py says, but
    for classes. Nothing here recurses, and nothing that does is asked of what was read: no tuple is hashed.

    Args:
        data: The pickle.
        name: The file, for errors.
        classes: Stand-ins by module and name.
    """
    stack: list[Any] = []
    push, pop = stack.append, stack.pop
    marks: list[int] = []
    memo: list[Any] = []
    position, spent = 0, 0
    word = int.from_bytes
    index, long, short = (struct.Struct(each).unpack_from for each in ("<I", "<i", "<H"))

    while True:
        if spent > 8 * _STEP + _MAX_EXPANSION * position:
            raise UnreadablePickle(f"the first {position} bytes ask for more memory than those of a checkpoint")
        until = position + _STEP
        # The most frequent first: a large file has millions.
        while position < until:
            code = data[position]
            position += 1
            if code == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif code == 0x6A:  # LONG_BINGET
                push(memo[index(data, position)[0]])
                position += 4
            elif code == 0x4B:  # BININT1
                push(data[position])
                position += 1
            elif code == 0x68:  # BINGET
                push(memo[data[position]])
                position += 1
            elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                if code == 0x87:
                    last, middle = pop(), pop()
                    made = (stack[-1], middle, last)
                elif code == 0x85:
                    made = (stack[-1],)
                else:
                    last = pop()
                    made = (stack[-1], last)
                stack[-1] = made
                spent += 72
                if data.startswith(_TO_SIZE, position) and stack[-2] is tuple:
                    memo += (made, (made,), made)
                    del stack[-2]
                    position += 5
            elif code == 0x28:  # MARK
                if len(marks) > 1000:
                    raise UnreadablePickle("it is nested more than 1000 times")
                marks.append(len(stack))
            elif code == 0x29:  # EMPTY_TUPLE
                found = stack[-1]
                if data.startswith(_TO_INSTANCE, position) and type(found) is type and issubclass(found, Inert):
                    stack[-1], state = found(), {}
                    memo += (stack[-1], state)
                    push(state)
                    marks.append(len(stack))
                    position += 5
                    spent += 264
                else:
                    push(())
            elif code == 0x81 or code == 0x52:  # NEWOBJ, REDUCE
                arguments, found = pop(), stack[-1]
                if type(found) is not type or type(arguments) is not tuple or len(arguments) > 16:
                    raise UnreadablePickle("it makes an instance of no class")
                if found is tuple:
                    if len(arguments) != 1 or type(arguments[0]) is not tuple or len(arguments[0]) > 64:
                        raise UnreadablePickle("expected the shape of a tensor")
                    stack[-1] = arguments[0]
                elif found is dict:
                    if arguments:
                        raise UnreadablePickle("expected an OrderedDict that is filled afterwards")
                    stack[-1] = {}
                    spent += 200
                else:
                    stack[-1] = found(arguments)
                    spent += 64
            elif code == 0x62:  # BUILD
                state = pop()
                if not isinstance(stack[-1], Inert):
                    raise UnreadablePickle(f"it changes {type(stack[-1]).__name__}, which has no state")
                stack[-1].state = state
            elif code == 0x75:  # SETITEMS
                mark = marks.pop()
                _fill(stack[mark - 1], stack, mark)
                del stack[mark:]
            elif code == 0x7D:  # EMPTY_DICT
                push({})
                spent += 200
            elif code == 0x4D:  # BININT2
                push(short(data, position)[0])
                position += 2
            elif code == 0x4A:  # BININT
                push(long(data, position)[0])
                position += 4
            elif code == 0x8A:  # LONG1
                end = position + 1 + data[position]
                push(word(data[position + 1 : end], "little", signed=True))
                position = end
            elif code in _TEXTS:
                start = position + _TEXTS[code]
                position = start + word(data[position:start], "little")
                push(str(data[start:position], "utf-8"))
            elif code == 0x71 or code == 0x72:  # BINPUT, LONG_BINPUT
                width = 1 if code == 0x71 else 4
                at = word(data[position : position + width], "little")
                position += width
                # A pickler counts them.
                if at == len(memo):
                    memo.append(stack[-1])
                elif at < len(memo):
                    memo[at] = stack[-1]
                else:
                    raise UnreadablePickle(f"byte {position} asks for more memory than that of a checkpoint")
            elif code == 0x89:
                push(False)
            elif code == 0x88:
                push(True)
            elif code == 0x4E:
                push(None)
            elif code == 0x74:  # TUPLE
                mark = marks.pop()
                stack[mark:] = [tuple(stack[mark:])]
                spent += 64
            elif code == 0x5D:  # EMPTY_LIST
                push([])
                spent += 120
            elif code == 0x65:  # APPENDS
                mark = marks.pop()
                items = stack[mark:]
                del stack[mark:]
                _list(stack[-1]).extend(items)
            elif code == 0x61:  # APPEND
                item = pop()
                _list(stack[-1]).append(item)
            elif code == 0x73:  # SETITEM
                _fill(stack[-3], stack, len(stack) - 2)
                del stack[-2:]
            elif code == 0x47:  # BINFLOAT
                push(struct.unpack_from(">d", data, position)[0])
                position += 8
            elif code in _BYTES:
                start = position + _BYTES[code]
                position = start + word(data[position:start], "little")
                push(data[start:position])
            elif code == 0x63:  # GLOBAL
                middle = data.index(b"\n", position)
                end = data.index(b"\n", middle + 1)
                module, attribute = str(data[position:middle], "utf-8"), str(data[middle + 1 : end], "utf-8")
                push(_find_class(classes, name, module, attribute))
                position = end + 1
            elif code == 0x93:  # STACK_GLOBAL
                attribute, module = pop(), pop()
                push(_find_class(classes, name, _text(module), _text(attribute)))
            elif code == 0x95:  # FRAME
                position += 8
            elif code == 0x80:  # PROTO
                position += 1
            elif code == 0x51:  # BINPERSID, of what torch.save puts into other entries
                pass
            elif code == 0x2E:  # STOP
                return pop()
            else:
                raise UnreadablePickle(f"byte {position - 1} is no opcode of a checkpoint's pickle")


def _find_class(classes: Mapping[tuple[str, str], type], file: str, module: str, name: str) -> type:
    found = classes.get((module, name))
    if found is None:
        raise RefusedPickle(
            f"{file} names {module[:80]}.{name[:80]}, which is none of the classes of a checkpoint and could "
            "run code: don't load it, get the checkpoint from a source that you trust"
        )
    return found


def _fill(found: Any, stack: list[Any], start: int) -> None:
    """Put the keys and values that lie on the stack from `start` on, in turn, into a dict."""
    if type(found) is not dict:
        raise UnreadablePickle(f"expected a dict, found {type(found).__name__}")
    for at in range(start, len(stack), 2):
        key = stack[at]
        if type(key) is not str and not _is_key(key):
            raise UnreadablePickle(f"a key is {type(key).__name__}, expected a name")
        found[key] = stack[at + 1]


def _is_key(value: Any) -> bool:
    """Tell whether a value is hashed without recursion, and not made to have the hash of many others."""
    if isinstance(value, int):
        return -1 << 63 <= value < 1 << 63
    if type(value) is tuple:
        plain = (type(each) is str or isinstance(each, int) and abs(each) < 1 << 16 for each in value)
        return len(value) <= 16 and all(plain)
    return isinstance(value, _KEYS)


def _list(found: Any) -> list[Any]:
    if type(found) is not list:
        raise UnreadablePickle(f"expected a list, found {type(found).__name__}")
    return found


def _as_metadata(found: Any) -> Metadata:
    _expect(found, "Metadata")
    tensors, objects = {}, []
    for name, entry in found.get("state_dict_metadata").items():
        if _expect(entry, "TensorStorageMetadata", "BytesStorageMetadata").kind == "BytesStorageMetadata":
            objects.append(_text(name))
        else:
            tensors[_text(name)] = (_shape(entry.get("size")), _dtype(entry.get("properties")))
    files: set[str] = set()
    shards = tuple(_shard(index, info, files) for index, info in found.get("storage_data").items())
    return Metadata(tensors, tuple(objects), shards)


def _shard(index: Any, info: Any, files: set[str]) -> Shard:
    """Return a shard; `files` are those that were looked at."""
    _expect(index, "MetadataIndex")
    where = _expect(info, "_StorageInfo").state
    file, offset, length = where["relative_path"], where["offset"], where["length"]
    if _text(file) not in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in file:
            raise UnreadablePickle(f"an entry lies in {file[:80]!r}, outside of the checkpoint")
        files.add(file)
    if not (_is_count(offset) and _is_count(length)):
        raise UnreadablePickle(f"an entry of {file[:80]!r} has no offset and length within a file")
    return Shard(_text(index.get("fqn")), file, offset, length)


def _expect(found: Any, *kinds: str) -> Inert:
    if not isinstance(found, Inert) or found.kind not in kinds:
        raise UnreadablePickle(f"expected an instance of {kinds[0]}, found {type(found).__name__}")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnreadablePickle(f"expected a name, found {type(value).__name__}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 64 or not all(_is_count(each) for each in value):
        raise UnreadablePickle("expected the shape of a tensor")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _dtype(properties: Any) -> str:
    """Return the name of the dtype in TensorProperties, whose state is a tuple or, in early releases, a dict."""
    _expect(properties, "TensorProperties")
    dtype = properties.get("dtype") if isinstance(properties.state, dict) else properties.state[0]
    name = getattr(dtype, "__name__", None) if isinstance(dtype, type) and issubclass(dtype, Inert) else None
    if name not in _DTYPES:
        raise UnreadablePickle("expected the dtype of a tensor")
    return name
