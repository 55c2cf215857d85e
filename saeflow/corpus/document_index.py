"""Hashes of all documents that a token artefact stores, sorted by key, kept in a file for the next append.

The file lies in tmp/ and only saves time: it holds the hashes of the parts that it names, and their checksum. One that
is missing or damaged, or that names a part which is not shown any more, is written anew from the parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from pyarrow import dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saeflow.store.artefact import Artefact
from saeflow.store.files import replacing
from saeflow.store.links import unlinked
from saeflow.store.records import PartRecord

FILES_AT_ONCE = 1000
KEPT_FROM = 500
"""Parts from which on the hashes are kept: those of fewer are read in less than a second."""
_FRESH_SHARE = 8
"""The file is written again once the parts that it lacks are more than one in so many."""
_COLUMNS = pa.schema([("document_id", pa.int64()), ("key", pa.string()), ("content_hash", pa.string())])
_NAMES = ("keys", "contents", "document_ids", "rests")


def key_hash(key: str) -> str:
    """Return 16 hex digits that stand for a document's key without revealing it."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


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


def stored_hashes(target: Artefact, parts: Sequence[PartRecord]) -> DocumentHashes:
    """Return the hashes of the documents of these parts. Only parts that were not kept last time are read."""
    path = index_path(target)
    kept = _kept(path, {part.folder for part in parts}) if len(parts) >= KEPT_FROM else None
    folders, hashes = kept or (set[str](), DocumentHashes.sorted(_no_rows()))
    fresh = [part for part in parts if part.folder not in folders]
    if fresh:
        hashes = hashes.merged(_read(target, fresh))
    if len(parts) >= KEPT_FROM and len(fresh) * _FRESH_SHARE > len(parts):
        _keep(path, [part.folder for part in parts], hashes)
    return hashes


def index_path(target: Artefact) -> Path:
    return target.work.with_name(f"{target.work.name}.documents")


def _kept(path: Path, shown: set[str]) -> tuple[set[str], DocumentHashes] | None:
    """Return the parts whose hashes a file holds, and these; None if it can't be trusted."""
    try:
        with safe_open(unlinked(path), "numpy") as file:
            about = file.metadata() or {}
            hashes = DocumentHashes(*(file.get_tensor(name) for name in _NAMES))
        folders = {str(folder) for folder in json.loads(about["parts"])}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    is_whole = about.get("checksum") == _checksum(about["parts"], hashes)
    return (folders, hashes) if is_whole and folders <= shown else None


def _keep(path: Path, folders: list[str], hashes: DocumentHashes) -> None:
    parts = json.dumps(folders)
    about = {"parts": parts, "checksum": _checksum(parts, hashes)}
    with contextlib.suppress(OSError), replacing(path) as temporary:  # a full disk ends no append
        temporary.write_bytes(save(dict(zip(_NAMES, hashes.columns, strict=True)), about))


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
    for start in range(0, len(parts), FILES_AT_ONCE):
        files = [str(target.part_file(part, "documents.parquet")) for part in parts[start : start + FILES_AT_ONCE]]
        table = dataset.dataset(files, schema=_COLUMNS, format="parquet").to_table()
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
