"""Questions under a filter, against an answer found by looking at each token in turn."""

from __future__ import annotations

import datetime
import itertools
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from saeflow.query.ask import ask, resolve_names
from saeflow.query.connection import connect
from saeflow.query.questions import find_question, parse_arguments
from saeflow.runtime.errors import UserError
from tests.query.test_first_answers import Rows, Slow, drawn, values_of, worlds
from tests.support.part_tables import bin_of, peak
from tests.support.small_store import DOCUMENTS, Document, Given

Ask = Callable[..., Rows]
WINDOWS = ((12, 12), (1, 0), (0, 0))


@dataclass
class Filter:
    """The filter of a question, applied to one token at a time."""

    slow: Slow
    source: str | None = None
    document_key: str | None = None
    since: str | None = None
    until: str | None = None
    role: str | None = None
    threshold: float = 0.0
    with_feature: int | None = None
    without_feature: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "slow" and value is not None}

    @property
    def features(self) -> list[int]:
        """One that fires often, one that fires seldom, one that is dead."""
        often, *_, seldom, dead = self.slow.features
        return [often, seldom, dead]

    def encoded(self) -> list[int]:
        return [token.token_id for token in self.slow.encoded if self._passes(token.token_id)]

    def firing(self, feature: int) -> dict[int, float]:
        return {
            token: value
            for token, value in self.slow.firing(feature).items()
            if self._passes(token) and (self.threshold == 0 or self.slow.beyond(token, feature, self.threshold))
        }

    def _passes(self, token: int) -> bool:
        given, owner = self.slow.given, self.slow.owner(token)
        date = given.metadata["published"][owner].as_py() if given.metadata else None
        return (
            self.source in (None, given.documents[owner].source)
            and self.document_key in (None, given.documents[owner].key)
            and (self.since is None or (date is not None and date >= self.since))
            and (self.until is None or (date is not None and date < self.until))
            and self.role in (None, given.roles.get(token))
            and (self.with_feature is None or token in self.slow.firing(self.with_feature))
            and (self.without_feature is None or token not in self.slow.firing(self.without_feature))
        )

    def window(self, token: int, before: int, after: int) -> tuple[Any, ...]:
        """The entries around a token, and its place among them."""
        mine = [t for t in self.slow.tokens if t.document_id == self.slow.owner(token)]
        place = [t.token_id for t in mine].index(token)
        first = max(0, place - before)
        return place - first, tuple(t.vocab_id for t in mine[first : place + after + 1])

    def once(self, tokens: list[int], before: int, after: int) -> dict[int, int]:
        """The first of all tokens with the same window, and how many there are."""
        copies: dict[Any, list[int]] = defaultdict(list)
        for token in tokens:
            copies[self.window(token, before, after)].append(token)
        return {same[0]: len(same) for same in copies.values()}


def the_context_is_right(filter: Filter, row: dict[str, Any], feature: int, before: int, after: int) -> None:
    slow, token = filter.slow, row["token_id"]
    mine = [t.token_id for t in slow.tokens if t.document_id == slow.owner(token)]
    place = mine.index(token)
    shown = mine[max(0, place - before) : place + after + 1]
    assert row["feature_values"] == [slow.value.get((t, feature), 0) for t in shown]
    assert shown[row["place"] - 1] == token
    assert row["feature_values"][row["place"] - 1] == row["value"]
    assert len(row["pieces"]) == len(shown)
    assert (row["key"], row["source"]) == (slow.key(token), slow.by_id[token].source)
    assert row["position"] == slow.by_id[token].position
    if shown == mine:
        assert "".join(row["pieces"]) == slow.text(slow.owner(token))


def feature_numbers(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        values = filter.firing(feature)
        (row,) = ask("feature_numbers", feature=feature)
        n = len(filter.encoded())
        assert (row["n_tokens"], row["n_encoded"], row["density"]) == (len(values), n, len(values) / n if n else None)
        assert row["n_documents"] == len({filter.slow.owner(token) for token in values})
        assert row["max_value"] == peak(values.values())
        shape = (np.mean(list(values.values())), np.std(list(values.values()))) if values else (None, None)
        assert (row["mean_value"], row["std_value"]) == pytest.approx(shape, abs=1e-9)


def feature_values(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        bins = Counter(map(bin_of, filter.firing(feature).values()))
        rows = ask("feature_values", feature=feature)
        assert [row["n_tokens"] for row in rows] == [bins[each] for each in sorted(bins)]
        assert [row["share"] for row in rows] == [bins[each] / bins.total() for each in sorted(bins)]
        if not filter.arguments.keys() - {"threshold"} and filter.threshold == 0:
            assert rows == ask("feature_histogram", feature=feature)


def feature_contexts(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        firing = filter.firing(feature)
        ordered = sorted(firing, key=lambda token: (-abs(firing[token]), token))
        for n, (before, after) in zip((2, 99, 99), WINDOWS, strict=True):
            once = list(filter.once(ordered, before, after).items())[:n]
            rows = ask("feature_contexts", feature=feature, n=n, before=before, after=after)
            assert [(row["token_id"], row["n_copies"]) for row in rows] == once
            for row in rows:
                the_context_is_right(filter, row, feature, before, after)


def feature_bands(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        firing = filter.firing(feature)
        ordered = sorted(firing, key=lambda token: (-abs(firing[token]), token))
        for bands, n, seed, (before, after) in ((3, 2, 0, WINDOWS[0]), (1, 99, 7, WINDOWS[2]), (99, 1, -1, WINDOWS[1])):
            expected, size = [], min(bands, len(ordered))
            for number in range(size):
                mine = [token for i, token in enumerate(ordered) if i * size // len(ordered) == number]
                values = [abs(firing[token]) for token in mine]
                once = filter.once(in_draw(mine, seed), before, after)
                whole = (number + 1, len(mine), min(values), max(values))
                chosen = sorted(list(once)[:n], key=ordered.index)
                expected += [(*whole, token, firing[token], once[token]) for token in chosen]
            rows = ask("feature_bands", feature=feature, bands=bands, n=n, seed=seed, before=before, after=after)
            names = ("band", "n_tokens", "low_value", "high_value", "token_id", "value", "n_copies")
            assert [tuple(row[name] for name in names) for row in rows] == expected
            assert sum({row["band"]: row["n_tokens"] for row in rows}.values()) == len(firing)
            for row in rows:
                assert row["low_value"] <= abs(row["value"]) <= row["high_value"]
                the_context_is_right(filter, row, feature, before, after)


def random_contexts(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        firing = filter.firing(feature)
        for n, seed, (before, after) in zip((2, 99, 0), (0, 5, 0), WINDOWS, strict=True):
            once = list(filter.once(in_draw(list(firing), seed), before, after).items())[:n]
            rows = ask("random_contexts", feature=feature, n=n, seed=seed, before=before, after=after)
            assert [(row["token_id"], row["n_copies"]) for row in rows] == once
            for row in rows:
                assert row["value"] == firing[row["token_id"]]
                the_context_is_right(filter, row, feature, before, after)


def near_miss_contexts(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        firing = filter.firing(feature)
        counts = Counter(filter.slow.by_id[token].vocab_id for token in firing)
        commonest = min(counts, key=lambda vocab_id: (-counts[vocab_id], vocab_id), default=None)
        fired = filter.slow.firing(feature)
        named = filter.slow.tokens[0].vocab_id if filter.slow.tokens else None
        for n, seed, vocab, (before, after) in zip((2, 99, 0), (0, 5, 0), (None, named, None), WINDOWS, strict=True):
            entry = commonest if vocab is None else vocab
            silent = [t for t in filter.encoded() if filter.slow.by_id[t].vocab_id == entry and t not in fired]
            once = list(filter.once(in_draw(silent, seed), before, after).items())[:n]
            rows = ask("near_miss_contexts", feature=feature, n=n, seed=seed, before=before, after=after, vocab=vocab)
            assert [(row["token_id"], row["n_copies"]) for row in rows] == once
            for row in rows:
                assert (row["n_silent"], row["n_fired"], row["value"]) == (len(silent), counts[entry], 0)
                the_context_is_right(filter, row, feature, before, after)


def feature_entries(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        found = defaultdict(list)
        for token, value in filter.firing(feature).items():
            found[filter.slow.by_id[token].vocab_id].append(value)
        ordered = sorted(found, key=lambda entry: (-len(found[entry]), entry))[:2]
        n = len(filter.firing(feature))
        expected = [
            (entry, filter.slow.given.vocab[entry].decode("utf-8", "replace"), len(found[entry]), len(found[entry]) / n)
            for entry in ordered
        ]
        rows = ask("feature_entries", feature=feature, n=2)
        assert [tuple(row.values())[:4] for row in rows] == expected
        assert [row["mean_value"] for row in rows] == pytest.approx([np.mean(found[entry]) for entry in ordered])


def feature_documents(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        found: dict[int, dict[int, float]] = defaultdict(dict)
        for token, value in filter.firing(feature).items():
            found[filter.slow.owner(token)][token] = value
        ordered = sorted(found, key=lambda i: (-math.fsum(map(abs, found[i].values())), i))[:3]
        rows = ask("feature_documents", feature=feature, n=3)
        assert [row["document_id"] for row in rows] == ordered
        for row in rows:
            mine = found[row["document_id"]]
            assert row["rate"] == len(mine) / len(filter.slow.given.documents[row["document_id"]].pieces)
            assert (row["n_tokens"], row["sum_value"]) == (len(mine), pytest.approx(math.fsum(mine.values())))
            assert (row["max_value"], mine[row["top_token_id"]]) == (peak(mine.values()),) * 2


def feature_sources(filter: Filter, ask: Ask) -> None:
    for feature in filter.features:
        sizes = Counter(filter.slow.by_id[token].source for token in filter.encoded())
        found = defaultdict(list)
        for token, value in filter.firing(feature).items():
            found[filter.slow.by_id[token].source].append(value)
        rows = ask("feature_sources", feature=feature)
        assert {row["source"]: (row["n_tokens"], row["n_encoded"]) for row in rows} == {
            source: (len(found[source]), n) for source, n in sizes.items()
        }
        for row in rows:
            mine = found[row["source"]]
            assert (row["rate"], row["max_value"]) == (len(mine) / row["n_encoded"], peak(mine))
            assert row["mean_value"] == (pytest.approx(np.mean(mine)) if mine else None)
            documents = Counter(
                filter.slow.by_id[token].document_id
                for token in filter.firing(feature)
                if filter.slow.by_id[token].source == row["source"]
            )
            largest = max(documents.values()) / len(mine) if mine else None
            assert (row["n_documents"], row["largest_share"]) == (len(documents), largest)
        assert [row["rate"] for row in rows] == sorted((row["rate"] for row in rows), reverse=True)


def feature_companions(filter: Filter, ask: Ask) -> None:
    encoded = set(filter.encoded())
    for feature in filter.features:
        mine, expected = set(filter.firing(feature)), []
        for other in range(filter.slow.given.n_features):
            both, n_other = len(mine & set(filter.slow.firing(other))), len(encoded & set(filter.slow.firing(other)))
            if both and other != feature:
                jaccard = both / (len(mine) + n_other - both)
                pmi = math.log2(both * len(encoded) / (len(mine) * n_other))
                expected.append((-jaccard, -both, other, len(mine), n_other, pytest.approx(pmi)))
        rows = ask("feature_companions", feature=feature, n=60)  # more than are stored: counted
        found = [
            (-row["jaccard"], -row["n_both"], row["other_id"], row["n_feature"], row["n_other"], row["pmi"])
            for row in rows
        ]
        assert found == sorted(expected, key=lambda row: row[:3])
        assert ask("feature_companions", feature=feature, n=3) == rows[:3]


def feature_examples(filter: Filter, ask: Ask) -> None:
    """Its parts are the answers of the questions that it gathers; random tokens are drawn apart."""
    for feature, (before, after) in itertools.product(filter.features, WINDOWS[:2]):
        wide = {"feature": feature, "before": before, "after": after, "seed": 3}
        rows = ask("feature_examples", **wide, n_strongest=5, bands=3, n_band=2, n_random=4)
        parts = {part: [row for row in rows if row["part"] == part] for part in ("strongest", "band", "random")}
        assert rows == [row for part in parts.values() for row in part]
        strongest = ask("feature_contexts", feature=feature, before=before, after=after, n=5)
        assert [{name: row[name] for name in strongest[0]} for row in parts["strongest"]] == strongest
        bands = ask("feature_bands", **wide, bands=3, n=2)
        assert [{name: row[name] for name in bands[0]} for row in parts["band"]] == bands
        firing = filter.firing(feature)
        assert len(parts["random"]) == min(4, len(filter.once(list(firing), before, after)))
        for row in parts["random"]:
            assert row["value"] == firing[row["token_id"]]
            the_context_is_right(filter, row, feature, before, after)


def in_draw(tokens: list[int], seed: int) -> list[int]:
    """The tokens in the order in which they are drawn."""
    rest, found = set(tokens), []
    while rest:
        found += drawn(rest, 1, seed)
        rest -= {found[-1]}
    return found


FILTERED = (
    feature_numbers, feature_values, feature_contexts, feature_bands, random_contexts, near_miss_contexts,
    feature_entries, feature_documents, feature_sources, feature_companions,
    feature_examples,
)  # fmt: skip


@st.composite
def filters(draw: st.DrawFn, slow: Slow) -> Filter:
    """A filter of one to three conditions."""
    given = slow.given
    assert isinstance(given, Given)
    feature = st.sampled_from(slow.features[:4])
    conditions = {
        "source": st.sampled_from(["s", "t"]),
        "document_key": st.sampled_from([document.key for document in given.documents]),
        "since": st.sampled_from(["1812", "1813-05"]),
        "until": st.sampled_from(["1813", "1814"]),
        "role": st.sampled_from(["user", "assistant"]),
        "threshold": st.sampled_from([0.5, 0.125, -0.25]),
        "with_feature": feature,
        "without_feature": feature,
    }
    chosen = draw(st.lists(st.sampled_from(sorted(conditions)), min_size=1, max_size=3, unique=True))
    return Filter(slow, **{name: draw(conditions[name]) for name in chosen})


@settings(max_examples=1, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("signed", [pytest.param(False, marks=pytest.mark.long), True], ids=["positive", "signed"])
def test_a_question_under_a_filter_answers_what_looking_at_each_token_answers(signed, data):
    world = data.draw(worlds(signed))
    world.documents += [Document("again", "s", world.documents[0].pieces)]
    world.values = data.draw(values_of(world, world.skipped))
    dates = st.sampled_from([None, "1811", "1813", "1813-05", "1813-05-01"])
    world.metadata = {"published": pa.array([data.draw(dates) for _ in world.documents], pa.string())}
    world.roles = {t.token_id: ("user", "assistant")[t.token_id // 3 % 2] for t in world.every_token()}
    slow = Slow(world)
    with tempfile.TemporaryDirectory() as folder, connect(world.write(Path(folder)), threads=1) as connection:
        for chosen in (Filter(slow), *(data.draw(filters(slow)) for _ in range(2))):
            note(str(chosen.arguments))
            for question in FILTERED:
                note(question.__name__)

                def asked(name: str, arguments=chosen.arguments, **own: object) -> Rows:
                    known = {each.name for each in find_question(name).parameters}
                    given = {key: value for key, value in arguments.items() if key in known}
                    return ask(connection, name, own | given).to_pylist()

                question(chosen, asked)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    documents = [
        Document("emma", "novels", [b"she", b" said", b" no", b"."]),
        Document("psalm", "bible", [b"he", b" said", b" no", b"."]),
    ]
    given = Given(
        documents=documents,
        values=[(1, 0, 1.0), (2, 0, 2.0), (5, 0, 3.0), (5, 1, 1.0)],
        roles={0: "user", 1: "user", 5: "assistant"},
        metadata={"year": pa.array([1815, None], pa.int64())},
    )
    with connect(given.write(tmp_path_factory.mktemp("two")), threads=1) as connection:
        yield connection


@pytest.mark.parametrize(
    ("filter", "found"),
    [
        ({}, (3, 8)),
        ({"source": "novels"}, (2, 4)),
        ({"document_key": "psalm"}, (1, 4)),
        ({"since": "1815"}, (2, 4)),
        ({"until": "1815"}, (0, 0)),
        ({"since": "1800-01-01", "until": "1815-01-02"}, (2, 4)),
        ({"role": "user"}, (1, 2)),
        ({"threshold": 1.0}, (2, 8)),
        ({"with_feature": 1}, (1, 1)),
        ({"without_feature": 1}, (2, 7)),
        ({"source": "novels", "role": "assistant"}, (0, 0)),
    ],
    ids=str,
)
def test_each_condition_of_the_filter_counts_its_own_tokens_and_all_that_could_fire(two, filter, found):
    (row,) = ask(two, "feature_numbers", {"feature": 0} | filter).to_pylist()
    assert (row["n_tokens"], row["n_encoded"]) == found


def test_copies_are_compared_as_sequences_and_counted(two):
    rows = ask(two, "feature_contexts", {"feature": 0, "before": 0, "after": 2}).to_pylist()
    assert [(row["value"], row["pieces"], row["n_copies"]) for row in rows] == [
        (3.0, [" said", " no", "."], 2),
        (2.0, [" no", "."], 1),
    ]


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"source": "novel"}, "There is no source 'novel'. Did you mean novels?"),
        ({"role": "usr"}, "There is no role 'usr'. Did you mean user?"),
        ({"document_key": "ema"}, "There is no document 'ema'. Did you mean emma?"),
        ({"with_feature": 9}, "There is no feature 9; features go from 0 to 3."),
        ({"without_feature": -1}, "There is no feature -1; features go from 0 to 3."),
        ({"since": "Lent"}, "since is 'Lent', but it must be a date such as 1813-01-28"),
        ({"until": "31.12.1813"}, "until is '31.12.1813', but it must be a date such as 1813-01-28"),
    ],
    ids=str,
)
def test_a_filter_that_names_nothing_is_refused_with_the_nearest_name(two, filter, message):
    question = find_question("feature_numbers")
    with pytest.raises(UserError) as refused:
        ask(two, question.name, resolve_names(two, question, parse_arguments(question, {"feature": 0} | filter)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("question", "words", "message"),
    [
        ("features_by_role", ["user", "assistant"], "There is no role 'user'. No token has a role"),
        ("feature_numbers", {"feature": 0, "role": "user"}, "There is no role 'user'. No token has a role"),
        ("compare_sources", ["novels", "bible"], "There is no source 'novels'. No document has one"),
        (
            "features_of_class",
            {"annotation": "pos", "class": "noun"},
            "There is no annotation 'pos'. There are none yet: saeflow annotate",
        ),
    ],
)
def test_where_the_corpus_has_no_such_names_at_all_the_error_says_what_would_give_some(
    tmp_path, question, words, message
):
    found = find_question(question)
    given = Given(documents=[Document("k", None, [b"a", b"b"])])
    with connect(given.write(tmp_path)) as connection, pytest.raises(UserError) as refused:
        resolve_names(connection, found, parse_arguments(found, words))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("1813", "1813-01-01 00:00:00"),
        ("1813-01", "1813-01-01 00:00:00"),
        ("1813-01-28", "1813-01-28 00:00:00"),
        ("1813-01-28T10:00:00Z", "1813-01-28 10:00:00"),
        ("1813-01-28 10:00:00+02:00", "1813-01-28 08:00:00"),
        ("1700000000.5", "2023-11-14 22:13:20.5"),
        ("28.1.1813", None),
        ("", None),
    ],
)
def test_dates_are_read_as_metadata_write_them(two, word, read):
    assert two.execute("select as_timestamp(?)::varchar", [word]).fetchone() == (read,)


@pytest.mark.long
@pytest.mark.parametrize(
    "column",
    [
        pa.array([datetime.date(1815, 12, 23), None]),
        pa.array(["1815", "soon"]),
        pa.array([datetime.datetime(1815, 12, 23), datetime.datetime(1611, 1, 1)]),
        pa.array([{"year": 1815}, None]),
    ],
    ids=["date", "text", "timestamp", "struct"],
)
def test_a_date_may_have_any_type_and_the_first_column_that_holds_one_counts(tmp_path, column):
    given = Given(documents=DOCUMENTS[:2], metadata={"created": column, "year": pa.array([1815, 1611])})
    with connect(given.write(tmp_path)) as connection:
        found = [
            ask(connection, "feature_numbers", {"feature": 0, **dates}).to_pylist()[0]["n_tokens"]
            for dates in ({"since": "1815", "until": "1816"}, {"since": "1600", "until": "1700"})
        ]
    assert found == [2, 2]


def test_a_question_under_no_filter_reads_no_tokens_but_those_of_the_feature(two):
    """Whatever the arguments rule out is gone from the plan."""
    plan = two.execute("explain from feature_values(0)").fetchall()[0][1]
    assert plan.upper().count("READ_PARQUET") == 1
    assert math.isclose(sum(row["share"] for row in ask(two, "feature_values", {"feature": 0}).to_pylist()), 1)


def test_examples_of_a_feature_that_fires_often_are_those_of_its_whole_bands(tmp_path: Path):
    """So often that not every draw is put in order."""
    pieces = [b" a", b" b", b" c", b" d", b" e"]
    words = [pieces[i * i * 7 % 11 % 5] for i in range(3_000)]
    world = Given([Document("long", "s", words)], [(i, 0, 1.0 + i * 37 % 101) for i in range(len(words))])
    with connect(world.write(tmp_path / "store"), threads=1) as connection:
        wide: dict[str, Any] = {"feature": 0, "before": 9, "after": 9}
        rows = ask(connection, "feature_examples", {**wide, "bands": 2, "n_band": 6, "n_random": 6}).to_pylist()
        bands = ask(connection, "feature_bands", {**wide, "bands": 2, "n": 6}).to_pylist()
        assert [{name: row[name] for name in bands[0]} for row in rows if row["part"] == "band"] == bands
        assert len({row["token_id"] for row in rows if row["part"] == "random"}) == 6
