# SPDX-License-Identifier: Apache-2.0
"""A pickle is loaded as it is, or refused in little memory and time. It runs nothing."""

import pickle
import tracemalloc

import pytest

from megatron.bridge.release_checkpoint.pickles import (
    OrderedDict,
    RefusedPickle,
    Size,
    UnreadablePickle,
    load,
    stand_ins,
)


CLASSES = {
    **stand_ins({"dcp": "MetadataIndex"}),
    ("torch", "Size"): Size,
    ("collections", "OrderedDict"): OrderedDict,
}
# Opcodes by their names in pickletools.
NONE, MARK, TUPLE, TUPLE1, EMPTY_DICT, EMPTY_LIST, APPEND = b"N", b"(", b"t", b"\x85", b"}", b"]", b"a"
EMPTY_TUPLE, REDUCE, SETITEM, STOP = b")", b"R", b"s", b"."


def test_what_python_pickles_is_loaded_as_it_is():
    plain = [
        {"a": [1, -1, 255, 256, 65_536, -(2**31), 2**31, 2**63, -(2**70)], 7: (True, False, None), ("b", 0): ()},
        [
            1.5,
            -0.0,
            float("inf"),
            "",
            "text",
            "é",
            "一",
            "x" * 70_000,
            b"",
            b"bytes",
            b"x" * 300,
            (1,),
            (1, 2),
            (1, 2, 3),
        ],
        (1, 2, 3, 4, [[], {}, [{}]], {"deep": {"deeper": {"deepest": (((),),)}}}),
    ]
    shared = ["the same"]
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps({"plain": plain, "shared": [shared, shared], "many": list(range(3000))}, protocol)
        # Bytes are a call in protocol 2.
        if protocol == 2:
            data = pickle.dumps({"plain": [plain[0], plain[2]], "shared": [shared, shared]}, protocol)
        read = load(data, "file", {})
        assert read == pickle.loads(data)
        assert read["shared"][0] is read["shared"][1]


@pytest.mark.parametrize("named", ["os system", "__builtin__ eval", "torch load", "dcp Other"])
def test_a_name_that_is_not_listed_is_refused(named: str):
    module, name = named.split()
    for data in (
        f"\x80\x02c{module}\n{name}\n".encode("latin-1") + pickle.dumps(("x",), 2)[2:-1] + b"R.",
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93.",
    ):
        with pytest.raises(RefusedPickle, match=f"^file: it names {module}.{name}, .* could run code. Don't"):
            load(data, "file", CLASSES)


def test_a_class_is_not_changed_by_a_pickle():
    """BUILD on a class would change it for every later file."""
    for attributes in ({"name": "x"}, {"x": 1}, {"__setstate__": 1}):
        state = pickle.dumps((None, attributes), 2)[2:-1]
        for cls in ("dcp\nMetadataIndex", "torch\nSize", "collections\nOrderedDict"):
            with pytest.raises(UnreadablePickle):
                load(b"\x80\x02c" + cls.encode() + b"\n" + state + b"b.", "file", CLASSES)
    assert not hasattr(CLASSES["torch", "Size"], "x")


MANY = MARK + NONE * 20_000 + TUPLE
ATTACKS = {
    "a tuple repeated": b"\x80\x02cdcp\nMetadataIndex\nr\0\0\0\0" + MANY + b"r\1\0\0\0"
    + EMPTY_LIST + (b"h\0h\1" + REDUCE + APPEND) * 5_000 + STOP,
    "nested tuples": b"\x80\x04" + EMPTY_TUPLE + TUPLE1 * 3_000_000 + STOP,
    "nested keys": b"\x80\x04" + EMPTY_DICT + EMPTY_TUPLE + (NONE + b"\x86") * 10**6 + NONE + SETITEM + STOP,
    "memo": b"\x80\x02" + NONE + b"r\xff\xff\xff\x7f" + STOP,
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_little_memory(name: str):
    tracemalloc.start()
    with pytest.raises(UnreadablePickle) as error:
        load(ATTACKS[name], "file", CLASSES)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert most < 120 << 20
