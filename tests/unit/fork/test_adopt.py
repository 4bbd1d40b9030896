# SPDX-License-Identifier: Apache-2.0
"""Adopting a release: what goes with it, the line in the table, and what a broken upstream is told to look at."""

import hashlib
from pathlib import Path

import libcst.matchers as m
import pytest
from click.testing import CliRunner
from wheel.wheelfile import WheelFile

from fork import adopt, requirements
from fork.__main__ import main
from fork.change import Change
from fork.edits import (
    File,
    add_parameter,
    call,
    ifs,
    insert_after,
    insert_first,
    pass_argument,
    replace,
    wrap,
)
from fork.errors import UpstreamError
from fork.upstream import RELEASES, Upstream


# Since the stack was written, upstream has renamed a function, a call and a file, and tests something else.
BROKEN = """\
import torch


def store(path, state):
    if state is not None:
        write_state(path, state)
    torch.write(path)


def load(path):
    torch.load(path)
    torch.load(path)
"""
CHANGE = Change(
    name="example",
    message="",
    why="",
    edits=[
        File(
            "saving.py",
            [
                add_parameter("save", "release: bool = False"),
                pass_argument("store", call("save_state"), "release=True"),
                insert_after("store", ifs("state is None"), "pass"),
                replace("load", call("torch.load"), "None"),
                insert_first("load", "check(path)"),
                replace("store", m.Call(func=m.Attribute(value=m.Name("torch"), attr=m.Name("save"))), "f()"),
            ],
        ),
        File("loading/reader.py", []),
    ],
    requirements=[requirements.move("for-gpu", "cuda"), requirements.move("for-gpus", "cuda")],
)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adopt, "RELEASES", dict(RELEASES))


@pytest.fixture
def upstream_files(upstream_files: dict[str, str]) -> dict[str, str]:
    return upstream_files | {"megatron/bridge/saving.py": BROKEN, "megatron/bridge/io/reader.py": ""}


def test_every_misplaced_edit_is_told_with_the_nearest_places(upstream: Upstream, upstream_wheel: Path):
    told = adopt.misplaced(upstream, upstream_wheel, [CHANGE])
    near = [each.split("\n    ") for each in told]
    assert [lines[0] for lines in near] == [
        "change example: saving.py: add parameter release to save: expected 1 place, found 0",
        "change example: saving.py: pass release=True in call of save_state in store: expected 1 place, found 0",
        "change example: saving.py: insert after if state is None in store: expected 1 place, found 0",
        "change example: saving.py: replace call of torch.load in load: expected 1 place, found 2",
        "change example: saving.py: replace Call(func=Attribute(value=Name(value='torch'), attr=Name(value='save'))) "
        "in store: expected 1 place, found 0",
        "change example: expected the file loading/reader.py in upstream, found none",
        "change example: requirements: move for-gpu to the extra cuda: expected a requirement of for-gpu, found none",
    ]
    assert [lines[1] for lines in near] == [
        "near: saving.py:4: def store(path, state):",
        "near: saving.py:6: write_state(path, state)",
        "near: saving.py:5: if state is not None:",
        "near: saving.py:11: torch.load(path)",
        "near: saving.py:7: torch.write(path)",
        "near: io/reader.py",
        "near: for-gpus",
    ]
    assert near[3][2] == "near: saving.py:12: torch.load(path)"


def test_scope_that_is_gone_is_looked_for_by_its_name(upstream: Upstream, upstream_wheel: Path):
    change = Change("c", "", "", [File("saving.py", [pass_argument("Saver.load", call("torch.load"), "a=1")])])
    (told,) = adopt.misplaced(upstream, upstream_wheel, [change])
    assert told.split("\n    ")[:2] == [
        "change c: saving.py: pass a=1 in call of torch.load in Saver.load: expected a class or function Saver.load, "
        "found none",
        "near: saving.py:10: def load(path):",
    ]


def test_matcher_that_is_put_together_is_told_in_words(upstream: Upstream, upstream_wheel: Path):
    saving = m.Assign(value=call("torch.save")) | m.Expr(value=call("torch.save"))
    change = Change("c", "", "", [File("saving.py", [wrap("store", saving, "with x:\n    {}")])])
    (told,) = adopt.misplaced(upstream, upstream_wheel, [change])
    assert told.split("\n    ")[:2] == [
        "change c: saving.py: wrap Assign(value=call of torch.save) or Expr(value=call of torch.save) in store: "
        "expected 1 place, found 0",
        "near: saving.py:7: torch.write(path)",
    ]


def test_release_that_fits_has_nothing_misplaced(upstream: Upstream, upstream_wheel: Path):
    change = Change("c", "", "", [File("saving.py", [add_parameter("store", "a: int = 0")])])
    assert adopt.misplaced(upstream, upstream_wheel, [change]) == []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts made-up packages where pip looks, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def add(name: str, version: str, *asked: str) -> Path:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in asked)]
        path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        with WheelFile(path, "w") as wheel:
            wheel.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.4", *lines, ""]))
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
        return path

    return add


def test_what_goes_with_a_release_is_the_newest_that_it_takes(index):
    wheel = index("megatron-bridge", "9.1.0", "transformers<6,>=5", "megatron-core[dev]<0.30")
    for version in ("0.29.1", "0.29.2", "0.30.0"):
        index("megatron-core", version)
    for version in ("5.0.0", "5.9.0", "6.0.0"):
        index("transformers", version)
    upstream = adopt.look_up("9.1.0")
    assert upstream == Upstream("9.1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "0.29.2", "5.9.0")
    assert adopt.look_up("9.1.0", "0.28.0", "5.1.0").megatron_core == "0.28.0"


def test_patch_release_keeps_the_megatron_core_of_its_minor_version(index):
    known = list(RELEASES.values())[-1]
    version = f"{known.version.rpartition('.')[0]}.99"
    index("megatron-bridge", version, "transformers", "megatron-core[dev]")
    index("transformers", "5.0.0")
    assert adopt.look_up(version).megatron_core == known.megatron_core


def test_release_that_the_index_lacks_is_said_in_one_line(index):
    with pytest.raises(UpstreamError, match="can't find megatron-bridge==9.9.9: pip says ") as error:
        adopt.look_up("9.9.9")
    assert "\n" not in str(error.value)


def test_line_goes_to_its_place_in_the_table_once(tmp_path: Path):
    table = tmp_path / "upstream.py"
    table.write_text(adopt.TABLE.read_text())
    before = table.read_text().splitlines(keepends=True)
    first, last = list(RELEASES)[0], list(RELEASES)[-1]
    for version in ("0.0.1", f"{last}.1", "0.0.1"):
        adopt.add_line(Upstream(version, "ab", "1.2.3", "5.0.0"), table)
    after = table.read_text().splitlines(keepends=True)
    added = [line for line in after if line not in before]
    assert added == [f'        Upstream("{version}", "ab", "1.2.3", "5.0.0"),\n' for version in ("0.0.1", f"{last}.1")]
    assert f'Upstream("{first}"' in after[after.index(added[0]) + 1]
    assert f'Upstream("{last}"' in after[after.index(added[1]) - 1]


def test_command_tells_what_is_misplaced_and_adds_no_line(
    upstream: Upstream, upstream_wheel: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adopt, "look_up", lambda *_: upstream)
    monkeypatch.setattr(adopt.stack, "load", lambda: [CHANGE])
    before = adopt.TABLE.read_text()
    result = CliRunner().invoke(main, ["adopt", "1.2.3", "--upstream-wheel", str(upstream_wheel)])
    assert result.exit_code == 1
    assert "near: saving.py:4: def store(path, state):" in result.output
    assert result.output.splitlines()[-1].startswith(
        "Error: 7 edits don't find their place in megatron-bridge 1.2.3; "
    )
    assert adopt.TABLE.read_text() == before
