# SPDX-License-Identifier: Apache-2.0
"""What the edits do to LibCST's trees: find a place, compare by meaning, rewrite, lay new code out like the old."""

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise

import libcst as cst
import libcst.matchers as m
from libcst import metadata

from fork.errors import EditError


Path = tuple[cst.CSTNode, ...]
"""A node with all that it lies in, the module first and the node last."""

Matcher = m.MatchIfTrue | m.BaseMatcherNode
DEFINITION = (cst.FunctionDef, cst.ClassDef)
HOLE = "__hole__"
INDENT = " " * 4
WIDTH = 119
STANDARD = sys.stdlib_module_names


# --- finding ---------------------------------------------------------------------------------------------------------


class _Finder(cst.CSTVisitor):
    """Collects the path, root first, of every node that lies in `scope` and matches."""

    def __init__(self, scope: str, matcher: Matcher, shallow: bool):
        self.scope = tuple(scope.split(".")) if scope else ()
        self.matcher = matcher
        self.shallow = shallow
        self.path: list[cst.CSTNode] = []
        self.names: list[str] = []
        self.places: list[Path] = []
        self.seen_scope = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        depth = min(len(self.names), len(self.scope))
        on_the_way = tuple(self.names[:depth]) == self.scope[:depth]
        inside = on_the_way and depth == len(self.scope)
        if inside:
            self.seen_scope = True
            if self._matches(node):
                self.places.append((*self.path, node))
        self.path.append(node)
        if isinstance(node, DEFINITION):
            self.names.append(node.name.value)
        if isinstance(node, cst.SimpleStatementLine):
            return inside and not self.shallow
        return on_the_way and not (inside and self.shallow and isinstance(node, DEFINITION))

    def on_leave(self, node: cst.CSTNode) -> None:
        self.path.pop()
        if isinstance(node, DEFINITION):
            self.names.pop()

    def _matches(self, node: cst.CSTNode) -> bool:
        if isinstance(self.matcher, m.MatchIfTrue):
            return bool(self.matcher.func(node))
        return m.matches(node, self.matcher)


def find(module: cst.Module, scope: str, matcher: Matcher, *, shallow: bool = False) -> list[Path]:
    """Returns the nodes in `scope` that match.

    Args:
        module: the tree.
        scope: the qualified name of a class or function; empty for the module.
        matcher: what to find.
        shallow: only among the scope's statements, not in the functions and classes that it defines.

    Raises:
        EditError: there is no such scope.
    """
    finder = _Finder(scope, matcher, shallow)
    module.visit(finder)
    if not finder.seen_scope:
        raise EditError(f"expected a class or function {scope}, found none")
    return finder.places


def find_definition(module: cst.Module, scope: str) -> Path:
    """Returns the function or class whose qualified name is `scope`; raises `EditError` unless there is just one."""
    parent, _, name = scope.rpartition(".")
    definition = m.FunctionDef(name=m.Name(name)) | m.ClassDef(name=m.Name(name))
    return counted(find(module, parent, definition, shallow=True), 1)[0]


def counted(places: list, count: int) -> list:
    """Returns `places`; raises `EditError` unless there are `count`."""
    if len(places) != count:
        raise EditError(f"expected {count} place{'s' * (count != 1)}, found {len(places)}")
    return places


# --- comparing -------------------------------------------------------------------------------------------------------


def code(node: cst.CSTNode) -> str:
    """Returns the source of `node`."""
    return cst.Module([]).code_for_node(node)


def fold(source: str) -> str:
    """Returns `source` on one line."""
    return re.sub(r"\s+", " ", source).strip()


def label(node: cst.CSTNode) -> str:
    """Returns what names a node among those of its kind, on one line: the function of a call, the test of an if."""
    match node:
        case cst.Call():
            return fold(code(node.func))
        case cst.Assign():
            return ", ".join(fold(code(each.target)) for each in node.targets)
        case cst.AnnAssign():
            return fold(code(node.target))
        case cst.If():
            return fold(code(node.test))
        case cst.FunctionDef() | cst.ClassDef():
            return node.name.value
        case cst.ImportFrom():
            return origin(node)
        case cst.Import():
            return ", ".join(alias.evaluated_name for alias in node.names)
        case cst.Expr():
            return label(node.value)
    return fold(code(node))


def bare(parameter: cst.Param) -> str:
    """The parameter without the comma and white space after it."""
    return code(
        parameter.with_changes(comma=cst.MaybeSentinel.DEFAULT, whitespace_after_param=cst.SimpleWhitespace(""))
    )


def key(what: cst.CSTNode | str) -> str | None:
    """What an expression or a statement means to Python, without formatting and comments; None for anything else."""
    source = what if isinstance(what, str) else code(what)
    if not isinstance(what, cst.BaseStatement | cst.BaseSmallStatement):
        source = f"({source}\n)"
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None


def same(one: cst.CSTNode, other: cst.CSTNode) -> bool:
    """Whether two expressions or statements mean the same to Python."""
    return _alike(one, other) and key(one) == key(other)


def _alike(one: cst.CSTNode, other: cst.CSTNode) -> bool:
    """A cheap test that all nodes pass that mean the same; it spares `key` for nearly all that don't."""
    if type(one) is not type(other):
        return False
    match one:
        case cst.Name():
            return one.value == other.value
        case cst.Attribute():
            return one.attr.value == other.attr.value and _alike(one.value, other.value)
        case cst.Call():
            return len(one.args) == len(other.args) and _alike(one.func, other.func)
        case cst.FunctionDef() | cst.ClassDef():
            return one.name.value == other.name.value
        case cst.SimpleStatementLine():
            return len(one.body) == len(other.body) and all(map(_alike, one.body, other.body))
    return True


def runs(statements: Sequence[cst.BaseStatement], wanted: Sequence[cst.BaseStatement]) -> list[int]:
    """The indices at which `statements` holds a run that means the same as `wanted`."""
    starts = range(len(statements) - len(wanted) + 1)
    return [at for at in starts if all(map(same, statements[at : at + len(wanted)], wanted))]


def run_through(path: Path, wanted: Sequence[cst.BaseStatement]) -> Sequence[cst.BaseStatement]:
    """The statements of the run that means the same as `wanted` and that the path passes through; empty if none is."""
    for block, each in pairwise(path):
        if isinstance(block, cst.IndentedBlock | cst.Module) and each in block.body:
            at = block.body.index(each)
            near = slice(max(0, at - len(wanted) + 1), at + len(wanted))
            for start in runs(block.body[near], wanted):
                return block.body[near][start : start + len(wanted)]
    return ()


# --- statements and expressions --------------------------------------------------------------------------------------


def parse_statements(source: str) -> list[cst.BaseStatement]:
    """Returns the statements of `source`, whose indentation as a whole doesn't matter."""
    module = cst.parse_module(textwrap.dedent(source).strip("\n") + "\n")
    # A blank line stays one, without white space, however deep the statements go.
    module = m.replace(module, m.EmptyLine(comment=None), cst.EmptyLine(indent=False))
    first, *rest = module.body
    return [first.with_changes(leading_lines=[*module.header, *first.leading_lines]), *rest]


def statement(path: Path) -> tuple[cst.CSTNode, cst.BaseStatement]:
    """The block and, in it, the statement that holds the last node of `path`."""
    for block, node in reversed(list(pairwise(path))):
        is_elif = node is path[-1] and isinstance(node, cst.If) and isinstance(block, cst.If)
        if is_elif or isinstance(block, cst.SimpleStatementSuite):
            raise EditError("expected a statement on a line of its own, found an `elif` or a one-line block")
        if isinstance(block, cst.IndentedBlock | cst.Module) and isinstance(node, cst.BaseStatement):
            return block, node
    raise EditError("expected a node inside a statement")


def split_blank(lines: Sequence[cst.EmptyLine]) -> tuple[list[cst.EmptyLine], list[cst.EmptyLine]]:
    """Leading lines as (those up to the last blank one, the comments of the statement itself)."""
    at = next((at for at in range(len(lines), 0, -1) if not lines[at - 1].comment), 0)
    return list(lines[:at]), list(lines[at:])


def fill_expression(template: str, place: cst.BaseExpression) -> cst.BaseExpression:
    """Returns the expression `template` with `place` for HOLE, in parentheses where it needs them."""
    tree = cst.parse_expression(template)
    plain = m.replace(tree, m.Name(HOLE), place.deep_clone())
    bracketed = place.deep_clone().with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    safe = m.replace(tree, m.Name(HOLE), bracketed)
    return plain if key(plain) == key(safe) else safe


def fill_statements(template: str, place: cst.BaseStatement) -> list[cst.BaseStatement]:
    """Returns the statements of `template` with `place` for the line HOLE; comments above `place` go above all."""
    blank, comments = split_blank(place.leading_lines)
    hole = m.SimpleStatementLine(body=[m.Expr(value=m.Name(HOLE))])
    filled = []
    for statement in parse_statements(template):
        filled.append(m.replace(statement, hole, place.with_changes(leading_lines=[]).deep_clone()))
    first = filled[0]
    own_comments = any(line.comment for line in first.leading_lines)
    kept = [*blank, *([] if own_comments else comments)]
    filled[0] = first.with_changes(leading_lines=[*kept, *first.leading_lines])
    return filled


# --- rewriting -------------------------------------------------------------------------------------------------------


class _Rewriter(cst.CSTTransformer):
    def __init__(self, table: dict, paths: Iterable[Path]):
        self.table = table
        self.way = {node for path in paths for node in path}

    def on_visit(self, node: cst.CSTNode) -> bool:
        return node in self.way

    def on_leave(self, original_node, updated_node):
        new = self.table.get(original_node, updated_node)
        return new(updated_node) if callable(new) else new


def rewrite(module: cst.Module, table: dict, paths: Iterable[Path]) -> cst.Module:
    """Replaces each node that is a key of `table` by its value, or by what its value makes of the node.

    Args:
        module: the tree.
        table: a node, or several (`FlattenSentinel`), or a function from the node to these, by the node to replace.
        paths: lead to every key of `table`.
    """
    return module.visit(_Rewriter(table, paths))


# --- parameters, arguments, docstrings -------------------------------------------------------------------------------


def insert_item(items: Sequence, at: int, new) -> list:
    """Inserts `new` into parameters, arguments or names; the formatter lays them out."""
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    new = new.with_changes(comma=cst.MaybeSentinel.DEFAULT)
    if at < len(items):
        return [*items[:at], new.with_changes(comma=comma), *items[at:]]
    if not items:
        return [new]
    *before, last = items
    if not isinstance(last.comma, cst.Comma):
        return [*before, last.with_changes(comma=comma), new]
    # A trailing comma keeps an item a line, and a comment behind it stays with the item before it.
    return [*before, last, new.with_changes(comma=cst.Comma())]


def with_parameter(function: cst.FunctionDef, new: cst.Param, keyword_only: bool) -> cst.FunctionDef:
    """Returns the function with the parameter `new`, last of its kind."""
    params = function.params
    star = [params.star_arg] if isinstance(params.star_arg, cst.CSTNode) else []
    slash = [params.posonly_ind] if isinstance(params.posonly_ind, cst.CSTNode) else []
    kwargs = [params.star_kwarg] if params.star_kwarg is not None else []
    items = [*params.posonly_params, *slash, *params.params, *star, *params.kwonly_params, *kwargs]
    if keyword_only:
        at = len(items) - len(kwargs)
        items = insert_item(items, at, new)
        if not star:
            items = insert_item(items, at, cst.ParamStar())
    else:
        items = insert_item(items, len(params.posonly_params) + len(slash) + len(params.params), new)
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


def with_argument(place: cst.Call, name: str, new: cst.Arg) -> cst.Call:
    """Returns the call with the keyword argument `new`, whose keyword is `name`."""
    for arg in place.args:
        if arg.keyword is not None and arg.keyword.value == name:
            return place.with_deep_changes(arg, value=new.value)
    at = next((index for index, arg in enumerate(place.args) if arg.star == "**"), len(place.args))
    return place.with_changes(args=insert_item(place.args, at, new))


def with_doc(function: cst.FunctionDef, name: str, doc: str) -> cst.FunctionDef:
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
    kind = f" ({code(annotation.annotation.annotation)})" if typed and annotation.annotation else ""
    entry = textwrap.wrap(
        f"{name}{kind}: {doc}",
        WIDTH,
        initial_indent=margin,
        subsequent_indent=margin + INDENT,
        break_long_words=False,
        break_on_hyphens=False,
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


def origin(node: cst.ImportFrom) -> str:
    """Returns what a `from` import imports from, with the dots of a relative one."""
    return "." * len(node.relative) + (code(node.module) if node.module is not None else "")


def with_names(node: cst.ImportFrom, names: Sequence[cst.ImportAlias]) -> cst.ImportFrom:
    """Returns the `from` import with those of `names` that it lacks; the formatter sorts them."""
    if isinstance(node.names, cst.ImportStar):
        return node
    items = list(node.names)
    have = {_alias(item) for item in items}
    for new in names:
        if _alias(new) not in have:
            items = insert_item(items, len(items), new.deep_clone())
    return node.with_changes(names=items)


def _alias(alias: cst.ImportAlias) -> tuple[str | None, str | None]:
    return alias.evaluated_name, alias.evaluated_alias


def with_import(
    module: cst.Module, present: Sequence[cst.SimpleStatementLine], new: cst.SimpleStatementLine
) -> cst.Module:
    """Returns the module with the import `new` behind one of `present`, its imports; the formatter sorts them."""

    def root(line: cst.SimpleStatementLine) -> str:
        node = line.body[0]
        name = origin(node) if isinstance(node, cst.ImportFrom) else code(node.names[0].name)
        return name.partition(".")[0]

    others = [line for line in present if root(line) != "__future__"]
    if not others:
        raise EditError("expected an import at module level to put it next to, found none")
    likes = [line for line in others if root(line) == root(new)]
    # Behind one of its kind, for what stands between the imports, such as a `try`, may use it.
    likes = likes or [line for line in others if (root(line) in STANDARD) == (root(new) in STANDARD)] or others
    place = likes[-1]
    return rewrite(module, {place: cst.FlattenSentinel([place, new])}, [(module, place)])


def with_aliases(node: cst.ImportFrom, aliases: Sequence[cst.ImportAlias]) -> cst.ImportFrom:
    """Returns a `from` import of `aliases` only."""
    bare = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in aliases]
    return node.with_changes(names=bare, lpar=None, rpar=None)


def used_in_functions(module: cst.Module, names: Iterable[str]) -> list[tuple[Path, set[str]]]:
    """Returns the paths of the outermost functions and methods that use global `names` when called, and which.

    Raises:
        EditError: One is used outside of a function, or annotations are evaluated.
    """
    names = set(names)
    wrapper = metadata.MetadataWrapper(module, unsafe_skip_copy=True)
    used: dict[cst.CSTNode, set[str]] = {}
    for scope in {scope for scope in wrapper.resolve(metadata.ScopeProvider).values() if scope is not None}:
        for access in scope.accesses:
            named = {each.name for each in access.referents if _is_global(each.scope)} & names
            # The text of a type hint isn't evaluated.
            if not named or access.is_annotation or isinstance(access.node, cst.BaseString):
                continue
            around = [access.scope]
            while not _is_global(around[-1]):
                around.append(around[-1].parent)
            functions = [each.node for each in around if isinstance(getattr(each, "node", None), cst.FunctionDef)]
            if not functions:
                raise EditError(f"expected {', '.join(sorted(named))} in functions only, found it at module level")
            used.setdefault(functions[-1], set()).update(named)
    if not any(m.matches(line, _FUTURE) for line in module.body):
        raise EditError("expected `from __future__ import annotations`, found annotations that are evaluated")
    functions = find(module, "", m.MatchIfTrue(lambda node: node in used))
    return [(path, used[path[-1]]) for path in functions]


_FUTURE = m.SimpleStatementLine(
    body=[
        m.ImportFrom(
            module=m.Name("__future__"),
            names=[m.ZeroOrMore(), m.ImportAlias(name=m.Name("annotations")), m.ZeroOrMore()],
        )
    ]
)


def _is_global(scope: metadata.Scope) -> bool:
    return isinstance(scope, metadata.GlobalScope)
