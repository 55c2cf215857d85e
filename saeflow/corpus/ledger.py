"""Which documents a token artefact holds, and so which of a corpus are new, changed, the same or forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import dataset

from saeflow.corpus.document import Document, is_held_out
from saeflow.corpus.document_index import (
    FILES_AT_ONCE,
    DocumentHashes,
    content_numbers,
    key_hash,
    key_numbers,
    stored_hashes,
)
from saeflow.corpus.forgotten import NOTHING, ForgottenHashes
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, Hidden, PartRecord

Verdict = Literal["new", "changed", "same", "forgotten"]
_SPLIT_COLUMNS = pa.schema([("document_id", pa.int64()), ("key", pa.string()), ("held_out", pa.bool_())])
HiddenByPart = Mapping[int, tuple[Hidden, ...]]


@dataclass(frozen=True)
class Entry:
    """A document as it is stored: under a key that no other document has, and on its side of the split."""

    document: Document
    key: str
    held_out: bool


@dataclass
class Ledger:
    """Hashes of the keys and contents of the documents that readers see, sorted by key: 33 bytes per document."""

    keys: np.ndarray
    contents: np.ndarray
    document_ids: np.ndarray
    rests: np.ndarray
    """The second half of each content's hash, which may stand for what lies beside the content."""
    forgotten: ForgottenHashes = NOTHING
    kept: frozenset[str] = frozenset()
    """Hashes of forgotten keys that are stored all the same, hidden: a lost part is made again with them."""
    changed: list[Hidden] = field(default_factory=list)
    n_by_verdict: Counter[Verdict] = field(default_factory=Counter)
    n_repeated: int = 0

    def __post_init__(self) -> None:
        self.is_met = np.zeros(len(self.keys), bool)
        self._replaced_contents: set[int] = set()
        self._left_out: set[int] = set()

    @classmethod
    def read(
        cls, target: Artefact, generation: Generation,
        forgotten: ForgottenHashes = NOTHING, kept: Iterable[str] = (),
    ) -> Ledger:  # fmt: skip
        """Read the documents of the generation's parts. `forgotten` is what the store has forgotten."""
        shown = stored_hashes(target, generation.parts).without(np.array(generation.hidden_ids, np.int64))
        every_hidden = (document for documents in generation.hidden.values() for document in documents)
        here = frozenset((each.key_hash, "") for each in every_hidden if each.reason == "forgotten")
        known = ForgottenHashes(forgotten.pairs | here)
        return cls._of(shown, known, frozenset(kept))

    @classmethod
    def of(cls, held: Sequence[tuple[str, str]]) -> Ledger:
        """Make a ledger of documents given by key and content hash, numbered in this order."""
        first, rests = content_numbers(content for _, content in held)
        keys = key_numbers(key for key, _ in held)
        return cls._of(DocumentHashes.sorted([keys, first, np.arange(len(held)), rests]))

    @classmethod
    def _of(
        cls, shown: DocumentHashes, forgotten: ForgottenHashes = NOTHING, kept: frozenset[str] = frozenset()
    ) -> Ledger:
        return cls(shown.keys, shown.contents, shown.document_ids, shown.rests, forgotten, kept)

    def look_up(self, key: str, content_hash: str) -> Verdict:
        """Compare a document with the stored one of its key. A changed document is noted as one to replace."""
        hashed = key_hash(key)
        place = _index_of(self.keys, hashed)
        if place is not None:
            self.is_met[place] = True
        if self._is_forgotten(hashed, content_hash):
            return "forgotten"
        if place is None:
            return "new"
        if (self.contents[place], self.rests[place]) == (_content_number(content_hash), _rest_number(content_hash)):
            return "same"
        self._replaced_contents.add(int(self.contents[place]))
        self.changed.append(Hidden(document_id=int(self.document_ids[place]), key_hash=hashed, reason="replaced"))
        return "changed"

    def _is_forgotten(self, key_hash: str, content_hash: str) -> bool:
        if key_hash in self.kept:
            return False
        return key_hash in self.forgotten.keys or content_hash[:16] in self.forgotten.contents

    def to_forget(self) -> list[Hidden]:
        """Return documents that readers still see, though the store has forgotten them."""
        keys, contents = (_hash_numbers(sorted(each)) for each in (self.forgotten.keys, self.forgotten.contents))
        places = np.flatnonzero(np.isin(self.keys, keys) | np.isin(self.contents, contents))
        return [
            Hidden(document_id=int(self.document_ids[i]), key_hash=f"{int(self.keys[i]):016x}", reason="forgotten")
            for i in places.tolist()
        ]

    def entries_to_store(self, documents: Iterable[Document], about: CorpusConfig) -> Iterator[Entry]:
        """Yield the documents that are new or changed, each under a key of its own."""
        times: Counter[str] = Counter()
        for document in documents:
            if not about.sql and document.key not in times:
                times.clear()  # equal keys of files follow one another
            key = self._own_key(document, times)
            self.n_repeated += key != document.key
            verdict = self.look_up(key, document.content_hash)
            if verdict == "new" and about.dedup and self._holds_content(document.content_hash):
                verdict = "same"
                self._left_out.add(_content_number(document.content_hash))
            self.n_by_verdict[verdict] += 1
            if verdict in ("new", "changed"):
                yield Entry(document, key, is_held_out(document.key, about.seed, about.held_out))

    @property
    def is_complete(self) -> bool:
        """False if a text was left out as a repetition of a document that has another text now.

        The corpus must then be read again once this version is published.
        """
        return self._left_out.isdisjoint(self._replaced_contents)

    def _own_key(self, document: Document, times: Counter[str]) -> str:
        """Return the document's key, with eight digits of the content if it came before. A stored one keeps its key."""
        key, by_content = document.key, f"{document.key}#{document.content_hash[:8]}"
        free, n = not times[key], times[by_content] + 1
        nth = by_content if n == 1 else f"{by_content} ({n})"
        mine = free and self._holds_as(key, document.content_hash)
        if not mine and (self._is_known(nth) or (not free and key_hash(key) not in self.forgotten.keys)):
            times[by_content], times[key] = n, times[key]
            return nth
        times[key] += 1
        return key

    def mark_met(self, document: Document) -> None:
        """Mark a document as met if it is stored with this content, under its own key or with digits added to it."""
        for key in (document.key, f"{document.key}#{document.content_hash[:8]}"):
            if self._holds_as(key, document.content_hash):
                self.look_up(key, document.content_hash)

    def ids_not_met(self) -> np.ndarray:
        """Return the ids of stored documents that were not looked up, int64 in ascending order."""
        return np.sort(self.document_ids[~self.is_met])

    def _holds_as(self, key: str, content_hash: str) -> bool:
        """True if a document with this key and content is stored."""
        place = _index_of(self.keys, key_hash(key))
        return place is not None and int(self.contents[place]) == _content_number(content_hash)

    def _is_known(self, key: str) -> bool:
        hashed = key_hash(key)
        return hashed in self.forgotten.keys or _index_of(self.keys, hashed) is not None

    def _holds_content(self, content_hash: str) -> bool:
        return _index_of(self._sorted_contents, content_hash[:16]) is not None

    @cached_property
    def _sorted_contents(self) -> np.ndarray:
        return np.sort(self.contents)

    def replaced(self, parts: Sequence[PartRecord]) -> dict[int, tuple[Hidden, ...]]:
        """Return the old versions of changed documents by the index of the part that holds them."""
        return group_by_part(self.changed, parts)


def document_rows(target: Artefact, generation: Generation, ids: np.ndarray) -> list[dict[str, Any]]:
    """Return `document_id`, `key` and `held_out` of the documents with these ids, from the parts that hold them."""
    first = [part.counts["first_document"] for part in generation.parts]
    holding = [generation.parts[i] for i in np.unique(np.searchsorted(first, ids, side="right") - 1)]
    files = [str(target.part_file(part, "documents.parquet")) for part in holding]
    wanted = dataset.field("document_id").isin(pa.array(ids))
    found: list[dict[str, Any]] = []
    for start in range(0, len(files), FILES_AT_ONCE):
        read = dataset.dataset(files[start : start + FILES_AT_ONCE], schema=_SPLIT_COLUMNS, format="parquet")
        found += read.to_table(filter=wanted).to_pylist()
    return found


def group_by_part(documents: Iterable[Hidden], parts: Sequence[PartRecord]) -> dict[int, tuple[Hidden, ...]]:
    """Group documents by the index of the part that holds them, in ascending order."""
    first = [part.counts["first_document"] for part in parts]
    found: dict[int, tuple[Hidden, ...]] = {}
    for document in sorted(documents, key=lambda each: each.document_id):
        index = parts[int(np.searchsorted(first, document.document_id, side="right")) - 1].index
        found[index] = (*found.get(index, ()), document)
    return found


def merge_hidden(old: HiddenByPart, new: HiddenByPart) -> dict[int, tuple[Hidden, ...]]:
    """Merge both, each document once and in order. The new entry replaces the old one."""
    every = {index: {d.document_id: d for d in (*old.get(index, ()), *new.get(index, ()))} for index in {*old, *new}}
    return {index: tuple(each[i] for i in sorted(each)) for index, each in sorted(every.items()) if each}


def _index_of(ascending: np.ndarray, digits: str) -> int | None:
    """Return the index of the number that these hex digits write; None if it is missing."""
    wanted = np.uint64(int(digits, 16))
    place = int(ascending.searchsorted(wanted))
    return place if place < len(ascending) and ascending[place] == wanted else None


def _content_number(content_hash: str) -> int:
    """The first 64 bits of a content hash."""
    return int(content_hash[:16], 16)


def _rest_number(content_hash: str) -> int:
    """The other 64 bits."""
    return int(content_hash[16:] or "0", 16)


def _hash_numbers(digits: Iterable[str]) -> np.ndarray:
    """Return uint64 numbers written as at most 16 hex digits each."""
    content = bytes.fromhex("".join(each.zfill(16) for each in digits))
    return np.frombuffer(content, ">u8").astype(np.uint64)
