"""What stands at a token, looked up without SQL: its vocabulary id, and where its document begins.

DuckDB would read blocks of 512 ids for each token, and sort all documents for each question. The ids of a part lie in
`vocab_ids.npy`, which is mapped into memory: one token costs one read of four bytes, and processes share the pages. In
a bucket it costs one request, as do all tokens of its block.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from duckdb.func import FunctionNullHandling, PythonUDFType

from saeflow.corpus.token_parts import VOCAB_IDS, has_vocab_ids
from saeflow.query.files.far_ids import FarIds
from saeflow.query.files.looked_up import document_start_function, vocab_id_function
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation
from saeflow.store.storage.objects import REQUESTS_AT_ONCE

MOST_MAPPED = 4_096
"""Files that are mapped at the same time: Linux allows a process 65,530 maps."""


Found = tuple[np.ndarray, np.ndarray]
"""What is found for each token, and whether nothing is."""


class VocabIdFile(NamedTuple):
    """A file of vocabulary ids, and its part's tokens: those from `first` to `end` - 1."""

    first: int
    end: int
    path: str


def vocab_id_files(tokens: Artefact, generation: Generation) -> list[VocabIdFile] | None:
    """Return the files of all parts by their first token, or None if these questions need SQL.

    They do where a part of an earlier saeflow has no such file, and where a hidden document must look like padding.
    """
    length = int(tokens.record.facts.get("context_length", 1))
    if generation.hidden_ids:
        return None
    found = []
    for part in generation.parts:
        counts = part.counts
        if not has_vocab_ids(part) or "first_sequence" not in counts:
            return None
        first = counts["first_sequence"] * length
        path = tokens.storage.location(tokens.part_path(part) / VOCAB_IDS)
        found.append(VocabIdFile(first, first + counts["n_sequences"] * length, path))
    return sorted(found)


class Documents:
    """Documents with tokens, hidden ones too, by their first token."""

    def __init__(self, paths: Sequence[str], filesystem: Any = None) -> None:
        """`filesystem` is fsspec's that has the files; None for local ones."""
        self._paths, self._filesystem = paths, filesystem

    def places(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the place of the last document that begins at or before each token (n,), -1 if none does."""
        found: np.ndarray = np.searchsorted(self.starts, token_ids, "right") - 1
        return found

    def owners(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the place of each token's document (n,), -1 where it has none."""
        found = self.places(token_ids)
        inside = found >= 0
        inside[inside] = token_ids[inside] < self.ends[found[inside]]
        return np.where(inside, found, -1)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first token of each, int64 (n,)."""
        starts: np.ndarray = self.table["first_token_id"].to_numpy()
        return starts

    @cached_property
    def ends(self) -> np.ndarray:
        """The token after the last of each, int64 (n,)."""
        ends: np.ndarray = self.starts + self.table["n_tokens"].to_numpy()
        return ends

    def named(self, places: pa.Array) -> dict[str, pa.Array]:
        """Return the numbers, keys and sources (n,) of the documents at these places, null at null."""
        return {name: self.table[name].take(places).combine_chunks() for name in ("document_id", "key", "source")}

    @cached_property
    def table(self) -> pa.Table:
        """Their numbers, keys and sources."""
        columns = ["first_token_id", "n_tokens", "document_id", "key", "source"]
        table = pq.read_table(list(self._paths), columns=columns, filesystem=self._filesystem, partitioning=None)
        return table.filter(pc.is_valid(table["first_token_id"])).sort_by("first_token_id").combine_chunks()


class TokenIndex:
    """The lookups of one run, for one connection and its cursors."""

    def __init__(self, files: Sequence[VocabIdFile], documents: Documents, filesystem: Any = None) -> None:
        """`filesystem` is fsspec's that has the files; None for local ones, which are mapped into memory."""
        self.files, self.documents, self._filesystem = files, documents, filesystem
        self._firsts = np.array([file.first for file in files], np.int64)
        self._ends = np.array([file.end for file in files], np.int64)
        self._opened: Callable[[int], np.ndarray | FarIds] = lru_cache(MOST_MAPPED)(self._open)

    def register(self, connection: duckdb.DuckDBPyConnection, number: int) -> None:
        """Give the connection the functions of a token id that `looked_up` names for the run of this number."""
        arrow, null_too = PythonUDFType.ARROW, FunctionNullHandling.SPECIAL
        for name, look_up, result in (
            (vocab_id_function(number), self.vocab_ids, "integer"),
            (document_start_function(number), self.document_starts, "bigint"),
        ):
            connection.create_function(name, _of_arrow(look_up), ["bigint"], result, type=arrow, null_handling=null_too)

    def vocab_ids(self, token_ids: np.ndarray) -> Found:
        """Return the vocabulary ids int32 (n,) of tokens (n,) in any order, and True where there is no such token."""
        order = None if np.all(token_ids[1:] >= token_ids[:-1]) else np.argsort(token_ids)
        ascending = token_ids if order is None else token_ids[order]
        found, lacks = np.zeros(len(ascending), np.int32), np.ones(len(ascending), bool)
        near = self._near(ascending)
        starts, stops = (np.searchsorted(ascending, bounds[near]) for bounds in (self._firsts, self._ends))
        held = np.flatnonzero(starts < stops)

        def read(place: int, start: int, stop: int) -> None:
            found[start:stop] = self._opened(place)[ascending[start:stop] - self._firsts_as_list[place]]
            lacks[start:stop] = False

        with self._reading() as each:
            list(each(read, (held + near.start).tolist(), starts[held].tolist(), stops[held].tolist()))
        if order is None:
            return found, lacks
        back = np.argsort(order)
        return found[back], lacks[back]

    def _near(self, ascending: np.ndarray) -> slice:
        """Return the places of the files from that of the first token to that of the last."""
        if not len(ascending):
            return slice(0, 0)
        return slice(max(self._place_of(ascending[0]), 0), self._place_of(ascending[-1]) + 1)

    def _place_of(self, token_id: int) -> int:
        """Return the place of the last file that begins at or before a token, -1 if none does."""
        return bisect.bisect_right(self._firsts_as_list, token_id) - 1

    def vocab_ids_of_span(self, first: int, last: int) -> np.ndarray:
        """Return the vocabulary ids int32 of consecutive tokens, both ends included."""
        place = self._place_of(first)
        opened = self._opened(place) if place >= 0 and last < self._ends[place] else None
        if isinstance(opened, np.ndarray):
            return opened[first - self._firsts[place] : last + 1 - self._firsts[place]]
        return self.vocab_ids(np.arange(first, last + 1))[0]

    @cached_property
    def _firsts_as_list(self) -> list[int]:
        return [file.first for file in self.files]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Callable[..., Iterable[None]]]:
        """Give what reads several files: one after the other, but in a bucket at once."""
        if self._filesystem is None:
            yield map
            return
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            yield pool.map

    def read_ahead(self, token_ids: Sequence[int]) -> None:
        """Read what these tokens need in a bucket, before each of them is asked for alone."""
        if self._filesystem is not None:
            self.vocab_ids(np.array(token_ids, np.int64))

    def document_starts(self, token_ids: np.ndarray) -> Found:
        """Return the first token int64 (n,) of the last document that begins at or before each token (n,).

        True where there is none.
        """
        starts, places = self.documents.starts, self.documents.places(token_ids)
        return starts[np.maximum(places, 0)] if len(starts) else np.zeros_like(token_ids), places < 0

    def _open(self, place: int) -> np.ndarray | FarIds:
        file = self.files[place]
        if self._filesystem is not None:
            return FarIds(self._filesystem, file.path, file.end - file.first)
        ids = np.asarray(np.load(file.path, mmap_mode="r", allow_pickle=False))  # each look at a memmap makes an object
        if ids.dtype != np.dtype("<i4") or ids.shape != (file.end - file.first,):
            raise ValueError(f"{file.path} does not hold the vocabulary ids of {file.end - file.first} tokens")
        return ids


def _of_arrow(look_up: Callable[[np.ndarray], Found]) -> Callable[[pa.ChunkedArray], pa.Array]:
    def of_arrow(token_ids: pa.ChunkedArray) -> pa.Array:
        found, lacks = look_up(pc.fill_null(token_ids, -1).to_numpy())
        return pa.array(found, mask=lacks if lacks.any() else None)

    return of_arrow
