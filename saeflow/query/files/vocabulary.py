"""The entries of a vocabulary, as answers show them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.query.files.letters import LONGEST, as_text, short_bytes


class VocabEntry(NamedTuple):
    """An entry of the vocabulary."""

    piece: str | None
    content: bytes
    text: str | None
    """The content, if it is text: then it neither ends a letter of another token nor leaves one open."""


class Vocabulary:
    """What `stg_vocab` says of an entry. An entry that is not there has no piece and no bytes."""

    def __init__(self, paths: Sequence[str], filesystem: Any = None) -> None:
        """`filesystem` is fsspec's that has the files; None for local ones."""
        self._paths, self._filesystem = paths, filesystem
        self._entries: dict[int, VocabEntry] = {}

    def entry(self, vocab_id: int) -> VocabEntry:
        return self._entries.get(vocab_id) or self._made(vocab_id)

    def pieces(self, vocab_ids: np.ndarray) -> pa.Array:
        """Return the names of entries (n,), null where there is none."""
        return self._pieces.take(self._rows(vocab_ids))

    def _made(self, vocab_id: int) -> VocabEntry:
        rows = self._rows(np.array([vocab_id]))
        row, piece = rows[0].as_py(), self._pieces.take(rows)[0].as_py()
        content = short_bytes(b"" if row is None else self._table["bytes"][row].as_py() or b"")
        self._entries[vocab_id] = made = VocabEntry(piece, content, as_text(content))
        return made

    def _rows(self, vocab_ids: np.ndarray) -> pa.Array:
        """Return the row of each entry (n,), null where there is none."""
        ascending, rows = self._order
        if not len(ascending):
            return pa.nulls(len(vocab_ids), pa.int64())
        places = vocab_ids if self._is_gapless else np.searchsorted(ascending, vocab_ids)
        places = places.clip(0, len(ascending) - 1)
        return pa.array(rows[places], mask=ascending[places] != vocab_ids)

    @cached_property
    def _table(self) -> pa.Table:
        columns = ["vocab_id", "piece", "bytes"]
        table = pq.read_table(list(self._paths), columns=columns, filesystem=self._filesystem, partitioning=None)
        return table.combine_chunks()

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of all entries in ascending order, and the row of each."""
        vocab_ids = self._table["vocab_id"].to_numpy()
        rows = np.argsort(vocab_ids)
        return vocab_ids[rows], rows

    @cached_property
    def _is_gapless(self) -> bool:
        """True if the numbers are 0, 1, 2, …, so that an entry's number is its place."""
        return np.array_equal(self._order[0], np.arange(self._table.num_rows))

    @cached_property
    def _pieces(self) -> pa.Array:
        """Pieces, a very long one cut as `short_text.sql` cuts it."""
        pieces = self._table["piece"].cast(pa.string())
        shortened = pc.binary_join_element_wise(pc.utf8_slice_codeunits(pieces, 0, LONGEST), "…", "")
        made = pc.if_else(pc.less_equal(pc.binary_length(pieces), LONGEST), pieces, shortened)
        return pa.concat_arrays([*made.chunks, pa.array([], pa.string())])
