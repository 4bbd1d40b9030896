# SPDX-License-Identifier: Apache-2.0
"""The stack as commits in a checkout of a made-up upstream: what they hold, and what is refused untouched."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fork import pull_request, stack, travel
from fork.__main__ import main
from fork.change import LOCK, Change, Sweep, TextEdit, insert_before_heading
from fork.edits import File, add_parameter, call, expression, pass_argument
from fork.edits import replace as replace_node
from fork.errors import EditError, ForkError
from fork.imports import missing
from fork.pull_request_text import labels
from fork.upstream_tests import UNIT_TESTS, find_tests


pytest.importorskip("ruff", reason="the session upstream_pr installs it")

HEADER = "# Copyright (c) 2020, SOMEBODY.\n# Licensed somehow.\n"
PACKAGE_INFO = '\nMAJOR = 1\nMINOR = 2\nPATCH = 3\nPRE_RELEASE = ""\n'
TEMPLATE = """\
# What does this PR do ?

One line.

# Changelog

- Lines.

# Before

- [ ] Did you write any new necessary tests?
- [ ] Did you add or update any necessary documentation?

# Additional Information

- Related to # (issue)
"""
LAUNCHER = """\
# Copyright (c) 2020
run \\
  tests/functional_tests/test_groups/converter/test_a.py \\
  tests/functional_tests/test_groups/converter/test_b.py
after
"""
FILES = {
    "src/megatron/bridge/package_info.py": HEADER + PACKAGE_INFO,
    "src/megatron/bridge/saving.py": '"""Saving."""\n\n\ndef save(path):\n    """Save."""\n    return path\n',
    "pyproject.toml": '[project]\ndependencies = [\n    "torch",\n    "for-gpus==1.0",  # why\n]\n',
    "ruff.toml": '[lint]\nselect = ["I", "F401", "D103"]\n[lint.per-file-ignores]\n"tests/**" = ["D"]\n',
    "docs/guide.md": "# Guide\n\n## Import\n\ntext\n\n## Export\n\ntext\n",
    ".github/PULL_REQUEST_TEMPLATE.md": TEMPLATE,
    "tests/__init__.py": "",
    "tests/unit_tests/__init__.py": "",
    "tests/unit_tests/test_saving.py": "def test_save():\n    mock.assert_called_once_with(1)\n",
    f"{travel.LAUNCHERS}/L0_Launch_converter.sh": LAUNCHER,
}
SPDX = travel.SPDX
TEST = f"{SPDX}from helper import VALUE\n\n\ndef test_value():\n    assert VALUE == 1\n"


def git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git configuration of one's own."""
    path = tmp_path / "gitconfig"
    path.write_text("[user]\n\tname = A Person\n\temail = person@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(root))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=upstream")
    return root


@pytest.fixture
def change(change: Change, modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    (modules / "new" / "extra.py").write_text(f'{SPDX}"""Extra."""\n\nANSWER = 42\n')
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "helper.py").write_text(f"{SPDX}VALUE = 1\n")
    (ours / "test_value.py").write_text(TEST)
    (ours / "test_gpu.py").write_text(TEST)
    monkeypatch.setattr(stack, "REPOSITORY", ours)
    expected = pass_argument("test_save", call("mock.assert_called_once_with"), "release=False")
    return replace(
        change,
        message="fix(ckpt): save a release\n\nIt was\nneeded.\n",
        changes=["one", "two"],
        tested=["by hand"],
        issues=[12],
        labels=["needs-more-tests"],
        tests={"helper.py": "new/helper.py", "test_value.py": "test_value.py"},
        functional={"test_gpu.py": "ckpts/test_gpu.py"},
        upstream_tests=[File("tests/unit_tests/test_saving.py", [expected])],
        docs=[insert_before_heading("docs/guide.md", "## Export", "## Release\n\nA \\ B\n\n")],
    )


@pytest.fixture
def make(checkout: Path, change: Change, modules: Path, tmp_path: Path):
    def make(*changes: Change, branch: str = "release", known=(), check=None, **changed) -> list[pull_request.Commit]:
        changes = [replace(each, **changed) for each in changes or [change]]
        return pull_request.make(checkout, changes, branch, tmp_path / "out", known, modules, check)

    return make


def shown(checkout: Path, path: str) -> str:
    return git(checkout, "show", f"release:{path}") + "\n"


def state(checkout: Path) -> tuple:
    files = {
        str(path): path.read_bytes() for path in checkout.rglob("*") if path.is_file() and ".git" not in path.parts
    }
    return (
        files,
        git(checkout, "branch", "--all"),
        git(checkout, "worktree", "list"),
        git(checkout, "rev-parse", "HEAD"),
    )


def test_checkout_gets_a_branch_and_nothing_else(make, checkout: Path):
    before = state(checkout)
    make()
    files, branches, *rest = state(checkout)
    assert (files, *rest) == (before[0], *before[2:])
    assert branches == f"{before[1]}\n  release"


def test_commit_is_signed_off_and_holds_the_edits(make, checkout: Path):
    make()
    assert git(checkout, "rev-list", "--count", "main..release") == "1"
    message = "fix(ckpt): save a release\n\nIt was\nneeded.\n\nSigned-off-by: A Person <person@example.org>"
    assert git(checkout, "log", "-1", "--format=%B", "release") == message
    assert "def save(path, release: bool = False):" in shown(checkout, "src/megatron/bridge/saving.py")
    assert '"for-gpus==1.0",' in shown(checkout, "pyproject.toml").partition("cuda = [")[2]


def test_new_files_have_upstreams_header_of_this_year(make, checkout: Path):
    make()
    for path in ("src/megatron/bridge/new/extra.py", "tests/unit_tests/new/helper.py"):
        first, second, blank, *_ = shown(checkout, path).splitlines()
        assert first.startswith("# Copyright (c) 20")
        assert first != HEADER.splitlines()[0]
        assert (second, blank) == ("# Licensed somehow.", "")
        assert "SPDX" not in shown(checkout, path)


def test_tests_travel_to_upstreams_places(make, checkout: Path):
    make()
    assert "from tests.unit_tests.new.helper import VALUE" in shown(checkout, "tests/unit_tests/test_value.py")
    assert shown(checkout, "tests/unit_tests/new/__init__.py").startswith("# Copyright")
    assert "mock.assert_called_once_with(1, release=False)" in shown(checkout, "tests/unit_tests/test_saving.py")
    assert "def test_value" in shown(checkout, f"{travel.TEST_GROUPS}/ckpts/test_gpu.py")
    script = shown(checkout, f"{travel.LAUNCHERS}/L0_Launch_gpu.sh")
    assert "run \\\n  tests/functional_tests/test_groups/ckpts/test_gpu.py\nafter\n" in script
    git(checkout, "switch", "--quiet", "release")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit_tests/test_value.py"]
    assert subprocess.run(command, cwd=checkout, capture_output=True).returncode == 0


def test_documentation_is_edited_once(make, checkout: Path, change: Change):
    make()
    text = shown(checkout, "docs/guide.md")
    assert text == "# Guide\n\n## Import\n\ntext\n\n## Release\n\nA \\ B\n\n## Export\n\ntext\n"
    assert change.docs[0].apply(text) == text


def test_lines_are_counted_by_what_they_are_in(make):
    (commit,) = make()
    assert commit.lines["upstream's modules"] == (1, 1)
    assert commit.lines["documentation"] == (4, 0)
    assert commit.lines["new modules"][1] == 0
    assert "| example | +1 −1 |" in pull_request.table([commit])


def test_text_fills_in_upstreams_template(make, tmp_path: Path):
    make()
    text = (tmp_path / "out" / "example.md").read_text()
    assert text.startswith(
        "Title: fix(ckpt): save a release\nLabels: bug, area:ckpt, needs-more-tests, needs-review\n\n"
    )
    assert (
        "# What does this PR do ?\n\nBecause it is an example.\n\nIt was needed.\n\n# Changelog\n\n- one\n- two\n"
        in text
    )
    assert "- [x] Did you write any new necessary tests?\n- [x] Did you add or update" in text
    assert "- Related to #12\n" in text
    assert "- by hand\n" in text
    assert "One line." not in text
    assert [path.name for path in (tmp_path / "out").glob("*.patch")] == ["0001-fix-ckpt-save-a-release.patch"]


def test_patches_of_before_are_replaced(make, checkout: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0009-old.patch").write_text("")
    make()
    assert not (tmp_path / "out" / "0009-old.patch").exists()


def test_change_that_is_there_already_is_left_out(make, checkout: Path, change: Change):
    make()
    git(checkout, "merge", "--quiet", "--ff-only", "release")
    with pytest.raises(ForkError, match="has all of these changes already"):
        make(branch="again")
    later = replace(change, name="later", edits=[File("saving.py", [add_parameter("save", "more: int = 0")])])
    assert [commit.change.name for commit in make(change, later, branch="later")] == ["later"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda c: (c / "docs/guide.md").write_text("mine"),
            r"has 1 uncommitted changes \(M docs/guide.md\); commit or",
        ),
        (lambda c: (c / "mine").write_text("mine"), r"has 1 uncommitted changes \(\?\? mine\)"),
        (lambda c: git(c, "branch", "release"), "has a branch release already; delete it or give another name"),
    ],
    ids=["modified", "untracked", "branch"],
)
def test_checkout_that_is_not_ready_is_refused(make, checkout: Path, tmp_path: Path, spoil, message: str):
    spoil(checkout)
    before = state(checkout)
    with pytest.raises(ForkError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
    assert state(checkout) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"upstream_tests": [File("tests/gone.py", [])]},
            "change example: expected the file tests/gone.py in the checkout",
        ),
        (
            {"upstream_tests": [File("tests/unit_tests/test_saving.py", [add_parameter("gone", "a")])]},
            "change example: tests/unit_tests/test_saving.py: add parameter a to gone: expected 1 place, found 0; "
            "look at the checkout and adjust changes/",
        ),
        (
            {"docs": [insert_before_heading("docs/guide.md", "## Gone", "x")]},
            "change example: docs/guide.md: insert before the heading '## Gone': expected 1 place, found 0; look at ",
        ),
        ({"tests": {"gone.py": "gone.py"}}, "gone.py does not exist; add it or take it off changes/"),
        (
            {"tests": {}, "functional": {}},
            "change example: expected `tests` in changes/, found none; add it there",
        ),
        ({"tested": []}, "change example: expected `tested` in changes/, found none; add it there"),
    ],
    ids=["file", "edit", "heading", "test", "no tests", "not tested"],
)
def test_place_that_has_moved_leaves_the_checkout_as_it_was(make, checkout: Path, wrong: dict, message: str):
    before = state(checkout)
    with pytest.raises(ForkError, match=message) as error:
        make(**wrong)
    assert "\n" not in str(error.value)
    assert state(checkout) == before


def test_edit_of_a_module_that_has_moved_is_told_with_its_change(make, checkout: Path, change: Change):
    before = state(checkout)
    wrong = replace(change, edits=[File("saving.py", [add_parameter("gone", "a=1")])])
    with pytest.raises(
        EditError, match=r"^change example: saving.py: add parameter a to gone: expected 1 place, found 0"
    ):
        make(wrong)
    assert state(checkout) == before


@pytest.mark.parametrize(
    "line",
    ["from megatron.bridge.new import later", "import megatron.bridge.later", "from megatron.bridge.later import x"],
)
def test_import_that_the_commit_lacks_is_said_with_the_file(make, checkout: Path, modules: Path, line: str):
    (modules / "new" / "extra.py").write_text(f'{SPDX}"""Extra."""\n\n{line}\n\nUSED = {line.split()[-1]}\n')
    before = state(checkout)
    with pytest.raises(
        ForkError, match=r"change example: src/megatron/bridge/new/extra.py imports megatron.bridge.*later"
    ):
        make()
    assert state(checkout) == before


def test_import_that_the_commit_has_is_taken(make, modules: Path):
    lines = ["import os", "from megatron.bridge import new, saving", "from megatron.bridge.saving import save"]
    (modules / "new" / "extra.py").write_text(f'{SPDX}"""Extra."""\n\n' + "".join(f"{x}  # noqa\n" for x in lines))
    assert make()


def test_other_files_are_edited(make, checkout: Path):
    edits = [
        TextEdit("pyproject.toml", "add numpy", r"^(dependencies = \[\n)", r'\1    "numpy",\n', '"numpy"'),
        File("tests/unit_tests/test_saving.py", [add_parameter("test_save", "a=1")]),
        File("gone.py", [add_parameter("f", "a=1", releases=">=99")]),
    ]
    make(others=edits)
    assert '    "numpy",\n' in shown(checkout, "pyproject.toml")
    assert "def test_save(a=1)" in shown(checkout, "tests/unit_tests/test_saving.py")


SWEPT = {"docs/guide.md": 2, "tests/unit_tests/test_saving.py": 1}
SWEEP = Sweep("say words", r"\btext\b|once", "words", SWEPT)


def test_sweep_replaces_every_place_and_is_made_once(make, checkout: Path):
    make(sweeps=[SWEEP])
    assert shown(checkout, "docs/guide.md").count("words\n") == 2
    assert "assert_called_words_with" in shown(checkout, "tests/unit_tests/test_saving.py")
    texts = {path: shown(checkout, path) for path in SWEPT}
    assert SWEEP.apply(texts) == texts


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            SWEPT | {"docs/guide.md": 3},
            "docs/guide.md: say words: expected 3 places, found 2; look at the ",
        ),
        (
            SWEPT | {"ruff.toml": 1},
            "ruff.toml: say words: expected 1 places, found 0; look at the checkout and adjust",
        ),
        (
            SWEPT | {"gone.md": 1},
            "expected the file gone.md in the checkout, found none; look at the ",
        ),
    ],
    ids=["another number", "none in one file", "no file"],
)
def test_sweep_of_another_tree_leaves_the_checkout_as_it_was(make, checkout: Path, places: dict, message: str):
    before = state(checkout)
    with pytest.raises(EditError, match=f"^change example: {re.escape(message)}") as error:
        make(sweeps=[replace(SWEEP, places=places)])
    assert "\n" not in str(error.value)
    assert state(checkout) == before


def test_change_that_touches_nothing_of_the_wheel_is_a_pull_request_only():
    assert [change.name for change in stack.load() if not change.in_wheel] == ["published-configs", "import-paths"]


@pytest.mark.parametrize(
    ("page", "fails"),
    [
        ("docs/guide.md", True),
        ("examples/models/x/run.sh", True),
        ("examples/models/flux/README.md", False),
        ("tests/test_x.py", False),
    ],
)
def test_page_that_names_the_iteration_of_an_import_fails_the_test_that_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, fails: bool
):
    for path, text in {"scripts/convert.sh": "", page: "out/iter_0000000\n"}.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(stack.CHANGES / "tests")
    travelling = importlib.import_module("test_import_paths")
    monkeypatch.setattr(travelling, "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=page) if fails else nullcontext():
        travelling.test_pages_and_scripts_name_no_iteration_of_an_import()


def test_module_that_upstreams_ruff_refuses_is_said(make, checkout: Path, modules: Path):
    (modules / "new" / "extra.py").write_text(f'{SPDX}"""Extra."""\n\n\ndef f():\n    pass\n')
    before = state(checkout)
    with pytest.raises(ForkError, match=r"ruff with the checkout's configuration: src/.*extra.py:\d+:5: D103 "):
        make()
    assert state(checkout) == before


def test_change_without_the_one_that_it_stands_on_is_refused(make, checkout: Path):
    first = Change("first", "", "", modules=["first.py"])
    with pytest.raises(ForkError, match="stands on first, which the checkout lacks; add --change first"):
        make(stands_on=["first"], known=[first])


def test_nobody_to_sign_off_is_refused(make, config: Path):
    config.write_text("")
    with pytest.raises(ForkError, match=r"git has no user.name to sign off with; set it with git config --global"):
        make()


def test_folder_that_is_no_checkout_is_refused_in_one_line(tmp_path: Path):
    result = CliRunner().invoke(main, ["pull-request", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {tmp_path} holds no megatron/bridge; expected an unpacked wheel or a checkout of Megatron-Bridge\n"
    )


def test_labels_follow_the_subject():
    wanted = {"fix(model): a": "bug", "docs: a": "docs", "perf(ckpt)!: a": "feature", "build: a": "feature"}
    got = {message: labels(Change("x", message, "")) for message in wanted}
    assert {message: given[0] for message, given in got.items()} == wanted
    assert [given[1] for given in got.values()] == ["area:model", "area:misc", "area:ckpt", "area:build"]


def test_a_subject_of_another_form_has_no_labels():
    with pytest.raises(ForkError, match="the subject is 'Save releases', expected `type"):
        labels(Change("x", "Save releases\n", ""))


def test_every_test_travels_once():
    travelling = [ours for change in stack.load() for ours in travel.travelling(change)]
    there = [
        path.relative_to(stack.REPOSITORY).as_posix()
        for pattern in ("tests/unit/conftest.py", "tests/unit/bridge/**/*.py", "changes/tests/*.py")
        for path in stack.REPOSITORY.glob(pattern)
    ]
    assert sorted(travelling) == sorted(there), "name it in changes/"
    functional = [ours for change in stack.load() for ours in change.functional]
    there = [path.relative_to(stack.REPOSITORY).as_posix() for path in stack.CHANGES.glob("tests/functional/*.py")]
    assert sorted(functional) == sorted(there)


@pytest.mark.parametrize("change", stack.load(), ids=lambda change: change.name)
def test_change_has_what_its_modules_and_tests_import_of_ours(change: Change, tmp_path: Path):
    changes = {each.name: each for each in stack.load()}
    names = [change.name]
    for name in names:
        names += changes[name].stands_on
    for module in (module for name in set(names) for module in changes[name].modules):
        target = tmp_path / "megatron" / "bridge" / module
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stack.MODULES / module, target)
    ours = {".".join(Path(path).with_suffix("").parts) for path in map(in_tree, modules_of(stack.load()))}
    files = [stack.MODULES / module for module in change.modules]
    files += [stack.REPOSITORY / test for test in travel.travelling(change)]
    lacking = missing(files, [tmp_path], travel.IMPORTED)
    assert not [(path, name) for path, name in lacking if any(f"{name}.".startswith(f"{each}.") for each in ours)]


def modules_of(changes: list[Change]) -> list[str]:
    return [module for change in changes for module in change.modules]


def in_tree(module: str) -> str:
    return os.path.normpath(f"megatron/bridge/{module}")


# What upstream's CONTRIBUTING.md lists, August 2026.
TYPES = {"feat", "fix", "refactor", "perf", "docs", "build", "ci", "test", "chore"}
SCOPES = {"model", "recipe", "training", "data", "ckpt", "peft", "distill", "prune", "quant", "diffusion", "misc"}
LABELS = {
    *("bug", "feature", "support", "docs", "ci"),
    *("needs-review", "breaking-change", "high-complexity", "needs-more-tests", "full-test-suite", "docs-only"),
    *(f"area:{area}" for area in (*SCOPES, "perf", "build")),
}


@pytest.mark.parametrize("change", stack.load(), ids=lambda change: change.name)
def test_title_and_labels_are_those_that_upstream_knows(change: Change):
    subject = change.message.partition("\n")[0]
    kind, scope, breaking, told = re.fullmatch(r"(\w+)(?:\((\w+)\))?(!?): (.+)", subject).groups()
    assert kind in TYPES
    assert scope is None or scope in SCOPES
    assert told[0].islower() and not told.endswith(".")
    given = labels(change)
    assert set(given) <= LABELS
    assert ("breaking-change" in given) is bool(breaking)
    assert sum(label in TYPES | {"bug", "feature", "support"} for label in given) == 1


def test_label_of_a_breaking_change_comes_from_its_subject(change: Change):
    breaking = replace(change, message="build!: move it\n", labels=[])
    assert labels(breaking) == [
        "feature",
        "area:build",
        "breaking-change",
        "needs-review",
    ]


@pytest.mark.parametrize("change", stack.load(), ids=lambda change: change.name)
def test_request_that_changes_requirements_says_that_the_lock_is_old(change: Change):
    edits = change.requirements or any(edit.path == "pyproject.toml" for edit in change.others)
    assert (LOCK in change.notes) is bool(edits)


# What is true here and nowhere else; os.fork() is another matter, and so is the method of Megatron Core's RNG tracker.
HERE = r"upstream|(?<![\".])\bfork\b(?!\()|\bchanges/|\btests/functional\b"
PAGES = r"|\bdocs/"


def texts() -> dict[str, str]:
    """What a reader of the pull requests sees, by where it is here."""
    found = {}
    for change in stack.load():
        paths = [stack.MODULES / module for module in change.modules]
        paths += [stack.REPOSITORY / test for test in (*travel.travelling(change), *change.functional)]
        found |= {str(path.resolve().relative_to(stack.REPOSITORY)): path.read_text("utf-8") for path in paths}
        said = [change.message, change.why, change.problem]
        said += [*change.changes, *change.unchanged, *change.tested, *change.later, *change.notes]
        found[f"the text of {change.name}"] = "\n".join(said)
        found |= {f"{edit.path} of {change.name}": edit.new for edit in change.docs}
    return found


@pytest.mark.parametrize("where", texts())
def test_what_travels_says_nothing_that_is_true_here_only(where: str):
    # The pull requests' texts may name pages of upstream's.
    here = re.compile(HERE + PAGES if where.endswith(".py") else HERE, re.IGNORECASE)
    lines = enumerate(texts()[where].splitlines(), 1)
    assert not [f"{where}:{number}: {line}" for number, line in lines if here.search(line)]


STEPS = "def test_step():\n    assert {value}\n\n\ndef test_other():\n    assert False\n"
LEAVING = """
import os
import subprocess


def test_leaving():
    process = subprocess.Popen(["sleep", "600"])
    with open(os.environ["STARTED"], "a") as file:
        file.write(f"{process.pid} {os.environ['HF_HUB_OFFLINE']}\\n")
"""


@pytest.mark.parametrize(
    ("value", "lost"),
    [("1", []), ("0", ["example: tests.unit_tests.test_saving.test_step: failed, was passed"])],
)
def test_tests_of_what_is_touched_have_to_pass_as_before(make, checkout: Path, change: Change, value: str, lost: list):
    (checkout / "src/megatron/bridge/peft").mkdir()
    (checkout / "src/megatron/bridge/peft/lora_layers.py").write_text("")
    (checkout / "tests/unit_tests/test_saving.py").write_text(STEPS.format(value="1"))
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message=tests")
    edit = replace_node("test_step", expression("1"), value)
    before = state(checkout)
    with nullcontext() if not lost else pytest.raises(ForkError, match="\n".join(map(re.escape, lost))):
        make(upstream_tests=[File("tests/unit_tests/test_saving.py", [edit])], check=Path(sys.executable))
    assert (state(checkout) == before) is bool(lost)


def test_tests_ask_no_hub_and_leave_no_process(make, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (checkout / "src/megatron/bridge/peft").mkdir()
    (checkout / "src/megatron/bridge/peft/lora_layers.py").write_text("")
    (checkout / "tests/unit_tests/test_saving.py").write_text(f"{STEPS.format(value='1')}\n{LEAVING}")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message=tests")
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    edit = replace_node("test_step", expression("1"), "2")
    make(upstream_tests=[File("tests/unit_tests/test_saving.py", [edit])], check=Path(sys.executable))
    started = [line.split() for line in (tmp_path / "started").read_text().splitlines()]
    assert len(started) == 2 and {offline for _, offline in started} == {"1"}
    state_of = [Path("/proc", pid, "stat") for pid, _ in started]
    assert not [path for path in state_of if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"]


def test_tests_of_a_commit_are_those_that_it_touches_and_those_named_after_its_modules(tmp_path: Path):
    files = ["a/test_saving.py", "test_saving.py", "test_other.py", "b/test_new.py", "b/helper.py"]
    for file in files:
        (tmp_path / UNIT_TESTS / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / UNIT_TESTS / file).write_text("")
    touched = ["src/megatron/bridge/saving.py", "docs/guide.md"]
    touched += [f"{UNIT_TESTS}/b/{name}.py" for name in ("test_new", "helper")]
    wanted = ["a/test_saving.py", "b/test_new.py", "test_saving.py"]
    assert find_tests(tmp_path, touched) == [UNIT_TESTS / file for file in wanted]
