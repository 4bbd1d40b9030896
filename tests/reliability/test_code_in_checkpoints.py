# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with code in them: every reader refuses them in one line, and the code doesn't run."""

import io
import json
import os
import pickle
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from broken import Payload, traces
from checkpoints import AutoBridge, read_megatron_lm_args
from click.testing import CliRunner
from test_faults import in_fork, in_namespace
from test_object_store_writer import object_store  # noqa: F401 - fixture
from test_release_checkpoint import gloo, hf_model, release, training  # noqa: F401 - fixtures
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron.bridge.cli import main
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.metadata import read_metadata
from megatron.bridge.repair import repair
from megatron.bridge.repair import state as repair_state
from megatron.bridge.repair.problems import problems
from megatron.bridge.training import model_load_save, untrusted_checkpoint


def saved(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save([payload], buffer)
    return buffer.getvalue()


def in_metadata(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def in_sound_metadata(folder: Path, payload: Payload) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_metadata_of_a_rank(folder: Path, payload: Payload) -> None:
    """PyTorch takes that of a rank where there is no other."""
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(payload))


def in_metadata_of_a_rank_beside_unsound(folder: Path, payload: Payload) -> None:
    """The same where the other can't be read: an object of PyTorch's that it can't make, and that we need not."""
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    metadata.planner_data = _Unsound()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    read_metadata(folder / ".metadata")
    with pytest.raises(TypeError):
        reader.read_metadata()
    (folder / "__0.metadata").write_bytes(pickle.dumps(payload))


class _Unsound:
    def __reduce__(self):
        return MetadataIndex, ()


def in_common_pt(folder: Path, payload: Payload) -> None:
    (folder / "common.pt").write_bytes(saved(payload))


def in_common_state(folder: Path, payload: Payload) -> None:
    """Put the payload where the metadata says that the common state is, as core 0.19 alone has it."""
    (folder / "common.pt").unlink()
    in_entry(folder, payload)


def in_entry(folder: Path, payload: Payload) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith("common_state"))
    place = metadata.storage_data[index]
    with (folder / place.relative_path).open("ab") as file:
        offset = file.tell()
        file.write(saved(payload))
        length = file.tell() - offset
    metadata.storage_data[index] = replace(place, offset=offset, length=length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def digests(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


PLANT = {
    each.__name__: each
    for each in (
        in_metadata,
        in_sound_metadata,
        in_metadata_of_a_rank,
        in_metadata_of_a_rank_beside_unsound,
        in_common_pt,
        in_common_state,
    )
}

# name: what reads a checkpoint root
READERS = {
    "args": lambda root, hf: read_megatron_lm_args(root),
    "load_megatron_model": lambda root, hf: AutoBridge.from_hf_pretrained(hf).load_megatron_model(root),
    "load_megatron_model of training": lambda root, hf: model_load_save.load_megatron_model(
        str(root), use_cpu_init=True, skip_temp_dist_context=True
    ),
    "export_ckpt": lambda root, hf: AutoBridge.from_hf_pretrained(hf).export_ckpt(root, root.with_name("exported")),
}


@pytest.fixture
def planted(request, release, tmp_path):  # noqa: F811
    root = Path(shutil.copytree(release, tmp_path / "planted"))
    PLANT[request.param](root / "release", Payload(traces(root)))
    return root


@pytest.mark.parametrize("planted", PLANT, indirect=True)
@pytest.mark.parametrize("reader", READERS)
def test_a_payload_does_not_run(planted, hf_model, gloo, reader):  # noqa: F811
    # Where the metadata is that of a rank, an export refuses the missing .metadata before it would read it.
    with pytest.raises(ValueError, match=r"could run code|can't be loaded: \.metadata is missing") as caught:
        READERS[reader](planted, hf_model)
    assert "\n" not in str(caught.value)
    assert not traces(planted).exists()


@pytest.mark.parametrize("planted", PLANT, indirect=True)
def test_a_payload_does_not_run_in_load_checkpoint(planted, training):  # noqa: F811
    with pytest.raises(ValueError, match="could run code"):
        training(pretrained_checkpoint=planted)
    assert not traces(planted).exists()


@pytest.mark.parametrize(
    "planted",
    ["in_metadata_of_a_rank", "in_metadata_of_a_rank_beside_unsound", "in_common_state"],
    indirect=True,
)
def test_the_payload_would_run_without_the_guard(planted):
    with suppress(dcp.api.CheckpointException):
        dcp.load({"common_state/shard_0_1": io.BytesIO()}, checkpoint_id=planted / "release", no_dist=True)
    assert traces(planted).exists()


def test_an_entry_beside_common_pt_is_not_read(release, hf_model, tmp_path):  # noqa: F811
    root = Path(shutil.copytree(release, tmp_path / "planted"))
    in_entry(root / "release", Payload(traces(root)))
    assert read_megatron_lm_args(root) == read_megatron_lm_args(release)
    assert any("could run code" in each.what and not each.repairable for each in problems(examine(root)))
    with pytest.raises(repair.Refused, match="could run code"):
        repair.plan(root)
    assert not traces(root).exists()


# name: what is done to common.pt
BROKEN_COMMON_PT = {
    "empty": lambda file: os.truncate(file, 0),
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "no archive": lambda file: file.write_bytes(b"nonsense" * 100),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.fixture
def broken(request, release, tmp_path):  # noqa: F811
    root = Path(shutil.copytree(release, tmp_path / "broken"))
    assert examine(root).payload.common == "both"
    BROKEN_COMMON_PT[request.param](root / "release/common.pt")
    return root


def assert_is_named(root: Path, error: BaseException) -> None:
    assert str(error).startswith(f"{root}/release/common.pt: the file is not what torch.save writes (")
    assert "Copy or download the checkpoint again" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("broken", BROKEN_COMMON_PT, indirect=True)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_common_pt_is_named(broken, hf_model, gloo, reader, record_property):  # noqa: F811
    before = digests(broken)
    with pytest.raises(ValueError) as caught:
        READERS[reader](broken, hf_model)
    assert_is_named(broken, caught.value)
    assert digests(broken) == before
    record_property("count of loads of a damaged common.pt, refused", 1)


@pytest.mark.parametrize("reader", READERS)
def test_a_common_pt_without_a_dict_is_named(release, hf_model, gloo, tmp_path, reader):  # noqa: F811
    root = Path(shutil.copytree(release, tmp_path / "list"))
    torch.save([1], root / "release/common.pt")
    with pytest.raises(ValueError, match="release/common.pt: it holds a list, expected a dict") as caught:
        READERS[reader](root, hf_model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", BROKEN_COMMON_PT, indirect=True)
def test_a_damaged_common_pt_is_named_in_load_checkpoint(broken, training):  # noqa: F811
    with pytest.raises(ValueError) as caught:
        training(pretrained_checkpoint=broken)
    assert_is_named(broken, caught.value)


@pytest.mark.parametrize("broken", BROKEN_COMMON_PT, indirect=True)
def test_a_damaged_common_pt_is_inspected_and_repaired(broken):
    before = digests(broken)
    invoked = CliRunner().invoke(main, ["inspect", str(broken), "--json"])
    document = json.loads(invoked.stdout)
    assert invoked.exit_code == 1 and [each["repairable"] for each in document["problems"]] == [True]
    assert "the entry common_state is whole" in document["problems"][0]["what"]
    assert {each["loads"] for each in document["readers"]} == {"no"}
    assert digests(broken) == before
    args = examine(broken).payload.args
    repair.run(repair.plan(broken))
    assert problems(examine(broken)) == []
    assert read_megatron_lm_args(broken) == args


def without_permission(root: Path, hf: Path) -> dict[str, str]:
    """What each reader says where this process may read all files but one."""
    in_namespace(mapped=False)
    said = {}
    for name in ("args", "export_ckpt"):
        with suppress(OSError):
            try:
                READERS[name](root, hf)
            except (PermissionError, ValueError) as error:
                said[name] = str(error)
    for command, *out in (("inspect",), ("repair",), ("export", str(root.with_name("exported")))):
        done = CliRunner().invoke(main, [command, str(root), *out])
        said[command] = f"{done.exit_code} {done.stdout if command == 'inspect' else done.stderr}"
    return said


def test_a_common_pt_that_belongs_to_somebody_else(release, hf_model, tmp_path):  # noqa: F811
    root = Path(shutil.copytree(release, tmp_path / "out"))
    file = root / "release/common.pt"
    before = digests(root)
    file.chmod(0)
    try:
        said = in_fork(partial(without_permission, root, hf_model))
    finally:
        file.chmod(0o600)
    wrong = f"{file} can't be read (Permission denied). Make it readable first."
    assert said["args"] == f"[Errno 13] Permission denied: '{file}'"
    assert said["export_ckpt"] == f"{file.parent} can't be loaded: {wrong}"
    assert said["inspect"].startswith("1 ") and wrong in said["inspect"]
    assert said["repair"] == f"1 Error: release: {wrong}\n"
    assert said["export"] == f"1 Error: {file.parent} can't be loaded: {wrong}\n"
    assert digests(root) == before


def test_metadata_in_an_object_store_is_vetted(object_store, tmp_path):  # noqa: F811
    url, folder = object_store
    untrusted_checkpoint.vet(url)
    folder.mkdir()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    with pytest.raises(ValueError, match=f"^{url}/__0.metadata: it names .*could run code"):
        untrusted_checkpoint.vet(url)
    assert not (tmp_path / "trace").exists()


# name: what instantiates the run config of a checkpoint root
INSTANTIATES = {
    "load_model_config": lambda root, hf: model_load_save.load_model_config(str(root)),
    "load_tokenizer": lambda root, hf: model_load_save.load_tokenizer(str(root)),
    "repair": lambda root, hf: repair.run(repair.plan(root)),
    **{name: READERS[name] for name in ("load_megatron_model", "load_megatron_model of training", "export_ckpt")},
}


@pytest.mark.parametrize("reader", INSTANTIATES)
def test_a_run_config_runs_no_shell(release, hf_model, gloo, tmp_path, reader):  # noqa: F811
    root = Path(shutil.copytree(release, tmp_path / "planted"))
    if reader == "repair":
        # Args are derived where there are none.
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, root / "release/common.pt")
        repair_state._write_entry(examine(root).payload)
    path = root / "release/run_config.yaml"
    config = yaml.safe_load(path.read_text())
    shell = {"_target_": "torch.utils.collect_env.run", "command": f"touch {traces(root)}"}
    config["tokenizer" if reader == "load_tokenizer" else "model"]["extra"] = shell
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="run_config.yaml: it names 'torch.utils.collect_env.run'") as caught:
        INSTANTIATES[reader](root, hf_model)
    assert "\n" not in str(caught.value)
    assert not traces(root).exists()


def test_the_environment_is_as_it_was_before(release, monkeypatch):  # noqa: F811
    for value in (None, "0"):
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value) if value else None
        with pytest.raises(KeyError), untrusted_checkpoint.reading(release / "release"):
            raise KeyError
        assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == value


@pytest.mark.parametrize("planted", ["in_common_state"], indirect=True)
def test_who_trusts_a_checkpoint_says_so(planted, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError):
        read_megatron_lm_args(planted)
    assert traces(planted).exists()
