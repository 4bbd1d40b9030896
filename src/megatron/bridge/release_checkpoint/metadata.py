# SPDX-License-Identifier: Apache-2.0
"""What `.metadata` and the common state of a checkpoint hold, read without torch.

The classes that they may name are those that PyTorch's DCP puts into `.metadata` (metadata.py and filesystem.py in
torch/distributed/checkpoint/, 2.1 to 2.11) and those that Megatron-LM puts into the common state (SAFE_GLOBALS in
megatron/core/safe_globals.py, core 0.19).
"""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from megatron.bridge.release_checkpoint import pickles
from megatron.bridge.release_checkpoint.pickles import Inert, UnreadablePickle


MAX_METADATA = 1 << 30
"""Bytes of a `.metadata`; those of the largest trainings have some hundred MB."""

MAX_COMMON_STATE = 64 << 20
"""Bytes of a common state, which holds args and bookkeeping and no weights."""

_MAX_COMMON_PICKLE = 8 << 20
_MAX_ZIP_ENTRIES = 10_000

_DTYPES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 bfloat16 complex32 complex64 "
    "complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 qint8 "
    "quint8 qint32"
)
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


_METADATA_CLASSES: pickles.Classes = {
    ("torch", "Size"): pickles.Size,
    ("collections", "OrderedDict"): pickles.OrderedDict,
    **pickles.stand_ins(
        {
            "torch": _DTYPES,
            "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata "
            "MetadataIndex StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
            "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
            # Where PyTorch up to 2.3 had them.
            "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
            "torch.serialization": "_get_layout",
            "pathlib": "Path PosixPath PurePosixPath",
            # pathlib's own module name from Python 3.13 on.
            "pathlib._local": "PosixPath",
        }
    ),
}
COMMON_CLASSES: pickles.Classes = {
    **_METADATA_CLASSES,
    **pickles.stand_ins(
        {
            "_codecs": "encode",
            "argparse": "Namespace",
            "types": "SimpleNamespace",
            "io": "BytesIO",
            "_io": "BytesIO",
            "signal": "Signals",
            "numpy": "dtype ndarray",
            "numpy.dtypes": "UInt32DType",
            "numpy.core.multiarray": "_reconstruct scalar",
            "numpy._core.multiarray": "_reconstruct scalar",
            "megatron.core.enums": "ModelType",
            "megatron.core.optimizer": "OptimizerConfig",
            "megatron.core.optimizer.optimizer_config": "OptimizerConfig",
            "megatron.core.rerun_state_machine": "RerunDiagnostic RerunMode RerunState",
            "megatron.core.transformer.enums": "AttnBackend CudaGraphModule CudaGraphScope InferenceCudaGraphScope",
            "torch": " ".join(["device", *_STORAGES]),
            "torch._utils": "_rebuild_parameter",
            "torch._C": "Generator",
            "torch.storage": "UntypedStorage",
        }
    ),
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
}


class Shard(NamedTuple):
    """Where one entry of a checkpoint lies: `offset` and `length` are bytes of `file` in the payload folder."""

    entry: str
    file: str
    offset: int
    length: int


class Metadata(NamedTuple):
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
    return _metadata(_read(path, MAX_METADATA), path)


def read_metadata_of_torch(path: str | os.PathLike) -> Any:
    """Read what `read_metadata` reads into PyTorch's own classes, as PyTorch's reader does. Raises the same."""
    data = _read(path, MAX_METADATA)
    _metadata(data, path)
    return pickles.load(data, path, _METADATA_CLASSES, real=True)


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
    return pickles.load(_unzip(_read(path, MAX_COMMON_STATE, offset, length), path), path, COMMON_CLASSES)


def _read(path: str | os.PathLike, most: int, offset: int = 0, length: int | None = None) -> bytes:
    size = os.stat(path).st_size
    length = size - offset if length is None else length
    if offset < 0 or length < 0 or offset + length > size:
        raise UnreadablePickle(path, f"the file has {size} bytes, expected {length} from byte {offset} on")
    if length > most:
        raise UnreadablePickle(path, f"{length} bytes, expected at most {most}")
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _unzip(data: bytes, path: str | os.PathLike) -> bytes:
    """Return the pickle in what `torch.save` writes."""
    # zipfile makes an object of each of the directory's entries before one can ask for their number.
    if data.count(b"PK\x01\x02") > _MAX_ZIP_ENTRIES:
        raise UnreadablePickle(path, f"the file has more than {_MAX_ZIP_ENTRIES} entries, a common state has a few")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entry = next((each for each in archive.infolist() if each.filename.rpartition("/")[2] == "data.pkl"), None)
            if entry is None:
                raise UnreadablePickle(path, "the file holds no data.pkl, expected what torch.save writes")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise UnreadablePickle(path, "the file is compressed, which torch.save doesn't do")
            if entry.file_size > _MAX_COMMON_PICKLE:
                what = f"{entry.file_size} bytes of state, expected at most {_MAX_COMMON_PICKLE}"
                raise UnreadablePickle(path, what)
            return archive.read(entry)
    except UnreadablePickle:
        raise
    except Exception as error:
        # What zipfile raises depends on what is wrong.
        raise UnreadablePickle(path, f"the file is not what torch.save writes ({error})") from None


def _metadata(data: bytes, path: str | os.PathLike) -> Metadata:
    found = pickles.load(data, path, _METADATA_CLASSES)
    try:
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
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UnreadablePickle(path, f"the file is not the metadata of a checkpoint ({error})") from None


def _shard(index: Any, info: Any, files: set[str]) -> Shard:
    """Return a shard; `files` are those that were looked at."""
    _expect(index, "MetadataIndex")
    where = _expect(info, "_StorageInfo").state
    file, offset, length = where["relative_path"], where["offset"], where["length"]
    if _text(file) not in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in file:
            raise ValueError(f"an entry lies in {file[:80]!r}, outside of the checkpoint")
        files.add(file)
    if not (_is_count(offset) and _is_count(length)):
        raise ValueError(f"an entry of {file[:80]!r} has no offset and length within a file")
    return Shard(_text(index.get("fqn")), file, offset, length)


def _expect(found: Any, *kinds: str) -> Inert:
    if not isinstance(found, Inert) or found.kind not in kinds:
        raise ValueError(f"expected an instance of {kinds[0]}, found {type(found).__name__}")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, found {type(value).__name__}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 64 or not all(_is_count(each) for each in value):
        raise ValueError("expected the shape of a tensor")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _dtype(properties: Any) -> str:
    """Return the name of the dtype in TensorProperties, whose state is a tuple or, in early releases, a dict."""
    _expect(properties, "TensorProperties")
    dtype = properties.get("dtype") if isinstance(properties.state, dict) else properties.state[0]
    name = dtype.__name__ if isinstance(dtype, type) else ""
    if not name or dtype is pickles.Size or dtype is not _METADATA_CLASSES.get(("torch", name)):
        raise ValueError("expected the dtype of a tensor")
    return name
