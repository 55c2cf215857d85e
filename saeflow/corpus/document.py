"""A document of a corpus: its text or vocabulary ids, its name, and the choices that follow from the name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Document:
    """One text, or its vocabulary ids, with its name; `metadata` holds the corpus's other columns."""

    key: str
    content: str | tuple[int, ...]
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)

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
        return hashlib.sha256(written).hexdigest()[:32]


@dataclass(frozen=True)
class Corpus:
    """A stream of documents and the Arrow fields of their metadata."""

    documents: Iterator[Document]
    metadata: pa.Schema


def is_held_out(key: str, seed: int, share: float) -> bool:
    """Is this document kept for evaluation? Depends on its key alone, so it never changes on append."""
    return _hashed(f"{seed}:{key}") < share


def is_shared(key: str, share: float) -> bool:
    """Is this document among the share of the corpus that is read? A larger share holds every smaller one."""
    return share >= 1 or _hashed(f"share:{key}") < share


def _hashed(text: str) -> float:
    """A number in [0, 1) that is the same for the same text, evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
