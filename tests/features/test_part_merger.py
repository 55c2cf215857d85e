"""How the values of a merged part are cut into files."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saeflow.features.part_merger import feature_buckets


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=60), wanted=st.integers(1, 100))
def test_buckets_take_every_feature_once_in_order_and_none_is_much_fuller_than_wanted(counts, wanted):
    found = feature_buckets(np.array(counts), wanted)
    assert [f for a, b in found for f in range(a, b + 1)] == list(range(len(counts)))
    share = sum(counts) / max(1, round(sum(counts) / wanted))
    assert all(sum(counts[a : b + 1]) <= share + max(counts) for a, b in found)
