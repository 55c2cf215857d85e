"""A document of a corpus: its text or vocabulary ids, its key, and the choices that follow from the key alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One text, or its vocabulary ids, with its key. `metadata` holds the corpus's other columns."""

    key: str
    content: str | tuple[int, ...]
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    beside: str = ""
    """Sixteen digits that stand for what lies beside the content, such as its activations: they take the place of the
    second half of the hash, so that equal contents still begin alike."""

    @property
    def text(self) -> str:
        assert isinstance(self.content, str)
        return self.content

    @property
    def vocab_ids(self) -> tuple[int, ...]:
        return () if isinstance(self.content, str) else self.content

    @cached_property
    def content_hash(self) -> str:
        written = self.content.encode() if isinstance(self.content, str) else np.array(self.content, "<i8").tobytes()
        digits = hashlib.sha256(written).hexdigest()
        return digits[:16] + (self.beside or digits[16:32])


@dataclass(frozen=True)
class Corpus:
    """A stream of documents and the Arrow fields of their metadata."""

    documents: Iterator[Document]
    metadata: pa.Schema


def is_held_out(key: str, seed: int, share: float) -> bool:
    """True if the document is held out. Depends only on its key, so appending never changes it."""
    return _unit_hash(f"{seed}:{key}") < share


def in_share(documents: Iterable[T], key: Callable[[T], str], share: float) -> Iterator[T]:
    """Yield the documents in the share of the corpus to read, by a hash of their keys.

    A larger share contains every smaller one. If the share holds none, the document nearest to it is yielded.
    """
    nearest: tuple[float, T] | None = None
    is_empty = True
    for document in documents:
        place = 0.0 if share >= 1 else _unit_hash(f"share:{key(document)}")
        if place < share:
            is_empty = False
            yield document
        elif is_empty and (nearest is None or place < nearest[0]):
            nearest = place, document
    if is_empty and nearest is not None:
        yield nearest[1]


def _unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text and is evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
