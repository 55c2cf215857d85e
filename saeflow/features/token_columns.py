"""Vocabulary entry, source of the document and position of each token of a part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from saeflow.corpus.selection import TokenSelection
from saeflow.features.schema import MOST_SOURCES

TokenSource = tuple[str | None, bool]
"""Name of a source, and True if it stands for all sources that have no row of their own."""

REST_OF_SOURCES: TokenSource = (None, True)


@dataclass(frozen=True)
class TokenColumns:
    """Columns (n,) of the tokens of one part, from `first_token` on."""

    first_token: int
    mask: np.ndarray
    """True for tokens that are encoded."""
    vocab_ids: np.ndarray
    source_codes: np.ndarray
    """int32: places in `sources`."""
    bands: np.ndarray
    """int32: `bands_of` the positions."""
    sources: list[TokenSource]

    def of(self, token_ids: np.ndarray) -> TokenColumns:
        """Return the columns of some tokens."""
        at = token_ids - self.first_token
        columns = (self.mask[at], self.vocab_ids[at], self.source_codes[at], self.bands[at])
        return TokenColumns(self.first_token, *columns, self.sources)


def read_token_columns(selection: TokenSelection, index: int) -> TokenColumns:
    """Read the tokens of one part; sources beyond the MOST_SOURCES with most encoded tokens count as one."""
    part = selection.parts[index]
    tokens = pq.read_table(selection.source.part_file(part, "tokens.parquet"), columns=["vocab_id", "document_id"])
    mask = selection.mask(index).reshape(-1)
    codes, sources = _source_codes(selection, index, tokens.column("document_id").fill_null(-1).to_numpy(), mask)
    bands = np.tile(bands_of(np.arange(selection.length)), part.counts["n_sequences"])
    first = part.counts["first_sequence"] * selection.length
    return TokenColumns(first, mask, tokens.column("vocab_id").to_numpy(), codes, bands, sources)


def bands_of(positions: np.ndarray) -> np.ndarray:
    """Return int32 bands: 0 for position 0, and b for the positions from 2^(b - 1) to 2^b - 1."""
    return np.frexp(positions.astype(np.float64))[1].astype(np.int32)


def _source_codes(
    selection: TokenSelection, index: int, owners: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, list[TokenSource]]:
    """Return codes int32 (n,) of all tokens, and the sources they stand for, by encoded tokens, then by name."""
    table = pq.read_table(
        selection.source.part_file(selection.parts[index], "documents.parquet"), columns=["document_id", "source"]
    )
    names = table.column("source").to_pylist()
    every = sorted(set(names), key=lambda name: (name is None, name or ""))
    number = {name: i for i, name in enumerate(every)}
    ids = table.column("document_id").to_numpy()
    of_document = np.array([number[name] for name in names], np.int64)
    order = np.argsort(ids)
    place = np.searchsorted(ids[order], owners[mask]) if len(ids) else np.empty(0, np.int64)
    found = of_document[order][place]
    counts = np.bincount(found, minlength=len(every))
    kept = np.argsort(-counts, kind="stable")[:MOST_SOURCES]
    code = np.full(len(every), len(kept), np.int32)
    code[kept] = np.arange(len(kept))
    codes = np.zeros(len(owners), np.int32)
    codes[mask] = code[found]
    sources: list[TokenSource] = [(every[i], False) for i in kept]
    return codes, [*sources, REST_OF_SOURCES]
