# SPDX-License-Identifier: Apache-2.0
"""Nothing of another test's process group reaches these, and Hypothesis tries the same inputs in each run."""

from collections.abc import Iterator

import hypothesis
import pytest


hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def no_rendezvous() -> Iterator[None]:
    """Forget the address that Bridge's model provider leaves in the environment: a child would listen there, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield
