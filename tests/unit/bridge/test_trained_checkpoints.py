# SPDX-License-Identifier: Apache-2.0
"""Where the base and the run config of a checkpoint lie that was trained from a release; no weights."""

import pytest
from test_layout import make_iteration, make_release

from megatron.bridge.release_checkpoint.layout import RUN_CONFIG, TRACKER
from megatron.bridge.training.mlm_compat import checkpoints
from megatron.bridge.training.utils import checkpoint_utils


def test_an_iteration_of_megatron_lm_borrows_the_run_config_of_the_release_beside_it(tmp_path):
    release, iteration = make_release(tmp_path), make_iteration(tmp_path, 4)
    assert checkpoints.run_config_folder(iteration) == str(iteration)
    assert checkpoints.lacks_run_config(iteration)
    (release / RUN_CONFIG).write_text("{}")
    assert checkpoints.run_config_folder(iteration) == str(release)
    assert not checkpoints.lacks_run_config(iteration)
    (iteration / RUN_CONFIG).write_text("{}")
    assert checkpoints.run_config_folder(iteration) == str(iteration)


@pytest.mark.parametrize(
    ("run_config", "is_release"), [("peft: {dim: 4}", True), ("peft: null", False), (None, False)]
)
def test_the_base_of_adapters_is_the_release_beside_them(tmp_path, run_config, is_release):
    checkpoint_utils.read_run_config.cache_clear()
    release = make_release(tmp_path)
    assert checkpoints.base_of_adapters(tmp_path) == checkpoints.base_of_adapters(release) == str(release)
    iteration = make_iteration(tmp_path, 4)
    (tmp_path / TRACKER).write_text("4")
    if run_config is not None:
        (iteration / RUN_CONFIG).write_text(run_config)
    assert checkpoints.base_of_adapters(tmp_path) == str(release if is_release else tmp_path)


def test_a_checkpoint_without_args_says_so(tmp_path, monkeypatch):
    from megatron.bridge.training.mlm_compat import arguments

    def without_args(path):
        raise AssertionError("Provided checkpoint does not have arguments saved.")

    monkeypatch.setattr(arguments, "_load_args_from_checkpoint", without_args)
    with pytest.raises(ValueError, match="release holds no Megatron-LM args: import the model again"):
        checkpoints.read_megatron_lm_args(make_release(tmp_path))
