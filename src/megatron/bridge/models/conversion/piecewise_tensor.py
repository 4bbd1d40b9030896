# SPDX-License-Identifier: Apache-2.0
"""A tensor that is a list of pieces of other tensors, and is read block by block.

A parameter mapping takes Hugging Face's tensors apart and puts the pieces together: rows of query, key and value
interleaved, gate and up projection one below the other. On `PiecewiseTensor` it does so without touching a byte: a
view or a concatenation along the first dimension is a new list of pieces. What a mapping does beyond that (arithmetic,
a transposition) is computed on the tensors in memory, so every mapping works, and most need no memory.
"""

import ctypes
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


_aten = torch.ops.aten
# What the disk is asked for before it is needed; more than what a virtual disk reads ahead on its own.
_READ_AHEAD_BYTES = 8 << 20
# Linux maps up to this much around a page that is read: more than a block, and more than a tensor. Whoever else reads
# there maps it again.
_FOLIO_BYTES = 2 << 20
# They make a tensor that is like another one, whose values they don't read.
_FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
# `mmap.madvise` keeps the interpreter's lock (`Modules/mmapmodule.c`, Python 3.12), and asking for 8 MiB takes
# milliseconds, for which the other threads would wait.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
# The filters of warnings are the whole process's.
_filtering = threading.Lock()


def storage_of(memory: mmap.mmap) -> torch.UntypedStorage:
    """Return the storage that a mapping is. Writing to that of a read-only mapping ends the process.

    A read-only mapping, unlike one that is copied on write, may be larger than the host's memory.
    """
    with _filtering, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


@dataclass(frozen=True)
class MappedFile:
    """A file that is mapped into memory, read-only, and where a tensor lies in it.

    Attributes:
        storage: The mapping, as `storage_of` gives it.
        offset: Where the tensor starts, in bytes.
    """

    storage: torch.UntypedStorage
    offset: int

    def expect(self, start: int, stop: int) -> None:
        """Ask for the bytes from `start` to `stop` of the tensor to be read ahead."""
        self._advise(mmap.MADV_WILLNEED, start, stop, mmap.PAGESIZE)

    def release(self, start: int, stop: int) -> None:
        """Take the pages of the bytes from `start` to `stop` out of this process; the page cache keeps them."""
        self._advise(mmap.MADV_DONTNEED, start, stop, _FOLIO_BYTES)

    def _advise(self, advice: int, start: int, stop: int, unit: int) -> None:
        first = (self.offset + start) // unit * unit
        last = min(-(-(self.offset + stop) // unit) * unit, self.storage.nbytes())
        if last > first and _madvise(self.storage.data_ptr() + first, last - first, advice):
            raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor.

    Attributes:
        flat: The tensor, one-dimensional.
        start: The first element.
        stop: One past the last element.
        file: The file that `flat` is a view of, if any.
        casts: The dtypes that the elements are converted to, one after the other.
    """

    flat: torch.Tensor
    start: int
    stop: int
    file: MappedFile | None = None
    casts: tuple[torch.dtype, ...] = ()

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the elements in order, in tensors of at most `size` bytes that are valid until the next one."""
        width = self.flat.element_size()
        step = max(size // max(width, *(dtype.itemsize for dtype in self.casts), 1), 1)
        ahead = max(_READ_AHEAD_BYTES // width, step)
        expected = self.start
        for start in range(self.start, self.stop, step):
            stop = min(start + step, self.stop)
            while self.file and expected < min(stop + ahead, self.stop):
                self.file.expect(expected * width, min(expected + ahead, self.stop) * width)
                expected += ahead
            block = self.flat[start:stop]
            for dtype in self.casts:
                block = block.to(dtype)
            yield block
            if self.file:
                self.file.release(start * width, stop * width)


class PiecewiseTensor(torch.Tensor):
    """A contiguous CPU tensor whose values lie elsewhere, in `pieces`, in row-major order. It can't be written to.

    Views that are contiguous, concatenation along the first dimension and changes of dtype give another
    `PiecewiseTensor` and touch no value. So does a view that is not contiguous, once it is read: what is written to it
    would not reach what it is a view of. Every other operation gives an ordinary tensor, computed in memory.
    """

    pieces: tuple[Piece, ...]

    @staticmethod
    def __new__(  # noqa: D102
        cls, pieces: Sequence[Piece], shape: Sequence[int], dtype: torch.dtype
    ) -> "PiecewiseTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device="cpu")
        tensor.pieces = tuple(pieces)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def wrap(cls, tensor: torch.Tensor, file: MappedFile | None = None) -> "PiecewiseTensor":
        """Return `tensor`, which is on the CPU, as one piece.

        Args:
            tensor: Any tensor; contiguous if `file` is given.
            file: The file that it is a view of.
        """
        if isinstance(tensor, cls):
            return tensor
        flat = tensor.detach().contiguous().view(-1)
        return cls([Piece(flat, 0, flat.numel(), file)], tensor.shape, tensor.dtype)

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the values in row-major order.

        Args:
            size: The most bytes that a block has, in its own dtype and in those that it is converted from.

        Yields:
            One-dimensional tensors of this tensor's dtype, each valid until the next one.
        """
        for piece in self.pieces:
            yield from piece.blocks(size)

    def materialize(self) -> torch.Tensor:
        """Return an ordinary tensor with the same values; one that is in memory already is returned itself."""
        if len(self.pieces) == 1 and not self.pieces[0].casts and self.pieces[0].file is None:
            (piece,) = self.pieces
            return piece.flat[piece.start : piece.stop].view(self.shape)
        return self._copy()

    def _copy(self) -> torch.Tensor:
        result = torch.empty(self.shape, dtype=self.dtype)
        at = 0
        for block in self.blocks(1 << 23):
            result.view(-1)[at : at + block.numel()] = block
            at += block.numel()
        return result

    def range(self, start: int, shape: Sequence[int]) -> "PiecewiseTensor":
        """Return `prod(shape)` elements from element `start` on, as a tensor of that shape."""
        stop = start + prod(shape)
        pieces, at = [], 0
        for piece in self.pieces:
            length = piece.stop - piece.start
            first, last = max(start - at, 0), min(stop - at, length)
            if first < last:
                pieces.append(replace(piece, start=piece.start + first, stop=piece.start + last))
            at += length
        return PiecewiseTensor(pieces, shape, self.dtype)

    def cast(self, dtype: torch.dtype) -> "PiecewiseTensor":
        """Return this tensor in another dtype, into which it is converted when it is read."""
        if dtype == self.dtype:
            return self
        pieces = [replace(piece, casts=(*piece.casts, dtype)) for piece in self.pieces]
        return PiecewiseTensor(pieces, self.shape, dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            _check_written(func, args, kwargs)
        elif isinstance(args[0], cls):
            if func._overloadname == "default" and func._opname in _FACTORIES:
                return func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            if func is _aten.clone.default:
                return args[0]._copy()
            if func is _aten._to_copy.default and kwargs.get("device") in (None, torch.device("cpu")):
                result = args[0].cast(kwargs.get("dtype") or args[0].dtype)
                # Values of a byte have scales, which mappings apply to one block after the other.
                return result.materialize() if _is_quantized(args[0]) else result
            if _is_view(func):
                if (views := _views(func, args, kwargs)) is None:
                    views = tree_map_only(torch.Tensor, cls.wrap, func(*_in_memory(args), **kwargs))
                return views
        elif func in (_aten.cat.default, _aten.stack.default) and (joined := _join(func, *args, **kwargs)) is not None:
            return joined
        return func(*_in_memory(args), **_in_memory(kwargs))


class IgnoreMeta(TorchDispatchMode):
    """Leaves tensors on the CPU that are moved to the meta device, which is where the model lies that they are for."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            if kwargs.get("dtype") in (None, args[0].dtype):
                return args[0]
        return func(*args, **kwargs)


def _in_memory(values: Any) -> Any:
    return tree_map_only(PiecewiseTensor, PiecewiseTensor.materialize, values)


def _check_written(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise if an operation writes to the Hugging Face checkpoint, or to a copy that nobody would see."""
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(isinstance(value, PiecewiseTensor) for value in tree_leaves(values.get(argument.name))):
            raise NotImplementedError(
                f"{func} changes a tensor of the Hugging Face checkpoint in place, which streaming can't: "
                "import with streaming=False"
            )


def _is_quantized(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1


def _is_view(func: Any) -> bool:
    return func._schema.arguments[0].alias_info is not None or func is _aten._unsafe_view.default


def _views(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what a view of the first argument is made of, or None if it is not contiguous.

    PyTorch computes shape, offset and strides, on a tensor without values.
    """
    base = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
    views = func(base, *args[1:], **kwargs)
    for view in views if isinstance(views, list | tuple) else [views]:
        if view.dtype != base.dtype or not view.is_contiguous():
            return None
    return tree_map_only(torch.Tensor, lambda view: args[0].range(view.storage_offset(), view.shape), views)


def _join(func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> PiecewiseTensor | None:
    """Return tensors one behind the other, or None if their elements interleave."""
    like = tensors[0]
    if len({tensor.dtype for tensor in tensors}) > 1 or any(tensor.dim() != like.dim() for tensor in tensors):
        return None
    dim %= like.dim() + (func is _aten.stack.default)
    if prod(like.shape[:dim]) != 1:
        return None
    shape = func([torch.empty(tensor.shape, device="meta") for tensor in tensors], dim).shape
    pieces = [piece for tensor in tensors for piece in PiecewiseTensor.wrap(tensor).pieces]
    return PiecewiseTensor(pieces, shape, like.dtype)
