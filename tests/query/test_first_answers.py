"""Every question that counts or chooses, against an answer found by looking at each token in turn."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from saeflow.pipeline import collect, compact, encode, train
from saeflow.pipeline import tokens as tokens_stage
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import ask
from saeflow.query.connection import check, connect
from saeflow.query.questions import questions
from saeflow.recipe.recipe import parse_recipe
from saeflow.store.store import Store
from tests.support.part_tables import Token, Value, band, bin_of, peak
from tests.support.small_pipeline import Ingredients, a_table, brought_data, quiet, recipe_data, write_table
from tests.support.small_store import Document, Given
from tests.support.stored_run import Stored

N_FEATURES = 5
Rows = list[dict[str, object]]


@st.composite
def a_document(draw: st.DrawFn, key: str) -> Document:
    """A text in pieces that may end in the midst of a letter."""
    raw = draw(st.text("aAb «€🐘\n", max_size=8)).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=12)))
    pieces = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    return Document(key, draw(st.sampled_from(["s", "t", None])), [piece for piece in pieces if piece])


@st.composite
def worlds(draw: st.DrawFn, signed: bool) -> Given:
    documents = [draw(a_document(f"d{i}")) for i in range(draw(st.integers(1, 5)))]
    hidden = draw(st.sets(st.integers(0, len(documents) - 1), max_size=1))
    skipped = draw(st.sampled_from([(), (0,), (1, 3)]))
    given = Given(
        documents=documents,
        n_parts=draw(st.integers(1, 3)),
        n_token_parts=draw(st.integers(1, 2)),
        n_buckets=draw(st.integers(0, 3)),
        skipped=skipped,
        hidden=sorted(hidden),
        signed=signed,
    )
    given.values = draw(values_of(given, skipped))
    shown = st.sampled_from([i / 8 - 1 for i in range(17)])
    features, entries = range(given.n_features), range(len(given.vocab))
    given.tables = {
        "similar": [
            {"feature_id": f, "other_id": g, "cosine": draw(shown)} for f in features for g in features if f != g
        ],
        "logits": [{"feature_id": f, "vocab_id": v, "logit": draw(shown)} for f in features for v in entries[:3]],
    }
    return given


@st.composite
def values_of(draw: st.DrawFn, given: Given, skipped: Sequence[int]) -> list[Value]:
    """Values with ties, of features of which the last never fires."""
    usable = [
        t.token_id
        for t in given.every_token()
        if t.document_id not in {None, *given.hidden} and t.position not in skipped
    ]
    cells = [(token, feature) for token in usable for feature in range(N_FEATURES - 1)]
    chosen = draw(st.lists(st.sampled_from(cells), unique=True, max_size=40)) if cells else []
    signs = st.sampled_from([1, -1] if given.signed else [1])
    return [(*cell, draw(signs) * draw(st.integers(1, 12)) / 8) for cell in sorted(chosen)]


@dataclass
class Slow:
    """The same questions, asked of the rows one by one."""

    given: Given | Stored
    other: Slow | None = None
    """The run that it is compared with."""

    @cached_property
    def features(self) -> list[int]:
        """Five features: three that fire most, one that fires least, one that does not fire, if there are such."""
        counts = Counter(feature for _, feature, _ in self.given.values)
        every = sorted(range(self.given.n_features), key=lambda feature: -counts[feature])
        rare = min(counts, key=counts.__getitem__, default=0)
        return [*every[:3], rare, every[-1]]

    @cached_property
    def sources(self) -> list[str]:
        found = Counter(token.source for token in self.tokens if token.source is not None)
        return [source for source, _ in found.most_common(2)] or ["s"]

    @cached_property
    def tokens(self) -> list[Token]:
        """Real tokens of visible documents."""
        return [t for t in self.given.every_token() if t.document_id not in {None, *self.given.hidden}]

    @cached_property
    def by_id(self) -> dict[int, Token]:
        return {token.token_id: token for token in self.tokens}

    @cached_property
    def value(self) -> dict[tuple[int, int], float]:
        return {(token, feature): value for token, feature, value in self.given.values}

    @cached_property
    def encoded(self) -> list[Token]:
        return [token for token in self.tokens if token.position not in self.given.skipped]

    @cached_property
    def _firing(self) -> dict[int, dict[int, float]]:
        found: dict[int, dict[int, float]] = defaultdict(dict)
        for token, feature, value in sorted(self.given.values):
            found[feature][token] = value
        return found

    def firing(self, feature: int) -> dict[int, float]:
        return self._firing.get(feature, {})

    def bytes_of(self, token: Token) -> bytes:
        return self.given.vocab[token.vocab_id]

    def piece(self, token_id: int) -> str:
        return self.bytes_of(self.by_id[token_id]).decode("utf-8", "replace")

    def key(self, token_id: int) -> str:
        return self.given.documents[self.owner(token_id)].key

    def owner(self, token_id: int) -> int:
        owner = self.by_id[token_id].document_id
        assert owner is not None
        return owner

    def text(self, document: int) -> str:
        return b"".join(self.given.documents[document].pieces).decode()

    def strongest(self, feature: int, n: int) -> list[int]:
        firing = self.firing(feature)
        return sorted(firing, key=lambda token: (-abs(firing[token]), token))[:n]

    def beyond(self, token: int, feature: int, threshold: float) -> bool:
        """True if the feature fires at the token, on the side of the threshold and beyond it."""
        value = self.value.get((token, feature), 0.0)
        return value < threshold if self.given.signed and threshold < 0 else value > max(threshold, 0.0)

    def usual(self, feature: int) -> float:
        values = list(self.firing(feature).values())
        if self.given.signed:
            return math.sqrt(math.fsum(value**2 for value in values) / len(values))
        return math.fsum(values) / len(values)


Ask = Callable[..., Rows]


def tokens_where(slow: Slow, ask: Ask) -> None:
    for feature in slow.features:
        for threshold in (0.0, 0.5, math.inf, -0.4, -1e-9, -math.inf):
            expected = [
                (t, v, slow.piece(t), slow.key(t), slow.by_id[t].source, t % slow.given.length)
                for t, v in slow.firing(feature).items()
                if slow.beyond(t, feature, threshold)
            ]
            assert [tuple(row.values()) for row in ask("tokens_where", feature, threshold)] == expected


def tokens_where_all(slow: Slow, ask: Ask) -> None:
    a, b, c, *_ = slow.features
    for features, thresholds in (
        ([a, b], [0.0, 0.0]),
        ([c, a, c], [0.25, 0.5, 0.75]),
        ([a, b], [-0.1, 0]),
        ([a, 2**40], [0, 0]),
    ):
        wanted = list(zip(features, thresholds, strict=True))
        expected = [
            (t.token_id, [slow.value[t.token_id, f] for f in features])
            for t in slow.tokens
            if all(slow.beyond(t.token_id, f, threshold) for f, threshold in wanted)
        ]
        rows = ask("tokens_where_all", features, thresholds)
        assert [(row["token_id"], row["feature_values"]) for row in rows] == expected


def tokens_where_within(slow: Slow, ask: Ask) -> None:
    a, b, c, *_ = slow.features
    for features, window in (([a, b], 0), ([a, b], 2), ([b, c, a], 3), ([a, a], 1)):
        thresholds = [(0.25, -0.2)[i % 2] if slow.given.signed else 0.25 for i in range(len(features))]
        expected = []
        for end in slow.tokens:
            inside = [slow.by_id.get(end.token_id - back) for back in range(window + 1)]
            mine = [t.token_id for t in inside if t is not None and t.document_id == end.document_id]
            wanted = zip(features, thresholds, strict=True)
            near = [max((t for t in mine if slow.beyond(t, *each)), default=None) for each in wanted]
            if None not in near and end.token_id in near:
                expected.append((end.token_id, near, slow.key(end.token_id)))
        rows = ask("tokens_where_within", features, thresholds, window)
        assert [(row["token_id"], row["token_ids"], row["key"]) for row in rows] == expected


def top_tokens_and_contexts(slow: Slow, ask: Ask) -> None:
    feature = slow.features[0]
    for n in (0, 3, 30):
        best = slow.strongest(feature, n)
        rows = ask("top_tokens", feature, n)
        assert [row["token_id"] for row in rows] == best
        shown = ask("contexts", feature, n, 10_000, 10_000)
        assert [row["token_id"] for row in shown] == best
        for row, token in zip(shown, best, strict=True):
            mine = [t.token_id for t in slow.tokens if t.document_id == slow.owner(token)]
            assert "".join(row["pieces"]) == slow.text(slow.owner(token))
            assert row["feature_values"] == [slow.value.get((t, feature), 0) for t in mine]
            assert mine[row["place"] - 1] == token
        for row in ask("contexts", feature, n, 1, 2):
            assert row["place"] <= 2
            assert len(row["pieces"]) <= 4
            assert row["feature_values"][row["place"] - 1] == row["value"]


def context(slow: Slow, ask: Ask) -> None:
    every = slow.given.every_token()
    for token in every[:: max(1, len(every) // 30)]:
        rows = ask("context", token.token_id, 10_000, 10_000)
        assert len(rows) == (token.token_id in slow.by_id)
        for row in rows:
            whole = str(row["text_before"]) + str(row["token_text"]) + str(row["text_after"])
            assert whole == slow.text(slow.owner(token.token_id))


def top_documents(slow: Slow, ask: Ask) -> None:
    found = defaultdict(list)
    for token, value in slow.firing(slow.features[0]).items():
        found[slow.owner(token)].append(value)
    first = {i: min(t.token_id for t in slow.tokens if t.document_id == i) for i in found}
    ordered = sorted(found, key=lambda i: (-math.fsum(map(abs, found[i])), first[i]))
    expected = [(-math.fsum(found[i]), i, len(found[i]), peak(found[i])) for i in ordered]
    rows = ask("top_documents", slow.features[0], 3)
    assert [(-row["sum_value"], row["document_id"], row["n_tokens"], row["max_value"]) for row in rows] == expected[:3]
    for row in rows:
        n_tokens = len(slow.given.documents[row["document_id"]].pieces)
        assert row["rate"] == row["n_tokens"] / n_tokens
        best = next(t for t in slow.strongest(slow.features[0], 10**6) if slow.owner(t) == row["document_id"])
        assert slow.value[row["top_token_id"], slow.features[0]] == row["max_value"]
        assert row["top_token_id"] == best or row["max_value"] == -slow.value[best, slow.features[0]]


def feature_histogram(slow: Slow, ask: Ask) -> None:
    values = list(slow.firing(slow.features[0]).values())
    rows = ask("feature_histogram", slow.features[0])
    assert sum(row["n_tokens"] for row in rows) == len(values)
    assert len(rows) == len({bin_of(value) for value in values})
    for row in rows:
        low, high = sorted((abs(row["from_value"]), abs(row["to_value"])))
        side = [abs(value) for value in values if (value < 0) == (row["from_value"] < 0)]
        assert row["from_value"] < row["to_value"]
        assert row["n_tokens"] == sum(low <= size < high for size in side) > 0
        assert row["share"] == row["n_tokens"] / len(values)


def drawn(tokens: Iterable[int], n: int, seed: int) -> set[int]:
    """n of the tokens at random: the first by MD5 of "seed:token", on every machine."""
    return set(sorted(tokens, key=lambda token: hashlib.md5(f"{seed}:{token}".encode()).hexdigest())[:n])


def feature_quantile_examples(slow: Slow, ask: Ask) -> None:
    a, b, *_, dead = slow.features
    for feature, bands, n, seed in ((a, 3, 2, 0), (a, 1, 99, 7), (b, 99, 1, -1), (dead, 2, 2, 0)):
        firing, expected = slow.firing(feature), []
        ordered = slow.strongest(feature, len(firing))
        size = min(bands, len(ordered))
        for number in range(size):
            mine = [token for i, token in enumerate(ordered) if i * size // len(ordered) == number]
            values = [abs(firing[token]) for token in mine]
            whole = (number + 1, len(mine), min(values), max(values))
            expected += [(*whole, t, firing[t], slow.piece(t)) for t in ordered if t in drawn(mine, n, seed)]
        rows = ask("feature_quantile_examples", feature, bands, n, seed)
        assert [tuple(row.values())[:7] for row in rows] == expected


def near_misses(slow: Slow, ask: Ask) -> None:
    firing = slow.firing(slow.features[0])
    counts: dict[int, int] = defaultdict(int)
    for token in firing:
        counts[slow.by_id[token].vocab_id] += 1
    entry = min(counts, key=lambda vocab_id: (-counts[vocab_id], vocab_id), default=None)
    same = [t.token_id for t in slow.encoded if t.vocab_id == entry]
    silent = [t for t in same if t not in firing]
    for n, seed in ((2, 0), (1, 5), (99, 0), (0, 0)):
        rows = ask("near_misses", slow.features[0], n, seed)
        assert [row["token_id"] for row in rows] == sorted(drawn(silent, n, seed))
        for row in rows:
            assert (row["n_silent"], row["n_fired"]) == (len(silent), len(same) - len(silent))
            assert row["key"] == slow.key(row["token_id"])


def coactivation(slow: Slow, ask: Ask) -> None:
    feature = slow.features[0]
    for shift in (0, 1, -1, 2, 2**62, -(2**63)):
        mine, expected = slow.firing(feature), {}
        for other in range(slow.given.n_features):
            theirs = slow.firing(other)
            both = [
                t
                for t in mine
                if t + shift in theirs
                and slow.owner(t + shift) == slow.owner(t)
                and (t + shift) // slow.given.length == t // slow.given.length
            ]
            if both and (shift or other != feature):
                union = len(mine) + len(theirs) - len(both)
                pmi = math.log2(len(both) * len(slow.encoded) / len(mine) / len(theirs))
                expected[other] = (len(both), len(mine), len(theirs), len(both) / union, pytest.approx(pmi))
        rows = ask("coactivation", feature, shift)
        assert {row["other_id"]: tuple(row.values())[1:] for row in rows} == expected
        assert [row["jaccard"] for row in rows] == sorted((row["jaccard"] for row in rows), reverse=True)
        if shift == 0:
            stored = {row["other_id"]: row for row in ask("coactive_features", feature)}
            assert stored.keys() == expected.keys()
            for other, row in stored.items():
                assert (row["n_both"], row["n_other"], row["jaccard"]) == (
                    expected[other][0], expected[other][2], expected[other][3],
                )  # fmt: skip


def spelt(slow: Slow, text: str) -> list[list[int]]:
    """Runs of tokens that are the text, whatever its case."""
    found: list[list[int]] = []
    goal = text.strip(" \t\n\r").lower()
    for first in range(len(slow.tokens) if goal else 0):
        for n in range(1, len(slow.tokens) - first + 1):
            run = slow.tokens[first : first + n]
            ends = [slow.bytes_of(run[0]).strip(b" \t\n\r"), slow.bytes_of(run[-1]).strip(b" \t\n\r")]
            if run[-1].document_id != run[0].document_id or not ends[0]:
                break
            spelling = b"".join(map(slow.bytes_of, run)).decode("utf-8", "replace").strip(" \t\n\r").lower()
            if spelling == goal and ends[1] and "\ufffd" not in spelling:
                found.append([t.token_id for t in run])
            if not goal.startswith(spelling.rstrip("\ufffd")):
                break
    return found


def features_on(slow: Slow, ask: Ask) -> None:
    encoded = {token.token_id for token in slow.encoded}
    whole = max(map(slow.text, {t.document_id for t in slow.tokens}), key=len, default="")
    for text in ("a", "AB", "a b", "€", "🐘a", "«", " ", "", "zz", whole, whole[:-1].upper()):
        places = [mine for run in spelt(slow, text) if (mine := encoded.intersection(run))]
        tokens, expected = set().union(*places), {}
        for feature in range(slow.given.n_features):
            firing = slow.firing(feature)
            n = len(tokens & set(firing))
            if n:
                share, density = n / len(tokens), len(firing) / len(slow.encoded)
                peaks = [max(abs(firing.get(token, 0)) for token in place) for place in places]
                strength = math.fsum(peaks) / len(peaks) / slow.usual(feature)
                score = -strength * math.log2(density)
                expected[feature] = pytest.approx((n, share, density, share / density, strength, score))
        rows = ask("features_on", text, 99)
        assert {row["feature_id"]: tuple(row.values())[2:] for row in rows} == expected
        order = [(-row["score"], row["feature_id"]) for row in rows]
        assert order == sorted(order)
        assert ask("features_on", text, 1) == rows[:1]


def source_contrast(slow: Slow, ask: Ask) -> None:
    first, second = slow.sources[0], slow.sources[-1]
    rows = {row["feature_id"]: row for row in ask("source_contrast", first, second)}
    assert sorted(rows) == list(range(slow.given.n_features))
    totals = {source: sum(t.source == source for t in slow.encoded) for source in (first, second)}
    for feature, row in rows.items():
        rates = {}
        for source, side in ((first, "a"), (second, "b")):
            values = [v for t, v in slow.firing(feature).items() if slow.by_id[t].source == source]
            rates[side] = len(values) / totals[source] if totals[source] else None
            assert (row[f"n_tokens_{side}"], row[f"rate_{side}"]) == (len(values), rates[side])
            assert row[f"mean_value_{side}"] == (pytest.approx(sum(values) / len(values), abs=1e-9) if values else None)
        if None in rates.values():
            assert row["cohens_h"] is None
        else:
            angles = [2 * math.asin(math.sqrt(rates[side])) for side in "ab"]
            assert row["cohens_h"] == pytest.approx(angles[0] - angles[1])


def position_profile(slow: Slow, ask: Ask) -> None:
    firing = slow.firing(slow.features[0])
    rows = ask("position_profile", slow.features[0])
    assert [row["first_position"] for row in rows] == sorted(
        {0 if t.position == 0 else 1 << (band(t.position) - 1) for t in slow.encoded}
    )
    for row in rows:
        inside = [t for t in slow.encoded if row["first_position"] <= t.position <= row["last_position"]]
        values = [firing[t.token_id] for t in inside if t.token_id in firing]
        assert (row["n_encoded"], row["n_tokens"], row["rate"]) == (len(inside), len(values), len(values) / len(inside))
        assert row["mean_value"] == (pytest.approx(sum(values) / len(values), abs=1e-9) if values else None)


def compare_sources(slow: Slow, ask: Ask) -> None:
    first, second = slow.sources[0], slow.sources[-1]
    rows = ask("compare_sources", first, second)
    stored = {row["feature_id"]: row for row in ask("source_contrast", first, second)}
    totals = {source: sum(t.source == source for t in slow.encoded) for source in (first, second)}
    assert sorted(row["feature_id"] for row in rows) == list(range(slow.given.n_features))
    for row in rows:
        for source, side in ((first, "a"), (second, "b")):
            values = [v for t, v in slow.firing(row["feature_id"]).items() if slow.by_id[t].source == source]
            assert row[f"n_tokens_{side}"] == len(values)
            assert row[f"rate_{side}"] == (len(values) / totals[source] if totals[source] else None)
            assert row[f"mean_value_{side}"] == (pytest.approx(sum(values) / len(values), abs=1e-9) if values else None)
        assert row["log2_ratio"] == stored[row["feature_id"]]["log2_ratio"]
    order = [(-abs(row["rate_difference"]), row["feature_id"]) for row in rows if row["rate_difference"] is not None]
    assert order == sorted(order)


def summaries(slow: Slow, ask: Ask) -> None:
    rows = ask("feature_summary")
    assert [row["feature_id"] for row in rows] == list(range(slow.given.n_features))
    for row in rows:
        values = list(slow.firing(row["feature_id"]).values())
        assert row["n_tokens"] == len(values)
        assert row["density"] == (len(values) / len(slow.encoded) if slow.encoded else None)
        assert row["max_value"] == peak(values)
        assert row["mean_value"] == (pytest.approx(np.mean(values), abs=1e-9) if values else None)
        assert row["std_value"] == (pytest.approx(np.std(values), abs=1e-3) if values else None)


def feature_kind(slow: Slow, ask: Ask) -> None:
    bands = Counter(band(t.position) for t in slow.encoded)
    narrow = {b for b, n in bands.items() if n / len(slow.encoded) <= 0.25}
    rows = ask("feature_kind")
    assert [row["feature_id"] for row in rows] == list(range(slow.given.n_features))
    for row in rows:
        mine = [slow.by_id[t] for t in slow.firing(row["feature_id"])]
        n, density = len(mine), len(mine) / max(len(slow.encoded), 1)
        entries, places = Counter(t.vocab_id for t in mine), Counter(band(t.position) for t in mine)
        kind = (
            "dead" if not n
            else "rare" if n < 10 or density < 1e-6
            else "dense" if density > 0.1
            else "single-token" if max(entries.values()) >= 0.9 * n
            else "position" if max((places[b] for b in narrow), default=0) >= 0.9 * n
            else "other"
        )  # fmt: skip
        assert (row["kind"], row["n_tokens"]) == (kind, n)
        if n:
            entry = min(entries, key=lambda vocab_id: (-entries[vocab_id], vocab_id))
            assert (row["vocab_id"], row["vocab_share"]) == (entry, entries[entry] / n)
            assert row["band_share"] == max(places.values()) / n


def token_features(slow: Slow, ask: Ask) -> None:
    for token in [*slow.tokens[:5], *slow.tokens[-2:]]:
        mine = [(v, f) for (t, f), v in slow.value.items() if t == token.token_id]
        rows = ask("token_features", token.token_id)
        assert [(row["value"], row["feature_id"]) for row in rows] == sorted(
            mine, key=lambda pair: (-abs(pair[0]), pair[1])
        )


def views(slow: Slow, ask: Ask) -> None:
    rows = ask("tokens")
    expected = [
        (t.token_id, t.vocab_id, slow.piece(t.token_id), t.document_id, slow.key(t.token_id), t.source, t.position)
        for t in slow.tokens
    ]
    assert [tuple(row.values())[:7] for row in rows] == expected  # test_offsets has the characters
    visible = [i for i in range(len(slow.given.documents)) if i not in slow.given.hidden]
    rows = ask("documents")
    assert [(row["document_id"], row["n_tokens"]) for row in rows] == [
        (i, len(slow.given.documents[i].pieces)) for i in visible
    ]
    with_tokens = [i for i in visible if slow.given.documents[i].pieces]
    assert [row["document_id"] for row in ask("find_documents")] == with_tokens[:50]
    assert [row["is_current"] for row in ask("runs")][:1] == [True]
    assert ask("feature_labels") == []


def search_token(slow: Slow, ask: Ask) -> None:
    for text in ("a", "A", " ", "€", ""):
        expected = []
        for vocab_id, entry in enumerate(slow.given.vocab):
            piece = entry.decode("utf-8", "replace")
            mine = [t.token_id for t in slow.tokens if t.vocab_id == vocab_id]
            if text.lower() in piece.lower():
                expected.append((len(piece), -len(mine), vocab_id, piece, min(mine, default=None)))
        rows = ask("search_token", text)
        found = [(len(r["piece"]), -r["n_tokens"], r["vocab_id"], r["piece"], r["first_token_id"]) for r in rows]
        assert found == sorted(expected)


def stored_tables(slow: Slow, ask: Ask) -> None:
    for feature in range(slow.given.n_features):
        for question, table, name in (("similar_features", "similar", "cosine"), ("feature_logits", "logits", "logit")):
            key = "other_id" if table == "similar" else "vocab_id"
            mine = [row for row in slow.given.tables.get(table, ()) if row["feature_id"] == feature]
            expected = [(row[name], row[key]) for row in sorted(mine, key=lambda row: (-row[name], row[key]))]
            assert [(row[name], row[key]) for row in ask(question, feature)] == expected


def feature_words(slow: Slow, ask: Ask) -> None:
    spelt = [entry.decode("utf-8", "replace") for entry in slow.given.vocab]
    rows = ask("feature_words", list(range(slow.given.n_features)))
    assert [row["feature_id"] for row in rows] == list(range(slow.given.n_features))
    for row in rows:
        up = [each for each in ask("feature_logits", row["feature_id"]) if each["logit"] > 0]
        assert row["promotes"] == [each["piece"] for each in up[:3]]
        n_fired = Counter(slow.by_id[token].vocab_id for token in slow.firing(row["feature_id"]))
        commonest = sorted(n_fired, key=lambda entry: (-n_fired[entry], entry))[:3]
        if len(n_fired) <= 10:  # else a part keeps the 10 commonest alone, and sums are lower bounds
            assert row["pieces"] == [spelt[entry] for entry in commonest]


def decoder_cosines(slow: Slow, ask: Ask) -> None:
    nearest: dict[int, float] = {}
    for row in slow.given.tables.get("similar", ()):
        nearest[row["feature_id"]] = max(row["cosine"], nearest.get(row["feature_id"], -1.0))
    bins = Counter(min(math.floor(cosine * 20), 19) for cosine in nearest.values())
    rows = ask("decoder_cosines")
    assert [(row["from_cosine"], row["n_features"]) for row in rows] == [(b / 20, n) for b, n in sorted(bins.items())]


def compare_runs(slow: Slow, ask: Ask) -> None:
    """Of the tokens that both runs encoded, each pair is counted."""
    other = slow.other or slow
    both = {t.token_id for t in slow.encoded} & {t.token_id for t in other.encoded}
    for least in (1, 2, 10):
        counts = [[len(both.intersection(run.firing(f))) for f in range(run.given.n_features)] for run in (slow, other)]
        expected = []
        for feature, n_a in enumerate(counts[0]):
            best: tuple[Any, ...] = (None,) * 5
            for match, n_b in enumerate(counts[1]):
                n_both = len(both.intersection(slow.firing(feature), other.firing(match)))
                jaccard = n_both / max(n_a + n_b - n_both, 1)
                if n_both and min(n_a, n_b) >= least and (best[1] is None or jaccard > best[1]):
                    best = (match, jaccard, n_both, n_a, n_b)
            expected.append((feature, *best))
        expected.sort(key=lambda row: (row[2] is None, -(row[2] or 0), row[0]))
        rows = ask("compare_runs", slow.given.name, other.given.name, least)
        assert [tuple(row.values())[:6] for row in rows] == expected


def wilson(hits: int, total: int, side: int) -> float:
    """An end of the 95% interval of a share: the root of (p - share)² = 1.96² p (1 - p) / total on this side."""
    if total == 0:
        return 0.0 if side < 0 else 1.0
    share, z = hits / total, 1.96
    middle, half = share + z * z / 2 / total, z * math.sqrt(share * (1 - share) / total + (z / 2 / total) ** 2)
    return (middle + side * half) / (1 + z * z / total)


def features_of_selection(slow: Slow, ask: Ask) -> None:
    encoded = {token.token_id for token in slow.encoded}
    every = [token.token_id for token in slow.given.every_token()]
    for chosen in (every[:5] or [0], every[1:900:3] or [0], every[-1:] or [0], every[:900] or [0], [10**9]):
        mine = encoded.intersection(chosen)
        others, expected = len(encoded - mine), {}
        for feature in range(slow.given.n_features):
            firing = slow.firing(feature)
            values = [value for token, value in firing.items() if token in mine]
            if values:
                n, rest = len(values), len(encoded.intersection(firing)) - len(values)
                share, rest_share = n / len(mine), rest / others if others else None
                low, high = wilson(n, len(mine), -1), wilson(rest, others, 1)
                row = (n, share, rest, rest_share, share / rest_share if rest_share else None)
                expected[feature] = pytest.approx((*row, np.mean(values), low * math.log2(low / high)), abs=1e-9)
        rows = ask("features_of_selection", "", [*chosen, chosen[0]], 99)
        assert {row["feature_id"]: tuple(row.values())[2:] for row in rows} == expected
        order = [(-row["score"], row["feature_id"]) for row in rows]
        assert order == sorted(order)
        assert ask("features_of_selection", "", chosen, 1) == rows[:1]


def absorption(slow: Slow, ask: Ask) -> None:
    """Each token of the class is looked at by itself: who fires, who pulls most."""
    encoded = {token.token_id for token in slow.encoded}
    every = [token.token_id for token in slow.given.every_token()][:900] or [0]
    cosines: dict[tuple[int, int], float] = {}
    for row in slow.given.tables.get("similar", ()):
        for pair in ((row["feature_id"], row["other_id"]), (row["other_id"], row["feature_id"])):
            cosines[pair] = max(row["cosine"], cosines.get(pair, -2.0))
    a, b, *_, dead = slow.features
    firing = [slow.firing(feature) for feature in range(slow.given.n_features)]
    for tokens, generals, *least in (
        (every, [], 0.9, 0.1, 0.25), (every[::2], [a], 0.0, -1.0, 0.1), (every[1::3] or [0], [b, a], 0.3, 0.2, 0.0),
        (every, [dead], 0.0, 0.0, 0.0),
    ):  # fmt: skip
        members = encoded.intersection(tokens)
        inside = [len(members.intersection(each)) for each in firing]
        telling = [row["feature_id"] for row in ask("features_of_selection", "", tokens, 1)]
        mains = generals or telling
        heard = {token for main in mains for token in members.intersection(firing[main])}
        absorbed = Counter[int]()
        for token in members - heard:
            pulls = [
                (-(firing[f][token] * cosines[f, main] / slow.usual(main)), f, main)
                for f in range(slow.given.n_features)
                for main in mains
                if token in firing[f] and (f, main) in cosines and firing[main]
            ]
            pull, best, main = min(pulls, default=(math.inf, -1, -1))
            is_specific = best >= 0 and inside[best] / len(firing[best]) >= least[0] and inside[best] < len(heard)
            if is_specific and cosines[best, main] >= least[1] and -pull >= least[2]:
                absorbed[best] += 1
        rows = ask("absorption", "", tokens, generals, *least)
        n, total = len(members), sum(absorbed.values())
        whole = (sorted(mains) or None, n, n - len(heard), total, total / n if n else None)
        assert {tuple(row.values())[:5] == whole for row in rows} == {True}
        found = [(row["feature_id"], row["n_absorbed"]) for row in rows if row["feature_id"] is not None]
        assert found == sorted(absorbed.items(), key=lambda item: (-item[1], item[0]))
        for row in rows if absorbed else ():
            assert row["share"] == row["n_absorbed"] / n
            assert row["precision"] == inside[row["feature_id"]] / len(firing[row["feature_id"]])


def split_features(slow: Slow, ask: Ask) -> None:
    other = slow.other or slow
    both = {t.token_id for t in slow.encoded} & {t.token_id for t in other.encoded}
    for feature in slow.features:
        mine = both.intersection(slow.firing(feature))
        for least in (0.0, 0.5, 1.0):
            theirs = {f: both.intersection(other.firing(f)) for f in range(other.given.n_features)}
            shares = {f: len(mine & tokens) / len(tokens) for f, tokens in theirs.items() if mine & tokens}
            ordered = sorted((f for f in shares if shares[f] >= least), key=lambda f: (-len(mine & theirs[f]), f))
            covered, expected = set[int](), []
            for f in ordered:
                covered |= mine & theirs[f]
                n_both, n_other = len(mine & theirs[f]), len(theirs[f])
                row = (f, len(mine), n_other, n_both, shares[f], n_both / len(mine), len(covered) / len(mine))
                expected.append((*row, n_both / (len(mine) + n_other - n_both), None))
            rows = ask("split_features", feature, other.given.name, 10, least)
            assert [tuple(row.values()) for row in rows] == expected[:10]


def correlate_runs(slow: Slow, ask: Ask) -> None:
    other = slow.other or slow
    both = sorted({t.token_id for t in slow.encoded} & {t.token_id for t in other.encoded})
    pairs = [(f, g) for f in slow.features for g in other.features]
    rows = ask("correlate_runs", slow.given.name, other.given.name, *map(list, zip(*pairs, strict=True)))
    assert [(row["feature_id"], row["match_id"]) for row in rows] == pairs
    for row in rows:
        one, two = slow.firing(row["feature_id"]), other.firing(row["match_id"])
        x, y = ([each.get(token, 0.0) for token in both] for each in (one, two))
        counts = [
            sum(v != 0 for v in x),
            sum(v != 0 for v in y),
            sum(v != 0 and w != 0 for v, w in zip(x, y, strict=True)),
        ]
        assert [row["n_a"], row["n_b"], row["n_both"], row["n_all"]] == [*counts, len(both)]
        union = counts[0] + counts[1] - counts[2]
        assert row["jaccard"] == (counts[2] / union if union else None)
        if both and len(set(x)) > 1 and len(set(y)) > 1:
            assert row["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


QUESTIONS = {
    tokens_where: "tokens_where", tokens_where_all: "tokens_where_all", tokens_where_within: "tokens_where_within",
    top_tokens_and_contexts: "top_tokens contexts", context: "context", top_documents: "top_documents",
    feature_histogram: "feature_histogram", feature_quantile_examples: "feature_quantile_examples",
    near_misses: "near_misses", coactivation: "coactivation coactive_features", features_on: "features_on",
    source_contrast: "source_contrast", compare_sources: "compare_sources", position_profile: "position_profile",
    summaries: "feature_summary", feature_kind: "feature_kind", token_features: "token_features",
    views: "tokens documents find_documents runs feature_labels", search_token: "search_token",
    stored_tables: "similar_features feature_logits", feature_words: "feature_words", compare_runs: "compare_runs",
    decoder_cosines: "decoder_cosines", features_of_selection: "features_of_selection", absorption: "absorption",
    split_features: "split_features", correlate_runs: "correlate_runs",
}  # fmt: skip


def test_every_question_has_a_slow_answer_to_be_compared_with():
    elsewhere = {
        "features_of_text",
        "text_tokens",
        "tokens_of_span",
        "features_by_role",
        "left_out",
        "runs_on_same_tokens",
    }
    elsewhere |= {"find_features", "count_features", "sources", "density_and_max", "density_histogram"}
    elsewhere |= {"document_tokens", "document_features"}
    elsewhere |= {"annotations", "annotated_tokens"}  # tests/classes
    elsewhere |= {"approximate_coactivation", "approximate_count_where_all", "count_where_all"}  # test_approximation
    elsewhere |= {f"approximate_{name}" for name in ("contrast_within", "features_by_role", "features_on")}
    elsewhere |= {"approximate_features_of_selection"}  # test_estimates
    elsewhere |= {"summary_within", "histogram_within", "contrast_within", "coactivation_within"}  # test_ranges
    elsewhere |= {"feature_rules"}  # test_rules counts what its rules say
    elsewhere |= {"effect_contexts", "effects_on_entries", "feature_effects"}  # tests/meaning/test_effects.py
    elsewhere |= {"explanation_scores", "explanation_mistakes"}  # test_explainer
    elsewhere |= {"annotations", "annotated_tokens", "feature_classes", "features_of_class", "classes_of_feature"}
    elsewhere |= {"sparse_probes"}  # tests/classes
    elsewhere |= {"metrics", "settings", "stages", "training_curve"}  # test_run_records reads what they were made from
    elsewhere |= {"labels_of_feature", "tokens_in_text"}  # test_sql
    elsewhere |= {"class_in_text", "measured_effects", "scores_of_labels"}  # test_meaning_of_features
    # test_new_text, test_offsets, test_chats, test_leave_out, test_sql, test_lists and test_documents_and_tokens ask
    # these; test_filtered_answers and test_documents_and_tokens ask those with a filter
    stored = [
        question.name
        for question in questions()
        if question.name not in elsewhere and "without_feature" not in {each.name for each in question.parameters}
    ]
    assert sorted(" ".join(QUESTIONS.values()).split()) == stored


@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.long
@pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])
def test_every_question_answers_what_looking_at_each_token_answers(signed, data):
    world = data.draw(worlds(signed))
    values = data.draw(values_of(world, world.skipped[:1]))
    other = replace(
        world, values=values, skipped=world.skipped[:1], name="other", fp="f0000000", corpus=("demo", "f0000001")
    )
    slow = Slow(world, Slow(other))
    with tempfile.TemporaryDirectory() as folder:
        other.write(Path(folder))
        with connect(world.write(Path(folder)), threads=1) as connection:
            for question in QUESTIONS:
                note(question.__name__)
                question(slow, lambda name, *arguments: ask(connection, name, arguments).to_pylist())
            assert [name for name, rows in check(connection) if rows.num_rows] == []


@pytest.fixture(
    scope="module",
    params=[
        "topk isolated",
        pytest.param("jumprelu compacted", marks=pytest.mark.long),
        pytest.param("a table", marks=pytest.mark.long),
        "a signed table",
    ],
)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Slow:
    """A run that the stages made: its values are what is in its files."""
    folder = tmp_path_factory.mktemp("stored")
    store = Store.create(folder / "store")
    if request.param == "a table":
        table = np.maximum(a_table(), 0)
        table[::7] = 0
        source = write_table(folder / "t.npy", table)
        recipes = [parse_recipe(brought_data(source, corpus={"held_out": 0.2}, sae={"n_features": 24, "k": 3}))]
    elif request.param == "a signed table":
        source = write_table(folder / "t.npy", a_table())
        sae, tokens = {"architecture": "abstopk", "n_features": 24, "k": 3}, {"part_tokens": 200}
        recipes = [parse_recipe(brought_data(source, corpus={"held_out": 0.2}, sae=sae, tokens=tokens))]
    else:
        about: dict[str, Any] = {"corpus": {"held_out": 0.2}, "sae": {"n_features": 24, "k": 3}}
        if request.param == "topk isolated":
            about |= {"tokens": {"packing": "isolated", "part_tokens": 10**6}}
            about["sae"] |= {"architecture": "topk"}
        else:
            about |= {"tokens": {"part_tokens": 800}, "activations": {"skip_positions": [0]}}
            about["sae"] |= {"architecture": "jumprelu"}
        first = recipe_data(Ingredients.write(folder), **about)
        second = first | {"name": "other", "data": "small", "sae": first["sae"] | {"seed": 1, "n_features": 20}}
        recipes = [parse_recipe(data) for data in (second, first)]
        for stage in (tokens_stage, collect):
            stage.run(Lineage(store, recipes[0]).anew(), quiet())
    for recipe in recipes:
        stages = (import_table, train, encode) if request.param.endswith("table") else (train, encode)
        for stage in stages:
            stage.run(Lineage(store, recipe), quiet())
    if request.param == "topk isolated":
        forget.forget(store, ["tales/002", "letters/003"], quiet())
        for recipe in recipes:
            encode.run(Lineage(store, recipe), quiet())
    if request.param in ("jumprelu compacted", "a signed table"):
        for recipe in recipes:
            compact.run(Lineage(store, recipe), quiet(), enough=2)
    if request.param == "a signed table":
        assert {value > 0 for *_, value in Stored(store, Lineage(store, recipes[0]).features).values} == {True, False}
    runs = [Slow(Stored(store, Lineage(store, recipe).features)) for recipe in recipes]
    return replace(runs[-1], other=runs[0])


@pytest.mark.long
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
def test_a_question_about_a_run_of_the_stages_answers_what_its_values_answer(stored, question, asked):
    question(stored, asked)


@pytest.fixture(scope="module")
def asked(stored: Slow) -> Iterator[Ask]:
    with connect(stored.given.store, stored.given.name) as connection:
        yield lambda name, *arguments: ask(connection, name, arguments).to_pylist()


def test_a_run_of_the_stages_passes_every_check(stored):
    with connect(stored.given.store, stored.given.name) as connection:
        assert [name for name, rows in check(connection) if rows.num_rows] == []
