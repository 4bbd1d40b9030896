# SPDX-License-Identifier: Apache-2.0
"""Jobs run in threads, for the processors that are there, and stop together."""

import os
import threading

import pytest
import torch

from megatron.bridge.models.conversion.streaming import execute


@pytest.mark.parametrize(
    ("processors", "ranks", "threads"),
    [(1, None, 1), (4, None, 4), (64, None, 8), (64, "16", 4), (64, "2", 8), (4, "8", 1), (4, "", 4)],
)
def test_threads_are_for_the_processors_of_this_rank(monkeypatch, processors, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert execute.processors() == threads


def test_shares_are_of_about_the_same_size_and_keep_the_order():
    assert execute.shares([5, 1, 9, 4, 4, 3], 2) == [[2, 4], [0, 1, 3, 5]]
    assert execute.shares([], 2) == [[], []]


def test_a_job_that_fails_stops_the_others():
    failed, told = threading.Event(), []

    def fail(advance):
        advance(1)
        failed.set()
        raise ValueError("a full disk")

    def go_on(advance):
        failed.wait()
        while True:
            advance(1)
            told.append("")

    with pytest.raises(ValueError, match="a full disk"):
        execute.run([go_on, fail, go_on], 3, "writing")


def test_jobs_share_the_threads_of_torch_and_give_them_back():
    before = torch.get_num_threads()
    assert execute.run([lambda advance: torch.get_num_threads()] * 2, 0, "writing") == [max(before // 2, 1)] * 2
    assert torch.get_num_threads() == before
