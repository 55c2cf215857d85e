"""A document of a corpus: its text or vocabulary ids, its key, and the choices that follow from the key alone."""

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
    """One text, or its vocabulary ids, with its key. `metadata` holds the corpus's other columns."""

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
    """True if the document is held out. Depends only on its key, so appending never changes it."""
    return _unit_hash(f"{seed}:{key}") < share


def is_in_share(key: str, share: float) -> bool:
    """True if the document is in the share of the corpus to read. A larger share contains every smaller one."""
    return share >= 1 or _unit_hash(f"share:{key}") < share


def _unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text and is evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
