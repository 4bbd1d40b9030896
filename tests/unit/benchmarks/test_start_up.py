# SPDX-License-Identifier: Apache-2.0
"""The rows of the start-up."""

from benchmarks import start_up
from benchmarks.start_up import IMPORT, Start


def test_rows_are_ratios_to_the_import_with_the_same_caches():
    starts = [
        Start(command, caches, wall * slow, wall * slow / 2, int(wall * 100))
        for caches, slow in ((True, 1.0), (False, 3.0))
        for command, wall in ((IMPORT, 2.0), (IMPORT, 4.0), (IMPORT, 100.0), ("import torch", 1.0))
    ]

    rows = {(row["command"], row["caches"]): row for row in start_up.rows(starts)}

    assert rows[IMPORT, True]["wall"] == 4 and rows[IMPORT, False]["wall"] == 12
    assert all(row["cpu / import"] == 0.25 for (command, _), row in rows.items() if command == "import torch")
    assert rows["import torch", True]["resident / import"] == 0.25
