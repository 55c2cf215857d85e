"""Many parts of a run become few: which ones are merged, and when the new ones are shown.

A compacted part holds what several activation parts gave; its record names them and the inputs of each. It is made
beside the old parts and takes their place in one switch, so a reader sees either the old ones or the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saeflow.corpus.selection import TokenSelection
from saeflow.features.coverage import FIRST_INDEX, covered, has_every_table, stands_for
from saeflow.features.part_merger import USUAL_MERGE, MergeSettings, PartMerger
from saeflow.runtime.progress import Bar
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord


def part_of_each(target: Artefact, inputs: Mapping[int, dict[str, str]]) -> dict[int, PartRecord]:
    """Map each activation part to the finished part that holds its values as they follow from these inputs.

    Activation parts without one are left out. Parts of format 1 do not say what they were made from; merged ones say
    that it was nothing.
    """
    wanted = {
        index: {stands_for(each)} if each.get("hidden") else {stands_for(each), stands_for({})}
        for index, each in inputs.items()
    }

    def valid_indices(part: PartRecord) -> list[int]:
        if part.index < FIRST_INDEX:
            return [part.index] if part.index in inputs and part.made_from(inputs[part.index]) else []
        return [index for index, digest in covered(part).items() if digest in wanted.get(index, ())]

    found: dict[int, PartRecord] = {}
    for part in target.parts(lambda part: bool(valid_indices(part))).values():
        for index in valid_indices(part):
            found.setdefault(index, part)
    return found


def replace_group(target: Artefact, group: Sequence[PartRecord], merged: PartRecord, clear: bool) -> None:
    """Show a merged part in the place of the parts that it holds. The caller holds the artefact's lease.

    `clear` removes folders that no list names: only once no later group is merged already.
    """
    gone = {old.folder for old in group}
    kept = [part for part in target.published().parts if part.folder not in gone]
    target.publish([*kept, merged], clear=clear)


def plan_merges(
    parts: Sequence[PartRecord], spans: Mapping[int, tuple[int, int]], enough: int = 2, mend: bool = False,
    settings: MergeSettings = USUAL_MERGE,
) -> list[list[PartRecord]]:  # fmt: skip
    """Return groups of at least `enough` neighbouring parts to merge.

    A group has at most `settings.most_values` values in at most `settings.most_tokens` places (padding counts), unless
    one part alone has more. `spans` is the first and last token of each activation part. `mend` adds groups, however
    small, with a part that an earlier saeflow made: such a part lacks some statistics.
    """
    groups: list[list[PartRecord]] = [[]]
    n_values = first = last = 0
    for part in _by_first_activation_part(parts):
        begin, end = min(spans[i][0] for i in covered(part)), max(spans[i][1] for i in covered(part))
        n_values, last = n_values + part.counts["n_values"], max(last, end)
        if groups[-1] and (n_values > settings.most_values or last - first >= settings.most_tokens):
            groups.append([])
        if not groups[-1]:
            n_values, first, last = part.counts["n_values"], begin, end
        groups[-1].append(part)
    return [
        group
        for group in groups
        if len(group) >= max(enough, 2) or (mend and not all(has_every_table(part) for part in group))
    ]


def group_between(parts: Sequence[PartRecord], first: str, last: str) -> list[PartRecord]:
    """Return a group of `plan_merges`, by the folders of its first and last part."""
    ordered = _by_first_activation_part(parts)
    folders = [part.folder for part in ordered]
    return ordered[folders.index(first) : folders.index(last) + 1]


def _by_first_activation_part(parts: Sequence[PartRecord]) -> list[PartRecord]:
    return sorted(parts, key=lambda part: min(covered(part)))


class _Source(NamedTuple):
    """A part to read from, and the activation parts whose values are taken."""

    part: PartRecord
    indices: list[int]


def merge_whole_parts(
    target: Artefact,
    selection: TokenSelection,
    parts: Sequence[PartRecord],
    bar: Bar,
    settings: MergeSettings = USUAL_MERGE,
) -> PartRecord:
    """Write all values of these parts as one part."""
    sources = [_Source(part, sorted(covered(part))) for part in parts]
    return _merge(target, selection, sources, settings, bar)


def parts_to_show(
    target: Artefact, selection: TokenSelection, inputs: Mapping[int, dict[str, str]],
    settings: MergeSettings = USUAL_MERGE,
) -> list[PartRecord]:  # fmt: skip
    """Return the parts that hold the values of these inputs, and no others.

    A compacted part that also holds values no longer wanted is written again without them.
    """
    owned: dict[str, list[int]] = {}
    records: dict[str, PartRecord] = {}
    for index, part in part_of_each(target, inputs).items():
        owned.setdefault(part.folder, []).append(index)
        records[part.folder] = part
    return [
        part
        if set(owned[folder]) == covered(part).keys()
        else _merge(target, selection, [_Source(part, sorted(owned[folder]))], settings)
        for folder, part in records.items()
    ]


def _merge(
    target: Artefact, selection: TokenSelection, sources: Sequence[_Source], settings: MergeSettings,
    bar: Bar | None = None,
) -> PartRecord:  # fmt: skip
    taken = dict(sorted((index, source.part) for source in sources for index in source.indices))
    inputs = {f"{index:06d}": covered(part)[index] for index, part in taken.items()}
    counts = {"n_tokens": 0, "n_values": 0, "n_parts": len(taken)}
    index = FIRST_INDEX + min(taken)
    with target.new_part(index, counts, inputs) as folder:
        merger = PartMerger(target, selection, taken, folder, bar, settings)
        merger.merge()
        counts["n_tokens"] = merger.n_tokens
        counts["n_values"] = int(merger.statistics.n_tokens.sum())
    return target.made[index]
