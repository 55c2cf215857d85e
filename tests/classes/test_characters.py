"""Spans of characters become exactly the tokens that have one of their characters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.classes import characters
from saeflow.classes.characters import Lookup, Marks, lookup


@st.composite
def parts(draw: st.DrawFn) -> Marks:
    """A part: documents in any order, offsets that mostly grow, tokens without characters left out here and there."""
    token_id, rows = draw(st.integers(0, 9)), []
    for document in draw(st.permutations(range(5)))[: draw(st.integers(1, 4))]:
        at = 0
        for _ in range(draw(st.integers(1, 6))):
            token_id += draw(st.sampled_from([1, 1, 1, 2]))
            start = max(0, at + draw(st.sampled_from([0, 0, 0, 1, -1, -2])))
            at = start + draw(st.integers(0, 3))
            rows.append((token_id, document * 7, start, at))
    return Marks(*np.array(rows, np.int64).T)


spans = st.lists(
    st.tuples(st.integers(0, 5).map(lambda n: n * 7), st.integers(-2, 14), st.integers(-2, 14)), max_size=12
).map(lambda rows: [(key, min(a, b), max(a, b) + 1) for key, a, b in rows])


def tokens_by_row(found: Lookup) -> dict[int, list[int]]:
    answer: dict[int, list[int]] = {}
    for row, first, last in zip(found.row, found.first, found.last, strict=True):
        answer.setdefault(int(row), []).extend(range(first, last + 1))
    return answer


@settings(max_examples=60, deadline=None)
@given(marks=parts(), rows=spans, at_once=st.sampled_from([1, 5, 1000]))
def test_a_span_has_the_tokens_that_looking_at_each_token_finds(
    marks: Marks, rows: list[tuple[int, int, int]], at_once: int
) -> None:
    document, first, end = np.array(rows, np.int64).reshape(-1, 3).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "_TOKENS_AT_ONCE", at_once)
        found = lookup(marks, document, first, end)
    expected, outside, cut = {}, 0, 0
    for row, (key, low, high) in enumerate(rows):
        mine = marks.document_id == key
        covers = mine & (marks.char_start < high) & (marks.char_end > low)
        length = marks.char_end[mine].max(initial=-1)
        if covers.any():
            expected[row] = marks.token_id[covers].tolist()
            cut += bool(high > length or low < 0)
        elif mine.any():
            outside += bool(low >= length or high <= 0)
    assert tokens_by_row(found) == expected
    assert (found.n_matched, found.n_outside, found.n_cut) == (len(expected), outside, cut)


def test_spans_of_one_row_are_unbroken_and_as_few_as_can_be() -> None:
    marks = Marks(*np.array([[0, 0, 0, 3], [1, 0, 3, 5], [3, 0, 5, 9], [4, 0, 9, 12]], np.int64).T)
    found = lookup(marks, *(np.array([n], np.int64) for n in (0, 1, 10)))
    assert [found.row.tolist(), found.first.tolist(), found.last.tolist()] == [[0, 0], [0, 3], [1, 4]]
