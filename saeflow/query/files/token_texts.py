"""The text around a token, put together without SQL.

Answers are those of `sql/staging/token_texts.sql` and `token_surroundings.sql`, which DuckDB plans for twenty
milliseconds: as long as it takes to find the tokens of a feature among billions of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType

from saeflow.query.files.letters import letter_rest, lossy_text, open_letter
from saeflow.query.files.looked_up import pieces_around_function, place_function, text_around_function
from saeflow.query.files.token_index import TokenIndex
from saeflow.query.files.vocabulary import VocabEntry, Vocabulary

MOST_TOKENS = 1 << 40
"""Tokens on one side of a token: as in `token_spans.sql`."""

LETTER_TOKENS = 3
"""A letter has at most four bytes, so a token's own may begin, or end, so many tokens away."""

LookUp = Callable[[int, int, int], "dict[str, object] | None"]
"""What is said of a token, given how many tokens before and after it are shown."""

_OTHER_MARKS = str.maketrans("«»", "‹›")

TEXT = pa.struct(
    {"piece": pa.string(), "text_before": pa.string(), "token_text": pa.string(), "text_after": pa.string(),
     "context": pa.string(), "key": pa.string(), "source": pa.string(),
     "position": pa.int64()}
)  # fmt: skip
PLACE = pa.struct(
    {"vocab_id": pa.int32(), "piece": pa.string(), "document_id": pa.int64(), "key": pa.string(), "source": pa.string(),
     "position": pa.int64()}
)  # fmt: skip
PIECES = pa.struct(
    {"first_near_id": pa.int64(), "pieces": pa.list_(pa.string()), "key": pa.string(), "source": pa.string(),
     "position": pa.int64()}
)  # fmt: skip


class TokenTexts:
    """Texts around tokens of one run, for one connection and its cursors."""

    def __init__(self, index: TokenIndex, vocabulary: Vocabulary, length: int | None) -> None:
        """`length` is the number of tokens in a sequence, None if that is not known."""
        self._index, self._documents, self._vocabulary, self._length = index, index.documents, vocabulary, length

    def register(self, connection: duckdb.DuckDBPyConnection, number: int) -> None:
        """Give the connection the functions that `looked_up` names for the run of this number.

        All take a token id, and two of them the numbers of tokens before and after it. They are null at a token of no
        document.
        """
        arrow, null_too = PythonUDFType.ARROW, FunctionNullHandling.SPECIAL
        place, sql_type = place_function(number), _sql_type(PLACE)
        connection.create_function(place, self.places, ["bigint"], sql_type, type=arrow, null_handling=null_too)
        for name, look_up, result in (
            (text_around_function(number), self.text_around, TEXT),
            (pieces_around_function(number), self.pieces_around, PIECES),
        ):
            of_arrow, sql_type = _of_rows(look_up, result, self._index.read_ahead), _sql_type(result)
            connection.create_function(name, of_arrow, ["bigint"] * 3, sql_type, type=arrow, null_handling=null_too)

    def places(self, token_ids: pa.ChunkedArray) -> pa.Array:
        """Return what `token_places` says of tokens (n,)."""
        ids = pc.fill_null(token_ids, -1).to_numpy()
        owners = self._documents.owners(ids)
        vocab_ids, lacks = self._index.vocab_ids(ids)
        inside = (owners >= 0) & ~lacks
        length = self._length
        columns = {
            "vocab_id": pa.array(vocab_ids, pa.int32()),
            "piece": self._vocabulary.pieces(vocab_ids),
            **self._documents.named(pa.array(owners, mask=~inside)),
            "position": pa.array(ids % length) if length else pa.nulls(len(ids), pa.int64()),
        }
        arrays = [array.cast(PLACE.field(name).type) for name, array in columns.items()]
        return pa.StructArray.from_arrays(arrays, fields=list(PLACE), mask=pa.array(~inside))

    def text_around(self, token_id: int, before: int, after: int) -> dict[str, object] | None:
        """Return what `token_texts` says of a token."""
        place = int(self._documents.owners(np.array([token_id]))[0])
        if place < 0:
            return None
        n_before, n_after = (max(before, LETTER_TOKENS), max(after, LETTER_TOKENS))
        first, entries = self._span(place, token_id, n_before, n_after)
        here = token_id - first
        texts = _parts_of_text(entries, here, max(here - before, 0), min(here + 1 + after, len(entries)))
        shown = [text.translate(_OTHER_MARKS) for text in texts]
        return {
            "piece": entries[here].piece,
            "text_before": texts[0],
            "token_text": texts[1],
            "text_after": texts[2],
            "context": f"{shown[0]}«{shown[1]}»{shown[2]}",
            **self._place_of(place, token_id),
        }

    def pieces_around(self, token_id: int, before: int, after: int) -> dict[str, object] | None:
        """Return the pieces of `token_surroundings`, and the token of the first of them."""
        place = int(self._documents.owners(np.array([token_id]))[0])
        if place < 0:
            return None
        first, entries = self._span(place, token_id, before, after)
        return {"first_near_id": first, "pieces": _pieces(entries), **self._place_of(place, token_id)}

    def _place_of(self, place: int, token_id: int) -> dict[str, object]:
        table, length = self._documents.table, self._length
        key, source = (table[name][place].as_py() for name in ("key", "source"))
        return {"key": key, "source": source, "position": token_id % length if length else None}

    def _span(self, place: int, token_id: int, before: int, after: int) -> tuple[int, list[VocabEntry]]:
        """Return the first token of a span inside a document, and the entries of all its tokens."""
        first = max(int(self._documents.starts[place]), token_id - before)
        last = min(int(self._documents.ends[place]) - 1, token_id + after)
        entry = self._vocabulary.entry
        return first, [entry(vocab_id) for vocab_id in self._index.vocab_ids_of_span(first, last).tolist()]


def _parts_of_text(entries: Sequence[VocabEntry], here: int, first: int, end: int) -> tuple[str, str, str]:
    """Return the texts before, at and after a token. The span has more tokens than are shown, to finish letters."""
    near = [entry.text for entry in entries[first:end]]
    whole = [entry.text is not None for entry in entries]
    if all(whole):
        return "".join(near[: here - first]), str(near[here - first]), "".join(near[here - first + 1 :])  # type: ignore[arg-type]
    in_front = b"".join(entry.content for entry in entries[:here])
    middle = entries[here].content
    behind = b"".join(entry.content for entry in entries[here + 1 :])
    n_in_front, n_behind = (
        sum(len(e.content) for e in part) for part in (entries[first:here], entries[here + 1 : end])
    )
    lead = open_letter(in_front) if letter_rest(middle) else b""
    rest = letter_rest(behind) if open_letter(lead + middle) else b""
    before = in_front[: len(in_front) - len(lead)]
    before = before[len(before) - max(n_in_front - len(lead), 0) :] if n_in_front > len(lead) else b""
    after = behind[len(rest) :][: max(n_behind - len(rest), 0)]
    after = after[: len(after) - len(open_letter(after))]
    return lossy_text(before[len(letter_rest(before)) :]), lossy_text(lead + middle + rest), lossy_text(after)


def _pieces(entries: Sequence[VocabEntry]) -> list[str]:
    """Return each token's text. A letter whose bytes several tokens share belongs to the one that begins it."""
    texts = [entry.text for entry in entries]
    if None not in texts:
        return texts  # type: ignore[return-value]
    return [lossy_text(piece) for piece in _finished(entries)]


def _finished(entries: Sequence[VocabEntry]) -> Iterator[bytes]:
    for place, (_, content, text) in enumerate(entries):
        if text is not None:
            yield content
            continue
        in_front, behind = (
            b"".join(entry.content for entry in near)
            for near in (entries[max(place - LETTER_TOKENS, 0) : place], entries[place + 1 : place + 1 + LETTER_TOKENS])
        )
        at_edge = place < LETTER_TOKENS and all(0x80 <= byte <= 0xBF for byte in in_front)
        own = content[len(letter_rest(content)) :] if at_edge or open_letter(in_front) else content
        own += letter_rest(behind) if open_letter(content) else b""
        yield own[: len(own) - len(open_letter(own))]


def _of_rows(
    look_up: LookUp, result: pa.StructType, read_ahead: Callable[[Sequence[int]], None]
) -> Callable[..., pa.Array]:
    """Return a function of DuckDB's columns. Nulls count as no tokens; a null token has no answer."""

    def of_rows(token_ids: pa.ChunkedArray, before: pa.ChunkedArray, after: pa.ChunkedArray) -> pa.Array:
        read_ahead(token_ids.drop_null().to_pylist())
        rows = zip(token_ids.to_pylist(), before.to_pylist(), after.to_pylist(), strict=True)
        found = [None if row[0] is None else look_up(row[0], *map(_at_most, row[1:])) for row in rows]
        return pa.array(found, result)

    return of_rows


def _at_most(n_tokens: int | None) -> int:
    return min(max(n_tokens or 0, 0), MOST_TOKENS)


def _sql_type(result: pa.StructType) -> str:
    names = {pa.string(): "varchar", pa.int64(): "bigint", pa.int32(): "integer", pa.list_(pa.string()): "varchar[]"}
    return f"struct({', '.join(f'{field.name} {names[field.type]}' for field in result)})"
