# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints in an object store, on folders that hold no weights."""

import pytest
from test_layout import make_iteration
from test_release_writer import write_release

from megatron.bridge.release_checkpoint.layout import INCOMPLETE, ITERATION_0, RELEASE, TRACKER, resolve_checkpoint
from megatron.bridge.training.object_store_writer import release_writer


@pytest.fixture
def object_store(tmp_path, monkeypatch):
    """The URL of a MultiStorageClient profile, and the local folder below which its objects lie."""
    pytest.importorskip("multistorageclient")
    from megatron.core.msc_utils import MultiStorageClientFeature

    # The client is cached by profile, so each test has its own.
    profile = tmp_path.name.replace("_", "-")
    store = tmp_path / "store"
    store.mkdir()
    config = tmp_path / "msc.yaml"
    provider = f"{{type: file, options: {{base_path: {store}}}}}"
    config.write_text(f"profiles:\n  {profile}:\n    storage_provider: {provider}\n")
    monkeypatch.setenv("MSC_CONFIG", str(config))
    MultiStorageClientFeature.enable()
    yield f"msc://{profile}/out", store / "out"
    MultiStorageClientFeature.disable()


def test_a_release_is_written_in_place_with_the_tracker_last(object_store):
    from megatron.core.msc_utils import MultiStorageClientFeature

    msc = MultiStorageClientFeature.import_package()
    root, folder = object_store
    for text in ("old", "new"):
        with release_writer(root) as writer:
            payload = writer.stage()
            assert payload == f"{root}/release"
            assert not (folder / TRACKER).exists()
            msc.Path(f"{payload}/metadata.json").write_text(text)
            writer.publish()
    assert (folder / "release/metadata.json").read_text() == "new"
    assert (folder / TRACKER).read_text() == "release"
    assert resolve_checkpoint(root) == resolve_checkpoint(f"{root}/{ITERATION_0}") == f"{root}/release"


def test_a_root_with_training_is_refused(object_store):
    root, folder = object_store
    make_iteration(folder, 5)
    with pytest.raises(FileExistsError, match="training iteration 5"), release_writer(root) as writer:
        writer.stage()


def test_a_local_path_is_staged_with_multistorageclient_enabled_too(object_store, tmp_path):
    with release_writer(tmp_path / "local") as writer:
        assert writer.stage().startswith(str(tmp_path / "local" / f"{RELEASE}{INCOMPLETE}"))
    write_release(tmp_path / "local", "payload")
    assert resolve_checkpoint(tmp_path / "local") == str(tmp_path / "local/release")
