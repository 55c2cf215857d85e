"""Which documents a token artefact holds, and so which of a corpus are new, changed, the same or forgotten.

Hashes of all documents are kept in a file of tmp/ for the next append. The file only saves time: it names the parts
that it covers and holds a checksum. One that is missing, damaged or of other parts is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from pyarrow import dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saeflow.corpus.document import Document, is_held_out
from saeflow.corpus.forgotten import NOTHING, ForgottenHashes
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.store.artefact import Artefact
from saeflow.store.files import replacing
from saeflow.store.links import unlinked
from saeflow.store.records import Generation, Hidden, PartRecord

Verdict = Literal["new", "changed", "same", "forgotten"]
_FILES_AT_ONCE = 1000
KEPT_FROM = 500
"""Parts from which on the hashes are kept: those of fewer are read in less than a second."""
_FRESH_SHARE = 8
"""The file is written again once the parts that it lacks are more than one in so many."""
_HASH_COLUMNS = pa.schema([("document_id", pa.int64()), ("key", pa.string()), ("content_hash", pa.string())])
_COLUMN_NAMES = ("keys", "contents", "document_ids", "rests")
_SPLIT_COLUMNS = pa.schema([("document_id", pa.int64()), ("key", pa.string()), ("held_out", pa.bool_())])
HiddenByPart = Mapping[int, tuple[Hidden, ...]]


def key_hash(key: str) -> str:
    """Return 16 hex digits that stand for a document's key without revealing it."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A document as it is stored: under a key that no other document has, and on its side of the split."""

    document: Document
    key: str
    held_out: bool


@dataclass(frozen=True)
class DocumentHashes:
    """One row a document, sorted by the hash of its key. `rests` is the second half of the content's hash."""

    keys: np.ndarray
    contents: np.ndarray
    document_ids: np.ndarray
    rests: np.ndarray

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        return self.keys, self.contents, self.document_ids, self.rests

    @classmethod
    def sorted(cls, columns: Sequence[np.ndarray]) -> DocumentHashes:
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))

    def merged(self, other: DocumentHashes) -> DocumentHashes:
        """Both together; a few rows among many are put in without sorting all of them again."""
        places = np.searchsorted(self.keys, other.keys, side="right")
        return DocumentHashes(*(np.insert(a, places, b) for a, b in zip(self.columns, other.columns, strict=True)))

    def without(self, document_ids: np.ndarray) -> DocumentHashes:
        if not len(document_ids):
            return self
        stays = ~np.isin(self.document_ids, document_ids)
        return DocumentHashes(*(column[stays] for column in self.columns))


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
    for start in range(0, len(files), _FILES_AT_ONCE):
        read = dataset.dataset(files[start : start + _FILES_AT_ONCE], schema=_SPLIT_COLUMNS, format="parquet")
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


def stored_hashes(target: Artefact, parts: Sequence[PartRecord]) -> DocumentHashes:
    """Return the hashes of the documents of these parts. Only parts that were not kept last time are read."""
    path = index_path(target)
    kept = _trusted_hashes(path, {part.folder for part in parts}) if len(parts) >= KEPT_FROM else None
    folders, hashes = kept or (set[str](), DocumentHashes.sorted(_no_rows()))
    fresh = [part for part in parts if part.folder not in folders]
    if fresh:
        hashes = hashes.merged(_read(target, fresh))
    if len(parts) >= KEPT_FROM and len(fresh) * _FRESH_SHARE > len(parts):
        _keep(path, [part.folder for part in parts], hashes)
    return hashes


def index_path(target: Artefact) -> Path:
    return target.work.with_name(f"{target.work.name}.documents")


def _trusted_hashes(path: Path, shown: set[str]) -> tuple[set[str], DocumentHashes] | None:
    """Return the parts whose hashes a file holds, and these; None if it can't be trusted."""
    try:
        with safe_open(unlinked(path), "numpy") as file:
            about = file.metadata() or {}
            hashes = DocumentHashes(*(file.get_tensor(name) for name in _COLUMN_NAMES))
        folders = {str(folder) for folder in json.loads(about["parts"])}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    is_whole = about.get("checksum") == _checksum(about["parts"], hashes)
    return (folders, hashes) if is_whole and folders <= shown else None


def _keep(path: Path, folders: list[str], hashes: DocumentHashes) -> None:
    parts = json.dumps(folders)
    about = {"parts": parts, "checksum": _checksum(parts, hashes)}
    with contextlib.suppress(OSError), replacing(path) as temporary:  # a full disk ends no append
        temporary.write_bytes(save(dict(zip(_COLUMN_NAMES, hashes.columns, strict=True)), about))


def _checksum(parts: str, hashes: DocumentHashes) -> str:
    digest = xxhash.xxh3_128(parts.encode())
    for column in hashes.columns:
        digest.update(f"{column.dtype} {column.shape}".encode())
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _no_rows() -> list[np.ndarray]:
    return [np.empty(0, dtype) for dtype in (np.uint64, np.uint64, np.int64, np.uint64)]


def _read(target: Artefact, parts: Sequence[PartRecord]) -> DocumentHashes:
    """Read the documents of these parts, many files together."""
    found = [_no_rows()]
    for start in range(0, len(parts), _FILES_AT_ONCE):
        files = [str(target.part_file(part, "documents.parquet")) for part in parts[start : start + _FILES_AT_ONCE]]
        table = dataset.dataset(files, schema=_HASH_COLUMNS, format="parquet").to_table()
        halves = content_numbers(table.column("content_hash").to_pylist())
        found.append(
            [key_numbers(table.column("key").to_pylist()), halves[0], table.column("document_id").to_numpy(), halves[1]]
        )
    return DocumentHashes.sorted([np.concatenate(column) for column in zip(*found, strict=True)])


def key_numbers(keys: Iterable[str]) -> np.ndarray:
    """Return the hash of each key, uint64: the number that `key_hash` writes."""
    digests = b"".join([hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def content_numbers(hashes: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last 16 hex digits of each hash, uint64. A hash may have fewer digits."""
    halves = [text[:16].rjust(16, "0") + text[16:].rjust(16, "0") for text in hashes]
    numbers = np.frombuffer(bytes.fromhex("".join(halves)), ">u8").astype(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(numbers[:, 0]), np.ascontiguousarray(numbers[:, 1])
