# SPDX-License-Identifier: Apache-2.0
"""A made-up upstream: a small wheel with the shape of megatron-bridge's, and a change for it."""

import hashlib
import textwrap
from pathlib import Path

import hypothesis
import pytest
from wheel.wheelfile import WheelFile

from fork import requirements
from fork.change import Change
from fork.edits import File, add_parameter
from fork.upstream import Upstream


# The same inputs in each run, and no limit of time.
hypothesis.settings.load_profile("ci")

PACKAGE_INFO = """
MAJOR = 1
MINOR = 2
PATCH = 3
PRE_RELEASE = ""
"""

SAVING = """
def save(path):
    return path
"""

METADATA = """\
Metadata-Version: 2.4
Name: megatron-bridge
Version: 1.2.3
Summary: A made-up upstream
Author-email: Somebody <author@example.org>
Maintainer-email: Somebody <maintainer@example.org>
Project-URL: Homepage, https://example.com
License: Some
        licence
BLANK
        text
License-File: LICENSE
Requires-Dist: torch
Requires-Dist: for-gpus==1.0
Provides-Extra: audio
Requires-Dist: librosa; extra == "audio"

# Description

Version: not a field
""".replace("BLANK", " " * 8)


@pytest.fixture
def upstream_files() -> dict[str, str]:
    """The files of the made-up wheel."""
    return {
        "megatron/bridge/__init__.py": "",
        "megatron/bridge/package_info.py": PACKAGE_INFO,
        "megatron/bridge/saving.py": SAVING,
        "megatron_bridge-1.2.3.dist-info/METADATA": METADATA,
        "megatron_bridge-1.2.3.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nTag: py3-none-any\n",
        "megatron_bridge-1.2.3.dist-info/entry_points.txt": "[some.group]\nname = megatron.bridge\n",
        "megatron_bridge-1.2.3.dist-info/licenses/LICENSE": "Some licence text\n",
    }


@pytest.fixture
def upstream_wheel(tmp_path: Path, upstream_files: dict[str, str]) -> Path:
    """The made-up wheel."""
    path = tmp_path / "index" / "megatron_bridge-1.2.3-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    with WheelFile(path, "w") as wheel:
        for name, text in upstream_files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def upstream(upstream_wheel: Path) -> Upstream:
    """The made-up release, pinned to the made-up wheel."""
    return Upstream("1.2.3", hashlib.sha256(upstream_wheel.read_bytes()).hexdigest(), "0.1.4", "5.0.0")


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder with the new module of the made-up change."""
    folder = tmp_path / "modules"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "extra.py").write_text("ANSWER = 42\n")
    return folder


@pytest.fixture
def change() -> Change:
    """A change that edits a file, adds a module and moves a requirement."""
    return Change(
        name="example",
        message="feat: example",
        why=textwrap.dedent("""\
            Because it is
            an example."""),
        edits=[File("saving.py", [add_parameter("save", "release: bool = False")])],
        modules=["new/extra.py"],
        requirements=[requirements.move("for-gpus", "cuda")],
    )
