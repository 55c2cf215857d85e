"""A step by kernels asks the device for nothing, and makes no tensor of the size of a product or of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.sae.gpu.trace import ARCHITECTURES, META, REAL, Sizes, launches, trace_of, traced

PAGE = Path(__file__).resolve().parents[3] / "docs" / "built" / "gpu-kernels.md"
TINY = Sizes(11, 40, 64, 3)
ODD = Sizes(8192, 65_536, 2300, 64)
"""Its width is filled up for the product."""


@pytest.mark.parametrize("sizes", [*REAL, ODD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("n_ranks", "what"), [(1, "rows"), (8, "rows"), (8, "features")])
def test_a_step_makes_no_large_tensor_and_copies_nothing_to_or_from_the_host(n_ranks, what, name, dtype, sizes):
    trace = trace_of(sizes, dtype, n_ranks=n_ranks, what=what, architecture=name)
    assert trace.kernels.count("decode_kernel") == 2  # dead features take part
    assert trace.largest < sizes.n_rows * sizes.n_features
    assert trace.largest < sizes.n_features * sizes.width
    assert not trace.transfers


QUESTIONS = {
    "a number": lambda x: x.sum().item(), "a truth": lambda x: bool(x.any()), "a list": lambda x: x.tolist(),
    "places": lambda x: x.nonzero(), "a mask": lambda x: x[x > 0], "chosen": lambda x: x.masked_select(x > 0),
    "a copy": lambda x: x.cpu(), "kinds": lambda x: x.unique(), "counts": lambda x: x.long().bincount(),
}  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_to_the_device_is_found(question):
    x = torch.empty(5, device=META)
    with traced() as trace, pytest.raises((RuntimeError, NotImplementedError)):
        question(x)
    assert not trace.kernels


def test_numbers_that_the_host_sends_and_masks_whose_size_it_needs_are_found():
    with traced() as trace:
        x = torch.empty(5, device=META) * torch.tensor([2.0]).to(META)
        x[x > 0] = torch.zeros(3, device=META)
    assert trace.transfers == ["_to_copy", "index_put_"]


def test_tensors_are_counted_as_long_as_they_are_there():
    with traced() as trace:
        for _ in range(3):
            kept = torch.empty(100, device=META).view(10, 10).square_().double()
        assert kept.is_meta
    assert (trace.peak, trace.largest) == (800 + 400 + 800, 100)


@pytest.mark.parametrize("name", ["topk", "matryoshka"])
def test_a_step_that_is_computed_does_what_one_without_data_does(name):
    real, without_data = (
        trace_of(TINY, torch.float32, place, architecture=name) for place in (torch.device("cpu"), META)
    )
    assert real.kernels == without_data.kernels
    assert real.operations == without_data.operations
    assert real.peak == pytest.approx(without_data.peak, rel=0.05)


def test_the_page_says_what_a_step_launches():
    assert launches() in PAGE.read_text()
