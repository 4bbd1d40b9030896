# SPDX-License-Identifier: Apache-2.0
"""The vocabulary in which a change to upstream's source is written.

A change (`fork.change`) lists, for each file of upstream, the edits that it takes. An edit names its place by
structure: a scope (the qualified name of a class or function, "" for the whole file) and a node at any depth in it. It
fails if the place is missing, or is found another number of times than `count`. It recognises its own result, so a
second application changes nothing.

Nodes are `libcst.matchers`; `call`, `assign`, `imports`, `define`, `ifs` and `expression` make the usual ones.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass

import libcst as cst
import libcst.matchers as m

from fork import syntax
from fork.errors import EditError
from fork.requirements import covers


@dataclass(frozen=True)
class Edit:
    """One edit of one file.

    Args:
        name: what the edit does and where, for messages.
        apply: takes the parsed file and returns the edited one; raises `EditError`.
        releases: specifier of the upstream versions that need the edit; empty for all.
        scope: where its place is, for messages.
        node: what its place is, for messages.
        shared: another change may have made the same edit before.
    """

    name: str
    apply: Callable[[cst.Module], cst.Module]
    releases: str = ""
    scope: str = ""
    node: syntax.Matcher | None = None
    shared: bool = False


@dataclass(frozen=True)
class Misplaced:
    """An edit whose place is not where it was, or a file that is gone.

    Attributes:
        message: What was expected and what was found.
        file: The file, relative to megatron/bridge.
        edit: The edit; None if the file is gone.
    """

    message: str
    file: str
    edit: Edit | None = None


@dataclass(frozen=True)
class File:
    """The edits of one file, whose path is relative to megatron/bridge."""

    path: str
    edits: Sequence[Edit]

    def covers(self, release: str) -> bool:
        """Returns whether upstream's `release`, which may lack the file, needs the edits or some of them."""
        return not self.edits or any(covers(edit.releases, release) for edit in self.edits)

    def apply(
        self, source: str, release: str, *, pristine: bool = False, misplaced: list[Misplaced] | None = None
    ) -> str:
        """Returns `source` with the edits that `release` needs.

        Args:
            source: the file.
            release: the version of upstream.
            pristine: the file is as upstream released it, so an edit whose result is there already is a mistake.
            misplaced: takes the edits that don't find their place, and the others are made.

        Raises:
            EditError: an edit's place is missing or ambiguous.
        """
        tree = cst.parse_module(source)
        for edit in self.edits:
            if covers(edit.releases, release):
                try:
                    edited = edit.apply(tree)
                    if pristine and edited is tree and not edit.shared:
                        raise EditError("expected to change something, found the result there already")
                except (EditError, cst.CSTValidationError, cst.ParserSyntaxError) as error:
                    message = f"{self.path}: {edit.name}: {str(error).splitlines()[0]}"
                    if misplaced is None:
                        raise EditError(message) from None
                    misplaced.append(Misplaced(message, self.path, edit))
                    continue
                tree = edited
        try:
            compile(tree.code, self.path, "exec", dont_inherit=True)
        except SyntaxError as error:
            raise EditError(f"{self.path}: the result is not Python: {error}") from None
        return tree.code


# --- nodes -----------------------------------------------------------------------------------------------------------


class Node(m.MatchIfTrue):
    """A matcher with a description for messages; it can be nested in other matchers.

    Attributes:
        description: What it matches.
        kinds: The classes of node that it matches.
        wanted: What `syntax.label` says of them.
    """

    def __init__(self, description: str, matches: Callable[[cst.CSTNode], bool], kinds: tuple[type, ...], wanted: str):
        super().__init__(matches)
        self.description, self.kinds, self.wanted = description, kinds, wanted


def call(function: str) -> Node:
    """A call of `function`, as it is written there: "get_checkpoint_name" or "torch.save"."""
    wanted = cst.parse_expression(function)
    return Node(
        f"call of {function}",
        lambda node: isinstance(node, cst.Call) and syntax.same(node.func, wanted),
        (cst.Call,),
        function,
    )


def assign(target: str) -> Node:
    """An assignment, annotated or not, to `target` ("name" or "self.name")."""
    wanted = cst.parse_expression(target)

    def matches(node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Assign):
            return any(syntax.same(each.target, wanted) for each in node.targets)
        return isinstance(node, cst.AnnAssign) and syntax.same(node.target, wanted)

    return Node(f"assignment to {target}", matches, (cst.Assign, cst.AnnAssign), target)


def imports(module: str) -> Node:
    """An `import module [as …]` or `from module import …`."""

    def matches(node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Import):
            return any(alias.evaluated_name == module for alias in node.names)
        return isinstance(node, cst.ImportFrom) and syntax.origin(node) == module

    return Node(f"import of {module}", matches, (cst.Import, cst.ImportFrom), module)


def define(name: str) -> Node:
    """The definition of the function or class `name`."""
    return Node(
        f"definition of {name}",
        lambda node: isinstance(node, cst.FunctionDef | cst.ClassDef) and node.name.value == name,
        syntax.DEFINITION,
        name,
    )


def ifs(test: str) -> Node:
    """An `if` whose test is `test`."""
    wanted = cst.parse_expression(test)
    return Node(
        f"if {syntax.fold(test)}",
        lambda node: isinstance(node, cst.If) and syntax.same(node.test, wanted),
        (cst.If,),
        test,
    )


def expression(source: str) -> Node:
    """An expression that is written as `source`, however it is formatted."""
    wanted = cst.parse_expression(source)
    return Node(f"expression {syntax.fold(source)}", lambda node: syntax.same(node, wanted), (type(wanted),), source)


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
        path = syntax.find_definition(module, scope)
        function = path[-1]
        if not isinstance(function, cst.FunctionDef):
            raise EditError("expected a function, found a class")
        for present in (*function.params.posonly_params, *function.params.params, *function.params.kwonly_params):
            if present.name.value == name:
                if syntax.fold(syntax.bare(present)) == syntax.fold(syntax.bare(new)):
                    return module
                raise EditError(f"expected no such parameter, found `{syntax.fold(syntax.bare(present))}`")
        edited = syntax.with_parameter(function, new.deep_clone(), keyword_only)
        if doc is not None:
            edited = syntax.with_doc(edited, name, doc)
        return syntax.rewrite(module, {function: edited}, [path])

    return Edit(f"add parameter {name} to {scope}", apply, releases, scope)


def set_default(function: str, parameter: str, value: str, *, releases: str = "") -> Edit:
    """Gives `parameter` of the function or method `function` the default `value`, in place of the one that it has."""
    new = cst.parse_expression(value)

    def apply(module: cst.Module) -> cst.Module:
        path = syntax.find_definition(module, function)
        params = path[-1].params
        every = (*params.posonly_params, *params.params, *params.kwonly_params)
        found = [each for each in every if each.name.value == parameter]
        if len(found) != 1 or found[0].default is None:
            raise EditError("expected a parameter with a default, found none")
        if syntax.same(found[0].default, new):
            return module
        edited = path[-1].deep_replace(found[0], found[0].with_changes(default=new.deep_clone()))
        return syntax.rewrite(module, {path[-1]: edited}, [path])

    return Edit(f"set the default of {parameter} in {function}", apply, releases, function)


def pass_argument(scope: str, node: syntax.Matcher, argument: str, *, count: int = 1, releases: str = "") -> Edit:
    """Passes `argument` ("release=release") in each call `node`; a keyword that is there gets the new value."""
    new = cst.parse_expression(f"f({argument})").args[0]
    name = new.keyword.value

    def apply(module: cst.Module) -> cst.Module:
        paths = syntax.counted(syntax.find(module, scope, node), count)
        table = {}
        for *_, place in paths:
            if not isinstance(place, cst.Call):
                raise EditError(f"expected a call, found {type(place).__name__}")
            if not any(
                arg.keyword and arg.keyword.value == name and syntax.same(arg.value, new.value) for arg in place.args
            ):
                table[place] = lambda inner: syntax.with_argument(inner, name, new.deep_clone())
        return syntax.rewrite(module, table, paths) if table else module

    return Edit(f"pass {argument} in {_describe(node, scope)}", apply, releases, scope, node)


def replace(scope: str, node: syntax.Matcher, new: str, *, count: int = 1, releases: str = "") -> Edit:
    """Replaces `node`, an expression or the statement that it is, by `new`."""

    def apply(module: cst.Module) -> cst.Module:
        return _substitute(module, scope, node, new, count, keeps_place=False)

    return Edit(f"replace {_describe(node, scope)}", apply, releases, scope, node)


def wrap(scope: str, node: syntax.Matcher, template: str, *, count: int = 1, releases: str = "") -> Edit:
    """Puts `node` where `template` has {}.

    The template is an expression ("fn({})") for an expression; for a statement it is statements, in which {} is a line
    of its own ("try:" above it, indented, "except ImportError:" and what follows below it).
    """
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}}")

    def apply(module: cst.Module) -> cst.Module:
        return _substitute(module, scope, node, template.replace("{}", syntax.HOLE), count, keeps_place=True)

    return Edit(f"wrap {_describe(node, scope)}", apply, releases, scope, node)


def replace_up_to(scope: str, first: syntax.Matcher, end: syntax.Matcher, new: str, *, releases: str = "") -> Edit:
    """Replaces the statements from `first` up to `end`, with the comments between them, by `new`."""

    def apply(module: cst.Module) -> cst.Module:
        (path,) = syntax.counted(syntax.find(module, scope, end), 1)
        block, last = syntax.statement(path)
        statements = syntax.parse_statements(new)
        stop = block.body.index(last)
        if syntax.runs(block.body[:stop], statements):
            return module
        (place,) = syntax.counted(syntax.find(module, scope, first), 1)
        start = block.body.index(syntax.statement(place)[1])
        blank, comments = syntax.split_blank(last.leading_lines)
        kept = last.with_changes(leading_lines=[*blank[-1:], *comments])
        body = [*block.body[:start], *statements, kept, *block.body[stop + 1 :]]
        return syntax.rewrite(module, {block: block.with_changes(body=body)}, [path[: path.index(block) + 1]])

    return Edit(f"replace {_describe(first, scope)}", apply, releases, scope, first)


def insert_before(
    scope: str,
    node: syntax.Matcher,
    statements: str,
    *,
    done: syntax.Matcher | None = None,
    count: int = 1,
    releases: str = "",
) -> Edit:
    """Inserts `statements` before the statement that holds `node`; `count` counts the statements.

    They are there already if `done` is in the scope: for statements that a later change edits.
    """
    return _inserting(scope, node, statements, done, count, releases, before=True)


def insert_after(
    scope: str,
    node: syntax.Matcher,
    statements: str,
    *,
    done: syntax.Matcher | None = None,
    count: int = 1,
    releases: str = "",
) -> Edit:
    """Inserts `statements` after the statement that holds `node`, as `insert_before` does before it."""
    return _inserting(scope, node, statements, done, count, releases, before=False)


def insert_first(scope: str, statements: str, *, done: syntax.Matcher | None = None, releases: str = "") -> Edit:
    """Inserts `statements` first in the function or class `scope`, after its docstring.

    They are there already if `done` is in the scope: for statements that a later change edits.
    """

    def apply(module: cst.Module) -> cst.Module:
        path = syntax.find_definition(module, scope)
        definition = path[-1]
        body = definition.body
        if not isinstance(body, cst.IndentedBlock):
            raise EditError("expected a body on lines of its own")
        at = 0 if definition.get_docstring() is None else 1
        new = syntax.parse_statements(statements)
        if syntax.runs(body.body, new) or done is not None and syntax.find(module, scope, done):
            return module
        edited = body.with_changes(body=[*body.body[:at], *new, *body.body[at:]])
        return syntax.rewrite(module, {body: edited}, [(*path, body)])

    return Edit(f"insert first in {scope}", apply, releases, scope)


def replace_in_test(
    test: str, name: str, new: str = "lambda *args, **kwargs: None", *, releases: str = ""
) -> list[Edit]:
    """Puts `new` in the place of the qualified `name` while a test of upstream runs. By default it does nothing."""
    return [
        add_parameter(test, "monkeypatch", releases=releases),
        insert_first(test, f'monkeypatch.setattr("{name}", {new})', releases=releases),
    ]


def decorate(function: str, decorator: str, *, outermost: bool = False, releases: str = "") -> Edit:
    """Adds `decorator` below the decorators that the function or method `function` has.

    With `outermost` it goes above them, but below `classmethod` and `staticmethod`, which make no function.
    """

    def apply(module: cst.Module) -> cst.Module:
        path = syntax.find_definition(module, function)
        definition = path[-1]
        new = cst.Decorator(cst.parse_expression(decorator))
        # A later change may have given it other arguments.
        if _called(new) in [_called(each) for each in definition.decorators]:
            return module
        decorators = list(definition.decorators)
        methods = [each for each in decorators if _called(each) in ("classmethod", "staticmethod")]
        decorators.insert(len(methods) if outermost else len(decorators), new)
        edited = definition.with_changes(decorators=decorators)
        return syntax.rewrite(module, {definition: edited}, [path])

    return Edit(f"decorate {function}", apply, releases, function)


def _called(decorator: cst.Decorator) -> str:
    place = decorator.decorator
    return syntax.code(place.func if isinstance(place, cst.Call) else place)


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
        if any(syntax.same(line, new) for line in present):
            return module
        if isinstance(importing, cst.ImportFrom):
            for line in present:
                if isinstance(line.body[0], cst.ImportFrom) and syntax.origin(line.body[0]) == syntax.origin(
                    importing
                ):
                    joined = syntax.with_names(line.body[0], importing.names)
                    return syntax.rewrite(module, {line.body[0]: joined}, [(module, line, line.body[0])])
        return syntax.with_import(module, present, new.deep_clone())

    return Edit(f"add {syntax.fold(statement)!r}", apply, releases, shared=True)


_IMPORT = m.SimpleStatementLine(body=[m.Import()])


def wrap_imports(template: str, *, releases: str = "") -> Edit:
    """Moves the `from` imports at module level, all together, to where `template` has a line {}.

    An import that `template` brings along stays out of it. `import package.module`, which an `__init__` has for what
    the module does when it is imported, goes, and so does one that may fail.
    """
    new = syntax.parse_statements(template.replace("{}", syntax.HOLE))
    hole = m.SimpleStatementLine(body=[m.Expr(value=m.Name(syntax.HOLE))])

    def apply(module: cst.Module) -> cst.Module:
        present = [line for line in module.body if m.matches(line, m.SimpleStatementLine(body=[m.ImportFrom()]))]
        moved = [line for line in present if not any(syntax.same(line, each) for each in new)]
        if not moved:
            if len(present) < sum(isinstance(each, cst.SimpleStatementLine) for each in new):
                raise EditError("expected imports at module level, found none")
            return module
        plain = [line for line in module.body if m.matches(line, _IMPORT | m.Try(body=m.IndentedBlock([_IMPORT])))]
        first = min(moved + plain, key=module.body.index)
        # A blank line stays one, without white space, in the block too.
        empty = m.EmptyLine(comment=None)
        lead, body = first.leading_lines, [m.replace(each, empty, cst.EmptyLine(indent=False)) for each in moved]
        body[0] = body[0].with_changes(leading_lines=[])
        filled = [m.replace(each, hole, lambda *_: cst.FlattenSentinel(body)) for each in new]
        filled[0] = filled[0].with_changes(leading_lines=lead)
        table = {line: cst.RemoveFromParent() for line in (*moved, *plain)} | {first: cst.FlattenSentinel(filled)}
        return syntax.rewrite(module, table, [(module, line) for line in table])

    return Edit("wrap imports", apply, releases)


def defer_imports(template: str, here: str, *deferred: str, releases: str = "") -> Edit:
    """Moves `from` imports at module level behind the others, to where `template` has a line {}.

    A function or method first imports, from the module itself, what it uses of them. So it also sees what a test has
    put in the place of a name. Annotations need nothing, for they aren't evaluated.

    Args:
        template: Statements with a line {} for the imports. They give the module a `__getattr__`.
        here: The full name of the module that is edited.
        *deferred: The modules whose names are moved, and the modules that are. The source may lack some of them, for
            upstream versions differ.
        releases: Specifier of the upstream versions that need the edit.
    """
    statements = template.replace("{}", syntax.HOLE)
    hole = m.SimpleStatementLine(body=[m.Expr(value=m.Name(syntax.HOLE))])

    def is_deferred(node: cst.ImportFrom, alias: cst.ImportAlias) -> bool:
        origin = syntax.origin(node)
        return origin in deferred or f"{origin}.{alias.evaluated_name}" in deferred

    def from_here(names: set[str]) -> cst.SimpleStatementLine:
        return cst.parse_statement(f"from {here} import {', '.join(sorted(names))}")

    def apply(module: cst.Module) -> cst.Module:
        lines = [line for line in module.body if m.matches(line, m.SimpleStatementLine(body=[m.ImportFrom()]))]
        moved: list[cst.ImportFrom] = []
        table: dict = {}
        for line in lines:
            node = line.body[0]
            names = [alias for alias in node.names if is_deferred(node, alias)]
            if not names:
                continue
            moved.append(syntax.with_aliases(node, names))
            rest = [alias for alias in node.names if alias not in names]
            bare = cst.RemoveFromParent()
            table[line] = line.with_changes(body=[syntax.with_aliases(node, rest)]) if rest else bare
        if not moved:
            within = m.findall(module, m.With() & m.MatchIfTrue(lambda node: node in module.body))
            present = [node for block in within for node in m.findall(block, m.ImportFrom())]
            if not any(is_deferred(node, alias) for node in present for alias in node.names):
                raise EditError(f"expected imports of {', '.join(deferred)} at module level, found none")
            return module
        names = {alias.evaluated_alias or alias.evaluated_name for node in moved for alias in node.names}
        paths = [(module, line) for line in table]
        for path, used in syntax.used_in_functions(module, names):
            body = path[-1].body
            if not isinstance(body, cst.IndentedBlock):
                raise EditError(f"expected a body of {path[-1].name.value} on lines of its own")
            at = 0 if path[-1].get_docstring() is None else 1
            table[body] = body.with_changes(body=[*body.body[:at], from_here(used), *body.body[at:]])
            paths.append((*path, body))
        # Those that only functions use look unused, to a linter.
        marked = cst.TrailingWhitespace(cst.SimpleWhitespace("  "), cst.Comment("# noqa: F401"))
        imports = [cst.SimpleStatementLine([node], trailing_whitespace=marked) for node in moved]

        def fill(line: cst.CSTNode, _: object) -> cst.FlattenSentinel:
            return cst.FlattenSentinel([imports[0].with_changes(leading_lines=line.leading_lines), *imports[1:]])

        block = [m.replace(each, hole, fill) for each in syntax.parse_statements(statements)]
        place = [line for line in lines if not isinstance(table.get(line), cst.RemovalSentinel)][-1]
        table[place] = cst.FlattenSentinel([table.get(place, place), *block])
        return syntax.rewrite(module, table, [*paths, (module, place)])

    return Edit("defer imports", apply, releases)


def _describe(node: syntax.Matcher, scope: str) -> str:
    return f"{_told(node)} in {scope}" if scope else _told(node)


def _told(node: object) -> str:
    """A matcher for messages, without what it does not care about."""
    if isinstance(node, Node):
        return node.description
    if isinstance(node, m.OneOf):
        return " or ".join(map(_told, node.options))
    if isinstance(node, m.MatchIfTrue | m.AtLeastN | m.AtMostN):
        return "…"
    if isinstance(node, list | tuple):
        return f"[{', '.join(map(_told, node))}]"
    if not is_dataclass(node):
        return re.sub(r"(, )?\w+=DoNotCare\(\)", "", repr(node))
    values = {each.name: getattr(node, each.name) for each in fields(node)}
    cared = [f"{name}={_told(value)}" for name, value in values.items() if value is not m.DoNotCare()]
    return f"{type(node).__name__}({', '.join(cared)})"


def nodes(matcher: object) -> list[Node]:
    """Returns the nodes with a description in a matcher, outermost first."""
    if isinstance(matcher, Node):
        return [matcher]
    inner = matcher.options if isinstance(matcher, m.OneOf) else matcher if isinstance(matcher, list | tuple) else ()
    if is_dataclass(matcher):
        inner = [getattr(matcher, each.name) for each in fields(matcher)]
    return [node for each in inner for node in nodes(each)]


def _inserting(
    scope: str,
    node: syntax.Matcher,
    statements: str,
    done: syntax.Matcher | None,
    count: int,
    releases: str,
    *,
    before: bool,
) -> Edit:
    def apply(module: cst.Module) -> cst.Module:
        if done is not None and syntax.find(module, scope, done):
            return module
        return _insert(module, scope, node, statements, count, before=before)

    where = "before" if before else "after"
    return Edit(f"insert {where} {_describe(node, scope)}", apply, releases, scope, node)


def _insert(
    module: cst.Module, scope: str, node: syntax.Matcher, source: str, count: int, *, before: bool
) -> cst.Module:
    new = syntax.parse_statements(source)
    todo: dict[cst.BaseStatement, syntax.Path] = {}
    done = set()
    for path in syntax.find(module, scope, node):
        if syntax.run_through(path, new):
            continue
        block, statement = syntax.statement(path)
        at = block.body.index(statement)
        if syntax.runs(block.body[:at] if before else block.body[at + 1 :], new):
            done.add(statement)
        else:
            todo[statement] = path
    if len(done) == count:
        # Other edits may have brought further places since.
        return module
    syntax.counted([*todo, *done], count)

    def around(kept: cst.BaseStatement) -> cst.FlattenSentinel:
        first, *rest = [each.deep_clone() for each in new]
        if not before:
            return cst.FlattenSentinel([kept, first, *rest])
        blank, comments = syntax.split_blank(kept.leading_lines)
        first = first.with_changes(leading_lines=[*blank, *first.leading_lines])
        return cst.FlattenSentinel([first, *rest, kept.with_changes(leading_lines=comments)])

    return syntax.rewrite(module, dict.fromkeys(todo, around), todo.values())


def _substitute(
    module: cst.Module, scope: str, node: syntax.Matcher, template: str, count: int, *, keeps_place: bool
) -> cst.Module:
    """Replaces each place by `template`, in which HOLE stands for the place itself."""
    paths = syntax.find(module, scope, node)
    todo: dict[cst.CSTNode, cst.CSTNode | cst.FlattenSentinel] = {}
    results: list[cst.CSTNode] = []
    for path in paths:
        place = path[-1]
        if isinstance(place, cst.BaseExpression):
            new = syntax.fill_expression(template, place)
            own = [each for each in path if syntax.same(each, new)]
        elif isinstance(place, cst.BaseStatement | cst.BaseSmallStatement):
            _, place = syntax.statement(path)
            new = cst.FlattenSentinel(syntax.fill_statements(template, place))
            own = syntax.run_through(path, list(new))
        else:
            raise EditError(f"expected an expression or a statement, found {type(place).__name__}")
        results += own[:1]
        if not own:
            todo.setdefault(place, new)
    # What the template itself brings along may match too.
    brought = {node for path in paths for result in results if result in path for node in path[path.index(result) :]}
    todo = {place: new for place, new in todo.items() if place not in brought}
    if len(results) == count if keeps_place else not todo and _results(module, scope, template) >= count:
        # Done before; other edits may have brought further places to wrap since.
        return module
    syntax.counted([*todo, *(results if keeps_place else ())], count)
    return syntax.rewrite(module, todo, paths)


def _results(module: cst.Module, scope: str, new: str) -> int:
    """How often `new`, an expression or statements, is in `scope`."""
    statements = syntax.parse_statements(new)
    blocks = syntax.find(module, scope, m.IndentedBlock() | m.Module())
    runs = sum(len(syntax.runs(block.body, statements)) for *_, block in blocks)
    try:
        return max(runs, len(syntax.find(module, scope, expression(new))))
    except cst.ParserSyntaxError:
        return runs
