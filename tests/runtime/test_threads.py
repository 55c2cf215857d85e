"""Work spread over threads that use one core each."""

import torch

from saeflow.runtime.threads import in_parallel, ranges


def test_work_is_spread_in_order_and_leaves_the_callers_threads_alone():
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        assert in_parallel(lambda i: i * i, range(50), threads) == [i * i for i in range(50)]
    assert torch.get_num_threads() == before


def test_ranges_cover_everything_once():
    assert ranges(0, 4) == []
    assert ranges(9, 4) == [(0, 4), (4, 8), (8, 9)]


def test_torch_uses_one_thread_wherever_work_runs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for threads in (1, 2):
            assert in_parallel(lambda _: torch.get_num_threads(), range(4), threads) == [1] * 4
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
