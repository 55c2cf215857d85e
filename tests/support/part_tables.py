"""The tables of a part, derived from its values and tokens one by one: slow and obvious."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from saeflow.corpus.token_parts import BLOCK_TOKENS
from saeflow.features.schema import MOST_SOURCES, TOP, TOP_VOCAB

Value = tuple[int, int, float]
"""token_id, feature_id, value"""

Rows = list[dict[str, object]]


class Token(NamedTuple):
    """One place of a sequence; padding has no document."""

    token_id: int
    vocab_id: int
    document_id: int | None
    source: str | None
    position: int


def band(position: int) -> int:
    return 0 if position == 0 else 1 + int(math.log2(position))


def bin_of(value: float) -> int:
    if value < 0:
        return -2048 - bin_of(-value)
    exponent = math.floor(math.log2(value))
    return 4 * exponent + math.floor(4 * (value / 2.0**exponent - 1))


def peak(values: Iterable[float]) -> float | None:
    """The strongest, with its sign."""
    return max(values, key=lambda value: (abs(value), value), default=None)


def count_stats(values: Iterable[Value], n_features: int) -> list[dict[str, float]]:
    rows = []
    for feature_id in range(n_features):
        mine = [value for _, feature, value in values if feature == feature_id]
        rows.append(
            {
                "feature_id": feature_id,
                "n_tokens": len(mine),
                "sum_value": math.fsum(mine),
                "sum_squares": math.fsum(value**2 for value in mine),
                "max_value": peak(mine) or 0.0,
            }
        )
    return rows


def part_tables(
    values: Sequence[Value], tokens: Sequence[Token], n_features: int, skipped: Iterable[int] = (), signed: bool = False
) -> dict[str, Rows]:
    """`tokens` are those of the part, `skipped` the positions that are not encoded."""
    used = [token for token in tokens if token.document_id is not None and token.position not in set(skipped)]
    by_id = {token.token_id: token for token in tokens}
    known = [(by_id[t], f, v) for t, f, v in values if t in by_id and math.isfinite(v) and (v > 0 or (signed and v))]
    listed = {source for source, _ in Counter(token.source for token in used).most_common(MOST_SOURCES)}

    def side(token: Token) -> tuple[str | None, bool]:
        return (token.source, False) if token.source in listed else (None, True)

    histogram = Counter((f, bin_of(v)) for _, f, v in known)
    sources, positions, entries = defaultdict(list), defaultdict(list), defaultdict(list)
    for token, f, v in known:
        sources[f, *side(token)].append(v)
        positions[f, band(token.position)].append(v)
        entries[f, token.vocab_id].append(v)
    encoded = Counter((*side(token), band(token.position)) for token in used)
    return {
        "feature_stats": list(count_stats(values, n_features)),
        "feature_histogram": _rows("feature_id bin n_tokens", [(*key, n) for key, n in histogram.items()]),
        "feature_sources": _rows(
            "feature_id source is_rest n_tokens sum_value sum_squares",
            [(*key, len(vs), math.fsum(vs), math.fsum(v * v for v in vs)) for key, vs in sources.items()],
        ),
        "feature_positions": _rows(
            "feature_id band n_tokens sum_value", [(*key, len(vs), math.fsum(vs)) for key, vs in positions.items()]
        ),
        "feature_vocab": _rows(
            "feature_id vocab_id n_tokens sum_value",
            _most([(*key, len(vs), math.fsum(vs)) for key, vs in entries.items()], TOP_VOCAB),
        ),
        "coactivation": _rows("feature_id other_id n_both", _coactive(values)),
        "encoded_tokens": _rows("source is_rest band n_tokens", [(*key, n) for key, n in encoded.items()]),
    }


def sample_tables(values: Iterable[Value], encoded: Sequence[Token], keys: Sequence[str]) -> dict[str, Rows]:
    """The sample of documents of a part with these encoded tokens; `keys` are those of all documents."""
    mine = {token.token_id: token.document_id for token in encoded if token.document_id is not None}
    mine = {token_id: i for token_id, i in mine.items() if hashlib.md5(keys[i].encode()).hexdigest()[:2] < "04"}
    firsts = {i: min(token_id for token_id in mine if mine[token_id] == i) for i in mine.values()}
    counts = Counter(mine.values())
    return {
        "sample": _rows("token_id feature_id value", sorted((v for v in values if v[0] in mine), key=lambda v: v[1])),
        "sample_documents": _rows("document_id first_token_id n_tokens", [(i, firsts[i], counts[i]) for i in counts]),
    }


def _most(rows: list[tuple], n: int) -> list[tuple]:
    """Of each feature the n rows with most tokens."""
    ordered = sorted(rows, key=lambda row: (row[0], -row[2], row[1]))
    places: Counter[int] = Counter()
    return [row for row in ordered if (places.update([row[0]]) or places[row[0]]) <= n]


def _coactive(values: Iterable[Value]) -> list[tuple[int, int, int]]:
    tokens = defaultdict(set)
    for token, feature, _ in values:
        tokens[feature].add(token)
    found = []
    for feature, mine in sorted(tokens.items()):
        both = [(len(mine & others), other, len(mine | others)) for other, others in tokens.items() if other != feature]
        near = sorted((n for n in both if n[0]), key=lambda n: (-n[0] / n[2], n[1]))
        found += [(feature, other, n) for n, other, _ in near[:TOP]]
    return found


def blocks(tokens: Sequence[Token]) -> Rows:
    grouped = defaultdict(list)
    for token in tokens:
        grouped[token.token_id // BLOCK_TOKENS].append(token)
    return [
        {
            "block_id": block_id,
            "first_token_id": mine[0].token_id,
            "n_tokens": len(mine),
            "vocab_ids": b"".join(token.vocab_id.to_bytes(4, "big") for token in mine),
        }
        for block_id, mine in grouped.items()
    ]


def _rows(names: str, rows: Iterable[tuple]) -> Rows:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]
