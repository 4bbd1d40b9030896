# SPDX-License-Identifier: Apache-2.0
"""No variant of a config ends with exit code 0, another model, and no word about it.

`nox -s variants` runs all of `variants.py`, the default command a dozen of them.
"""

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import steps
from judge import Judge
from variants import SAME, VARIANTS, Variant, sharpen

from megatron.bridge import AutoBridge


NEAR = 1e-4  # of the largest logit


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each row that the command line asks for."""
    everything = metafunc.config.option.variants
    rows = [each for each in VARIANTS if everything or each.default]
    metafunc.parametrize("variant", rows, ids=[each.name for each in rows])


@pytest.fixture(scope="module")
def judge(reports: Path) -> Iterator[Judge]:
    """Start Megatron-LM once for all rows."""
    judge = Judge(reports / "judge.txt")
    yield judge
    judge.end()


def test_variant_is_the_same_or_is_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    judge: Judge,
    variant: Variant,
) -> None:
    """Megatron-LM computes what transformers computes, or the import says that it doesn't."""
    source = models.make_model(tmp_path / "hf", variant.family, prepare=sharpen, **variant.changes)
    kind, _, words = variant.expected.partition(": ")
    if kind == "refused":
        with pytest.raises(Exception) as error:
            AutoBridge.import_ckpt(source, tmp_path / "megatron")
        assert words in str(error.value)
        assert not (tmp_path / "megatron" / steps.TRACKER).exists()
        return
    AutoBridge.import_ckpt(source, tmp_path / "megatron")
    if kind == "said":
        assert words in caplog.text + capsys.readouterr().out
        return
    assert variant.expected == SAME
    assert judge.ask(source, tmp_path / "megatron", steps.model_flags(tmp_path / "megatron")) < NEAR
