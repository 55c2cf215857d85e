"""Which tokens count: real ones that no setting leaves out and no forgotten document owns.

Activations of every position are stored; these are the ones that are trained on, encoded and judged.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.corpus.vocabulary import chosen_vocab_ids
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, PartRecord


@dataclass(frozen=True)
class TokenSelection:
    """The tokens of one artefact that count, as of one generation of it."""

    source: Artefact
    skip_positions: tuple[int, ...] = ()
    skip_special: bool | tuple[int, ...] = False
    """True: every special entry of the vocabulary. Else the vocab_ids to leave out."""
    skip_norms_above: float | None = None
    """Vectors longer than this many times the median do not count either. `activations.lengths` finds them."""
    roles: tuple[str, ...] = ()
    """Roles whose tokens count; empty for all tokens, those that no role wrote too."""
    generation: Generation = field(init=False, compare=False)
    SETTINGS: ClassVar = ("skip_positions", "skip_special", "skip_norms_above", "roles")
    """The settings in `[activations]`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "generation", self.source.published())

    @classmethod
    def of(cls, source: Artefact, config: ActivationsConfig) -> TokenSelection:
        """Return what a recipe selects. Raises UserError for positions, entries and roles that there are not."""
        parts = source.published().parts
        positions = positions_from_start(config.skip_positions, int(source.fact("context_length")))
        roles = tuple(sorted(set(config.roles)))
        _require_roles(source, parts, roles)
        if isinstance(config.skip_special, bool):
            return cls(source, positions, config.skip_special, config.skip_norms_above, roles)
        special = chosen_vocab_ids(source.own_file("vocab.parquet"), config.skip_special)
        return cls(source, positions, tuple(special.tolist()) or False, config.skip_norms_above, roles)

    @cached_property
    def length(self) -> int:
        """Context length T."""
        return int(self.source.fact("context_length"))

    @cached_property
    def parts(self) -> dict[int, PartRecord]:
        return {part.index: part for part in self.generation.parts}

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """First and last token of every part, padding included."""
        first = {index: part.counts["first_sequence"] * self.length for index, part in self.parts.items()}
        return {i: (first[i], first[i] + self.parts[i].counts["n_sequences"] * self.length - 1) for i in first}

    @property
    def facts(self) -> dict[str, Any]:
        """The settings, where they are not the defaults: for fingerprints and records."""
        special = self.skip_special if isinstance(self.skip_special, bool) else list(self.skip_special)
        settings = {
            "skip_positions": list(self.skip_positions), "skip_special": special,
            "skip_norms_above": self.skip_norms_above, "roles": list(self.roles),
        }  # fmt: skip
        return {name: value for name, value in settings.items() if value}

    @classmethod
    def from_facts(cls, source: Artefact, facts: Mapping[str, Any]) -> TokenSelection:
        special = facts.get("skip_special", False)
        special = tuple(special) if isinstance(special, list) else bool(special)
        positions, roles = (tuple(facts.get(name, ())) for name in ("skip_positions", "roles"))
        return cls(source, positions, special, facts.get("skip_norms_above"), roles)

    def mask(self, index: int, rows: slice = slice(None), left_out: Counter[str] | None = None) -> np.ndarray:
        """Return bool (s, T): True at the used tokens of these sequences of a part, however long their vectors.

        `left_out` counts the others by reason, each once, without those of forgotten documents.
        """
        table = self._read(self.parts[index], ["document_id", "vocab_id", *(["role"] if self.roles else [])], rows)
        owners = table["document_id"]
        used = owners >= 0
        hidden = [document.document_id for document in self.generation.hidden.get(index, ())]
        if hidden:
            used &= ~np.isin(owners, hidden)
        for reason, applies in self.reasons(table.get("vocab_id", owners), table.get("role")):
            if left_out is not None:
                left_out[reason] += int((used & applies).sum())
            used &= ~applies
        return np.asarray(used)

    def reasons(self, vocab_ids: np.ndarray, spoken: np.ndarray | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each reason to leave tokens (s, T) out, with bool of a shape that fits them: True where it applies.

        `spoken` (s, T) is True at tokens of the roles that count; None if all count.
        """
        if self.skip_positions:
            yield "position", np.isin(np.arange(self.length), self.skip_positions)
        if len(self.special):
            yield "special", np.isin(vocab_ids, self.special)
        if spoken is not None:
            yield "role", ~spoken

    def owners(self, index: int, rows: slice, mask: np.ndarray) -> np.ndarray:
        """Return the document_id (n,) int64 of the tokens that `mask` (s, T) marks in these sequences of a part."""
        return np.asarray(self._read(self.parts[index], ["document_id"], rows)["document_id"][mask])

    def counts(self, index: int) -> np.ndarray:
        """Return int64 (S,): used tokens of every sequence of a part. Reads no tokens if the record says enough."""
        part = self.parts[index]
        whole = not self.generation.hidden.get(index) and not part.counts.get("n_removed_documents")
        facts = self.source.record.facts
        packed_tight = facts.get("packing") == "concatenated" and "special_tokens" not in facts
        if packed_tight and whole and not len(self.special) and not self.roles:
            return self._tight_counts(part)
        return np.asarray(self.mask(index).sum(1))

    def _tight_counts(self, part: PartRecord) -> np.ndarray:
        """Count tokens of sequences that are full, but for the last for training and the last held out."""
        n, n_train = part.counts["n_sequences"], part.counts["n_train_sequences"]
        real = np.full(n, self.length)
        if n_train:
            real[n_train - 1] += part.counts["n_train_tokens"] - n_train * self.length
        if n > n_train:
            real[n - 1] += part.counts["n_tokens"] - part.counts["n_train_tokens"] - (n - n_train) * self.length
        return real - np.searchsorted(self.skip_positions, real) if self.skip_positions else real

    @cached_property
    def special(self) -> np.ndarray:
        """The vocab_ids to leave out, int32."""
        if self.skip_special is True:
            return chosen_vocab_ids(self.source.own_file("vocab.parquet"), self.skip_special)
        return np.array(self.skip_special or (), np.int32)

    def _read(self, part: PartRecord, columns: list[str], rows: slice) -> dict[str, np.ndarray]:
        """Read columns (s, T) of these sequences: of a large part, only the row groups that hold them.

        `role` is True at the roles that count.
        """
        wanted = columns if len(self.special) else [name for name in columns if name != "vocab_id"]
        start, stop, _ = rows.indices(part.counts["n_sequences"])
        with pq.ParquetFile(self.source.part_file(part, "tokens.parquet")) as file:
            groups, before = _holding(file.metadata, start * self.length, stop * self.length)
            table = file.read_row_groups(groups, columns=wanted)
        table = table.slice(start * self.length - before, max(stop - start, 0) * self.length)
        found: dict[str, Any] = {name: table.column(name) for name in wanted}
        found["document_id"] = found["document_id"].fill_null(-1)
        if "role" in found:
            found["role"] = pc.is_in(found["role"], value_set=pa.array(self.roles, pa.string()))
        return {name: column.to_numpy().reshape(-1, self.length) for name, column in found.items()}


def _holding(about: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups that hold the rows from `start` to before `stop`, and the number of rows before them."""
    ends = np.cumsum([0, *(about.row_group(number).num_rows for number in range(about.num_row_groups))])
    groups = [n for n, (a, b) in enumerate(itertools.pairwise(ends.tolist())) if a < stop and b > start]
    return groups, int(ends[groups[0]]) if groups else start


def _require_roles(source: Artefact, parts: Sequence[PartRecord], roles: Sequence[str]) -> None:
    """Raise UserError if nobody has one of these roles. Reads until each was found: mostly one row group."""
    found: set[str | None] = {None}
    for part in parts if roles else ():
        with pq.ParquetFile(source.part_file(part, "tokens.parquet"), read_dictionary=["role"]) as file:
            for number in range(file.num_row_groups):
                found.update(pc.unique(file.read_row_group(number, ["role"]).column(0)).to_pylist())
                if found.issuperset(roles):
                    return
    if parts and (lacking := [role for role in roles if role not in found]):
        there = ", ".join(sorted(map(brief, filter(None, found)))) or "none"
        raise UserError(
            f"activations.roles names {brief(lacking[0])!r}, but nobody in {source.id} has that role. Its roles: "
            f"{there}.\nCorrect activations.roles, or read more documents."
        )


def positions_from_start(positions: Sequence[int], length: int) -> tuple[int, ...]:
    """Return positions of sequences of this length, sorted, where -1 is the last one. Raises UserError."""
    if any(not -length <= position < length for position in positions):
        raise UserError(
            f"activations.skip_positions is {list(positions)}; sequences have the positions 0 to {length - 1}."
        )
    return tuple(sorted({position % length for position in positions}))
