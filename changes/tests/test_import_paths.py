# SPDX-License-Identifier: Apache-2.0
"""Pages and scripts name an imported checkpoint by its root or its release, for an import writes no iteration."""

from fnmatch import fnmatch
from pathlib import Path


ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("docs", "examples", "scripts", "skills", "tutorials")
ITERATION_0 = b"iter_0000000"
# Where it is right: what is written on request, what a release of the documentation or a verified commit wrote, and
# converters that write it still.
KEPT = (
    "*/bridge-guide.md",
    "*/fern/versions/*",
    "*/model_verification_cards/*",
    "*/megatron_mimo/*",
    "*/models/flux/*",
    "*/models/llada/*",
    "*/models/wan/*",
)


def test_pages_and_scripts_name_no_iteration_of_an_import():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert any(path.name == "convert.sh" for path in files)
    named = [path.relative_to(ROOT).as_posix() for path in files if ITERATION_0 in path.read_bytes()]
    assert [path for path in named if not any(fnmatch(path, kept) for kept in KEPT)] == []
