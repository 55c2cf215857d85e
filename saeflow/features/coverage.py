"""Which activation parts the values of a run's part belong to, and what they followed from: read from its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from saeflow.features.schema import PART_TABLES
from saeflow.recipe.fingerprint import fingerprint
from saeflow.store.records import PartRecord

FIRST_INDEX = 10_000_000
"""A compacted part has the index of its first activation part, and this added."""


def covered(part: PartRecord) -> dict[int, str]:
    """Activation parts whose values a part holds, by index, and what stands for the inputs of each."""
    if part.index < FIRST_INDEX:
        return {part.index: stands_for(part.inputs)}
    return {int(index): digest for index, digest in part.inputs.items()}


def stands_for(inputs: Mapping[str, str]) -> str:
    """Digits for what values followed from, then those of the hidden documents that were left out."""
    hidden = inputs.get("hidden", "")
    return f"{fingerprint(dict(inputs))} {hidden}".strip()


def hidden_in(digest: str) -> str:
    """What stands for the hidden documents in such digits; empty where none were."""
    return digest.partition(" ")[2]


def token_ranges(indices: Iterable[int], tokens: Iterable[PartRecord], length: int) -> list[tuple[int, int]] | None:
    """Tokens, first and last, of the parts with these indices, neighbours as one; None where a record does not say."""
    counts = {part.index: part.counts for part in tokens}
    ranges: list[tuple[int, int]] = []
    for index in sorted(indices):
        if not {"first_sequence", "n_sequences"} <= counts.get(index, {}).keys():
            return None
        first = counts[index]["first_sequence"] * length
        end = first + counts[index]["n_sequences"] * length
        if ranges and ranges[-1][1] == first - 1:
            first = ranges.pop()[0]
        if end > first:
            ranges.append((first, end - 1))
    return ranges


def holding(parts: Iterable[PartRecord]) -> str:
    """Stands for what parts hold, however they are cut or merged."""
    return fingerprint(sorted(item for part in parts for item in covered(part).items()))


def has_every_table(part: PartRecord) -> bool:
    """Not so of a part that an earlier saeflow made."""
    return {f"{table}.parquet" for table in PART_TABLES} <= {file.name for file in part.files}
