"""Estimates of contrasts, of a text's features and of chosen tokens: how often the intervals have the truth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction
from saeflow.query.ask import ask, query, resolve_names
from saeflow.query.connection import connect
from saeflow.query.outside import approximation
from saeflow.query.outside.approximation import estimate_of
from saeflow.query.questions import find_question, parse_arguments
from saeflow.runtime.errors import UserError
from saeflow.store.records import Hidden
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.query.test_approximation import (
    DOCUMENT_TOKENS,
    N_DOCUMENTS,
    SAMPLED,
    draw_sample,
    fewest_of,
    sampled_world,
    small,
)
from tests.support.small_pipeline import quiet
from tests.support.small_store import Document, Given

CHOSEN = pa.array(range(0, N_DOCUMENTS * DOCUMENT_TOKENS, 3))
ASKED: dict[str, dict[str, Any]] = {
    "features_on": {"text": "cat"},
    "features_of_selection": {"sql": "select …"},
    "features_by_role": {"a": "user", "b": "assistant"},
    "contrast_within": {"a": "s", "b": "t"},
}
"""Questions that have an estimate; the select is not run here, and `CHOSEN` are the tokens that it chooses."""

INTERVALS = {
    "features_on": [("n_tokens", "low", "high"), ("score", "score_low", "score_high")],
    "features_of_selection": [("n_tokens", "low", "high"), ("score", "score_low", "score_high")],
    **dict.fromkeys(
        ("features_by_role", "contrast_within"),
        [(rate, f"{rate}_low", f"{rate}_high") for rate in ("rate_a", "rate_b")] + [("cohens_h", "h_low", "h_high")],
    ),
}


def planted_world() -> Given:
    """Documents of two sources, with two words and two roles. A document has rates of its own, also on the word *cat*.

    Feature 0 fires often, 1 more in source s, 2 more on *cat* and for the user, and 3 seldom.
    """
    drawn, documents, values = random.Random(0), [], []
    for i in range(N_DOCUMENTS):
        pieces = [drawn.choice([b" cat", b" dog"]) for _ in range(DOCUMENT_TOKENS)]
        documents.append(Document(f"d{i}", "st"[i % 2], pieces))
        rates = [drawn.betavariate(*shape) for shape in ((0.4, 0.4), (0.3, 0.6), (0.3, 0.9), (0.3, 1.5))]
        for place, piece in enumerate(pieces):
            token = i * DOCUMENT_TOKENS + place
            shares = [1.0, 1.0 if i % 2 else 0.6, (1.0 if piece == b" cat" else 0.3) * (1 - place % 2 / 2), 1.0]
            fires = [drawn.random() < rate * share for rate, share in zip(rates, shares, strict=True)]
            values += [(token, feature, 0.5 + drawn.random()) for feature, fired in enumerate(fires) if fired]
    world = Given(documents=documents, values=values)
    world.roles = {token: ("user", "assistant")[token % 2] for token in range(N_DOCUMENTS * DOCUMENT_TOKENS)}
    return world


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Given, duckdb.DuckDBPyConnection]]:
    world = planted_world()
    with connect(world.write(tmp_path_factory.mktemp("planted")), threads=1) as connection:
        yield world, connection


def answer(connection: duckdb.DuckDBPyConnection, question: str, asked: str) -> dict[int, dict[str, Any]]:
    readings = CHOSEN if asked == "features_of_selection" else None
    rows = ask(connection, question, ASKED[asked], readings=readings).to_pylist()
    return {row["feature_id"]: row for row in rows}


@pytest.mark.parametrize("n_samples", [30, pytest.param(120, marks=pytest.mark.long)])
def test_of_many_samples_about_95_in_100_have_the_truth_in_each_interval(planted, n_samples):
    world, connection = planted
    truth = {question: answer(connection, question, question) for question in ASKED}
    hits: Counter[tuple[str, int, str]] = Counter()
    for seed in range(n_samples):
        draw_sample(world, connection, seed, share=1 / 16)
        for question in ASKED:
            for feature, row in answer(connection, f"approximate_{question}", question).items():
                for name, low, high in INTERVALS[question]:
                    assert row[low] <= row[name] <= row[high]
                    hits[question, feature, name] += row[low] <= truth[question][feature][name] <= row[high]
    assert len(hits) == 4 * sum(map(len, INTERVALS.values()))
    assert all(n >= fewest_of(n_samples) for n in hits.values()), hits
    for question, columns in INTERVALS.items():
        for name, *_ in columns:
            of_every_feature = sum(hits[question, feature, name] for feature in range(4))
            assert of_every_feature >= fewest_of(4 * n_samples), (question, name, hits)
    assert sum(hits.values()) < 0.985 * len(hits) * n_samples, "intervals are wider than need be"


def test_a_sample_of_all_documents_gives_the_exact_figures(planted):
    world, connection = planted
    draw_sample(world, connection, 0, share=1)
    for question in ASKED:
        exact, estimated = (answer(connection, name, question) for name in (question, f"approximate_{question}"))
        assert estimated.keys() == exact.keys() == {0, 1, 2, 3}
        for feature, row in estimated.items():
            same = exact[feature].keys() & row.keys()
            assert {name for name, *_ in INTERVALS[question]} < same
            assert {name: row[name] for name in same} == pytest.approx({name: exact[feature][name] for name in same})


def test_what_is_surely_largest_comes_first(planted):
    world, connection = planted
    draw_sample(world, connection, 5, share=1 / 4)
    for question in ("features_on", "features_of_selection"):
        lows = [row["score_low"] for row in answer(connection, f"approximate_{question}", question).values()]
        assert lows == sorted(lows, reverse=True)
    for question in ("features_by_role", "contrast_within"):
        rows = answer(connection, f"approximate_{question}", question).values()
        sure = [max(row["h_low"], -row["h_high"], 0) for row in rows]
        assert sure == sorted(sure, reverse=True)
        assert sure[0] > 0


def test_a_feature_that_one_side_of_the_sample_lacks_may_yet_fire_there(planted):
    world, connection = planted
    tokens = DOCUMENT_TOKENS * N_DOCUMENTS
    only = Given(documents=world.documents, values=[(t, 0, 1.0) for t in range(tokens) if t // DOCUMENT_TOKENS % 2])
    draw_sample(only, connection, 0, share=1 / 16)
    (row,) = answer(connection, "approximate_contrast_within", "contrast_within").values()
    assert (row["rate_a"], row["rate_b"]) == (0, 1)
    assert (row["rate_a_low"], row["rate_b_high"]) == pytest.approx((0, 1))
    assert 0 < row["rate_a_high"] < row["rate_b_low"] < 1
    assert row["h_low"] < row["h_high"]


def test_each_of_these_questions_is_estimated_if_it_reads_many_values(tmp_path, monkeypatch):
    roles = {token: ("user", "assistant")[token % 2] for token in range(240)}
    documents = [Document(key, "st"[i % 2], [b"x"] * 4) for i, key in enumerate(SAMPLED[:60])]
    dates = pa.array([str(1800 + i) for i in range(60)])
    with small(tmp_path, documents=documents, roles=roles, metadata={"published": dates}) as connection:
        asked = {
            "features_on": {"text": "x"},
            "features_of_selection": {"tokens": [1, 2, 3]},
            "features_by_role": {"a": "user", "b": "assistant"},
            "contrast_within": {"a": "s", "b": "t", "until": "1850"},
        }
        for question, arguments in asked.items():
            assert estimate(connection, question, **arguments) is None
            monkeypatch.setattr(approximation, "CHEAP_VALUES", 0)
            name, given = estimate(connection, question, **arguments)
            assert name == f"approximate_{question}"
            assert ask(connection, name, given).num_rows == 3
            monkeypatch.undo()


def estimate(connection: duckdb.DuckDBPyConnection, question: str, readings: Any = None, **arguments: object) -> Any:
    chosen = find_question(question)
    return estimate_of(connection, chosen, parse_arguments(chosen, arguments), readings)


def test_a_question_that_reads_few_values_is_answered_exactly_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 400)
    with small(tmp_path) as connection:
        assert estimate(connection, "features_on", text="no such word") is None
        assert estimate(connection, "features_on", text="x") is not None
        assert estimate(connection, "features_of_selection", pa.array([], pa.int64()), sql="select …") is None
        assert estimate(connection, "features_of_selection", pa.array([7]), sql="select …") is not None
    world = sampled_world(n_parts=1, n_token_parts=1)
    for i, document in enumerate(world.documents):
        document.source = "st"[i % 2]
    with connect(world.write(tmp_path / "sources")) as connection:
        asked = {"a": "s", "b": "t"}
        assert estimate(connection, "contrast_within", **asked) is None, "stored counts answer"
        assert estimate(connection, "contrast_within", **asked, from_part=0, to_part=0) is None


def test_a_range_that_cuts_parts_is_estimated_unless_few_features_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 150)
    dates = pa.array([str(1800 + i) for i in range(60)])
    documents = [Document(key, "st"[i % 2], [b"x"] * 4) for i, key in enumerate(SAMPLED[:60])]
    with small(tmp_path, documents=documents, metadata={"published": dates}) as connection:
        cut = {"a": "s", "b": "t", "since": "1810"}
        name, given = estimate(connection, "contrast_within", **cut)
        rows = ask(connection, name, given).to_pylist()
        exact = {row["feature_id"]: row for row in ask(connection, "contrast_within", cut).to_pylist()}
        assert [row["rate_a"] for row in rows] == [exact[row["feature_id"]]["rate_a"] for row in rows]
        assert [row["n_documents_a"] for row in rows] == [25] * 3
        assert estimate(connection, "contrast_within", **cut, features=[1]) is None
        assert estimate(connection, "contrast_within", a="s", b="t", since="1830") is None, "a whole part"


@pytest.mark.parametrize("without", [[1], [0, 1]], ids=["one part", "all parts"])
def test_estimates_need_a_sample_in_every_part(tmp_path, without):
    documents = [Document(key, "st"[i % 2], [b"x"] * 4) for i, key in enumerate(SAMPLED[:60])]
    roles = {token: ("user", "assistant")[token % 2] for token in range(240)}
    with small(tmp_path, without_sample=without, documents=documents, roles=roles) as connection:
        for question, arguments in {
            "features_on": ["x"], "features_by_role": ["user", "assistant"], "features_of_selection": ["", [1, 2]],
            "contrast_within": ["s", "t"], "coactivation": [0], "count_where_all": [[0, 1], [0, 0]],
        }.items():  # fmt: skip
            with pytest.raises(UserError, match="stored no sample: saeflow compact stores it"):
                ask(connection, f"approximate_{question}", arguments)


def test_a_share_has_no_upper_end_above_one(planted):
    _, connection = planted
    rows = query(connection, "select max(share_high(n, n)) as high from (select unnest(range(1, 3000)) as n)")
    assert rows.to_pylist() == [{"high": 1.0}]


def test_scores_of_a_dense_feature_in_a_large_selection_are_numbers(tmp_path):
    """A feature that fires nearly everywhere cannot fire on fewer chosen tokens than the others leave over."""
    fires = [t for t in range(320) if t % 53]
    chosen = [t for t in range(320) if t % 10]
    with small(tmp_path, values=[(t, 0, 1.0) for t in fires]) as connection:
        (exact,) = ask(connection, "features_of_selection", {"tokens": chosen}).to_pylist()
        (row,) = ask(connection, "approximate_features_of_selection", {"tokens": chosen}).to_pylist()
    assert len(fires) - (320 - len(chosen)) <= row["low"] <= row["n_tokens"] <= row["high"] <= len(chosen)
    assert row["low"] <= exact["n_tokens"] <= row["high"]
    assert 0 <= row["rest_share"] <= 1
    assert row["score_low"] <= row["score"] <= row["score_high"]
    assert row["score_low"] <= exact["score"] <= row["score_high"]


def test_one_sampled_document_says_nothing_about_how_its_score_varies(tmp_path):
    documents = [Document(key, None, [b"cat" if i == 0 else b"x"] * 4) for i, key in enumerate(SAMPLED[:40])]
    values = [(t, 0, 1.0) for t in range(0, 160, 3)]
    with small(tmp_path, documents=documents, values=values, n_parts=1, n_token_parts=1) as connection:
        (row,) = ask(connection, "approximate_features_on", ["cat"]).to_pylist()
    assert (row["n_documents"], row["score_low"], row["score_high"]) == (1, None, None)
    assert row["low"] <= row["n_tokens"] <= row["high"]


def test_roles_that_do_not_exist_and_one_role_twice(tmp_path):
    roles = {token: ("user", "assistant")[token % 2] for token in range(320)}
    with small(tmp_path, roles=roles) as connection:
        for question in ("features_by_role", "approximate_features_by_role"):
            chosen = find_question(question)
            with pytest.raises(UserError, match="There is no role 'asistant'"):
                resolve_names(connection, chosen, parse_arguments(chosen, ["user", "asistant"]))
            rows = ask(connection, question, ["user", "user"]).to_pylist()
            assert max(row["rate_b"] for row in rows) > 0
            assert [(row["rate_a"], row["cohens_h"]) for row in rows] == [(row["rate_b"], 0) for row in rows]


@pytest.mark.parametrize("arguments", [{"since": "yesterday"}, {"until": "1813-13"}], ids=str)
def test_a_wrong_date_is_named_before_an_estimate_too(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 0)
    documents = [Document(key, "st"[i % 2], [b"x"] * 4) for i, key in enumerate(SAMPLED[:60])]
    with small(tmp_path, documents=documents) as connection:
        (wrong,) = arguments.values()
        with pytest.raises(UserError, match=wrong):
            estimate(connection, "contrast_within", a="s", b="t", **arguments)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    """A run of one merged part. The second of its parts of tokens has lost a document since: its values are hidden."""
    store = Store.create(tmp_path_factory.mktemp("forgetful"))
    run = _made_run.make(store, 1 << 17, part_tokens=[1 << 12, 1 << 12], n_features=16)
    tokens = store.by_id(run.record.inputs[0])
    used, parts = TokenSelection(tokens), run.published().parts
    with quiet().bar("compact", None, "values") as bar:
        for group in compaction.plan_merges(parts, used.spans):
            compaction.replace_group(run, group, compaction.merge_whole_parts(run, used, group, bar), clear=True)
    gone = Hidden(document_id=tokens.published().parts[1].counts["first_document"], key_hash="1", reason="forgotten")
    tokens.publish(tokens.published().parts, hidden={1: (gone,)})
    with connect(store, threads=1) as connection:
        assert query(connection, "select count(*) as n from stg_hidden_values").to_pylist() == [{"n": 1}]
        yield connection


SHOWN = """
select values.feature_id, places.source, token_id
from stg_feature_major as values
asof join stg_document_places as places on values.token_id >= places.first_token_id
"""
ENCODED = """
select count(*) as n
from stg_tokens_encoded
asof join stg_document_places as places on stg_tokens_encoded.token_id >= places.first_token_id
where places.source = ? or ? is null
"""


@pytest.mark.parametrize("source", [None, "source 0", "source 1"])
def test_while_values_are_hidden_ranges_are_counted_from_those_that_are_shown(forgetful, source):
    shown: dict[int, set[int]] = {}
    for row in query(forgetful, SHOWN).to_pylist():
        if source in (None, row["source"]):
            shown.setdefault(row["feature_id"], set()).add(row["token_id"])
    ((n_encoded,),) = forgetful.execute(ENCODED, [source, source]).fetchall()
    asked = {} if source is None else {"source": source}
    summary = {row["feature_id"]: row for row in ask(forgetful, "summary_within", asked).to_pylist()}
    for feature, tokens in shown.items():
        assert (summary[feature]["n_tokens"], summary[feature]["density"]) == (len(tokens), len(tokens) / n_encoded)
        bins = ask(forgetful, "histogram_within", {"feature": feature, **asked}).to_pylist()
        assert sum(row["n_tokens"] for row in bins) == len(tokens)
    pairs = ask(forgetful, "coactivation_within", {"feature": 0, **asked}).to_pylist()
    assert len(pairs) == len(shown) - 1
    for row in pairs:
        other = shown[row["other_id"]]
        assert (row["n_both"], row["n_feature"], row["n_other"]) == (len(shown[0] & other), len(shown[0]), len(other))
    if source:
        rows = ask(forgetful, "contrast_within", [source, "source 2"]).to_pylist()
        assert {row["feature_id"]: row["n_tokens_a"] for row in rows} == {f: len(each) for f, each in shown.items()}
        numbers = ask(forgetful, "feature_numbers", {"feature": 0, "source": source}).to_pylist()
        assert (numbers[0]["n_tokens"], numbers[0]["n_encoded"]) == (len(shown[0]), n_encoded)


def test_while_values_are_hidden_no_count_is_estimated_from_stored_counts(forgetful, monkeypatch):
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 0)
    monkeypatch.setattr(approximation, "FEWEST_DOCUMENTS", 0)
    for question, arguments in {
        "coactivation": {"feature": 0}, "count_where_all": {"features": [0, 1], "thresholds": [0.0, 0.0]},
    }.items():  # fmt: skip
        assert estimate(forgetful, question, **arguments) is None
        with pytest.raises(UserError, match="saeflow encode RECIPE shows them again"):
            ask(forgetful, f"approximate_{question}", arguments)
    assert estimate(forgetful, "contrast_within", a="source 0", b="source 1") is not None
