"""Families of simple rules: each gives every token a key, and tokens of one key make one rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saeflow.meaning.token_rules import counting, hashing, shapes
from saeflow.meaning.token_rules.counting import N_LEVELS
from saeflow.meaning.token_rules.hashing import LEAST_FIRINGS, Hashes, Places
from saeflow.meaning.token_rules.token_table import TokenTable
from saeflow.meaning.token_rules.wording import either, quoted
from saeflow.runtime.threads import in_parallel
from saeflow.sae.kernels import Ids

LONGEST_NGRAM = 5
"""Tokens of the longest n-gram, with the token itself."""

_SHOWN_PLACES = 16
"""Positions that are rules of their own; later ones are taken together by powers of two."""


_SECOND = {"token", "shape", "after", "n-gram", "after n-gram", "word", "position"}


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of rule over the tokens of a table."""

    kind: str
    keys: Ids
    """(n,): -1 for tokens in no rule of the family."""
    sizes: Ids
    """(N_LEVELS, K): training tokens of each key, in each sample."""
    order: Ids
    """(n,): `TokenTable.order`."""
    say: Callable[[Sequence[int]], str]
    """Word the rule of some keys."""
    price: float = 0.0
    """F1 on training documents that the family must be ahead of a simpler one."""
    is_next: bool = False
    """True if keys are the next token's entries, so that a feature may have only those it makes the model say."""

    @property
    def may_be_second(self) -> bool:
        """True if it may be joined to a rule of another kind: only short rules may."""
        return self.kind in _SECOND

    @cached_property
    def index(self) -> tuple[Places, Ids]:
        """The tokens of each key: see `counting.index_keys`."""
        starts = np.zeros(self.sizes.shape[1] + 1, np.int64)
        token_ids = np.empty(int(np.count_nonzero(self.keys >= 0)), np.int32)
        counting.index_keys(self.keys, self.order, starts, token_ids)
        return starts, token_ids


def make_families(table: TokenTable, threads: int) -> list[Family]:
    """Return every family for the tokens of a table, the simplest first."""
    makers = [*_of_the_token(table), *_of_ngrams(table), *_of_words(table), *_of_places(table), *_of_pairs(table)]
    return in_parallel(lambda make: make(), makers, threads)


Maker = Callable[[], Family]


def _family(
    table: TokenTable, kind: str, keys: Ids, n_keys: int, say: Callable[[Sequence[int]], str], price: float = 0.0,
    is_next: bool = False,
) -> Family:  # fmt: skip
    sizes = np.zeros((N_LEVELS, n_keys), np.int32)
    counting.count_training(keys, table.levels, sizes)
    return Family(kind, keys, sizes, table.order, say, price, is_next)


def _by_entry(table: TokenTable, codes: Ids) -> Ids:
    """Return a code for each token from codes of vocabulary entries."""
    return np.where(table.vocab_ids >= 0, codes[table.vocab_ids], -1).astype(np.int32)


def _shifted(table: TokenTable, keys: Ids, back: int) -> Ids:
    """Return the keys of the tokens `back` places before, -1 where that is another document or sequence."""
    found = np.full(len(keys), -1, np.int32)
    found[back:] = keys[: len(keys) - back] if back else keys
    found[table.contexts < back] = -1
    return found


def _of_the_token(table: TokenTable) -> list[Maker]:
    entry = lambda key: quoted(table.pieces[key])  # noqa: E731
    names = shapes.SHAPES
    shape_of = np.array([shapes.shape_of(piece) for piece in table.pieces], np.int32)

    def parts(cut: Callable[[str], str | None], kind: str, template: str) -> Family:
        codes, texts = shapes.numbered(map(cut, table.pieces))
        return _family(
            table,
            kind,
            _by_entry(table, codes),
            len(texts),
            lambda keys: template + either([quoted(texts[k]) for k in keys]),
            0.02,
        )

    def after(back: int, template: str, price: float) -> Family:
        keys = _shifted(table, table.vocab_ids, back)
        return _family(
            table, "after", keys, len(table.pieces), lambda keys: template + either(list(map(entry, keys))), price
        )

    makers: list[Maker] = [
        lambda: _family(
            table, "token", table.vocab_ids, len(table.pieces), lambda keys: either(list(map(entry, keys)))
        ),
        lambda: _family(
            table, "shape", _by_entry(table, shape_of), len(names), lambda keys: either([names[k] for k in keys])
        ),
        lambda: after(1, "after ", 0.0),
        lambda: _family(
            table, "after shape", _shifted(table, _by_entry(table, shape_of), 1), len(names),
            lambda keys: "after " + either([names[k] for k in keys]),
        ),
        lambda: after(2, "two tokens after ", 0.01),
        lambda: after(3, "three tokens after ", 0.02),
        lambda: _next(table),
    ]  # fmt: skip
    for n in (1, 2, 3):
        makers.append(lambda n=n: parts(lambda piece: shapes.beginning(piece, n), "begins", "begins with "))  # type: ignore[misc]
        makers.append(lambda n=n: parts(lambda piece: shapes.ending(piece, n), "ends", "ends with "))  # type: ignore[misc]
    return makers


def _next(table: TokenTable) -> Family:
    keys = np.full(len(table.vocab_ids), -1, np.int32)
    follows = table.contexts[1:] > 0
    keys[:-1][follows] = table.vocab_ids[1:][follows]
    return _family(
        table, "says", keys, len(table.pieces),
        lambda keys: "before " + either([quoted(table.pieces[k]) for k in keys]) + ", which it makes the model say",
        0.005, True,
    )  # fmt: skip


def _numbered_keys(table: TokenTable, hashes: Hashes) -> tuple[Ids, Places]:
    """Return keys (n,) for hashes of enough training tokens, and a training token of each key."""
    n = len(hashes)
    size = 1 << max(4, (2 * n).bit_length())
    keys, examples = np.empty(n, np.int32), np.empty(n, np.int64)
    slots, numbers = np.zeros(size, np.uint64), np.empty(size, np.int32)
    kept = hashing.number_hashes(hashes, table.sides, LEAST_FIRINGS, slots, numbers, keys, examples)
    return keys, examples[:kept].copy()


def _text_between(table: TokenTable, token: int, first: int, last: int) -> str:
    """Return the text of the tokens from `first` to `last` places before a token, both included."""
    return "".join(table.pieces[i] for i in table.vocab_ids[token - first : token - last + 1].tolist())


def _of_ngrams(table: TokenTable) -> list[Maker]:
    def here(n: int) -> Family:
        keys, examples = _ngram_keys(table, n - 1, 0)

        def one(key: int) -> str:
            token = int(examples[key])
            return f"{quoted(_text_between(table, token, 0, 0))} after {quoted(_text_between(table, token, n - 1, 1))}"

        return _family(table, "n-gram", keys, len(examples), lambda keys: either(list(map(one, keys))), 0.01 * (n - 1))

    def before(n: int) -> Family:
        keys, examples = _ngram_keys(table, n, 1)

        def one(key: int) -> str:
            return quoted(_text_between(table, int(examples[key]), n, 1))

        return _family(
            table,
            "after n-gram",
            keys,
            len(examples),
            lambda keys: "after " + either(list(map(one, keys))),
            0.01 * (n - 1),
        )

    found: list[Maker] = [lambda n=n: here(n) for n in range(2, LONGEST_NGRAM + 1)]  # type: ignore[misc]
    return [*found, *(lambda n=n: before(n) for n in range(2, LONGEST_NGRAM))]  # type: ignore[misc]


def _ngram_keys(table: TokenTable, first: int, last: int) -> tuple[Ids, Places]:
    hashes = np.empty(len(table.vocab_ids), np.uint64)
    hashing.hash_ngrams(table.vocab_ids, table.contexts, first, last, hashes)
    return _numbered_keys(table, hashes)


def _of_words(table: TokenTable) -> list[Maker]:
    begins = np.array([shapes.begins_word(piece) for piece in table.pieces], np.bool_)

    def hashes() -> tuple[Hashes, Hashes]:
        word, before = np.empty(len(table.vocab_ids), np.uint64), np.empty(len(table.vocab_ids), np.uint64)
        hashing.hash_words(table.vocab_ids, table.contexts, begins, word, before)
        return word, before

    def start_of(token: int) -> int:
        while not begins[table.vocab_ids[token]]:
            token -= 1
        return token

    def word() -> Family:
        keys, examples = _numbered_keys(table, hashes()[0])

        def one(key: int) -> str:
            token = int(examples[key])
            return quoted(_text_between(table, token, token - start_of(token), 0))

        return _family(
            table, "word", keys, len(examples), lambda keys: "the word so far is " + either(list(map(one, keys))), 0.01
        )

    def word_before() -> Family:
        keys, examples = _numbered_keys(table, hashes()[1])

        def one(key: int) -> str:
            token = int(examples[key])
            end = start_of(token) - 1
            return quoted(_text_between(table, token, token - start_of(end), token - end))

        return _family(
            table,
            "after word",
            keys,
            len(examples),
            lambda keys: "in the word after " + either(list(map(one, keys))),
            0.01,
        )

    return [word, word_before]


def _of_places(table: TokenTable) -> list[Maker]:
    edges = [*range(_SHOWN_PLACES), *(1 << np.arange(4, 31)).tolist()]

    def banded(places: NDArray[np.int64] | Ids) -> Ids:
        return (np.searchsorted(edges, places, side="right") - 1).astype(np.int32)

    def name(key: int) -> str:
        return str(key) if key < _SHOWN_PLACES else f"{edges[key]}–{edges[key + 1] - 1}"

    positions = np.where(table.vocab_ids >= 0, np.arange(len(table.vocab_ids)) % table.context_length, -1)
    n = len(edges)
    found: list[Maker] = [
        lambda: _family(
            table,
            "position",
            banded(positions),
            n,
            lambda keys: "position " + either(list(map(name, keys))) + " of a sequence",
        ),
        lambda: _family(
            table,
            "place",
            banded(table.places),
            n,
            lambda keys: "token " + either(list(map(name, keys))) + " of a document",
        ),
    ]
    if len(table.sources) > 1:
        found.append(
            lambda: _family(
                table, "source", _source_keys(table), len(table.sources),
                lambda keys: "source " + either([quoted(table.sources[k]) for k in keys]),
            )
        )  # fmt: skip
    return found


def _source_keys(table: TokenTable) -> Ids:
    if not len(table.source_of):
        return np.full(len(table.documents), -1, np.int32)
    return np.where(table.documents >= 0, table.source_of[table.documents], -1).astype(np.int32)


def _of_pairs(table: TokenTable) -> list[Maker]:
    """Two keys at once: a shape after a token, an entry in a source."""
    shape_of = np.array([shapes.shape_of(piece) for piece in table.pieces], np.int32)

    def pair(
        kind: str, left: Callable[[], Ids], right: Callable[[], Ids], one: Callable[[int, int], str], price: float
    ) -> Family:
        a, b = left(), right()
        hashes = np.empty(len(a), np.uint64)
        hashing.hash_pairs(a, b, hashes)
        keys, examples = _numbered_keys(table, hashes)
        a_of, b_of = a[examples], b[examples]
        return _family(
            table,
            kind,
            keys,
            len(examples),
            lambda keys: either([one(int(a_of[k]), int(b_of[k])) for k in keys]),
            price,
        )

    def shape_keys() -> Ids:
        return _by_entry(table, shape_of)

    def entry(key: int) -> str:
        return quoted(table.pieces[key])

    names = shapes.SHAPES
    found: list[Maker] = [
        lambda: pair("shape after", shape_keys, lambda: _shifted(table, table.vocab_ids, 1),
                     lambda s, v: f"{names[s]} after {entry(v)}", 0.01),
        lambda: pair("token after shape", lambda: table.vocab_ids, lambda: _shifted(table, shape_keys(), 1),
                     lambda v, s: f"{entry(v)} after {names[s]}", 0.01),
        lambda: pair("shape after shape", shape_keys, lambda: _shifted(table, shape_keys(), 1),
                     lambda s, v: f"{names[s]} after {names[v]}", 0.01),
        lambda: pair("skip-gram", lambda: table.vocab_ids, lambda: _shifted(table, table.vocab_ids, 2),
                     lambda v, w: f"{entry(v)} two tokens after {entry(w)}", 0.02),
    ]  # fmt: skip
    if len(table.sources) > 1:
        source = lambda: _source_keys(table)  # noqa: E731
        found += [
            lambda: pair("token in source", lambda: table.vocab_ids, source,
                         lambda v, s: f"{entry(v)} in source {quoted(table.sources[s])}", 0.02),
            lambda: pair("shape in source", shape_keys, source,
                         lambda v, s: f"{names[v]} in source {quoted(table.sources[s])}", 0.02),
            lambda: pair("after in source", lambda: _shifted(table, table.vocab_ids, 1), source,
                         lambda v, s: f"after {entry(v)} in source {quoted(table.sources[s])}", 0.02),
        ]  # fmt: skip
    return found
