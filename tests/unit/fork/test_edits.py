# SPDX-License-Identifier: Apache-2.0
"""Each edit before and after, on made-up source; what it refuses; and that a second application changes nothing."""

import textwrap
from pathlib import Path

import libcst.matchers as m
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fork.edits import (
    EditError,
    File,
    add_import,
    add_parameter,
    assign,
    call,
    defer_imports,
    define,
    expression,
    ifs,
    imports,
    insert_after,
    insert_before,
    insert_first,
    pass_argument,
    replace,
    set_default,
    wrap,
    wrap_imports,
)
from fork.formatting import tidy


def apply(source: str, *edits, release: str = "1.0") -> str:
    return File("file.py", edits).apply(textwrap.dedent(source), release)


DEFER = defer_imports("with later(__name__):\n    # Later.\n    {}", "pkg.here", "pkg.big")
FUTURE = "from __future__ import annotations\n"

CASES = {
    "parameter: last of one line": (
        [add_parameter("f", "new: bool = False")],
        "def f(a, b=1): pass",
        "def f(a, b=1, new: bool = False): pass",
    ),
    "parameter: the only one": ([add_parameter("f", "new=1")], "def f(): pass", "def f(new=1): pass"),
    "parameter: after an only one on lines": (
        [add_parameter("f", "new=1")],
        """
        def f(
            a,
        ): pass
        """,
        """
        def f(
            a,
            new=1,
        ): pass
        """,
    ),
    "parameter: comments stay with their parameters": (
        [add_parameter("f", "new=1")],
        """
        def f(
            a,  # of a
            b=2,  # of b
        ) -> None:
            pass
        """,
        """
        def f(
            a,  # of a
            b=2,  # of b
            new=1,
        ) -> None:
            pass
        """,
    ),
    "parameter: hanging indent without trailing comma": (
        [add_parameter("f", "new=1")],
        """
        def f(
            a, b
        ): pass
        """,
        """
        def f(
            a, b, new=1
        ): pass
        """,
    ),
    "parameter: before *args, keyword-only ones and **kwargs": (
        [add_parameter("f", "new=1")],
        "def f(a, /, b, *args, c, **kwargs): pass",
        "def f(a, /, b, new=1, *args, c, **kwargs): pass",
    ),
    "default: in place of the one that is there": (
        [set_default("f", "b", "True")],
        "def f(a, b: bool = False, *, c=False): pass",
        "def f(a, b: bool = True, *, c=False): pass",
    ),
    "parameter: before the star": (
        [add_parameter("f", "new=1")],
        "def f(a, *, c): pass",
        "def f(a, new=1, *, c): pass",
    ),
    "parameter: keyword-only behind a new star": (
        [add_parameter("f", "new=1", keyword_only=True)],
        "def f(a, **kwargs): pass",
        "def f(a, *, new=1, **kwargs): pass",
    ),
    "parameter: keyword-only behind a new star on lines": (
        [add_parameter("f", "new=1", keyword_only=True)],
        """
        def f(
            a,
        ): pass
        """,
        """
        def f(
            a,
            *,
            new=1,
        ): pass
        """,
    ),
    "parameter: keyword-only behind the star that is there": (
        [add_parameter("f", "new=1", keyword_only=True)],
        "def f(*, a): pass",
        "def f(*, a, new=1): pass",
    ),
    "parameter: keyword-only behind *args": (
        [add_parameter("f", "new=1", keyword_only=True)],
        "def f(*args): pass",
        "def f(*args, new=1): pass",
    ),
    "parameter: keyword-only of a method without others": (
        [add_parameter("C.f", "new=1", keyword_only=True)],
        "class C:\n    def f(self): pass\n",
        "class C:\n    def f(self, *, new=1): pass\n",
    ),
    "import: two names join one": ([add_import("from a import c, d")], "from a import b\n", "from a import b, c, d\n"),
    "parameter: documented without a word split at its hyphen": (
        [add_parameter("f", "new=1", doc=f"{'x' * 95} Megatron-LM.")],
        '''
        def f():
            """Do.

            Args:
            """
        ''',
        f'''
        def f(new=1):
            """Do.

            Args:
                new: {"x" * 95}
                    Megatron-LM.
            """
        ''',
    ),
    "parameter: documented after the one before it": (
        [add_parameter("f", "new: bool = False", doc="Whether it is new.")],
        '''
        def f(a, *, c):
            """Do.

            Args:
                a: the first,
                    at length
                c: the last

            Returns:
                nothing
            """
        ''',
        '''
        def f(a, new: bool = False, *, c):
            """Do.

            Args:
                a: the first,
                    at length
                new: Whether it is new.
                c: the last

            Returns:
                nothing
            """
        ''',
    ),
    "parameter: documented with its type where the others are": (
        [add_parameter("f", "new: bool = False", doc="Whether it is new.")],
        '''
        def f(a: int):
            """Do.

            Args:
                a (int): the first
            """
        ''',
        '''
        def f(a: int, new: bool = False):
            """Do.

            Args:
                a (int): the first
                new (bool): Whether it is new.
            """
        ''',
    ),
    "argument: last of one line": (
        [pass_argument("", call("g"), "new=new")],
        "x = g(a, b=1)",
        "x = g(a, b=1, new=new)",
    ),
    "argument: none there": ([pass_argument("", call("g"), "new=new")], "g()", "g(new=new)"),
    "argument: on lines": (
        [pass_argument("", call("m.g"), "new=new")],
        """
        m.g(
            a,
            b=1,
        )
        g(a)
        """,
        """
        m.g(
            a,
            b=1,
            new=new,
        )
        g(a)
        """,
    ),
    "argument: on lines without trailing comma": (
        [pass_argument("", call("g"), "new=new")],
        """
        g(
            a,
            b
        )
        """,
        """
        g(
            a,
            b,
            new=new
        )
        """,
    ),
    "argument: before **": (
        [pass_argument("", call("g"), "new=new")],
        "g(a, **rest)",
        "g(a, new=new, **rest)",
    ),
    "argument: new value": (
        [pass_argument("", call("g"), "new=2")],
        "g(a, new=1, b=3)",
        "g(a, new=2, b=3)",
    ),
    "replace: expression, however it is formatted": (
        [replace("f", expression("a.b( c )"), "d")],
        """
        def f():
            return x + a.b(
                c,  # a comment
            )
        def g():
            return a.b(c)
        """,
        """
        def f():
            return x + d
        def g():
            return a.b(c)
        """,
    ),
    "replace: expression by one that holds it": (
        [replace("", expression("x"), "max(x, 0)")],
        "y = x",
        "y = max(x, 0)",
    ),
    "replace: several": (
        [replace("", expression("x"), "z", count=2)],
        "y = [x, x]",
        "y = [z, z]",
    ),
    "replace: statement by several, with its comment": (
        [replace("f", m.Return(), "a = 1\nreturn a")],
        """
        def f():
            b = 2

            # the end
            return b
        """,
        """
        def f():
            b = 2

            # the end
            a = 1
            return a
        """,
    ),
    "replace: statement, with another comment": (
        [replace("f", m.Return(), "# all new\nreturn a")],
        """
        def f():
            b = 2

            # the end
            return b
        """,
        """
        def f():
            b = 2

            # all new
            return a
        """,
    ),
    "replace: a matcher of LibCST": (
        [replace("", m.Integer("1"), "2")],
        "a = 1 + 3",
        "a = 2 + 3",
    ),
    "wrap: expression": ([wrap("", call("g"), "f({})")], "x = g(1)", "x = f(g(1))"),
    "wrap: parentheses where they are needed": (
        [wrap("", expression("a + b"), "2 * {}")],
        "x = a + b",
        "x = 2 * (a + b)",
    ),
    "wrap: no parentheses where they are not": (
        [wrap("", expression("a + b"), "f({})")],
        "x = a + b",
        "x = f(a + b)",
    ),
    "wrap: statement in a block that brings another match": (
        [wrap("", imports("fast"), "try:\n    {}\nexcept ImportError:\n    import slow as fast")],
        """
        # a header

        # why it is fast
        import fast

        x = fast.y
        """,
        """
        # a header

        # why it is fast
        try:
            import fast
        except ImportError:
            import slow as fast

        x = fast.y
        """,
    ),
    "wrap: from import": (
        [wrap("", imports("fast.er"), "try:\n    {}\nexcept ImportError:\n    y = None")],
        "from fast.er import y\n",
        "try:\n    from fast.er import y\nexcept ImportError:\n    y = None\n",
    ),
    "wrap: assignment whose template assigns again": (
        [wrap("", assign("self.x"), "try:\n    {}\nexcept KeyError:\n    self.x = None")],
        "self.x = y[0]\n",
        "try:\n    self.x = y[0]\nexcept KeyError:\n    self.x = None\n",
    ),
    "insert before: a comment that a blank line parts from the statement stays above": (
        [insert_before("", assign("y"), "log()")],
        """
        if a:
            x = 1
        # else: there is none

        # theirs
        y = 1
        """,
        """
        if a:
            x = 1
        # else: there is none

        log()
        # theirs
        y = 1
        """,
    ),
    "insert before: blank lines above, comments with their statement": (
        [insert_before("", ifs("a and b"), "# mine\nlog()")],
        """
        x = 1

        # theirs
        if a and  b:
            pass
        """,
        """
        x = 1

        # mine
        log()
        # theirs
        if a and  b:
            pass
        """,
    ),
    "insert before: the statement that holds a call": (
        [insert_before("f", call("g"), "log()")],
        """
        def f():
            if x:
                y = [g(1), g(2)]
        """,
        """
        def f():
            if x:
                log()
                y = [g(1), g(2)]
        """,
    ),
    "insert after: a definition": (
        [insert_after("f", define("inner"), "inner = 1\nouter = 2")],
        """
        def f():
            def inner():
                pass
            return 3
        """,
        """
        def f():
            def inner():
                pass
            inner = 1
            outer = 2
            return 3
        """,
    ),
    "insert after: what brings another match": (
        [insert_after("", assign("x"), "if y:\n    x = 2")],
        "x: int = 1\n",
        "x: int = 1\nif y:\n    x = 2\n",
    ),
    "insert: twice at one place": (
        [insert_after("", assign("x"), "a()"), insert_after("", assign("x"), "b()")],
        "x = 1\n",
        "x = 1\nb()\na()\n",
    ),
    "insert: at a place that a later edit brings again": (
        [insert_after("", assign("x"), "a()"), insert_before("", assign("y"), "x = 2")],
        "x = 1\ny = 2\n",
        "x = 1\na()\nx = 2\ny = 2\n",
    ),
    "insert first: after the docstring": (
        [insert_first("C.f", "log()")],
        '''
        class C:
            def f(self):
                """Do."""
                return 1
        ''',
        '''
        class C:
            def f(self):
                """Do."""
                log()
                return 1
        ''',
    ),
    "insert first: nested function": (
        [insert_first("f.g", "log()")],
        "def f():\n    def g():\n        return 1\n",
        "def f():\n    def g():\n        log()\n        return 1\n",
    ),
    "import: in order": (
        [add_import("from pkg.core import x"), add_import("import json")],
        "import os\n\nimport numpy\n\nfrom pkg.a import y\nfrom pkg.z import z\n",
        "import json\nimport os\n\nimport numpy\n\nfrom pkg.a import y\nfrom pkg.core import x\nfrom pkg.z import z\n",
    ),
    "import: last of its likes": (
        [add_import("from pkg.z import x")],
        "from pkg.a import y\n\nx = 1\n",
        "from pkg.a import y\nfrom pkg.z import x\n\nx = 1\n",
    ),
    "import: joins one of the same module": (
        [add_import("from pkg.a import B, x")],
        """
        from pkg.a import (
            A,
            C,
            y,
        )
        """,
        """
        from pkg.a import (
            A,
            B,
            C,
            x,
            y,
        )
        """,
    ),
    "import: joins on one line": (
        [add_import("from pkg.a import z as q")],
        "from pkg.a import y\n",
        "from pkg.a import y, z as q\n",
    ),
    "deferred imports: into functions and a block": (
        [DEFER],
        '''
        from __future__ import annotations

        from typing import Generic

        from pkg.big import (
            One,
            Two as Second,
        )
        from pkg import big, small
        from pkg.small import light

        x = light(small)


        def f(a: One) -> Second:
            """Do."""
            b: One = light(a)
            return [big.g(One, c) for c in b]


        class C(Generic[x]):
            def method(self, One):
                return One, "Second"

            @property
            def inner(self):
                def nested():
                    return Second

                return nested
        ''',
        '''
        from __future__ import annotations

        from typing import Generic

        from pkg import small
        from pkg.small import light

        with later(__name__):
            # Later.
            from pkg.big import One, Two as Second  # noqa: F401
            from pkg import big  # noqa: F401

        x = light(small)


        def f(a: One) -> Second:
            """Do."""
            from pkg.here import One, big
            b: One = light(a)
            return [big.g(One, c) for c in b]


        class C(Generic[x]):
            def method(self, One):
                return One, "Second"

            @property
            def inner(self):
                from pkg.here import Second
                def nested():
                    return Second

                return nested
        ''',
    ),
    "imports together: in the place of the first": (
        [wrap_imports("from pkg.lazy import later\n\n\nwith later(__name__):\n    {}")],
        '''
        """A package."""

        # What it gives.
        try:
            import pkg.optional
        except ImportError:
            pass
        import pkg.z  # registers
        from pkg.a import y

        # Others.
        from pkg.b import (
            x,
        )

        z = 1
        ''',
        '''
        """A package."""

        # What it gives.
        from pkg.lazy import later


        with later(__name__):
            from pkg.a import y

            # Others.
            from pkg.b import (
                x,
            )

        z = 1
        ''',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_edit_gives_what_is_expected(name: str, tmp_path: Path):
    edits, before, after = CASES[name]
    found, wanted = tmp_path / "found.py", tmp_path / "wanted.py"
    found.write_text(apply(before, *edits))
    wanted.write_text(textwrap.dedent(after))
    tidy(tmp_path, [found, wanted])
    assert found.read_text() == wanted.read_text()


@pytest.mark.parametrize("name", CASES)
def test_second_application_changes_nothing(name: str):
    edits, before, _ = CASES[name]
    once = apply(before, *edits)
    assert apply(once, *edits) == once


REFUSED = {
    "missing place": (replace("", call("g"), "h()"), "x = 1", "expected 1 place, found 0"),
    "ambiguous place": (wrap("", call("g"), "h({})"), "g(); g()", "expected 1 place, found 2"),
    "ambiguous statement": (insert_after("", call("g"), "h()"), "g()\ng()\n", "expected 1 place, found 2"),
    "fewer than count": (pass_argument("", call("g"), "a=1", count=3), "g(); g()", "expected 3 places, found 2"),
    "missing scope": (replace("C.f", call("g"), "h()"), "class C: pass", "class or function C.f, found none"),
    "missing function": (add_parameter("f", "a=1"), "def g(): pass", "expected 1 place, found 0"),
    "function that is defined twice": (add_parameter("f", "a=1"), "def f(): 1\ndef f(): 2", "found 2"),
    "class for a function": (add_parameter("C", "a=1"), "class C: pass", "expected a function, found a class"),
    "other parameter of that name": (add_parameter("f", "a=1"), "def f(a=2): pass", "found `a=2`"),
    "no docstring": (add_parameter("f", "a=1", doc="A."), "def f(): pass", "expected a docstring"),
    "no Args": (add_parameter("f", "a=1", doc="A."), 'def f():\n    """Do."""', "expected an Args section"),
    "not a call": (pass_argument("", expression("x"), "a=1"), "y = x", "expected a call, found Name"),
    "elif": (insert_before("", ifs("b"), "c()"), "if a: 1\nelif b: 2", "`elif` or a one-line block"),
    "one-line block": (insert_before("", call("g"), "c()"), "if a: g()", "`elif` or a one-line block"),
    "not a statement": (replace("", m.Arg(), "x"), "g(y)", "expected an expression or a statement, found Arg"),
    "no import to defer": (
        DEFER,
        "from pkg.small import x",
        "expected imports of pkg.big at module level, found none",
    ),
    "deferred at module level": (
        DEFER,
        f"{FUTURE}from pkg.big import x\ny = x",
        "expected x in functions only, found it at",
    ),
    "deferred in a lambda": (DEFER, f"{FUTURE}from pkg.big import x\ny = lambda: x", "expected x in functions only"),
    "deferred default": (
        DEFER,
        f"{FUTURE}from pkg.big import x\ndef f(a=x):\n    pass",
        "expected x in functions only",
    ),
    "deferred base": (DEFER, f"{FUTURE}from pkg.big import x\nclass A(x):\n    pass", "expected x in functions only"),
    "deferred one-liner": (DEFER, f"{FUTURE}from pkg.big import x\ndef f(): x()", "a body of f on lines of its own"),
    "annotations that are evaluated": (DEFER, "from pkg.big import x", "found annotations that are evaluated"),
    "no import to go by": (add_import("import x"), "y = 1", "found none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str):
    edit, source, message = REFUSED[name]
    with pytest.raises(EditError) as error:
        apply(source, edit)
    assert message in str(error.value)
    assert str(error.value).startswith(f"file.py: {edit.name}: ")
    assert "\n" not in str(error.value)


def test_result_that_is_not_python_is_refused():
    with pytest.raises(EditError, match=r"file.py: the result is not Python: 'return' outside function"):
        apply("x = 1", insert_after("", assign("x"), "return x"))
    with pytest.raises(EditError, match=r"file.py: add parameter b to f: .* without defaults"):
        apply("def f(a=1): pass", add_parameter("f", "b"))
    with pytest.raises(EditError, match=r"file.py: replace call of g: "):
        apply("g()", replace("", call("g"), "h("))


@pytest.mark.parametrize("name", CASES)
def test_result_that_upstream_has_already_is_refused(name: str):
    edits, _, after = CASES[name]
    file = File("file.py", edits)
    if all(edit.shared for edit in edits):
        assert file.apply(textwrap.dedent(after), "1.0", pristine=True) == textwrap.dedent(after)
    else:
        with pytest.raises(EditError, match="expected to change something, found the result there already"):
            file.apply(textwrap.dedent(after), "1.0", pristine=True)


def test_wrap_needs_a_hole():
    with pytest.raises(ValueError, match="has no {}"):
        wrap("", call("g"), "h()")


@pytest.mark.parametrize(
    ("releases", "release", "applies"),
    [("", "0.3.1", True), (">=0.5", "0.5.1", True), (">=0.5", "0.4.2", False), (">=0.7", "0.7.0rc0", True)],
)
def test_edits_apply_to_the_releases_that_they_cover(releases: str, release: str, applies: bool):
    source = "g()"
    assert (apply(source, replace("", call("g"), "h()", releases=releases), release=release) != source) is applies


ARGUMENTS = st.lists(st.sampled_from(["a", "b.c", "d(1)", "*e", "'f'"]), max_size=4).map(
    lambda items: sorted(items, key=lambda item: item.startswith("*"))
)
LAYOUTS = st.sampled_from(["{}", "{},", "\n    {}\n", "\n    {},\n", "\n    {},  # comment\n"])


@given(arguments=ARGUMENTS, layout=LAYOUTS, separator=st.sampled_from([", ", ",\n    ", ",  # comment\n    "]))
def test_argument_joins_any_layout(arguments: list[str], layout: str, separator: str):
    if "\n" in separator and "\n" not in layout:
        layout = "\n    {}\n"
    inner = layout.format(separator.join(arguments)) if arguments else ""
    edited = apply(f"x = g({inner})\n", pass_argument("", call("g"), "new=new"))
    seen = []
    values = {"b": type("B", (), {"c": 2}), "d": lambda value: value, "e": [4], "a": 1, "new": "new"}
    exec(edited, {**values, "g": lambda *args, new: seen.append((len(args), new))})
    assert seen == [(len(arguments), "new")]
    assert edited.count("# comment") == inner.count("# comment")
