"""A feature's examples: from every quantile band of its values, near misses, and random silent contexts.

The examples that explain and those that score are different tokens of different texts. All draws follow from the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import numpy as np

from saeflow.meaning.language_model.settings import ExampleCounts

READ = (
    "feature_examples", "near_miss_contexts", "token_surroundings", "tokens_of_feature", "token_owners", "token_pieces",
    "is_encoded", "stg_feature_stats", "stg_document_places", "stg_labels", "stg_shape", "strength",
)  # fmt: skip
"""Views and macros that this package reads: a connection needs no others."""

MARKED = 0.3
"""A token is marked if its strength is above this share of the strongest of its context, as in delphi."""

_SPARE = 3
"""Examples asked for and used: the strongest token of its context stands for it, and others are left aside."""

_BANDS = "from feature_examples(?, 0, ?, ?, 0, ?, ?, ?)"
_NEAR_MISSES = "from near_miss_contexts(?, ?, ?, ?, ?)"
_AROUND = (
    "select * from token_surroundings(?, (select list(fired) from (from tokens_of_feature(?)) as fired), ?, ?) "
    "order by token_id"
)
_ENCODED = "select token_id from token_pieces(?) as known where is_encoded(known.token_id, known.vocab_id)"
_OWNERS = "select token_id, document_id from token_owners(?)"
_LAST = "select max(end_token_id) from stg_document_places"
_STRONGEST = "select max(strength(max_value)) from stg_feature_stats where feature_id = ?"


@dataclass(frozen=True)
class Window:
    """Tokens around one token of a document, with the strength of the feature at each."""

    stratum: str
    """`band_1` (the strongest values) and so on, `near_misses` or `random`."""
    token_id: int
    document_id: int
    place: int
    """Place of the token among the pieces, from 0."""
    pieces: tuple[str, ...]
    strengths: tuple[float, ...]
    """Magnitudes, in the units of the activations."""

    @property
    def fires(self) -> bool:
        return max(self.strengths) > 0

    @cached_property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def active(self) -> tuple[int, ...]:
        """Places of the tokens that are marked in an example of the feature."""
        least = MARKED * max(self.strengths)
        return tuple(place for place, value in enumerate(self.strengths) if value > least)

    def overlaps(self, other: Window, n_tokens: int) -> bool:
        """True if the two share tokens or have the same text."""
        near = self.document_id == other.document_id and abs(self.token_id - other.token_id) < n_tokens
        return near or self.text == other.text


@dataclass(frozen=True)
class Examples:
    """The examples of one feature. Windows of `scoring` share no text with those of `explaining`."""

    feature: int
    strongest: float
    explaining: tuple[Window, ...]
    scoring: tuple[Window, ...]


def draw_examples(connection: duckdb.DuckDBPyConnection, feature: int, counts: ExampleCounts) -> Examples:
    """Read a feature's examples. There are fewer than asked for if the feature rarely fires, or is rarely silent.

    A window of a band has its strongest token in the middle, or as near to it as the document allows. Windows of near
    misses and of random tokens are silent throughout, so that no in detection is right for all of them.
    """
    reader = _ExampleReader(connection, feature, counts)
    bands = reader.bands()
    near = reader.near_misses()
    explaining = [window for windows in bands.values() for window in windows[: _share_to_explain(windows, counts)]]
    explaining += near[: _n_shown(near, counts)]
    scoring = list[Window]()
    for windows in bands.values():
        rest = windows[_share_to_explain(windows, counts) :]
        scoring += _apart(rest, explaining, scoring, counts.tokens)[: counts.score]
    rest = near[_n_shown(near, counts) :]
    scoring += _apart(rest, explaining, scoring, counts.tokens)[: counts.near_misses]
    scoring += _apart(reader.random(), explaining, scoring, counts.tokens)[: counts.random]
    return Examples(feature, reader.strongest(), tuple(explaining), tuple(scoring))


def _share_to_explain(windows: Sequence[Window], counts: ExampleCounts) -> int:
    """Return how many windows of a band explain. The only window of a band explains in every other band."""
    if len(windows) == 1:
        return int(windows[0].stratum.removeprefix("band_")) % 2
    wanted = counts.explain + counts.score
    return min(counts.explain, -(-len(windows) * counts.explain // wanted))


def _n_shown(near: Sequence[Window], counts: ExampleCounts) -> int:
    return min(counts.near_misses // 5, len(near) // 2)


def _apart(
    windows: Sequence[Window], explaining: Sequence[Window], chosen: Sequence[Window], n_tokens: int
) -> list[Window]:
    """Return the windows that share no text with those that explain, nor their text with one that is chosen."""
    texts = {window.text for window in chosen}
    found = []
    for window in windows:
        if window.text not in texts and not any(window.overlaps(other, n_tokens) for other in explaining):
            texts.add(window.text)
            found.append(window)
    return found


@dataclass
class _ExampleReader:
    connection: duckdb.DuckDBPyConnection
    feature: int
    counts: ExampleCounts

    def bands(self) -> dict[str, list[Window]]:
        """Return windows by band, the strongest band first, each in the order of its draw."""
        counts = self.counts
        n = _SPARE * (counts.explain + counts.score)
        rows = self._rows(_BANDS, self.feature, counts.bands, n, counts.before, counts.after, counts.seed)
        found: dict[str, list[Window]] = {}
        for row in rows:
            row["stratum"] = f"band_{row['band']}"
        for window in sorted(self._windows(rows), key=lambda window: self._draw(window.token_id)):
            if window.strengths[window.place] == max(window.strengths):
                found.setdefault(window.stratum, []).append(window)
        return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("band_"))))

    def near_misses(self) -> list[Window]:
        counts = self.counts
        n = _SPARE * (counts.near_misses + counts.near_misses // 5)
        rows = self._rows(_NEAR_MISSES, self.feature, n, counts.before, counts.after, counts.seed) if n else []
        return self._silent(rows, "near_misses")

    def random(self) -> list[Window]:
        """Return windows around random encoded tokens in which the feature is silent."""
        last = self.connection.execute(_LAST).fetchall()[0][0]
        found: list[Window] = []
        for spare in (2 * _SPARE, 20 * _SPARE):
            if last is not None and len(found) < self.counts.random:
                dice = np.random.default_rng([self.counts.seed, self.feature])
                ids = np.unique(dice.integers(0, last, spare * self.counts.random)).tolist()
                rows = self._rows(_AROUND, self._encoded(ids), self.feature, self.counts.before, self.counts.after)
                found = self._silent(rows, "random")
                found.sort(key=lambda window: self._draw(window.token_id))
        return found

    def strongest(self) -> float:
        found = self.connection.execute(_STRONGEST, [self.feature]).fetchall()[0][0]
        return float(found or 0)

    def _encoded(self, ids: list[int]) -> list[int]:
        return [row[0] for row in self.connection.execute(_ENCODED, [ids]).fetchall()]

    def _silent(self, rows: list[dict[str, Any]], stratum: str) -> list[Window]:
        for row in rows:
            row["stratum"] = stratum
        return [window for window in self._windows(rows) if not window.fires]

    def _rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        found = self.connection.execute(sql, list(values))
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def _windows(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Window]:
        ids = [row["token_id"] for row in rows]
        owners = dict(self.connection.execute(_OWNERS, [ids]).fetchall()) if ids else {}
        for row in rows:
            strengths = tuple(abs(float(value)) for value in row["feature_values"])
            if row["token_id"] in owners and "".join(row["pieces"]).strip():
                yield Window(
                    row["stratum"], row["token_id"], owners[row["token_id"]], row["place"] - 1, tuple(row["pieces"]),
                    strengths,
                )  # fmt: skip

    def _draw(self, token_id: int) -> bytes:
        return hashlib.blake2b(f"{self.counts.seed}:{token_id}".encode(), digest_size=8).digest()
