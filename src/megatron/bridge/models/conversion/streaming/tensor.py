# SPDX-License-Identifier: Apache-2.0
"""A tensor that is a list of pieces of files, and is read block by block.

A parameter mapping takes Hugging Face's tensors apart and puts the pieces together: it interleaves rows of query, key
and value, and puts the up projection below the gate projection. With `PiecewiseTensor` it does so without touching a
byte, because a view, or a concatenation along the first dimension, is a new list of pieces.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron.bridge.models.conversion.streaming.sources import InFile, InMemory, Source


_aten = torch.ops.aten
# They return a tensor that is like another one, and don't read its values.
_FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
_COPIED_BYTES = 8 << 20


class NeedsValues(Exception):
    """An operation needs values that are not in memory."""


@dataclass(frozen=True)
class Piece:
    """A run of elements of a source.

    Attributes:
        source: Where the elements come from.
        start: The first element.
        stop: One past the last element.
        casts: The dtypes that the elements are converted to, one after the other.
    """

    source: Source
    start: int
    stop: int
    casts: tuple[torch.dtype, ...] = ()

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the elements in one-dimensional tensors, each valid until the next one.

        They have at most `size` bytes in their dtype, and in those that they are converted from.
        """
        width = max(dtype.itemsize for dtype in (self.source.dtype, *self.casts))
        for block in self.source.blocks(self.start, self.stop, max(size // width, 1)):
            for dtype in self.casts:
                block = block.to(dtype)
            yield block


class PiecewiseTensor(torch.Tensor):
    """A contiguous CPU tensor without values of its own: its elements are those of `pieces`, in row-major order.

    Views that are contiguous, concatenation along the first dimension and changes of dtype return another
    `PiecewiseTensor` and read nothing. Any other operation raises `NeedsValues`, unless `Computing` is active. An
    operation that writes to the tensor raises `NotImplementedError`, because the write would be lost.
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
    def of(cls, source: Source, shape: Sequence[int]) -> "PiecewiseTensor":
        """Return a tensor of all elements of a source."""
        count = prod(shape)
        return cls([Piece(source, 0, count)] if count else [], shape, source.dtype)

    @classmethod
    def wrap(cls, tensor: torch.Tensor) -> "PiecewiseTensor":
        """Return a tensor on the CPU as one piece."""
        if isinstance(tensor, cls):
            return tensor
        return cls.of(InMemory(tensor.detach().contiguous().view(-1)), tensor.shape)

    @property
    def in_files(self) -> bool:
        """Whether all elements are read from files, as they are or scaled (fp8.py)."""
        return all(isinstance(getattr(piece.source, "stored", piece.source), InFile) for piece in self.pieces)

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the values in row-major order, as `Piece.blocks` does."""
        for piece in self.pieces:
            yield from piece.blocks(size)

    def materialize(self) -> torch.Tensor:
        """Return an ordinary tensor with the same values. It shares their memory if they are in memory already."""
        if len(self.pieces) == 1 and not self.pieces[0].casts and isinstance(self.pieces[0].source, InMemory):
            (piece,) = self.pieces
            return piece.source.flat[piece.start : piece.stop].view(self.shape)
        result = torch.empty(self.shape, dtype=self.dtype)
        flat, at = result.view(-1), 0
        for block in self.blocks(_COPIED_BYTES):
            flat[at : at + block.numel()] = block
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
        result = None
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        elif not isinstance(args[0], cls):
            if func in (_aten.cat.default, _aten.stack.default):
                result = _join(func, *args, **kwargs)
        elif func is _aten.is_pinned.default:
            return False
        elif func._overloadname == "default" and func._opname in _FACTORIES:
            return func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
        elif func is _aten._to_copy.default:
            # Quantized values have scales. A mapping applies them block by block, and would read each block anew.
            is_quantized = args[0].dtype.is_floating_point and args[0].dtype.itemsize == 1
            if kwargs.get("device") in (None, torch.device("cpu")) and not is_quantized:
                result = args[0].cast(kwargs.get("dtype") or args[0].dtype)
        elif _is_view(func):
            result = _view(func, args, kwargs)
        if result is None:
            raise NeedsValues(f"{func} needs the values of a tensor that is not in memory")
        return result


class Computing(TorchDispatchMode):
    """Reads tensors into memory for operations that need their values."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except NeedsValues:
            result = func(*_in_memory(args), **_in_memory(kwargs))
        # What is written to a view must reach what it is a view of, and here would not.
        return tree_map_only(torch.Tensor, PiecewiseTensor.wrap, result) if _is_view(func) else result


def is_piecewise(model: Iterable[torch.nn.Module]) -> bool:
    """Return whether the parameters of a model are piecewise tensors."""
    modules = (chunk for chunk in model if isinstance(chunk, torch.nn.Module))
    return any(isinstance(parameter, PiecewiseTensor) for module in modules for parameter in module.parameters())


def _in_memory(values: Any) -> Any:
    return tree_map_only(PiecewiseTensor, PiecewiseTensor.materialize, values)


def _refuse_writes(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(isinstance(value, PiecewiseTensor) for value in tree_leaves(values.get(argument.name))):
            raise NotImplementedError(
                f"{func} writes to a tensor of the Hugging Face checkpoint, which streaming does not support: import "
                "with streaming=False"
            )


def _is_view(func: Any) -> bool:
    alias = func._schema.arguments[0].alias_info
    return (alias is not None and not alias.is_write) or func is _aten._unsafe_view.default


def _view(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the views of a tensor, or None if one is not contiguous."""
    # PyTorch computes shapes, offsets and strides on a tensor without values.
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
    stacked = func is _aten.stack.default
    dim %= like.dim() + stacked
    # By hand, since PyTorch imports sympy to join tensors without values.
    around, *others = {(*each.shape[:dim], *each.shape[dim + (not stacked) :]) for each in tensors}
    if others or prod(around[:dim]) != 1:
        return None
    shape = (*around[:dim], len(tensors) if stacked else sum(each.shape[dim] for each in tensors), *around[dim:])
    pieces = [piece for tensor in tensors for piece in PiecewiseTensor.wrap(tensor).pieces]
    return PiecewiseTensor(pieces, shape, like.dtype)
