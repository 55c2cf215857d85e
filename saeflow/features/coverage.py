"""Map a feature part back to the activation parts it was computed from, and to their inputs, by its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from saeflow.features.schema import PART_TABLES
from saeflow.recipe.fingerprint import fingerprint
from saeflow.store.records import PartRecord

FIRST_INDEX = 10_000_000
"""The index of a compacted part is that of its first activation part plus this number."""


def covered(part: PartRecord) -> dict[int, str]:
    """Return the index of each activation part whose values a part holds, with a digest of its inputs."""
    if part.index < FIRST_INDEX:
        return {part.index: stands_for(part.inputs)}
    return {int(index): digest for index, digest in part.inputs.items()}


def stands_for(inputs: Mapping[str, str]) -> str:
    """Return a digest of the inputs of values, then the digest of the hidden documents that were left out."""
    hidden = inputs.get("hidden", "")
    return f"{fingerprint(dict(inputs))} {hidden}".strip()


def hidden_digest_of(digest: str) -> str:
    """Return the digest of hidden documents from that of all inputs; empty if there were none."""
    return digest.partition(" ")[2]


def token_ranges(indices: Iterable[int], tokens: Iterable[PartRecord], length: int) -> list[tuple[int, int]] | None:
    """Return first and last tokens of the parts with these indices, neighbours as one; None if a record lacks them."""
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
    """Return a digest of the values in these parts: it does not depend on how they are cut or merged."""
    return fingerprint(sorted(item for part in parts for item in covered(part).items()))


def has_every_table(part: PartRecord) -> bool:
    """True if no table is missing, as it is in a part that an earlier saeflow made."""
    return {f"{table}.parquet" for table in PART_TABLES} <= {file.name for file in part.files}
