"""Characters of documents become tokens: a span covers each token that stands for at least one of its characters.

A token part is read once. Spans are looked up by bisection, so a part costs its tokens and, for each span, a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saeflow.classes.membership import Ints
from saeflow.classes.places import Unmatched
from saeflow.corpus.token_parts import has_marks
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact

_TOKENS_AT_ONCE = 4_000_000
"""Tokens looked at one by one, at once."""


@dataclass(frozen=True)
class Marks:
    """The tokens of a part that stand for characters, in the order of their numbers; each document in one stretch."""

    token_id: Ints
    document_id: Ints
    char_start: Ints
    char_end: Ints


def require_characters(tokens: Artefact) -> None:
    """Raises UserError, with the way to get them, if the tokens do not know their characters."""
    parts = tokens.published().parts
    if not all(map(has_marks, parts)):
        raise UserError(
            f"Some of {tokens.id} have no characters: an earlier saeflow wrote them. `start` and `end` mean nothing.\n"
            "Write the tokens anew, `saeflow run RECIPE --set name=NEW`, or name places by token_id or whole documents."
        )
    if not any(part.counts.get("n_offsets", 0) for part in parts):
        raise UserError(
            f"{tokens.id} have no characters: their tokenizer is written in Python, or the corpus was given as ids of "
            "tokens. `start` and `end` mean nothing.\nName places by token_id, or name whole documents."
        )


def find_characters(
    connection: duckdb.DuckDBPyConnection, tokens: Artefact, unmatched: Unmatched, progress: Progress
) -> None:
    """Turn the rows of `annotate_characters` into rows of `annotate_found`, and count those that give no token."""
    n_left = connection.execute("select count(*) from annotate_characters").fetchall()[0][0]
    if n_left == 0:
        return
    with progress.bar("annotate", n_left, "spans") as bar:
        for part in tokens.published().parts:
            marks = read_marks(tokens.part_file(part, "tokens.parquet"))
            if not len(marks.token_id):
                continue
            sql = "from annotate_characters where document_id between ? and ?"
            ends = [int(marks.document_id.min()), int(marks.document_id.max())]
            rows: pa.Table = connection.sql(sql, params=ends).to_arrow_table()
            _insert(connection, rows, marks, unmatched)
            n_left -= len(rows)
            bar.advance(len(rows))
    unmatched.n_between += n_left  # their documents have special tokens alone


def read_marks(path: Path) -> Marks:
    """Return the tokens of a file that stand for characters."""
    table = pq.read_table(path, columns=["token_id", "document_id", "mask", "char_start", "char_end"])
    table = table.filter(pc.and_(table.column("mask"), pc.is_valid(table.column("char_start"))))
    return Marks(*(_whole_numbers(table, name) for name in ("token_id", "document_id", "char_start", "char_end")))


def _whole_numbers(table: pa.Table, name: str) -> Ints:
    return np.asarray(table.column(name), np.int64)


def _insert(connection: duckdb.DuckDBPyConnection, rows: pa.Table, marks: Marks, unmatched: Unmatched) -> None:
    class_id, document_id, first_char, end_char = (_whole_numbers(rows, name) for name in rows.column_names)
    found = lookup(marks, document_id, first_char, end_char)
    unmatched.n_outside += found.n_outside
    unmatched.n_between += len(rows) - found.n_outside - found.n_matched
    unmatched.n_cut += found.n_cut
    spans = pa.table(
        {"class_id": class_id[found.row], "document_id": document_id[found.row],
         "first_token_id": found.first, "last_token_id": found.last}
    )  # fmt: skip
    connection.register("annotate_batch", spans)
    connection.execute("insert into annotate_found from annotate_batch")
    connection.unregister("annotate_batch")


@dataclass(frozen=True)
class Lookup:
    """Unbroken spans of tokens, and the row that gave each. A row may give several, in its own order, or none."""

    row: Ints
    first: Ints
    last: Ints
    n_matched: int
    """Rows that gave at least one."""
    n_outside: int
    """Rows whose characters all lie behind the last one that a token stands for, or before the first character."""
    n_cut: int
    """Matched rows that reach beyond that last character, or begin before the first."""


def lookup(marks: Marks, document_id: Ints, first_char: Ints, end_char: Ints) -> Lookup:
    """Find the tokens of spans of characters: those with a character from `first_char` to `end_char` - 1.

    The result is exact for tokenizers whose offsets jump back, too, and a token without characters breaks a span. Spans
    with such a token inside are looked at token by token, all others by two bisections.
    """
    places = _Places.of(marks)
    rank = places.rank_of(document_id)
    low, high, end_of_text = places.bounds(rank, first_char, end_char)
    known = rank >= 0
    hit = known & (low <= high)
    outside = known & ~hit & ((first_char >= end_of_text) | (end_char <= 0))
    plain = hit & (places.n_odd[high] == places.n_odd[low]) & ~places.is_jump[low]
    rows = np.flatnonzero(plain)
    row, first, last = [rows], [marks.token_id[low[rows]]], [marks.token_id[high[rows]]]
    for chosen in _cut_rows(np.flatnonzero(hit & ~plain), (high - low + 1)):
        for each, found in zip(
            (row, first, last), _one_by_one(marks, chosen, low, high, first_char, end_char), strict=True
        ):
            each.append(found)
    every = np.concatenate(row)
    matched = np.zeros(len(document_id), bool)
    matched[every] = True
    cut = matched & ((end_char > end_of_text) | (first_char < 0))
    return Lookup(
        every, np.concatenate(first), np.concatenate(last), int(matched.sum()), int(outside.sum()), int(cut.sum())
    )


@dataclass(frozen=True)
class _Places:
    """The tokens of a part as numbers that grow: the rank of the document times the width, plus a character."""

    documents: Ints
    """Documents in ascending order."""
    ranks: Ints
    """The rank of each of these: which one it is by its tokens."""
    width: int
    reached: Ints
    """By token, the furthest end of a character of its document so far."""
    begun: Ints
    """By token, the nearest start of a character of its document from there on."""
    last_of: Ints
    """By rank, the place of the document's last token."""
    n_odd: Ints
    """By token, how many steps from one token to the next, up to this one, break a span or jump back."""
    is_jump: NDArray[np.bool_]
    """By token: true if its own offsets are not the furthest and the nearest."""

    @classmethod
    def of(cls, marks: Marks) -> _Places:
        begins = np.flatnonzero(np.diff(marks.document_id, prepend=marks.document_id[:1] - 1))
        rank = np.zeros(len(marks.document_id), np.int64)
        rank[begins[1:]] = 1
        rank = np.cumsum(rank)
        width = int(marks.char_end.max()) + 2
        ends, starts = rank * width + marks.char_end, rank * width + marks.char_start
        reached, begun = np.maximum.accumulate(ends), np.minimum.accumulate(starts[::-1])[::-1]
        jump = (reached != ends) | (begun != starts)
        step = np.diff(marks.token_id, prepend=marks.token_id[:1] - 1) != 1
        order = np.argsort(marks.document_id[begins])
        return cls(
            marks.document_id[begins][order], order, width, reached, begun,
            np.append(begins[1:], len(rank)) - 1, np.cumsum(step | jump), jump,
        )  # fmt: skip

    def rank_of(self, document_id: Ints) -> Ints:
        """Return the rank of each document; -1 if the part does not hold it."""
        place = np.minimum(np.searchsorted(self.documents, document_id), len(self.documents) - 1)
        return np.where(self.documents[place] == document_id, self.ranks[place], -1)

    def bounds(self, rank: Ints, first_char: Ints, end_char: Ints) -> tuple[Ints, Ints, Ints]:
        """Return the first and last token that may have a character of each span (0 and -1 if none has), and where
        each text ends.
        """
        known = np.maximum(rank, 0)
        base = known * self.width
        first_char, end_char = (np.clip(each, -1, self.width - 1) for each in (first_char, end_char))
        low = np.searchsorted(self.reached, base + first_char, side="right")
        high = np.searchsorted(self.begun, base + end_char, side="left") - 1
        high = np.where(rank >= 0, high, -1)
        end_of_text = self.reached[self.last_of[known]] - base
        some = low <= high
        return np.where(some, low, 0), np.where(some, high, -1), end_of_text


def _cut_rows(rows: Ints, sizes: Ints) -> Iterator[Ints]:
    """Cut rows into runs with about `_TOKENS_AT_ONCE` tokens each."""
    if len(rows):
        total = np.cumsum(sizes[rows])
        yield from np.split(rows, np.flatnonzero(np.diff(total // _TOKENS_AT_ONCE)) + 1)


def _one_by_one(
    marks: Marks, rows: Ints, low: Ints, high: Ints, first_char: Ints, end_char: Ints
) -> tuple[Ints, Ints, Ints]:
    """Look at every token from `low` to `high` of some rows. Return the row, first and last token of each span."""
    n = high[rows] - low[rows] + 1
    row = np.repeat(rows, n)
    token = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + np.repeat(low[rows], n)
    covers = (marks.char_start[token] < end_char[row]) & (marks.char_end[token] > first_char[row])
    row, token_id = row[covers], marks.token_id[token[covers]]
    begins = np.ones(len(row), bool)
    begins[1:] = (np.diff(row) != 0) | (np.diff(token_id) != 1)
    ends = np.append(begins[1:], True) if len(row) else begins
    return row[begins], token_id[begins], token_id[ends]
