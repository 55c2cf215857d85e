"""No batch on its way to a GPU is lost or overwritten, however late copies and steps are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saeflow.activations.upload import N_SLOTS, CudaLane, Room, uploaded
from tests.support.fake_lane import FakeLane

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batches(sizes: Sequence[int], n_sites: int) -> list[tuple[Tensor, ...]]:
    made = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(n, 3 + site, generator=made).half() for site in range(n_sites)) for n in sizes]


def reader(whole: list[tuple[Tensor, ...]]) -> Callable[[Room | None], Iterator[tuple[Tensor, ...]]]:
    def read(room: Room | None) -> Iterator[tuple[Tensor, ...]]:
        for batch in whole:
            shapes = [(len(each), each.shape[1]) for each in batch]
            outs = room(shapes, torch.float16) if room else [torch.empty_like(each) for each in batch]
            yield tuple(out.copy_(each) for out, each in zip(outs, batch, strict=True))

    return read


@given(st.lists(st.integers(1, 5), max_size=12), st.integers(1, 2), st.integers(0, 1000))
def test_each_step_uses_its_own_batch_whenever_copies_and_steps_are_done(
    sizes: list[int], n_sites: int, seed: int
) -> None:
    whole, lane, used = batches(sizes, n_sites), FakeLane(seed), list[bool]()
    for wanted, given_batch in zip(whole, uploaded(reader(whole), torch.device("cpu"), lane), strict=True):

        def use(wanted: tuple[Tensor, ...] = wanted, given_batch: tuple[Tensor, ...] = given_batch) -> bool:
            used.append(all(map(torch.equal, wanted, given_batch)))
            return True

        lane.step(use)
    lane.work(lambda: not lane.steps and not lane.copies)
    assert used == [True] * len(sizes)


def test_the_memory_of_three_batches_is_used_again_and_again() -> None:
    whole, lane = batches([4] * 20, 2), FakeLane(0)
    found = list(uploaded(reader(whole), torch.device("cpu"), lane))
    assert len(found) == 20
    assert len(lane.rooms) == 2 * 2 * N_SLOTS
    assert {batch[0].data_ptr() for batch in found} <= {room.data_ptr() for room in lane.rooms}


def test_who_stops_early_leaves_no_copy_behind() -> None:
    lane = FakeLane(3)
    coming = uploaded(reader(batches([2] * 9, 1)), torch.device("cpu"), lane)
    next(coming)
    next(coming)
    coming.close()
    assert not lane.copies


def test_on_the_processor_batches_are_those_that_are_read() -> None:
    whole = batches([3, 2], 1)

    def read(room: Room | None) -> Iterator[tuple[Tensor, ...]]:
        assert room is None
        yield from whole

    assert [id(each[0]) for each in uploaded(read, torch.device("cpu"))] == [id(each[0]) for each in whole]


@on_gpu
def test_a_gpu_gets_what_the_host_read() -> None:
    place, whole = torch.device("cuda"), batches([1000, 900, 1000, 800, 1200, 7], 2)
    found = [tuple(each.clone() for each in batch) for batch in uploaded(reader(whole), place, CudaLane(place))]
    for wanted, batch in zip(whole, found, strict=True):
        assert all(torch.equal(one, other.cpu()) for one, other in zip(wanted, batch, strict=True))
