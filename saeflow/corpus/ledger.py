"""Which documents a token artefact holds: what of a corpus is new, changed, the same, or to be left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import dataset

from saeflow.corpus.document import Document, is_held_out
from saeflow.recipe.settings import CorpusConfig
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, Hidden, PartRecord

Verdict = Literal["new", "changed", "same", "forgotten"]
_PARTS_AT_ONCE = 1000
_COLUMNS = pa.schema([("document_id", pa.int64()), ("key", pa.string()), ("content_hash", pa.string())])
_ROWS = pa.schema([("document_id", pa.int64()), ("key", pa.string()), ("held_out", pa.bool_())])
HiddenByPart = Mapping[int, tuple[Hidden, ...]]


def key_hash(key: str) -> str:
    """16 hex digits that stand for a document's key and do not tell it."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A document as it is stored: under a key that no other has, and on its side of the split."""

    document: Document
    key: str
    held_out: bool


@dataclass
class Ledger:
    """Hashes of keys and contents of the documents that readers see: sorted by key, 25 bytes a document."""

    keys: np.ndarray
    contents: np.ndarray
    document_ids: np.ndarray
    forgotten: frozenset[str] = frozenset()
    changed: list[Hidden] = field(default_factory=list)
    found: Counter[Verdict] = field(default_factory=Counter)
    n_repeated: int = 0

    def __post_init__(self) -> None:
        self.met = np.zeros(len(self.keys), bool)
        self._replaced_contents: set[int] = set()
        self._left_out: set[int] = set()

    @classmethod
    def read(cls, target: Artefact, generation: Generation) -> Ledger:
        """From the documents of the generation's parts."""
        hidden = np.array(generation.hidden_ids, np.int64)
        keys, contents, ids = [], [], []
        for start in range(0, len(generation.parts), _PARTS_AT_ONCE):
            table = _documents(target, generation.parts[start : start + _PARTS_AT_ONCE])
            table = table.filter(~np.isin(table.column("document_id").to_numpy(), hidden))
            ids.append(table.column("document_id").to_numpy())
            keys.append(_numbers(map(key_hash, table.column("key").to_pylist())))
            contents.append(_numbers(text[:16] for text in table.column("content_hash").to_pylist()))
        every = [np.concatenate(each) if each else np.empty(0, np.uint64) for each in (keys, contents, ids)]
        every_hidden = (document for documents in generation.hidden.values() for document in documents)
        forgotten = frozenset(each.key_hash for each in every_hidden if each.reason == "forgotten")
        return cls._sorted(every[0], every[1], every[2], forgotten)

    @classmethod
    def of(cls, held: Sequence[tuple[str, str]]) -> Ledger:
        """Of documents by key and content hash, numbered as they come."""
        keys, contents = _numbers(key_hash(key) for key, _ in held), _numbers(content[:16] for _, content in held)
        return cls._sorted(keys, contents, np.arange(len(held)), frozenset())

    @classmethod
    def _sorted(cls, keys: np.ndarray, contents: np.ndarray, ids: np.ndarray, forgotten: frozenset[str]) -> Ledger:
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], contents[order], ids[order], forgotten)

    def look_up(self, key: str, content_hash: str) -> Verdict:
        """What the artefact knows of this document; a changed one is noted to be replaced."""
        hashed = key_hash(key)
        if hashed in self.forgotten:
            return "forgotten"
        place = _place(self.keys, hashed)
        if place is None:
            return "new"
        self.met[place] = True
        if int(self.contents[place]) == _number(content_hash):
            return "same"
        self._replaced_contents.add(int(self.contents[place]))
        self.changed.append(Hidden(document_id=int(self.document_ids[place]), key_hash=hashed, reason="replaced"))
        return "changed"

    def fresh(self, documents: Iterable[Document], about: CorpusConfig) -> Iterator[Entry]:
        """The documents that are new or changed, each under a key of its own."""
        times: Counter[str] = Counter()
        for document in documents:
            if not about.sql and document.key not in times:
                times.clear()  # files give equal keys one after the other
            key = self._own_key(document, times)
            self.n_repeated += key != document.key
            verdict = self.look_up(key, document.content_hash)
            if verdict == "new" and about.dedup and self._has_content(document.content_hash):
                verdict = "same"
                self._left_out.add(_number(document.content_hash))
            self.found[verdict] += 1
            if verdict in ("new", "changed"):
                yield Entry(document, key, is_held_out(document.key, about.seed, about.held_out))

    @property
    def settled(self) -> bool:
        """False if a text was left out because a document held it that has another text now: the corpus has to be read
        again, once the new version is published."""
        return self._left_out.isdisjoint(self._replaced_contents)

    def _own_key(self, document: Document, times: Counter[str]) -> str:
        """The document's key; where that has come before, followed by its content, which no order of files changes."""
        key, by_content = document.key, f"{document.key}#{document.content_hash[:8]}"
        free, n = not times[key], times[by_content] + 1
        nth = by_content if n == 1 else f"{by_content} ({n})"
        mine = free and self._holds_as(key, document.content_hash)
        if not mine and (self._knows(nth) or (not free and key_hash(key) not in self.forgotten)):
            times[by_content], times[key] = n, times[key]
            return nth
        times[key] += 1
        return key

    def meet_again(self, document: Document) -> None:
        """Count a document as met that is stored with just this content, under its own key or by content."""
        for key in (document.key, f"{document.key}#{document.content_hash[:8]}"):
            if self._holds_as(key, document.content_hash):
                self.look_up(key, document.content_hash)

    def not_met(self) -> np.ndarray:
        """The numbers of the documents, int64 in order, that no document looked up stands for."""
        return np.sort(self.document_ids[~self.met])

    def _holds_as(self, key: str, content_hash: str) -> bool:
        """Is a document of this key and content stored?"""
        place = _place(self.keys, key_hash(key))
        return place is not None and int(self.contents[place]) == _number(content_hash)

    def _knows(self, key: str) -> bool:
        hashed = key_hash(key)
        return hashed in self.forgotten or _place(self.keys, hashed) is not None

    def _has_content(self, content_hash: str) -> bool:
        return _place(self._sorted_contents, content_hash[:16]) is not None

    @cached_property
    def _sorted_contents(self) -> np.ndarray:
        return np.sort(self.contents)

    def replaced(self, parts: Sequence[PartRecord]) -> dict[int, tuple[Hidden, ...]]:
        """The old versions of changed documents, by index of the part that holds them."""
        return by_part(self.changed, parts)


def rows_of(target: Artefact, generation: Generation, ids: np.ndarray) -> list[dict[str, Any]]:
    """`document_id`, `key` and `held_out` of the documents with these numbers, from the parts that hold them."""
    first = [part.counts["first_document"] for part in generation.parts]
    holding = [generation.parts[i] for i in np.unique(np.searchsorted(first, ids, side="right") - 1)]
    files = [str(target.part_file(part, "documents.parquet")) for part in holding]
    wanted = dataset.field("document_id").isin(pa.array(ids))
    found: list[dict[str, Any]] = []
    for start in range(0, len(files), _PARTS_AT_ONCE):
        read = dataset.dataset(files[start : start + _PARTS_AT_ONCE], schema=_ROWS, format="parquet")
        found += read.to_table(filter=wanted).to_pylist()
    return found


def by_part(documents: Iterable[Hidden], parts: Sequence[PartRecord]) -> dict[int, tuple[Hidden, ...]]:
    first = [part.counts["first_document"] for part in parts]
    found: dict[int, tuple[Hidden, ...]] = {}
    for document in sorted(documents, key=lambda each: each.document_id):
        index = parts[int(np.searchsorted(first, document.document_id, side="right")) - 1].index
        found[index] = (*found.get(index, ()), document)
    return found


def merged(old: HiddenByPart, new: HiddenByPart) -> dict[int, tuple[Hidden, ...]]:
    """Both, each document once, in order; what is new about it counts."""
    every = {index: {d.document_id: d for d in (*old.get(index, ()), *new.get(index, ()))} for index in {*old, *new}}
    return {index: tuple(each[i] for i in sorted(each)) for index, each in sorted(every.items()) if each}


def _place(ascending: np.ndarray, digits: str) -> int | None:
    """Where the number of these hex digits is, if it is there."""
    wanted = np.uint64(int(digits, 16))
    place = int(ascending.searchsorted(wanted))
    return place if place < len(ascending) and ascending[place] == wanted else None


def _number(content_hash: str) -> int:
    """The first 64 bits of a content hash."""
    return int(content_hash[:16], 16)


def _numbers(digits: Iterable[str]) -> np.ndarray:
    """uint64 of at most 16 hex digits each."""
    content = bytes.fromhex("".join(each.zfill(16) for each in digits))
    return np.frombuffer(content, ">u8").astype(np.uint64)


def _documents(target: Artefact, parts: Sequence[PartRecord]) -> pa.Table:
    """What is asked of the documents of these parts; many files are read quicker together than one by one."""
    files = [str(target.part_file(part, "documents.parquet")) for part in parts]
    return dataset.dataset(files, schema=_COLUMNS, format="parquet").to_table()
