"""Which classes each token belongs to, looked up in constant time.

Most tokens share their set of classes with many others. So a token holds the number of its set, and the sets are stored
once. This takes two to four bytes a token, however many classes there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]

UNCOUNTED = 0
"""The code of tokens that do not count: padding, tokens left out, hidden or not encoded."""

BEYOND = 1 << 62
"""More tokens than there can be."""


@dataclass(frozen=True)
class Spans:
    """Unbroken spans of tokens, each of one class. Spans of one class do not overlap."""

    classes: tuple[str, ...]
    numbers: Ints
    """(n,) the place of each span's class in `classes`."""
    firsts: Ints
    lasts: Ints
    """(n,) first and last token_id, both included."""


@dataclass(frozen=True)
class Membership:
    """The counted tokens of a run: their sets of classes, and their documents.

    Arrays over tokens begin at `first_token`. Documents are numbered from 0 in the order of their ids.
    """

    classes: tuple[str, ...]
    first_token: int
    codes: NDArray[np.unsignedinteger]
    """(tokens,) UNCOUNTED, or the number of the token's set of classes."""
    set_starts: Ints
    set_classes: NDArray[np.uint32]
    """Set s holds the classes `set_classes[set_starts[s] : set_starts[s + 1]]`."""
    documents: NDArray[np.int32]
    """(tokens,) the number of the token's document; anything where the code is UNCOUNTED."""
    document_ids: Ints
    document_tokens: Ints
    """(documents,) counted tokens."""
    document_classes: Ints
    """(documents, classes) counted tokens of each class."""
    together: bool
    """True if the tokens of each document are neighbours, but for tokens that do not count."""

    @property
    def n_tokens(self) -> int:
        return int(self.document_tokens.sum())

    @property
    def n_documents(self) -> int:
        return len(self.document_ids)

    @property
    def class_tokens(self) -> Ints:
        """(classes,) counted tokens."""
        return np.asarray(self.document_classes.sum(0), np.int64)

    def sets_with(self, number: int) -> NDArray[np.bool_]:
        """Return bool, by code: True if the set holds the class of this number."""
        has = np.zeros(len(self.set_starts) - 1, bool)
        owners = np.repeat(np.arange(len(has)), np.diff(self.set_starts))
        has[owners[self.set_classes == number]] = True
        return has


def membership(spans: Spans, token_ids: Ints, document_ids: Ints) -> Membership:
    """Return the sets of classes of the counted tokens (ascending) and of their documents.

    Spans may cover tokens that do not count. Raises ValueError if spans of a class overlap.
    """
    first, n_places = (int(token_ids[0]), int(token_ids[-1] - token_ids[0]) + 1) if len(token_ids) else (0, 0)
    places = token_ids - first
    starts, states = _constant_stretches(spans, first, n_places)
    words, set_of_stretch = _distinct_rows(states, np.diff(np.r_[starts, n_places]))
    set_of_stretch += 1
    kind: type[np.unsignedinteger] = np.uint16 if len(words) < 1 << 16 else np.uint32
    codes: NDArray[np.unsignedinteger] = np.zeros(n_places, kind)
    codes[places] = np.repeat(set_of_stretch.astype(kind), np.diff(np.r_[starts, n_places]))[places]
    of_set = np.zeros((len(words) + 1, len(spans.classes)), np.uint8)
    of_set[1:] = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : len(spans.classes)]
    ids, of_token, together = _numbered_documents(document_ids)
    documents = np.zeros(n_places, np.int32)
    documents[places] = of_token
    return Membership(
        spans.classes,
        first,
        codes,
        np.r_[0, np.cumsum(of_set.sum(1, dtype=np.int64))],
        np.nonzero(of_set)[1].astype(np.uint32),
        documents,
        ids,
        np.bincount(of_token, minlength=len(ids)),
        _count_by_document(of_token, codes[places], of_set, len(ids)),
        together,
    )


def _numbered_documents(document_ids: Ints) -> tuple[Ints, Ints, bool]:
    """Return the different ids, the place of each token's id among them, and whether equal ids are neighbours."""
    begins = np.flatnonzero(np.r_[True, document_ids[1:] != document_ids[:-1]][: len(document_ids)])
    ids, of_run = np.unique(document_ids[begins], return_inverse=True)
    return ids, np.repeat(of_run, np.diff(np.r_[begins, len(document_ids)])), len(ids) == len(begins)


def _constant_stretches(spans: Spans, first: int, n_places: int) -> tuple[Ints, NDArray[np.uint64]]:
    """Return where the set of classes changes (n,), from place 0 on, and the set from there on: one bit a class (n, w).

    A class's bit is flipped where a span of it begins, and again behind the span's end.
    """
    require_spans(spans)
    bounds = np.clip(np.r_[spans.firsts, spans.lasts + 1] - first, 0, n_places)
    numbers = np.r_[spans.numbers, spans.numbers]
    order = np.argsort(bounds, kind="stable")
    bounds, numbers = np.r_[0, bounds[order]], numbers[order]
    n_words = max(1, -(-len(spans.classes) // 64))
    flips = np.zeros((len(bounds), n_words), np.uint64)
    flips[np.arange(1, len(bounds)), numbers // 64] = np.uint64(1) << (numbers % 64).astype(np.uint64)
    states = np.bitwise_xor.accumulate(flips, axis=0)
    last = np.r_[bounds[1:] != bounds[:-1], True] & (bounds < n_places)
    return bounds[last], states[last]


def _distinct_rows(rows: NDArray[np.uint64], n_tokens: Ints) -> tuple[NDArray[np.uint64], Ints]:
    """Return the different rows, those of most tokens first, and for each row its place among them.

    Common sets lie together in the processor's cache. np.unique along an axis is 20 times slower.
    """
    _, firsts, numbers = np.unique(rows[:, 0], return_index=True, return_inverse=True)
    for column in rows.T[1:]:
        _, place = np.unique(column, return_inverse=True)
        _, firsts, numbers = np.unique(numbers * len(rows) + place, return_index=True, return_inverse=True)
    order = np.argsort(-np.bincount(numbers, n_tokens), kind="stable")
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    return rows[firsts[order]], place_of[numbers]


def require_spans(spans: Spans) -> None:
    """Raise ValueError if spans of a class overlap, or if a span has tokens that no corpus has."""
    numbers, firsts, lasts = spans.numbers, spans.firsts, spans.lasts
    later = (numbers[1:] > numbers[:-1]) | ((numbers[1:] == numbers[:-1]) & (firsts[1:] >= firsts[:-1]))
    if not later.all():
        order = np.lexsort((firsts, numbers))
        numbers, firsts, lasts = numbers[order], firsts[order], lasts[order]
    wrong = (numbers[1:] == numbers[:-1]) & (firsts[1:] <= lasts[:-1])
    if wrong.any() or (firsts > lasts).any():
        at = int(np.flatnonzero(np.r_[wrong, False] | (firsts > lasts))[0])
        raise ValueError(f"spans of class {spans.classes[numbers[at]]!r} overlap at token {firsts[at]}")
    if len(firsts) and not 0 <= firsts.min() <= lasts.max() < BEYOND:
        raise ValueError("a span has tokens that no corpus has")


def _count_by_document(
    of_token: Ints, codes: NDArray[np.unsignedinteger], of_set: NDArray[np.uint8], n_documents: int
) -> Ints:
    """Return int64 (documents, classes): how many tokens of each class a document has."""
    ones = np.ones(len(codes), np.int64)
    per_set = sparse.csr_array((ones, (of_token, codes)), shape=(n_documents, len(of_set)))
    return np.asarray(per_set @ of_set.astype(np.int64))
