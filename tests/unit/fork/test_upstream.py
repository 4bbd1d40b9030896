# SPDX-License-Identifier: Apache-2.0
"""How upstream's wheel is had: from an index through pip, from the cache, from a path; never without its hash."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fork.errors import UpstreamError
from fork.upstream import RELEASES, Upstream, obtain


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as pip's only index, and a cache of one's own."""
    folder = tmp_path / "index"
    folder.mkdir(exist_ok=True)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_index_is_asked_once(upstream: Upstream, upstream_wheel: Path, tmp_path: Path):
    content = upstream_wheel.read_bytes()
    got = obtain(upstream)
    assert got.read_bytes() == content
    assert got.is_relative_to(tmp_path / "cache")
    upstream_wheel.unlink()
    assert obtain(upstream) == got


def test_damaged_cache_is_fetched_anew(upstream: Upstream, upstream_wheel: Path):
    got = obtain(upstream)
    got.write_bytes(b"damaged")
    assert obtain(upstream).read_bytes() == upstream_wheel.read_bytes()


def test_no_network_says_how_to_do_without(upstream: Upstream):
    with pytest.raises(UpstreamError) as error:
        obtain(replace(upstream, version="9.9.9"))
    assert str(error.value).startswith("can't download megatron-bridge 9.9.9: pip says ")
    assert "--upstream-wheel PATH" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_network_says_what_was_not_reached(upstream: Upstream, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UpstreamError, match=r"http://127.0.0.1:9/simple/megatron-bridge/: connection error"):
        obtain(replace(upstream, version="9.9.9"))


def test_index_with_another_file_is_refused(upstream: Upstream, tmp_path: Path):
    pinned = "0" * 64
    with pytest.raises(UpstreamError) as error:
        obtain(replace(upstream, sha256=pinned))
    assert str(error.value) == (
        f"the index has megatron-bridge 1.2.3 with sha256 {upstream.sha256}, expected {pinned}; let pip use PyPI or a "
        "true mirror of it, or give --upstream-wheel PATH (or MEGATRON_BRIDGE_UPSTREAM_WHEEL) with "
        "megatron_bridge-1.2.3-py3-none-any.whl"
    )
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_given_wheel_is_taken_under_any_name(upstream: Upstream, upstream_wheel: Path, tmp_path: Path):
    moved = upstream_wheel.rename(tmp_path / "download")
    assert obtain(upstream, moved) == moved


def test_given_wheel_with_another_hash_is_refused(upstream: Upstream, tmp_path: Path):
    other = tmp_path / "other.whl"
    other.write_bytes(b"")
    with pytest.raises(UpstreamError) as error:
        obtain(upstream, other)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert str(error.value) == (
        f"upstream wheel {other} has sha256 {empty}, expected {upstream.sha256}; "
        "give the wheel of megatron-bridge 1.2.3 from PyPI, megatron_bridge-1.2.3-py3-none-any.whl"
    )


def test_given_wheel_that_is_not_there_is_refused(upstream: Upstream, tmp_path: Path):
    with pytest.raises(UpstreamError, match=r"gone.whl is not a file; give the wheel of megatron-bridge 1.2.3"):
        obtain(upstream, tmp_path / "gone.whl")


def test_cache_that_is_a_file_is_refused(upstream: Upstream, tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UpstreamError, match=r"can't keep the upstream wheel: .*; set XDG_CACHE_HOME to a folder"):
        obtain(upstream)


def test_releases_are_pinned():
    for version, release in RELEASES.items():
        assert version == release.version
        assert len(bytes.fromhex(release.sha256)) == 32
