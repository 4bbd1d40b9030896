# SPDX-License-Identifier: Apache-2.0
"""Load a pickle without running it.

A pickle can call any function that it names. This module does what Python's documentation recommends, an `Unpickler`
whose `find_class` knows a list of names: https://docs.python.org/3/library/pickle.html#restricting-globals. Each name
is an inert class here. That doesn't bound memory and time: 45 kB that repeat one tuple took 0.8 GB, and a key of
tuples nested three million deep ended the process. So `_check` follows all opcodes before anything is built.
"""

import gc
import io
import os
import pickle
import pickletools
import re
from collections.abc import Iterable, Mapping
from typing import Any


# Bytes of containers that a byte of the pickle may ask for. Those of real checkpoints ask for up to 16.
_MAX_EXPANSION, _ALLOWANCE = 32, 1 << 19
_MAX_ARGUMENTS, _MAX_MARKS = 16, 1000


class UnreadablePickle(ValueError):
    """A file is not what a checkpoint has at this place.

    Attributes:
        finding: What was found, without the advice: the checkpoint may have the same content elsewhere.
    """

    def __init__(self, path: str | os.PathLike, what: str, advice: str = "Copy or download the checkpoint again."):
        self.finding = f"{path}: {what}"
        super().__init__(f"{self.finding}. {advice}")


class RefusedPickle(UnreadablePickle):
    """A pickle names what no checkpoint needs: loading it could run code."""


class Inert:
    """Stands for an instance of a class: it keeps what the pickle says of the instance and does nothing.

    Attributes:
        args: Arguments that the class would have been called with.
        state: What `__setstate__` or the instance's `__dict__` would have got.
    """

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any
    name = kind = ""

    def __new__(cls, *args: Any) -> Any:
        """Keep the arguments."""
        if len(args) > _MAX_ARGUMENTS:
            raise ValueError(f"{cls.name} has {len(args)} arguments")
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    # Python's unpickler looks for it on a class, too, and so no pickle sets an attribute of a class.
    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute of the instance, None where the pickle has none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Size(Inert):
    """Stands for `torch.Size`, of which a tuple is made."""

    __slots__ = ()

    def __new__(cls, dimensions: Any) -> Any:
        """Return the dimensions."""
        if type(dimensions) is not tuple or len(dimensions) > 64:
            raise ValueError("expected the shape of a tensor")
        return dimensions


class OrderedDict(Inert):
    """Stands for `collections.OrderedDict`, of which a dict is made, to be filled afterwards."""

    __slots__ = ()

    def __new__(cls) -> Any:
        """Return a dict that is still empty."""
        return {}


Classes = Mapping[tuple[str, str], type[Inert]]  # Stand-ins by module and name.


def stand_ins(modules: Mapping[str, str]) -> dict[tuple[str, str], type[Inert]]:
    """Make a stand-in for each of the names, which are given by module and separated by blanks."""
    return {
        (module, kind): type(kind, (Inert,), {"__slots__": (), "name": f"{module}.{kind}", "kind": kind})
        for module, kinds in modules.items()
        for kind in kinds.split()
    }


def load(data: bytes, path: str | os.PathLike, classes: Classes, *, real: bool = False) -> Any:
    """Load a pickle of plain values and of instances of listed classes.

    Args:
        data: The pickle.
        path: The file, for errors.
        classes: What the pickle may name.
        real: Make instances of the classes themselves, not of their stand-ins.

    Raises:
        RefusedPickle: It names something else.
        UnreadablePickle: It is cut off or damaged, or asks for more memory or time than that of a checkpoint.
    """
    collecting = gc.isenabled()
    # Nothing in a large pickle is garbage, and the collector would look at all of it again and again.
    gc.disable()
    unpickler = _Unpickler(data, path, classes, real)
    try:
        _check(data, unpickler)
        return unpickler.load()
    except UnreadablePickle:
        raise
    except Exception as error:
        # What a damaged pickle raises depends on where it is damaged.
        raise UnreadablePickle(path, f"the pickle is cut off or damaged ({error})") from None
    finally:
        if collecting:
            gc.enable()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: str | os.PathLike, classes: Classes, real: bool):
        # `fix_imports` would replace names of Python 2 before find_class sees them.
        super().__init__(io.BytesIO(data), fix_imports=False)
        self._path, self._classes, self._real = path, classes, real

    def find_class(self, module: str, name: str) -> Any:
        found = self.stand_in(module, name)
        return super().find_class(module, name) if self._real else found

    def stand_in(self, module: Any, name: Any) -> type[Inert]:
        found = self._classes.get((module, name))
        if found is None:
            raise RefusedPickle(
                self._path,
                f"it names {module[:80]}.{name[:80]}, which no checkpoint needs and which could run code",
                "Don't load it. Get the checkpoint from a source that you trust.",
            )
        return found

    def persistent_load(self, identifier: Any) -> Any:
        # By it torch.save names the storage of a tensor, which is another entry of its file.
        return identifier


# --- check -----------------------------------------------------------------------------------------------------------

# Classes whose instances are plain values.
_PLAIN = (Size, OrderedDict)
# Stand for what can't be a key of a dict, or shall not be one, and for what is a key by its identity.
_OTHER, _IDENTITY = object(), object()
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_SCALARS = _TEXTS | {"NONE", "NEWTRUE", "NEWFALSE", "BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Bytes that each takes in the end.
_CONTAINERS = {"EMPTY_LIST": 120, "EMPTY_DICT": 200}
_INSTANCE, _TUPLE = 240, 72


def _check(data: bytes, unpickler: _Unpickler) -> None:
    """Refuse a pickle that must not be built.

    It may have the opcodes that Python's pickler writes and no others, and may ask for memory in proportion to its
    length. Building a dict hashes its keys, by recursion in C: no key may be nested, or chosen to collide with others.
    """
    stack: list[Any] = []
    push, pop = stack.append, stack.pop
    marks: list[int] = []
    memo: list[Any] = []
    spent = 0
    file = io.BytesIO(data)
    opcodes: Iterable[Any] = pickletools.genops(file)
    for opcode, value, position in opcodes:
        name = opcode.name
        # The most frequent come first.
        if name == "BINGET" or name == "LONG_BINGET":
            push(memo[value])
        elif name == "EMPTY_TUPLE":
            if (record := _RECORD.match(data, position)) is not None:
                spent += _skip(record, stack, memo)
                file.seek(record.end())
            else:
                push(())
        elif name == "BUILD" or name == "APPEND":
            pop()
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in _SCALARS:
            push(value)
        elif name == "MARK":
            if len(marks) > _MAX_MARKS:
                raise ValueError(f"it is nested more than {_MAX_MARKS} times")
            marks.append(len(stack))
        elif name in _TUPLES or name == "TUPLE":
            start = marks.pop() if name == "TUPLE" else len(stack) - _TUPLES[name]
            made = tuple(stack[start:])
            stack[start:] = [made if _is_key(made) else _OTHER]
            spent += _TUPLE
        elif name == "NEWOBJ" or name == "REDUCE":
            # What stands for the class stands for the instance.
            pop()
            spent += _INSTANCE
        elif name == "SETITEMS" or name == "SETITEM":
            start = marks.pop() if name == "SETITEMS" else len(stack) - 2
            _check_keys(stack[start::2])
            del stack[start:]
        elif name in _CONTAINERS:
            push(_OTHER)
            spent += _CONTAINERS[name]
        elif name == "APPENDS":
            del stack[marks.pop() :]
        elif name == "BINPUT" or name == "LONG_BINPUT":
            # A pickler counts them.
            if value != len(memo):
                raise ValueError(f"byte {position} asks for more memory than a checkpoint does")
            memo.append(stack[-1])
        elif name == "GLOBAL":
            stand_in = unpickler.stand_in(*value.split(" ", 1))
            push(_OTHER if stand_in in _PLAIN else _IDENTITY)
        elif name == "STACK_GLOBAL":
            attribute, module = pop(), pop()
            push(_OTHER if unpickler.stand_in(module, attribute) in _PLAIN else _IDENTITY)
        elif name not in ("FRAME", "PROTO", "BINPERSID", "STOP"):
            raise ValueError(f"byte {position} is no opcode of a checkpoint's pickle")
        if spent > _ALLOWANCE + _MAX_EXPANSION * position:
            raise ValueError(f"the first {position} bytes ask for more memory than a checkpoint does")


def _check_keys(keys: Iterable[Any]) -> None:
    if not all(map(_is_key, keys)):
        raise ValueError("a key of a dict is neither a name nor a number")


def _is_key(value: Any) -> bool:
    if isinstance(value, int):
        return -1 << 63 <= value < 1 << 63
    if type(value) is tuple:
        plain = (each is None or type(each) is str or isinstance(each, int) and abs(each) < 1 << 16 for each in value)
        return len(value) <= 16 and all(plain)
    return value is _IDENTITY or value is None or isinstance(value, (str, float, bytes))


# A large `.metadata` is mostly instances whose fields are numbers, shapes and what the memo has. A regular expression
# follows them faster than genops: EMPTY_TUPLE NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK (key value)+ SETITEMS BUILD.
_GET = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:" + b"|".join(rb"\x%02x.{%d}" % (size, size) for size in range(9)) + rb"))"
_DIMENSIONS = rb"(?:%(i)s\x85|%(i)s%(i)s\x86|%(i)s%(i)s%(i)s\x87)" % {b"i": _INT}
# MEMOIZE TUPLE1 MEMOIZE REDUCE MEMOIZE
_SHAPE = _GET + _DIMENSIONS + rb"\x94\x85\x94R\x94"
_FIELD = re.compile(rb"(%s)(?:%s|(%s)|%s|N)" % (_GET, _INT, _SHAPE, _GET), re.DOTALL)
_RECORD = re.compile(rb"\)\x81\x94\}\x94\(((?:%s(?:%s|%s|%s|N)){1,16})ub" % (_GET, _INT, _SHAPE, _GET), re.DOTALL)


def _skip(record: re.Match[bytes], stack: list[Any], memo: list[Any]) -> int:
    """Do what `_check` does for the opcodes of a record, and return the bytes that it takes."""
    fields = _FIELD.findall(record[1])
    _check_keys([memo[int.from_bytes(key[1:], "little")] for key, _ in fields])
    shapes = sum(1 for _, shape in fields if shape)
    memo += (stack[-1], *[_OTHER] * (1 + 3 * shapes))
    return _INSTANCE + _CONTAINERS["EMPTY_DICT"] + shapes * (2 * _TUPLE + _INSTANCE)
