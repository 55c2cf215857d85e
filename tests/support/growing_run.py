"""A run of which only the sizes exist: it grows part by part, and what a plan merges is counted, not written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from saeflow.features.compaction import USUAL_MERGE, MergeSettings
from saeflow.features.levels import plan_levels
from saeflow.features.schema import FIRST_INDEX, covered
from saeflow.store.records import PartRecord

PLACES = 10
"""Tokens of an activation part, padding included."""


@dataclass
class GrowingRun:
    """The parts of a run, and what merging them has written."""

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
