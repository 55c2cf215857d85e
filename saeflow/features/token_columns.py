"""What is said of tokens beside their activations: vocabulary entry, source of the document, position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from saeflow.corpus.selection import TokenSelection
from saeflow.features.schema import MOST_SOURCES

Source = tuple[str | None, bool]
"""Its name, and whether it stands for all sources that have no row of their own."""

REST: Source = (None, True)


@dataclass(frozen=True)
class TokenFacts:
    """Of the tokens of one part, from `first_token` on: mask, vocab_id, number of the source, position band (n,)
    each."""

    first_token: int
    mask: np.ndarray
    vocab_ids: np.ndarray
    source_codes: np.ndarray
    bands: np.ndarray
    sources: list[Source]
    """By code."""

    def of(self, token_ids: np.ndarray) -> TokenFacts:
        """Those of some tokens."""
        at = token_ids - self.first_token
        each = (self.mask[at], self.vocab_ids[at], self.source_codes[at], self.bands[at])
        return TokenFacts(self.first_token, *each, self.sources)


def facts_of(used: TokenSelection, index: int) -> TokenFacts:
    """The tokens of one part; sources beyond the MOST_SOURCES with most used tokens are one."""
    part = used.parts[index]
    tokens = pq.read_table(used.source.part_file(part, "tokens.parquet"), columns=["vocab_id", "document_id"])
    mask = used.mask(index).reshape(-1)
    codes, sources = _sources(used, index, tokens.column("document_id").fill_null(-1).to_numpy(), mask)
    bands = np.tile(bands_of(np.arange(used.length)), part.counts["n_sequences"])
    first = part.counts["first_sequence"] * used.length
    return TokenFacts(first, mask, tokens.column("vocab_id").to_numpy(), codes, bands, sources)


def bands_of(positions: np.ndarray) -> np.ndarray:
    """int32: 0 of position 0, and b of the positions from 2^(b - 1) to 2^b - 1."""
    return np.frexp(positions.astype(np.float64))[1].astype(np.int32)


def _sources(used: TokenSelection, index: int, owners: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, list[Source]]:
    """Codes int32 (n,) of every token, and what they stand for: by number of used tokens, then by name."""
    table = pq.read_table(
        used.source.part_file(used.parts[index], "documents.parquet"), columns=["document_id", "source"]
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
    sources: list[Source] = [(every[i], False) for i in kept]
    return codes, [*sources, REST]
