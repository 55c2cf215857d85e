"""When the parts of a growing run are merged: few parts, bounded writing, in the order of the corpus."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.features.compaction import MergeSettings, group_between
from saeflow.features.levels import plan_levels
from saeflow.features.schema import PART_TABLES, SAMPLE_TABLES, covered
from saeflow.store.records import FileRecord, PartRecord
from tests.support.growing_run import PLACES, GrowingRun, a_part, merged

sizes_of_appends = st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=8), min_size=1, max_size=40)


def n_levels(n_held: int, per_level: int) -> int:
    """How many levels above the lowest one a run of so many activation parts has."""
    return next(level for level in itertools.count() if per_level ** (level + 1) > n_held)


@given(appends=sizes_of_appends, per_level=st.integers(2, 6))
def test_a_run_that_grows_has_few_parts_and_no_value_is_written_more_often_than_it_has_levels(
    appends: list[list[int]], per_level: int
) -> None:
    run = GrowingRun(per_level)
    for sizes in appends:
        run.append(sizes)
        run.merge()
        highest = n_levels(run.n_held, per_level)
        assert len(run.parts) <= (per_level - 1) * (1 + highest)
        assert max(run.written.values(), default=0) <= highest
    assert [index for held in run.in_order() for index in held] == list(range(run.n_held))
    assert sum(part.counts["n_values"] for part in run.parts) == run.n_values


@given(appends=sizes_of_appends, per_level=st.integers(2, 6), most=st.integers(500, 5000), places=st.integers(30, 400))
def test_no_part_is_merged_beyond_what_one_may_hold(
    appends: list[list[int]], per_level: int, most: int, places: int
) -> None:
    run = GrowingRun(per_level, MergeSettings(most_values=most, most_tokens=places))
    for sizes in appends:
        run.append(sizes)
        for group in run.plan():
            held = [index for part in group for index in covered(part)]
            assert sum(part.counts["n_values"] for part in group) <= most
            assert PLACES * len(held) <= places
        run.merge()
        highest = n_levels(run.n_held, per_level)
        full = 2 * run.n_values / most + 2 * PLACES * run.n_held / places
        assert len(run.parts) <= (per_level - 1) * (1 + highest) + full + 1
        assert max(run.written.values(), default=0) <= highest + 1


@given(
    appends=sizes_of_appends, per_level=st.integers(2, 6), most=st.integers(500, 5000), killed_after=st.integers(0, 4)
)
def test_a_plan_whose_first_groups_are_merged_already_ends_with_the_parts_of_the_whole_plan(
    appends: list[list[int]], per_level: int, most: int, killed_after: int
) -> None:
    runs = [GrowingRun(per_level, MergeSettings(most_values=most)) for _ in range(2)]
    for sizes in appends:
        for run in runs:
            run.append(sizes)
    runs[0].merge()
    runs[1].merge(killed_after)
    runs[1].merge()
    assert runs[0].in_order() == runs[1].in_order()


@given(appends=sizes_of_appends, per_level=st.integers(2, 6), most=st.integers(0, 5000))
def test_merges_at_once_have_no_more_values_together_than_asked(
    appends: list[list[int]], per_level: int, most: int
) -> None:
    run = GrowingRun(per_level, MergeSettings(most_values=most, most_at_once=most))
    for sizes in appends:
        run.append(sizes)
        assert sum(part.counts["n_values"] for group in run.plan() for part in group) <= most
        run.merge()
    for _ in range(run.n_held):
        run.merge()
    assert run.plan() == [], "what was left is merged later"


def test_merges_that_follow_from_one_another_are_one() -> None:
    run = GrowingRun(4)
    run.append([1] * 21)
    assert [len(group) for group in run.plan()] == [16, 4]
    run.merge()
    assert run.in_order() == [[*range(16)], [*range(16, 20)], [20]]
    run.append([1] * 3)
    assert [[len(covered(part)) for part in group] for group in run.plan()] == [[1, 1, 1, 1]]
    run.append([1] * 40)
    assert [[len(covered(part)) for part in group] for group in run.plan()] == [[16, 4, *[1] * 44]]


def test_a_part_between_larger_ones_is_merged_with_them_and_parts_at_their_sides_are_not() -> None:
    run = GrowingRun(2)
    run.parts = [merged(range(4), 4), a_part(4, 1), merged(range(5, 9), 4), a_part(9, 1)]
    [group] = run.plan()
    assert group == run.parts[:3]
    assert group_between(run.parts, group[0].folder, group[-1].folder) == group


@pytest.mark.parametrize("tables", [{}, PART_TABLES], ids=["without counts", "without a sample"])
def test_a_part_of_an_earlier_saeflow_is_mended_alone_if_it_is_asked(tables: dict[str, object]) -> None:
    def part_with(index: int, names: Iterable[str]) -> PartRecord:
        files = [FileRecord(name=f"{name}.parquet", n_bytes=1, checksum="") for name in names]
        return PartRecord(index=index, counts={"n_values": 1}, files=files)

    parts = [part_with(0, tables), part_with(1, PART_TABLES | SAMPLE_TABLES)]
    spans = {0: (0, 9), 1: (10, 19)}
    assert plan_levels(parts, spans, 4) == []
    assert plan_levels(parts, spans, 4, mend=True) == [parts[:1]]


@pytest.mark.parametrize("n", [0, 1])
def test_a_run_without_neighbours_is_left_alone(n: int) -> None:
    run = GrowingRun(2)
    run.append([1] * n)
    assert run.plan() == []
