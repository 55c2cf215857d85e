"""Which tokens count: real ones that no setting leaves out and no forgotten document owns.

Activations of every position are stored; these are the ones that are trained on, encoded and judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from saeflow.corpus.vocabulary import special_ids
from saeflow.recipe.settings import ActivationsConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, PartRecord


@dataclass(frozen=True)
class TokenSelection:
    """The tokens of one artefact that count, as of one generation of it."""

    source: Artefact
    skip_positions: tuple[int, ...] = ()
    skip_special: bool = False
    generation: Generation = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generation", self.source.published())
        length = self.length
        if any(not 0 <= position < length for position in self.skip_positions):
            raise UserError(
                f"activations.skip_positions is {list(self.skip_positions)}; sequences have the positions 0 to "
                f"{length - 1}."
            )

    @classmethod
    def of(cls, source: Artefact, config: ActivationsConfig) -> TokenSelection:
        return cls(source, tuple(sorted(set(config.skip_positions))), config.skip_special)

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
        settings = {"skip_positions": list(self.skip_positions), "skip_special": self.skip_special}
        return {name: value for name, value in settings.items() if value}

    @classmethod
    def from_facts(cls, source: Artefact, facts: Mapping[str, Any]) -> TokenSelection:
        return cls(source, tuple(facts.get("skip_positions", ())), bool(facts.get("skip_special", False)))

    def mask(self, index: int, rows: slice = slice(None)) -> np.ndarray:
        """Return bool (s, T): True at the used tokens of these sequences of a part."""
        part = self.parts[index]
        table = self._read(part, ["document_id", "vocab_id"], rows)
        owners = table["document_id"]
        used = owners >= 0
        hidden = [document.document_id for document in self.generation.hidden.get(index, ())]
        if hidden:
            used &= ~np.isin(owners, hidden)
        if len(self._special):
            used &= ~np.isin(table["vocab_id"], self._special)
        used[:, list(self.skip_positions)] = False
        return np.asarray(used)

    def owners(self, index: int, rows: slice) -> np.ndarray:
        """Return the document_id (n,) int64 of the used tokens of these sequences of a part."""
        owners = self._read(self.parts[index], ["document_id"], rows)["document_id"]
        return np.asarray(owners[self.mask(index, rows)])

    def counts(self, index: int) -> np.ndarray:
        """Return int64 (S,): used tokens of every sequence of a part. Reads no tokens if the record says enough."""
        part = self.parts[index]
        whole = not self.generation.hidden.get(index) and not part.counts.get("n_removed_documents")
        facts = self.source.record.facts
        packed_tight = facts.get("packing") == "concatenated" and "special_tokens" not in facts
        if packed_tight and whole and not len(self._special):
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
    def _special(self) -> np.ndarray:
        return special_ids(self.source.own_file("vocab.parquet")) if self.skip_special else np.empty(0, np.int32)

    def _read(self, part: PartRecord, columns: list[str], rows: slice) -> dict[str, np.ndarray]:
        """Read columns (s, T) of these sequences: of a large part, only the row groups that hold them."""
        wanted = columns if len(self._special) else [name for name in columns if name != "vocab_id"]
        start, stop, _ = rows.indices(part.counts["n_sequences"])
        with pq.ParquetFile(self.source.part_file(part, "tokens.parquet")) as file:
            groups, before = _holding(file.metadata, start * self.length, stop * self.length)
            table = file.read_row_groups(groups, columns=wanted)
        table = table.slice(start * self.length - before, max(stop - start, 0) * self.length)
        found: dict[str, Any] = {name: table.column(name) for name in wanted}
        found["document_id"] = found["document_id"].fill_null(-1)
        return {name: column.to_numpy().reshape(-1, self.length) for name, column in found.items()}


def _holding(about: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups that hold the rows from `start` to before `stop`, and the number of rows before them."""
    ends = np.cumsum([0, *(about.row_group(number).num_rows for number in range(about.num_row_groups))])
    groups = [n for n, (a, b) in enumerate(itertools.pairwise(ends.tolist())) if a < stop and b > start]
    return groups, int(ends[groups[0]]) if groups else start
