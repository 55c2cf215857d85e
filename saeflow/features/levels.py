"""When the parts of a growing run are merged: levels, as in a log-structured merge.

If every append merged all parts, it would write all values again. If none did, a question would open a file of every
part. A log-structured merge (O'Neil et al. 1996, "The Log-Structured Merge-Tree") lies between: a part has a level, and
n neighbours of one level become one part of the next. This is the policy called tiering (Dayan & Idreos 2018,
"Dostoevsky", section 2), with n as its size ratio. After N activation parts, appended one after the other in any sizes:

    level of a part   floor(log_n p), where p activation parts gave its values
    parts             at most (n - 1) · (1 + floor(log_n N))
    values written    at most floor(log_n N) · values appended: each merge lifts all that it writes by a level or more

No part has more than `most_values`. Neighbours that together have more stay as they are, or as many as fit become one.
That adds at most 2 V / most_values full parts to V values, and writes a value once more. Parts between others, made by
forgetting, wait for merges of their own or of the parts around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saeflow.features.compaction import USUAL_MERGE, MergeSettings, by_first_activation_part
from saeflow.features.schema import indices_held, is_of_now
from saeflow.store.records import PartRecord

AFTER_APPEND = MergeSettings(most_values=200_000_000, most_at_once=200_000_000)
"""Merges after one append take two cores about 70 seconds, so that the next append does not wait longer."""


@dataclass(frozen=True)
class Group:
    """Neighbouring parts to be one: how many activation parts and values they hold, first and last token."""

    parts: tuple[PartRecord, ...]
    n_held: int
    n_values: int
    first_token: int
    last_token: int

    @classmethod
    def of(cls, part: PartRecord, spans: Mapping[int, tuple[int, int]]) -> Group:
        held = [spans[index] for index in indices_held(part)]
        ends = min(first for first, _ in held), max(last for _, last in held)
        return cls((part,), len(held), part.counts["n_values"], *ends)

    @classmethod
    def joined(cls, groups: Sequence[Group]) -> Group:
        return cls(
            tuple(part for group in groups for part in group.parts),
            sum(group.n_held for group in groups),
            sum(group.n_values for group in groups),
            min(group.first_token for group in groups),
            max(group.last_token for group in groups),
        )

    def level(self, per_level: int) -> int:
        level, n_held = 0, self.n_held
        while n_held >= per_level:
            level, n_held = level + 1, n_held // per_level
        return level

    def fits(self, settings: MergeSettings) -> bool:
        n_places = self.last_token - self.first_token
        return self.n_values <= settings.most_values and n_places < settings.most_tokens


def plan_levels(
    parts: Sequence[PartRecord], spans: Mapping[int, tuple[int, int]], per_level: int, mend: bool = False,
    settings: MergeSettings = USUAL_MERGE,
) -> list[list[PartRecord]]:  # fmt: skip
    """Return groups of neighbouring parts to merge, so that fewer than `per_level` of them stay on a level.

    Merges that follow from one another are one group: each value is written once, however many levels it rises. `spans`
    is the first and last token of each activation part. `mend` adds parts that an earlier saeflow made, each alone.
    """
    groups = [Group.of(part, spans) for part in by_first_activation_part(parts)]
    level = 0
    while any(group.level(per_level) >= level for group in groups):
        groups = _with_level_merged(groups, level, per_level, settings)
        level += 1
    merged = [group.parts for group in groups if len(group.parts) > 1 or (mend and not is_of_now(group.parts[0]))]
    return _within([list(parts) for parts in merged], settings.most_at_once)


def _with_level_merged(groups: Sequence[Group], level: int, per_level: int, settings: MergeSettings) -> list[Group]:
    """Merge parts of one level wherever `per_level` of them have none of a higher level between them.

    Parts of lower levels between them are merged, too.
    """
    done: list[Group] = []
    waiting: list[int] = []
    for group in groups:
        if group.level(per_level) > level:
            waiting.clear()
        if group.level(per_level) == level:
            waiting.append(len(done))
        done.append(group)
        if len(waiting) == per_level:
            n = _n_that_fit(done, waiting, settings)
            end, start = waiting[n - 1] + 1, waiting[0]
            done[start:end] = [Group.joined(done[start:end])]
            waiting = [place - (end - start) + 1 for place in waiting[n:]]
    return done


def _n_that_fit(done: Sequence[Group], waiting: Sequence[int], settings: MergeSettings) -> int:
    """Return how many of the waiting groups, with all between them, one part can hold: at least one."""
    ends = [waiting[n - 1] + 1 for n in range(1, len(waiting) + 1)]
    return max(1, sum(Group.joined(done[waiting[0] : end]).fits(settings) for end in ends))


def _within(groups: Sequence[list[PartRecord]], most_values: int) -> list[list[PartRecord]]:
    """Return those of the groups, in order, that have at most `most_values` values together."""
    found, n_values = [], 0
    for group in groups:
        size = sum(part.counts["n_values"] for part in group)
        if n_values + size <= most_values:
            found.append(group)
            n_values += size
    return found
