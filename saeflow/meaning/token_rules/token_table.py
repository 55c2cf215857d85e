"""The tokens of a run as arrays, and which of them a rule is chosen and tested on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import duckdb
import numpy as np
from numpy.typing import NDArray

from saeflow.meaning.token_rules.counting import sample_levels
from saeflow.meaning.token_rules.hashing import HELD_OUT, NOT_ENCODED, TRAINING, Sides
from saeflow.recipe.fingerprint import fingerprint
from saeflow.runtime.memory import require_share_of_memory
from saeflow.sae.kernels import Ids

BYTES_PER_TOKEN = 240
"""Memory that a token takes while rules are chosen: its columns, and one key for each kind of rule."""

_FIFTH = 5

TOKEN_TABLES = ("stg_tokens", "stg_documents", "stg_vocab", "stg_shape", "is_encoded")
"""Views and macros of `sql/` that `read_token_table` asks."""


@dataclass(frozen=True)
class TokenTable:
    """Columns (n,) by token_id. Padding and tokens of hidden documents have vocab_id and document -1, and side 0."""

    vocab_ids: Ids
    documents: Ids
    """Places in the list of documents, in the order of their keys."""
    places: Ids
    """Places in the document, from 0."""
    sides: Sides
    source_of: Ids
    """(n_documents,): places in `sources`."""
    sources: list[str]
    pieces: list[str]
    """The vocabulary as text."""
    context_length: int
    split: str
    """How tokens were held out, in words."""

    @cached_property
    def contexts(self) -> NDArray[np.int32]:
        """How many tokens before each one are of its document and its sequence."""
        positions = np.arange(len(self.vocab_ids)) % self.context_length
        return np.minimum(positions, self.places).astype(np.int32)

    @cached_property
    def levels(self) -> Sides:
        """The samples of training tokens: see `counting.sample_levels`."""
        return sample_levels(self.sides)

    @cached_property
    def order(self) -> Ids:
        """Every token: those of small samples first, those that are held out last."""
        return np.argsort(np.where(self.sides == HELD_OUT, 1, -self.levels.astype(np.int8)), kind="stable").astype(
            np.int32
        )

    def n_on(self, side: int) -> int:
        return int(np.count_nonzero(self.sides == side))


def read_token_table(connection: duckdb.DuckDBPyConnection) -> TokenTable:
    """Read the tokens of the connection's run. Raises UserError if they do not fit into memory."""
    [(n, length)] = connection.execute(
        "select coalesce((select max(token_id) from stg_tokens) + 1, 0), (select context_length from stg_shape)"
    ).fetchall()
    remedy = "Take a larger machine, or explain a run of a smaller corpus (corpus.share)."
    require_share_of_memory(n * BYTES_PER_TOKEN, f"Rules for {n:,} tokens take", remedy, n_quarters=3)
    documents = connection.execute(
        "select document_id, key, docs.source, held_out, first_token_id from stg_documents as docs "
        "where first_token_id is not null order by key, document_id"
    ).fetchnumpy()
    ids = np.ma.getdata(documents["document_id"]).astype(np.int64)
    names = [_text_or_empty(each) for each in documents["source"].tolist()]
    sources = sorted(set(names))
    code = {name: place for place, name in enumerate(sources)}
    vocab_ids, owners, counted = _read_columns(connection, n, ids)
    first = np.ma.getdata(documents["first_token_id"]).astype(np.int64)
    places = np.full(n, -1, np.int64)
    real = owners >= 0
    places[real] = np.flatnonzero(real) - first[owners[real]]
    held_out, split = _split(documents, owners, counted)
    sides = np.where(counted & real, np.where(held_out, HELD_OUT, TRAINING), NOT_ENCODED).astype(np.uint8)
    return TokenTable(
        vocab_ids, owners, places.astype(np.int32), sides, np.array([code[name] for name in names], np.int32), sources,
        _vocabulary_pieces(connection), max(1, int(length or 1)), split,
    )  # fmt: skip


def _text_or_empty(value: object) -> str:
    return "" if value is None else str(value)


def _read_columns(
    connection: duckdb.DuckDBPyConnection, n: int, document_ids: NDArray[np.int64]
) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    """Return the vocabulary id and the document's place of each token, and whether it was encoded."""
    vocab_ids, owners = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
    counted = np.zeros(n, np.bool_)
    order = np.argsort(document_ids)
    reader = connection.sql(
        "select token_id, vocab_id, document_id, is_encoded(token_id, vocab_id) as counted from stg_tokens "
        "where mask and document_id is not null"
    ).to_arrow_reader(1 << 20)
    for batch in reader:
        at, vocab, owner, counts = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
        vocab_ids[at] = vocab
        owners[at] = order[np.searchsorted(document_ids[order], owner)]
        counted[at] = counts.astype(np.bool_)
    return vocab_ids, owners, counted


def _vocabulary_pieces(connection: duckdb.DuckDBPyConnection) -> list[str]:
    rows = connection.execute("select vocab_id, piece from stg_vocab").fetchall()
    pieces = [""] * (1 + max((vocab_id for vocab_id, _ in rows), default=-1))
    for vocab_id, piece in rows:
        pieces[vocab_id] = _text_or_empty(piece)
    return pieces


def _split(
    documents: dict[str, NDArray[np.generic]], owners: Ids, counted: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], str]:
    """Return for each token whether it is held out, and in words how that was decided.

    The documents that the corpus holds out are taken, else a fifth of the documents by their keys, else a fifth of the
    tokens in stretches of 512.
    """
    own = np.ma.getdata(documents["held_out"]).astype(np.bool_)
    fifth = np.array([int(fingerprint({"held out": str(key)}), 16) % _FIFTH == 0 for key in documents["key"]], np.bool_)
    for chosen, name in ((own, "the corpus's held-out documents"), (fifth, "a fifth of the documents")):
        if len(chosen):
            held_out = chosen[owners] & (owners >= 0)
            if 0 < np.count_nonzero(held_out & counted) < np.count_nonzero(counted):
                return held_out, name
    return np.arange(len(owners)) // 512 % _FIFTH == _FIFTH - 1, "a fifth of the tokens"
