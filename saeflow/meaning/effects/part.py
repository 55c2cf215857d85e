"""One part of the firings: read its sequences, change each firing in forward passes, and give the rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import torch

from saeflow.features.changes import FeatureChange, FeatureLevels
from saeflow.features.schema import EFFECTS
from saeflow.meaning.effects.branches import Branches, BranchPass
from saeflow.meaning.effects.figures import Figures, Moved, compare
from saeflow.model.sites import device_of
from saeflow.runtime.devices import model_threads
from saeflow.runtime.threads import map_in_order
from saeflow.sae.autoencoder import SparseAutoencoder

_MOST_SEQUENCES_BETWEEN = 64
"""If fewer unwanted sequences than this lie between two wanted ones, all are read in one go."""
_MOST_READ = 1 << 20
"""Tokens that are read at once."""


@dataclass(frozen=True)
class SequenceTokens:
    """The tokens of some sequences, (s, T) each."""

    numbers: np.ndarray
    """(s): the sequences, ascending."""
    vocab_ids: np.ndarray
    owners: np.ndarray
    """The document of each token; -1 for padding and forgotten documents."""

    @classmethod
    def read(cls, connection: duckdb.DuckDBPyConnection, wanted: np.ndarray, length: int) -> SequenceTokens:
        """Read these sequences (ascending) from a run's tokens; far sequences in between are not read."""
        blocks = wanted // max(1, _MOST_READ // length)
        ends = np.flatnonzero((np.diff(wanted) > _MOST_SEQUENCES_BETWEEN) | (np.diff(blocks) > 0)) + 1
        groups = np.split(wanted, ends) if len(wanted) else []
        ids, owners = [np.zeros((0, length), np.int64)], [np.zeros((0, length), np.int64)]
        for group in groups:
            first, last = int(group[0]), int(group[-1])
            table: pa.Table = connection.execute(
                "select token_id, vocab_id, if(mask, document_id, null) as document_id from src_tokens "
                "where token_id between ? and ? order by token_id",
                [first * length, (last + 1) * length - 1],
            ).to_arrow_table()
            columns = [table.column("vocab_id"), table.column("document_id").fill_null(-1)]
            rows = (column.to_numpy().astype(np.int64).reshape(-1, length) for column in columns)
            for found, each in zip((ids, owners), rows, strict=True):
                found.append(each[group - first])
        return cls(wanted, np.concatenate(ids), np.concatenate(owners))

    def n_ahead(self, rows: np.ndarray, places: np.ndarray, most: int) -> np.ndarray:
        """Return how many positions of its own document there are from each place on, 1 to `most`."""
        length, found = self.vocab_ids.shape[1], np.ones(len(rows), np.int64)
        goes_on = np.ones(len(rows), bool)
        for ahead in range(1, most):
            at = np.minimum(places + ahead, length - 1)
            goes_on &= (places + ahead < length) & (self.owners[rows, at] == self.owners[rows, places])
            found += goes_on
        return found

    def following(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the entry that follows each position in its document and sequence; -1 if none does."""
        at = np.minimum(positions + 1, self.vocab_ids.shape[1] - 1)
        follows = (at > positions) & (self.owners[rows, at] == self.owners[rows, positions])
        return np.where(follows, self.vocab_ids[rows, at], -1)


@dataclass(frozen=True)
class PartMeasurer:
    """Measures parts: what all of them need."""

    running: BranchPass
    sae: SparseAutoencoder
    effect: str
    """The name of the artefact."""
    change: FeatureChange
    levels: dict[int, FeatureLevels]
    length: int
    """Tokens of a sequence."""
    n_positions: int
    """The changed token's own position, and those after it."""
    top: int
    n_vocab: int

    def measure(self, connection: duckdb.DuckDBPyConnection, firings: pa.Table) -> pa.Table:
        """Return a row for each firing and position. `firings` are sorted by token."""
        token, feature, value = (firings.column(name).to_numpy() for name in ("token_id", "feature_id", "value"))
        numbers, rows = np.unique(token // self.length, return_inverse=True)
        places = token % self.length
        tokens = SequenceTokens.read(connection, numbers, self.length)
        lengths = tokens.n_ahead(rows, places, self.n_positions)
        set_to = self._new_values(feature, value)
        pair = np.repeat(np.arange(len(token)), lengths)
        ahead = np.arange(len(pair)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        following = tokens.following(rows[pair], places[pair] + ahead)
        every = self._branches(tokens, rows, places, lengths, feature, set_to - value.astype(np.float64))
        figures = self._figures(every, following)
        return _table(
            {
                "effect": np.full(len(pair), self.effect), "change": np.full(len(pair), str(self.change)),
                "feature_id": feature[pair], "token_id": token[pair], "ahead": ahead,
                "document_id": tokens.owners[rows[pair], places[pair]],
                "band": firings.column("band").to_numpy()[pair], "value": value[pair], "set_to": set_to[pair],
            },
            figures,
        )  # fmt: skip

    def _new_values(self, feature: np.ndarray, value: np.ndarray) -> np.ndarray:
        chosen, place = np.unique(feature, return_inverse=True)
        new = [self.change.new_value(self.levels[each]) for each in chosen.tolist()]
        fixed = np.array([np.nan if each is None else each for each in new], np.float64)[place]
        return np.where(np.isnan(fixed), value, fixed)

    def _branches(
        self, tokens: SequenceTokens, rows: np.ndarray, places: np.ndarray, lengths: np.ndarray, feature: np.ndarray,
        amounts: np.ndarray,
    ) -> Iterator[Branches]:  # fmt: skip
        starts = np.searchsorted(rows, np.arange(len(tokens.numbers) + 1))
        for row in range(len(tokens.numbers)):
            mine = slice(starts[row], starts[row + 1])
            directions = self.sae.W_dec.detach()[torch.from_numpy(feature[mine].astype(np.int64))].float().cpu()
            moves = torch.from_numpy(amounts[mine]).float()[:, None] * directions
            yield Branches(tokens.vocab_ids[row], places[mine], lengths[mine], moves)

    def _figures(self, every: Iterator[Branches], following: np.ndarray) -> list[Figures]:
        def work(item: tuple[list[Branches], np.ndarray]) -> Figures:
            batch, follow = item
            return compare(*self.running.logits(batch), follow, self.top, self.n_vocab)

        workers = model_threads(device_of(self.running.model), 0)
        return list(map_in_order(work, _with_following(self.running.batches(every), following), workers))


def _with_following(
    batches: Iterator[list[Branches]], following: np.ndarray
) -> Iterator[tuple[list[Branches], np.ndarray]]:
    start = 0
    for batch in batches:
        stop = start + sum(int(each.lengths.sum()) for each in batch)
        yield batch, following[start:stop]
        start = stop


def _table(columns: dict[str, np.ndarray], figures: Sequence[Figures]) -> pa.Table:
    arrays: dict[str, pa.Array] = {name: pa.array(column) for name, column in columns.items()}
    for name in ("loss", "loss_change", "kl"):
        parts = [getattr(each, name) for each in figures]
        arrays[name] = pa.array(np.concatenate(parts or [np.zeros(0)]), from_pandas=True)  # NaN is null
    for way in ("up", "down"):
        moved: list[Moved] = [getattr(each, way) for each in figures]
        for name, what in (("ids", "entries"), ("before", "before"), ("after", "after")):
            arrays[f"{way}_{name}"] = _lists([getattr(each, what) for each in moved], [each.counts for each in moved])
    schema = EFFECTS["effects"]
    return pa.table({field.name: arrays[field.name].cast(field.type) for field in schema}, schema=schema)


def _lists(values: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> pa.ListArray:
    """Return a list for each row: the first of its values, as many as counted."""
    if not values:
        return pa.array([], pa.list_(pa.float32()))
    every, n = np.concatenate(values), np.concatenate(counts)
    offsets = np.zeros(len(n) + 1, np.int32)
    np.cumsum(n, out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, every[np.arange(every.shape[1]) < n[:, None]])
