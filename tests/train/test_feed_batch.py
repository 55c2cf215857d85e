"""The rows of a batch as many trainings take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saeflow.train.training import FeedBatch


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scaled_rows_stay_when_the_memory_of_the_batch_is_used_again(dtype: torch.dtype) -> None:
    feed: Any = None
    values, place = torch.ones(4, 3, dtype=dtype), torch.device("cpu")
    batch = FeedBatch(0, (values,), feed)
    taken = batch.scaled(0, 1.0, place)
    assert batch.scaled(0, 1.0, place) is taken
    values.zero_()
    assert torch.equal(taken, torch.ones(4, 3))
