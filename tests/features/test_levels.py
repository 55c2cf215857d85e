"""When the parts of a growing run are merged: few parts, bounded writing, in the order of the corpus."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.features.compaction import USUAL_MERGE, MergeSettings, group_between
from saeflow.features.levels import plan_levels
from saeflow.features.schema import FIRST_INDEX, PART_TABLES, covered
from saeflow.store.records import FileRecord, PartRecord

PLACES = 10
"""Tokens of an activation part, padding included."""

sizes_of_appends = st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=8), min_size=1, max_size=40)


@dataclass
class Run:
    """A run of which only the sizes exist, and what merging it has written."""

    per_level: int
    settings: MergeSettings = USUAL_MERGE
    parts: list[PartRecord] = field(default_factory=list)
    n_values: int = 0
    written: Counter[int] = field(default_factory=Counter)
    """How often the values of each activation part were written again."""

    @property
    def n_held(self) -> int:
        return sum(len(covered(part)) for part in self.parts)

    def plan(self) -> list[list[PartRecord]]:
        spans = {index: (PLACES * index, PLACES * index + PLACES - 1) for part in self.parts for index in covered(part)}
        return plan_levels(self.parts, spans, self.per_level, settings=self.settings)

    def append(self, sizes: Sequence[int]) -> None:
        first = self.n_held
        self.parts += [a_part(index, n) for index, n in enumerate(sizes, first)]
        self.n_values += sum(sizes)

    def merge(self, most_groups: int | None = None) -> None:
        for group in self.plan()[:most_groups]:
            held = sorted(index for part in group for index in covered(part))
            self.written.update(held)
            folders = {part.folder for part in group}
            self.parts = [part for part in self.parts if part.folder not in folders]
            self.parts.append(merged(held, sum(part.counts["n_values"] for part in group)))

    def in_order(self) -> list[list[int]]:
        """The activation parts of each part, from the first token to the last."""
        return sorted(sorted(covered(part)) for part in self.parts)


def a_part(index: int, n_values: int) -> PartRecord:
    return PartRecord(index=index, counts={"n_values": n_values}, files=[])


def merged(held: Sequence[int], n_values: int) -> PartRecord:
    inputs = {f"{index:06d}": "digest" for index in held}
    return PartRecord(index=FIRST_INDEX + held[0], counts={"n_values": n_values}, files=[], inputs=inputs)


def n_levels(n_held: int, per_level: int) -> int:
    """How many levels above the lowest one a run of so many activation parts has."""
    return next(level for level in itertools.count() if per_level ** (level + 1) > n_held)


@given(appends=sizes_of_appends, per_level=st.integers(2, 6))
def test_a_run_that_grows_has_few_parts_and_no_value_is_written_more_often_than_it_has_levels(
    appends: list[list[int]], per_level: int
) -> None:
    run = Run(per_level)
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
    run = Run(per_level, MergeSettings(most_values=most, most_tokens=places))
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
    runs = [Run(per_level, MergeSettings(most_values=most)) for _ in range(2)]
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
    run = Run(per_level, MergeSettings(most_values=most, most_at_once=most))
    for sizes in appends:
        run.append(sizes)
        assert sum(part.counts["n_values"] for group in run.plan() for part in group) <= most
        run.merge()
    for _ in range(run.n_held):
        run.merge()
    assert run.plan() == [], "what was left is merged later"


def test_merges_that_follow_from_one_another_are_one() -> None:
    run = Run(4)
    run.append([1] * 21)
    assert [len(group) for group in run.plan()] == [16, 4]
    run.merge()
    assert run.in_order() == [[*range(16)], [*range(16, 20)], [20]]
    run.append([1] * 3)
    assert [[len(covered(part)) for part in group] for group in run.plan()] == [[1, 1, 1, 1]]
    run.append([1] * 40)
    assert [[len(covered(part)) for part in group] for group in run.plan()] == [[16, 4, *[1] * 44]]


def test_a_part_between_larger_ones_is_merged_with_them_and_parts_at_their_sides_are_not() -> None:
    run = Run(2)
    run.parts = [merged(range(4), 4), a_part(4, 1), merged(range(5, 9), 4), a_part(9, 1)]
    [group] = run.plan()
    assert group == run.parts[:3]
    assert group_between(run.parts, group[0].folder, group[-1].folder) == group


def test_a_part_of_an_earlier_saeflow_is_mended_alone_if_it_is_asked() -> None:
    complete = [FileRecord(name=f"{table}.parquet", n_bytes=1, checksum="") for table in PART_TABLES]
    parts = [a_part(0, 1), PartRecord(index=1, counts={"n_values": 1}, files=complete)]
    spans = {0: (0, 9), 1: (10, 19)}
    assert plan_levels(parts, spans, 4) == []
    assert plan_levels(parts, spans, 4, mend=True) == [parts[:1]]


@pytest.mark.parametrize("n", [0, 1])
def test_a_run_without_neighbours_is_left_alone(n: int) -> None:
    run = Run(2)
    run.append([1] * n)
    assert run.plan() == []
