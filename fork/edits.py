# SPDX-License-Identifier: Apache-2.0
"""The vocabulary in which a change to upstream's source is written.

A `Change` lists, for each file of upstream, the edits that it takes. An edit names its place by structure: a scope
(the X another number of times than `count`, and it recognises its own result, so a second application
changes nothing.

Nodes are `libcst.matchers`; `call`, `assign`, `imports`, `define`, `returns`, `ifs` and `expression` make the usual
ones.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import libcst as cst
import libcst.matchers as m

from fork.errors import EditError
from fork.requirements import RequirementEdit, covers


Path = tuple[cst.CSTNode, ...]
HOLE = "__hole__"
INDENT = " " * 4
WIDTH = 119


@dataclass(frozen=True)
class Edit:
    """One edit of one file.

    Args:
        name: what the edit does and where, for messages.
        apply: takes the parsed file and returns the edited one; raises `EditError`.
        releases: specifier of the upstream releases that need the edit; empty for all.
    """

    name: str
    apply: Callable[[cst.Module], cst.Module]
    releases: str = ""


@dataclass(frozen=True)
class File:
    """The edits of one file, whose path is relative to megatron/bridge."""

    path: str
    edits: Sequence[Edit]

    def apply(self, source: str, release: str) -> str:
        """Returns `source` with the edits that `release` needs; raises `EditError`."""
        for edit in self.edits:
            if covers(edit.releases, release):
                try:
                    source = edit.apply(cst.parse_module(source)).code
                    compile(source, self.path, "exec", dont_inherit=True)
                except EditError as error:
                    raise EditError(f"{self.path}: {edit.name}: {error}") from None
                except (SyntaxError, cst.ParserSyntaxError, cst.CSTValidationError) as error:
                    cause = str(error).splitlines()[0]
                    raise EditError(f"{self.path}: {edit.name}: the result is not Python: {cause}") from None
        return source


@dataclass(frozen=True)
class Change:
    """One change of the stack: a commit that upstream could take alone.

    Args:
        name: the name on the command line and in messages.
        message: the commit message that upstream would get.
        why: one paragraph for the notice of modification and the pull request.
        edits: the files of upstream that change.
        modules: new modules, paths relative to megatron/bridge.
        requirements: edits of the wheel's requirements, see `fork.requirements`.
    """

    name: str
    message: str
    why: str
    edits: Sequence[File] = ()
    modules: Sequence[str] = ()
    requirements: Sequence[RequirementEdit] = ()


# --- nodes -----------------------------------------------------------------------------------------------------------


class Node(m.MatchIfTrue):
    """A matcher with a description for messages; it can be nested in other matchers."""

    def __init__(self, description: str, matches: Callable[[cst.CSTNode], bool]):
        super().__init__(matches)
        self.description = description


def call(function: str) -> Node:
    """A call of `function`, as it is written there: "get_checkpoint_name" or "torch.save"."""
    wanted = _key(function)
    return Node(f"call of {function}", lambda node: isinstance(node, cst.Call) and _key(node.func) == wanted)


def assign(target: str) -> Node:
    """An assignment, annotated or not, to `target` ("name" or "self.name") alone."""
    wanted = _key(target)

    def matches(node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Assign):
            return any(_key(each.target) == wanted for each in node.targets)
        return isinstance(node, cst.AnnAssign) and _key(node.target) == wanted

    return Node(f"assignment to {target}", matches)


def imports(module: str) -> Node:
    """An `import module [as …]` or `from module import …`."""

    def matches(node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Import):
            return any(_code(alias.name) == module for alias in node.names)
        return isinstance(node, cst.ImportFrom) and _origin(node) == module

    return Node(f"import of {module}", matches)


def define(name: str) -> Node:
    """The definition of the function or class `name`."""
    matcher = m.FunctionDef(name=m.Name(name)) | m.ClassDef(name=m.Name(name))
    return Node(f"definition of {name}", lambda node: m.matches(node, matcher))


def returns() -> Node:
    """A return statement."""
    return Node("return", lambda node: isinstance(node, cst.Return))


def ifs(test: str) -> Node:
    """An `if` whose test is `test`."""
    wanted = _key(test)
    return Node(f"if {_fold(test)}", lambda node: isinstance(node, cst.If) and _key(node.test) == wanted)


def expression(source: str) -> Node:
    """An expression that is written as `source`, however it is formatted."""
    wanted, kind = _key(source), type(cst.parse_expression(source))
    return Node(f"expression {_fold(source)}", lambda node: type(node) is kind and _key(node) == wanted)


# --- edits -----------------------------------------------------------------------------------------------------------


def add_parameter(
    scope: str, parameter: str, doc: str | None = None, *, keyword_only: bool = False, releases: str = ""
) -> Edit:
    """Adds `parameter` ("release: bool = False") to the function `scope`.

    It goes after the last ordinary parameter, before `*args`, keyword-only ones and `**kwargs`; with `keyword_only`
    after the last keyword-only one, behind the `*` that is there or a new one. `doc` becomes its entry in the
    docstring's Args section.
    """
    new = cst.parse_module(f"def f(*, {parameter}): pass").body[0].params.kwonly_params[0]
    name = new.name.value

    def apply(module: cst.Module) -> cst.Module:
        *_, function = _only(_find(module, *_parent_and_definition(scope)), 1)
        if not isinstance(function, cst.FunctionDef):
            raise EditError("expected a function, found a class")
        for present in (*function.params.posonly_params, *function.params.params, *function.params.kwonly_params):
            if present.name.value == name:
                if _fold(_bare(present)) == _fold(_bare(new)):
                    return module
                raise EditError(f"expected no such parameter, found `{_fold(_bare(present))}`")
        edited = _with_parameter(function, new.deep_clone(), keyword_only)
        if doc is not None:
            edited = _with_doc(edited, name, doc)
        return _rewrite(module, {function: edited})

    return Edit(f"add parameter {name} to {scope}", apply, releases)


def pass_argument(scope: str, node: m.MatchIfTrue, argument: str, *, count: int = 1, releases: str = "") -> Edit:
    """Passes `argument` ("release=release") in each call `node`; a keyword that is there gets the new value."""
    new = cst.parse_expression(f"f({argument})").args[0]
    name = new.keyword.value

    def apply(module: cst.Module) -> cst.Module:
        places = [path[-1] for path in _counted(_find(module, scope, node), count)]
        if not all(isinstance(place, cst.Call) for place in places):
            raise EditError("expected calls, found other nodes")
        return _rewrite(module, {place: _with_argument(place, name, new.deep_clone()) for place in places})

    return Edit(f"pass {argument} in {_describe(node, scope)}", apply, releases)


def replace(scope: str, node: m.MatchIfTrue, new: str, *, count: int = 1, releases: str = "") -> Edit:
    """Replaces `node`, an expression or the statement that it is, by `new`."""

    def apply(module: cst.Module) -> cst.Module:
        return _substitute(module, scope, node, new, count, keeps_place=False)

    return Edit(f"replace {_describe(node, scope)}", apply, releases)


def wrap(scope: str, node: m.MatchIfTrue, template: str, *, count: int = 1, releases: str = "") -> Edit:
    """Puts `node` where `template` has {}.

    The template is an expression ("fn({})") for an expression; for a statement it is statements, in which {} is a line
    of its own ("try:" above it, indented, "except ImportError:" and what follows below it).
    """
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}}")

    def apply(module: cst.Module) -> cst.Module:
        return _substitute(module, scope, node, template.replace("{}", HOLE), count, keeps_place=True)

    return Edit(f"wrap {_describe(node, scope)}", apply, releases)


def insert_before(scope: str, node: m.MatchIfTrue, statements: str, *, count: int = 1, releases: str = "") -> Edit:
    """Inserts `statements` before the statement that holds `node`; `count` counts the statements."""
    return Edit(
        f"insert before {_describe(node, scope)}",
        lambda module: _insert(module, scope, node, statements, count, before=True),
        releases,
    )


def insert_after(scope: str, node: m.MatchIfTrue, statements: str, *, count: int = 1, releases: str = "") -> Edit:
    """Inserts `statements` after the statement that holds `node`; `count` counts the statements."""
    return Edit(
        f"insert after {_describe(node, scope)}",
        lambda module: _insert(module, scope, node, statements, count, before=False),
        releases,
    )


def insert_first(scope: str, statements: str, *, releases: str = "") -> Edit:
    """Inserts `statements` first in the function or class `scope`, after its docstring."""

    def apply(module: cst.Module) -> cst.Module:
        *_, definition = _only(_find(module, *_parent_and_definition(scope)), 1)
        body = definition.body
        if not isinstance(body, cst.IndentedBlock):
            raise EditError("expected a body on lines of its own")
        at = 0 if definition.get_docstring() is None else 1
        new = _parse_statements(statements)
        if _runs(body.body, [_key(each) for each in new]):
            return module
        edited = body.with_changes(body=[*body.body[:at], *new, *body.body[at:]])
        return _rewrite(module, {body: edited})

    return Edit(f"insert first in {scope}", apply, releases)


def add_import(statement: str, *, releases: str = "") -> Edit:
    """Adds the import `statement` at module level, in order; its names join a `from` of the same module."""
    new = cst.parse_statement(statement)
    importing = new.body[0]

    def apply(module: cst.Module) -> cst.Module:
        present = [
            line
            for line in module.body
            if m.matches(line, m.SimpleStatementLine(body=[m.Import() | m.ImportFrom(names=[m.AtLeastN(n=1)])]))
        ]
        if any(_key(line) == _key(new) for line in present):
            return module
        if isinstance(importing, cst.ImportFrom):
            for line in present:
                if isinstance(line.body[0], cst.ImportFrom) and _origin(line.body[0]) == _origin(importing):
                    return _rewrite(module, {line.body[0]: _with_names(line.body[0], importing.names)})
        return _with_import(module, present, new.deep_clone())

    return Edit(f"add {_fold(statement)!r}", apply, releases)


# --- finding ---------------------------------------------------------------------------------------------------------


class _Finder(cst.CSTVisitor):
    """Collects the path, root first, of every node that lies in `scope` and matches."""

    def __init__(self, scope: str, matcher: m.MatchIfTrue | m.BaseMatcherNode):
        self.scope = tuple(scope.split(".")) if scope else ()
        self.matcher = matcher
        self.path: list[cst.CSTNode] = []
        self.names: list[str] = []
        self.places: list[Path] = []
        self.seen_scope = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        depth = min(len(self.names), len(self.scope))
        on_the_way = tuple(self.names[:depth]) == self.scope[:depth]
        if on_the_way and depth == len(self.scope):
            self.seen_scope = True
            if self._matches(node):
                self.places.append((*self.path, node))
        self.path.append(node)
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.names.append(node.name.value)
        return on_the_way

    def on_leave(self, node: cst.CSTNode) -> None:
        self.path.pop()
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.names.pop()

    def _matches(self, node: cst.CSTNode) -> bool:
        if isinstance(self.matcher, m.MatchIfTrue):
            return bool(self.matcher.func(node))
        return m.matches(node, self.matcher)


def _find(module: cst.Module, scope: str, matcher: m.MatchIfTrue | m.BaseMatcherNode) -> list[Path]:
    finder = _Finder(scope, matcher)
    module.visit(finder)
    if not finder.seen_scope:
        raise EditError(f"expected a class or function {scope}, found none")
    return finder.places


def _parent_and_definition(scope: str) -> tuple[str, Node]:
    """The search for the definition of `scope`, which is directly in its parent, not deeper."""
    parent, _, name = scope.rpartition(".")
    return parent, define(name)


def _only(places: list[Path], count: int) -> Path:
    """The one definition among `places` that is not nested in a further function or class of the scope."""
    depth = [sum(isinstance(node, cst.FunctionDef | cst.ClassDef) for node in path) for path in places]
    return _counted([path for path, each in zip(places, depth, strict=True) if each == min(depth)], count)[0]


def _counted(places: list, count: int) -> list:
    if len(places) != count:
        raise EditError(f"expected {count} place{'s' * (count != 1)}, found {len(places)}")
    return places


def _describe(node: m.MatchIfTrue | m.BaseMatcherNode, scope: str) -> str:
    what = node.description if isinstance(node, Node) else _fold(repr(node))
    return f"{what} in {scope}" if scope else what


# --- comparing -------------------------------------------------------------------------------------------------------


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def _fold(source: str) -> str:
    return re.sub(r"\s+", " ", source).strip()


def _bare(parameter: cst.Param) -> str:
    """The parameter without the comma and white space after it."""
    return _code(
        parameter.with_changes(comma=cst.MaybeSentinel.DEFAULT, whitespace_after_param=cst.SimpleWhitespace(""))
    )


def _key(what: cst.CSTNode | str) -> str | None:
    """What an expression or a statement means to Python, without formatting and comments; None for anything else."""
    source = what if isinstance(what, str) else _code(what)
    if not isinstance(what, cst.BaseStatement | cst.BaseSmallStatement):
        source = f"({source}\n)"
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None


def _runs(statements: Sequence[cst.BaseStatement], keys: list[str | None]) -> list[int]:
    """The indices at which `statements` holds a run that equals `keys`."""
    have = [_key(each) for each in statements]
    return [at for at in range(len(have) - len(keys) + 1) if have[at : at + len(keys)] == keys]


def _run_through(path: Path, keys: list[str | None]) -> Sequence[cst.BaseStatement]:
    """The statements of the run that equals `keys` and that the path passes through; empty if there is none."""
    for block, statement in pairwise(path):
        if isinstance(block, cst.IndentedBlock | cst.Module) and statement in block.body:
            at = block.body.index(statement)
            for start in _runs(block.body, keys):
                if start <= at < start + len(keys):
                    return block.body[start : start + len(keys)]
    return ()


# --- statements and expressions --------------------------------------------------------------------------------------


def _parse_statements(source: str) -> list[cst.BaseStatement]:
    module = cst.parse_module(textwrap.dedent(source).strip("\n") + "\n")
    first, *rest = module.body
    return [first.with_changes(leading_lines=[*module.header, *first.leading_lines]), *rest]


def _statement(path: Path) -> tuple[cst.CSTNode, cst.BaseStatement]:
    """The block and, in it, the statement that holds the last node of `path`."""
    for block, node in reversed(list(pairwise(path))):
        if isinstance(block, cst.SimpleStatementSuite) or (
            node is path[-1] and isinstance(node, cst.If) and block.__class__ is cst.If
        ):
            raise EditError("expected a statement on a line of its own, found an `elif` or a one-line block")
        if isinstance(block, cst.IndentedBlock | cst.Module) and isinstance(node, cst.BaseStatement):
            return block, node
    raise EditError("expected a node inside a statement")


def _split_blank(lines: Sequence[cst.EmptyLine]) -> tuple[list[cst.EmptyLine], list[cst.EmptyLine]]:
    """Leading lines as (blank lines, the comments from the first one on)."""
    at = next((index for index, line in enumerate(lines) if line.comment), len(lines))
    return list(lines[:at]), list(lines[at:])


def _insert(
    module: cst.Module, scope: str, node: m.MatchIfTrue, source: str, count: int, *, before: bool
) -> cst.Module:
    keys = [_key(each) for each in _parse_statements(source)]
    places: dict[cst.CSTNode, cst.CSTNode] = {}
    done = 0
    for path in _find(module, scope, node):
        if _run_through(path, keys):
            continue
        block, statement = _statement(path)
        if statement in places:
            continue
        at = block.body.index(statement)
        if _runs(block.body[:at] if before else block.body[at + 1 :], keys):
            done += 1
        else:
            places[statement] = block
    if not places and done == count:
        return module
    _counted([*places, *range(done)], count)
    table = {}
    for statement in places:
        new = _parse_statements(source)
        if before:
            blank, comments = _split_blank(statement.leading_lines)
            new[0] = new[0].with_changes(leading_lines=[*blank, *new[0].leading_lines])
            table[statement] = lambda kept, new=new, comments=comments: cst.FlattenSentinel(
                [*new, kept.with_changes(leading_lines=comments)]
            )
        else:
            table[statement] = lambda kept, new=new: cst.FlattenSentinel([kept, *new])
    return _rewrite(module, table)


def _substitute(
    module: cst.Module, scope: str, node: m.MatchIfTrue, template: str, count: int, *, keeps_place: bool
) -> cst.Module:
    """Replaces each place by `template`, in which HOLE stands for the place itself."""
    paths = _find(module, scope, node)
    todo: dict[cst.CSTNode, cst.CSTNode | cst.FlattenSentinel] = {}
    results: list[cst.CSTNode] = []
    for path in paths:
        place = path[-1]
        if isinstance(place, cst.BaseExpression):
            new = _fill_expression(template, place)
            own = [each for each in path if isinstance(each, cst.BaseExpression) and _key(each) == _key(new)]
        elif isinstance(place, cst.BaseStatement | cst.BaseSmallStatement):
            _, place = _statement(path)
            filled = _fill_statements(template, place)
            new = cst.FlattenSentinel(filled)
            own = _run_through(path, [_key(each) for each in filled])
        else:
            raise EditError(f"expected an expression or a statement, found {type(place).__name__}")
        results += own[:1]
        if not own:
            todo.setdefault(place, new)
    # What the template itself brings along may match too.
    brought = {node for path in paths for result in results if result in path for node in path[path.index(result) :]}
    todo = {place: new for place, new in todo.items() if place not in brought}
    done = len(results) if keeps_place else _results(module, scope, template)
    if not todo and (done == count if keeps_place else done >= count):
        return module
    _counted([*todo, *(results if keeps_place else ())], count)
    return _rewrite(module, todo)


def _results(module: cst.Module, scope: str, new: str) -> int:
    """How often `new`, an expression or statements, is in `scope`."""
    keys = [_key(each) for each in _parse_statements(new)]
    blocks = _find(module, scope, Node("block", lambda node: isinstance(node, cst.IndentedBlock | cst.Module)))
    runs = sum(len(_runs(path[-1].body, keys)) for path in blocks)
    try:
        return max(runs, len(_find(module, scope, expression(new))))
    except cst.ParserSyntaxError:
        return runs


def _fill_expression(template: str, place: cst.BaseExpression) -> cst.BaseExpression:
    tree = cst.parse_expression(template)
    hole = Node("hole", lambda node: isinstance(node, cst.Name) and node.value == HOLE)
    plain = m.replace(tree, m.Name(HOLE), place.deep_clone())
    meant = m.replace(tree, m.Name(HOLE), cst.parse_expression(f"({_code(place)}\n)"))
    if _key(plain) == _key(meant) or tree.deep_equals(cst.Name(HOLE)) or hole.func(tree):
        return plain
    return m.replace(
        tree, m.Name(HOLE), place.deep_clone().with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    )


def _fill_statements(template: str, place: cst.BaseStatement) -> list[cst.BaseStatement]:
    blank, comments = _split_blank(place.leading_lines)
    hole = m.SimpleStatementLine(body=[m.Expr(value=m.Name(HOLE))])
    filled = []
    for statement in _parse_statements(template):
        filled.append(m.replace(statement, hole, place.with_changes(leading_lines=[]).deep_clone()))
    first = filled[0]
    own_comments = any(line.comment for line in first.leading_lines)
    kept = [*blank, *([] if own_comments else comments)]
    filled[0] = first.with_changes(leading_lines=[*kept, *first.leading_lines])
    return filled


class _Rewriter(cst.CSTTransformer):
    def __init__(self, table: dict):
        self.table = table

    def on_leave(self, original_node, updated_node):
        new = self.table.get(original_node, updated_node)
        return new(updated_node) if callable(new) else new


def _rewrite(module: cst.Module, table: dict) -> cst.Module:
    """Replaces each node that is a key of `table` by its value, or by what its value makes of the node."""
    return module.visit(_Rewriter(table))


# --- parameters, arguments, docstrings -------------------------------------------------------------------------------


def _separator(items: Sequence[cst.CSTNode], lead: cst.BaseParenthesizableWhitespace) -> cst.Comma:
    """The comma between two items of a parameter or argument list that is laid out like this one, without comments."""
    if len(items) > 1 and isinstance(items[0].comma, cst.Comma):
        space = items[0].comma.whitespace_after
    else:
        space = lead if isinstance(lead, cst.ParenthesizedWhitespace) else cst.SimpleWhitespace(" ")
    return cst.Comma(whitespace_after=_uncommented(space))


def _uncommented(space: cst.BaseParenthesizableWhitespace) -> cst.BaseParenthesizableWhitespace:
    if isinstance(space, cst.ParenthesizedWhitespace):
        return space.with_changes(first_line=cst.TrailingWhitespace(), empty_lines=[])
    return space


def _insert_item(items: Sequence, at: int, new, lead: cst.BaseParenthesizableWhitespace, tail: str) -> list:
    """Inserts `new` into parameters or arguments in their layout; `tail` is the attribute for space after an item."""
    separator = _separator(items, lead)
    if at < len(items):
        return [*items[:at], new.with_changes(comma=separator), *items[at:]]
    if not items:
        return [new]
    *before, last = items
    end, between = last.comma, separator
    if isinstance(end, cst.Comma):
        space = end.whitespace_after
        if isinstance(space, cst.ParenthesizedWhitespace):
            if isinstance(between.whitespace_after, cst.ParenthesizedWhitespace):
                # A comment behind the last item stays with that item.
                between = between.with_deep_changes(between.whitespace_after, first_line=space.first_line)
            end = end.with_changes(whitespace_after=_uncommented(space))
    if hasattr(last, tail) and hasattr(new, tail):
        new = new.with_changes(**{tail: getattr(last, tail)})
        last = last.with_changes(**{tail: cst.SimpleWhitespace("")})
    return [*before, last.with_changes(comma=between), new.with_changes(comma=end)]


def _with_parameter(function: cst.FunctionDef, new: cst.Param, keyword_only: bool) -> cst.FunctionDef:
    params = function.params
    star = [params.star_arg] if isinstance(params.star_arg, cst.CSTNode) else []
    slash = [params.posonly_ind] if isinstance(params.posonly_ind, cst.CSTNode) else []
    kwargs = [params.star_kwarg] if params.star_kwarg is not None else []
    items = [*params.posonly_params, *slash, *params.params, *star, *params.kwonly_params, *kwargs]
    lead = function.whitespace_before_params
    tail = "whitespace_after_param"
    if keyword_only:
        at = len(items) - len(kwargs)
        items = _insert_item(items, at, new, lead, tail)
        if not star:
            items = _insert_item(items, at, cst.ParamStar(), lead, tail)
    else:
        items = _insert_item(items, len(params.posonly_params) + len(slash) + len(params.params), new, lead, tail)
    return function.with_changes(params=_parameters(items))


def _parameters(items: Sequence[cst.CSTNode]) -> cst.Parameters:
    """The flat list of a signature, separators included, as libcst holds it."""
    slash = next((at for at, item in enumerate(items) if isinstance(item, cst.ParamSlash)), None)
    posonly, rest = ([], list(items)) if slash is None else (list(items[:slash]), list(items[slash + 1 :]))
    starred = next(
        (at for at, item in enumerate(rest) if isinstance(item, cst.ParamStar) or getattr(item, "star", "") == "*"),
        None,
    )
    kwargs = [item for item in rest if getattr(item, "star", "") == "**"]
    rest = rest[: len(rest) - len(kwargs)]
    return cst.Parameters(
        posonly_params=posonly,
        posonly_ind=cst.MaybeSentinel.DEFAULT if slash is None else items[slash],
        params=rest if starred is None else rest[:starred],
        star_arg=cst.MaybeSentinel.DEFAULT if starred is None else rest[starred],
        kwonly_params=[] if starred is None else rest[starred + 1 :],
        star_kwarg=kwargs[0] if kwargs else None,
    )


def _with_argument(place: cst.Call, name: str, new: cst.Arg) -> cst.Call:
    for arg in place.args:
        if arg.keyword is not None and arg.keyword.value == name:
            return place.with_deep_changes(arg, value=new.value)
    at = next((index for index, arg in enumerate(place.args) if arg.star == "**"), len(place.args))
    items = _insert_item(place.args, at, new, place.whitespace_before_args, "whitespace_after_arg")
    return place.with_changes(args=items)


def _with_doc(function: cst.FunctionDef, name: str, doc: str) -> cst.FunctionDef:
    """Adds an entry for the parameter `name` to the docstring's Args, after that of the parameter before it."""
    first = function.body.body[0] if isinstance(function.body, cst.IndentedBlock) else None
    if not m.matches(first, m.SimpleStatementLine(body=[m.Expr(value=m.SimpleString())])):
        raise EditError("expected a docstring to document the parameter in, found none")
    string = first.body[0].value
    lines = string.value.split("\n")
    head = next((at for at, line in enumerate(lines) if line.strip() in ("Args:", "Arguments:", "Parameters:")), None)
    if head is None:
        raise EditError("expected an Args section in the docstring, found none")
    end, entries = _section(lines, head)
    if name in entries:
        return function
    names = [item.name.value for item in (*function.params.params, *function.params.kwonly_params)]
    known = [each for each in names[: names.index(name)] if each in entries] if name in names else []
    at = _entry_end(lines, entries[known[-1]], end) if known else end
    start = next(iter(entries.values()), None)
    margin = re.match(r"\s*", lines[start] if start is not None else lines[head] + INDENT).group()
    if start is None:
        margin = re.match(r"\s*", lines[head]).group() + INDENT
    typed = sum(bool(re.match(r"\s*\w+ \(", lines[line])) for line in entries.values()) * 2 > len(entries)
    annotation = next(p for p in (*function.params.params, *function.params.kwonly_params) if p.name.value == name)
    kind = f" ({_code(annotation.annotation.annotation)})" if typed and annotation.annotation else ""
    entry = textwrap.wrap(
        f"{name}{kind}: {doc}", WIDTH, initial_indent=margin, subsequent_indent=margin + INDENT, break_long_words=False
    )
    value = "\n".join([*lines[:at], *entry, *lines[at:]])
    return function.with_deep_changes(string, value=value)


def _section(lines: list[str], head: int) -> tuple[int, dict[str, int]]:
    """The line after the last entry of the section that starts at `head`, and the first line of each entry by name."""
    margin = len(lines[head]) - len(lines[head].lstrip())
    entries: dict[str, int] = {}
    end, depth = head + 1, None
    for at in range(head + 1, len(lines)):
        text = lines[at].strip()
        indent = len(lines[at]) - len(lines[at].lstrip())
        if text and (indent <= margin or text in ('"""', "'''")):
            break
        if text:
            depth = indent if depth is None else depth
            end = at + 1
            entry = re.match(r"\*{0,2}(\w+)\s*(\(.*?\))?:", text)
            if entry and indent == depth:
                entries[entry[1]] = at
    return end, entries


def _entry_end(lines: list[str], start: int, end: int) -> int:
    """The line after the entry that starts at `start`; `end` is the end of the section."""
    depth = len(lines[start]) - len(lines[start].lstrip())
    for at in range(start + 1, end):
        if not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip()) <= depth:
            return at
    return end


# --- imports ---------------------------------------------------------------------------------------------------------


def _origin(node: cst.ImportFrom) -> str:
    return "." * len(node.relative) + (_code(node.module) if node.module is not None else "")


def _name_order(alias: cst.ImportAlias) -> tuple[int, str]:
    """The order of isort and ruff inside one import: constants, classes, the rest."""
    name = _code(alias.name)
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


def _with_names(node: cst.ImportFrom, names: Sequence[cst.ImportAlias]) -> cst.ImportFrom:
    if isinstance(node.names, cst.ImportStar):
        return node
    items = list(node.names)
    lead = node.lpar.whitespace_after if node.lpar is not None else cst.SimpleWhitespace(" ")
    for new in names:
        bare = _fold(_code(new.with_changes(comma=cst.MaybeSentinel.DEFAULT)))
        if any(_fold(_code(item.with_changes(comma=cst.MaybeSentinel.DEFAULT))) == bare for item in items):
            continue
        at = next((index for index, item in enumerate(items) if _name_order(item) > _name_order(new)), len(items))
        items = _insert_item(items, at, new.deep_clone(), lead, "")
    return node.with_changes(names=items)


def _with_import(module: cst.Module, present: list, new: cst.SimpleStatementLine) -> cst.Module:
    def order(line: cst.SimpleStatementLine) -> tuple[bool, str]:
        node = line.body[0]
        is_from = isinstance(node, cst.ImportFrom)
        return is_from, _origin(node) if is_from else _code(node.names[0].name)

    kind, name = order(new)
    root = name.partition(".")[0]
    standard = root in sys.stdlib_module_names
    roots = [(line, order(line)[1].partition(".")[0]) for line in present]
    likes = [line for line, each in roots if each == root] or [
        line for line, each in roots if each != "__future__" and (each in sys.stdlib_module_names) == standard
    ]
    if not likes:
        raise EditError("expected an import at module level to put it next to, found none")
    later = next((line for line in likes if order(line) > (kind, name)), None)
    if later is not None:
        new = new.with_changes(leading_lines=_split_blank(later.leading_lines)[0])
        comments = _split_blank(later.leading_lines)[1]
        return _rewrite(
            module, {later: lambda kept: cst.FlattenSentinel([new, kept.with_changes(leading_lines=comments)])}
        )
    return _rewrite(module, {likes[-1]: lambda kept: cst.FlattenSentinel([kept, new])})
