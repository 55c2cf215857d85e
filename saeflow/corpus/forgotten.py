"""Documents that a store has forgotten, by key and by content: no recipe takes them in again until `forget --undo`.

`forgotten.json` beside `store.json` holds two hashes of each: 40 bytes a document, and no text. They can confirm a
guess of a key or text; nothing can be read from them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.store.lists import read_forgotten_keys
from saeflow.store.records import FORGOTTEN, Damaged, ForgottenRecord, checked_text, parse_record
from saeflow.store.store import Store

Pair = tuple[str, str]
"""The hash of a key, and the first 16 digits of the content hash; empty if it is not known or the text is empty."""

_EMPTY_TEXT = hashlib.sha256(b"").hexdigest()[:16]


@dataclass(frozen=True)
class ForgottenHashes:
    """What is forgotten. Equal if the same documents are."""

    pairs: frozenset[Pair] = frozenset()

    @classmethod
    def read(cls, store: Store) -> ForgottenHashes:
        """Read the store's list, and the keys that an earlier saeflow hid in one artefact of tokens alone.

        Raises Damaged if the list is damaged.
        """
        return cls(frozenset([*_listed_documents(store)[0], *((key, "") for key in _hidden_keys(store))]))

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(key for key, _ in self.pairs)

    @cached_property
    def contents(self) -> frozenset[str]:
        return frozenset(content for _, content in self.pairs if content)

    def with_same_texts(self, keys: Iterable[str]) -> frozenset[str]:
        """Return these hashes of keys, and those of documents that had one of their texts."""
        wanted = set(keys)
        texts = {content for key, content in self.pairs if content and key in wanted}
        return frozenset(wanted | {key for key, content in self.pairs if content in texts})


NOTHING = ForgottenHashes()


def pair_of(key_hash: str, content_hash: str) -> Pair:
    content = content_hash[:16]
    return key_hash, "" if content == _EMPTY_TEXT else content


def add(store: Store, pairs: Iterable[Pair]) -> None:
    """Add documents to the store's list."""
    new = set(pairs)
    _change(store, lambda listed: listed | new)


def drop(store: Store, keys: frozenset[str]) -> None:
    """Take documents out of the store's list, by the hashes of their keys."""
    _change(store, lambda listed: {pair for pair in listed if pair[0] not in keys})


def _change(store: Store, change: Callable[[set[Pair]], set[Pair]]) -> None:
    with store.storage.locked("forgotten"):
        listed, tag = _listed_documents(store)
        pairs: Sequence[Pair] = sorted(change(listed))
        content = checked_text({"format_version": FORMAT_VERSION, "documents": pairs})
        store.storage.put_if_unchanged(store.root / FORGOTTEN, content.encode(), tag)


def _listed_documents(store: Store) -> tuple[set[Pair], str | None]:
    """Return what the store's list holds now, and the tag of its file."""
    path = store.root / FORGOTTEN
    try:
        content, tag = store.storage.read(path)
    except FileNotFoundError:
        return set(), None
    return set(parse_record(content, path, ForgottenRecord).documents), tag


def _hidden_keys(store: Store) -> Iterator[str]:
    for source in store.artefacts("tokens"):
        with contextlib.suppress(Damaged):  # its own stage mends it
            if number := source.current_number():
                yield from read_forgotten_keys(source.list_path(number))
