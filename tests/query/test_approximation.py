"""Estimates from a sample of documents: how often the interval has the truth, and when an estimate is given."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.features.sample import is_sampled
from saeflow.features.schema import SAMPLE_TABLES
from saeflow.query.ask import ask
from saeflow.query.connection import check, connect
from saeflow.query.outside import approximation
from saeflow.query.outside.approximation import estimate_of
from saeflow.query.questions import find_question, parse_arguments
from saeflow.query.runs import runs
from saeflow.runtime.errors import UserError
from tests.support.part_tables import Value
from tests.support.small_store import Document, Given

N_DOCUMENTS, DOCUMENT_TOKENS = 1200, 8
KEYS = [f"d{i}" for i in range(5000)]
SAMPLED = [key for key in KEYS if is_sampled(key)]
OTHERS = [key for key in KEYS if not is_sampled(key)]


def planted_values() -> list[Value]:
    """Feature 0 fires at a rate of each document's own, and at its tokens 1 often, 2 seldom, and 3 in few documents."""
    drawn, found = random.Random(0), []
    for i in range(N_DOCUMENTS):
        rate, often, seldom = drawn.betavariate(1, 2), drawn.betavariate(3, 2), drawn.betavariate(1, 12)
        topical = i % 12 == 0
        for token in range(i * DOCUMENT_TOKENS, (i + 1) * DOCUMENT_TOKENS):
            fires = [drawn.random() < share for share in (rate, often, seldom, 0.9 * topical)]
            value = 1 + drawn.random()
            if fires[0]:
                found += [(token, feature, value) for feature, fired in enumerate(fires) if fired]
            elif drawn.random() < 0.05:
                found.append((token, 1, value))
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Given, duckdb.DuckDBPyConnection]]:
    documents = [Document(f"d{i}", None, [b"x"] * DOCUMENT_TOKENS) for i in range(N_DOCUMENTS)]
    world = Given(documents=documents, values=planted_values())
    with connect(world.write(tmp_path_factory.mktemp("planted")), threads=1) as connection:
        yield world, connection


def draw_sample(world: Given, connection: duckdb.DuckDBPyConnection, seed: int, share: float) -> None:
    """Show another sample of documents: those whose hash with this seed is low."""
    hashes = [hashlib.md5(f"{seed}:{document.key}".encode()).hexdigest()[:8] for document in world.documents]
    chosen = np.array([int(each, 16) for each in hashes]) < share * 2**32
    tokens, features, values = map(np.array, zip(*world.values, strict=True))
    mine, ids = chosen[tokens // DOCUMENT_TOKENS], np.flatnonzero(chosen)
    tables = {
        "sample": [features[mine], tokens[mine], values[mine]],
        "sample_documents": [ids, ids * DOCUMENT_TOKENS, np.full(len(ids), DOCUMENT_TOKENS)],
    }
    for name, columns in tables.items():
        arrays = [pa.array(each, field.type) for each, field in zip(columns, SAMPLE_TABLES[name], strict=True)]
        connection.register("drawn", pa.table(arrays, schema=SAMPLE_TABLES[name]))
        connection.execute(f"create or replace table kept_{name} as from drawn")
        connection.execute(f"create or replace view src_{name} as from kept_{name}")


def fewest_of(n: int) -> int:
    """Return how many of n intervals of 95% have the truth at least, but for one of ten thousand tests."""
    chances = [math.comb(n, k) * 0.95**k * 0.05 ** (n - k) for k in range(n + 1)]
    return next(k for k in range(n) if sum(chances[: k + 1]) > 1e-4)


@pytest.mark.parametrize("n_samples", [40, pytest.param(400, marks=pytest.mark.long)])
def test_of_many_samples_about_95_in_100_have_the_truth_in_the_interval(planted, n_samples):
    world, connection = planted
    truth = {row["other_id"]: row["n_both"] for row in ask(connection, "coactivation", [0]).to_pylist()}
    thresholds = [1.3, 1.0]
    (joint,) = ask(connection, "count_where_all", [[1, 0], thresholds]).to_pylist()
    hits: Counter[str] = Counter()
    for seed in range(n_samples):
        draw_sample(world, connection, seed, share=1 / 16)
        for row in ask(connection, "approximate_coactivation", [0]).to_pylist():
            assert row["low"] <= row["n_both"] <= row["high"]
            hits[str(row["other_id"])] += row["low"] <= truth[row["other_id"]] <= row["high"]
        (row,) = ask(connection, "approximate_count_where_all", [[1, 0], thresholds]).to_pylist()
        hits["joint"] += row["low"] <= joint["n_tokens"] <= row["high"]
    assert sorted(hits) == ["1", "2", "3", "joint"]
    assert all(n >= fewest_of(n_samples) for n in hits.values()), hits
    assert sum(hits.values()) < 0.985 * 4 * n_samples, "intervals are wider than need be"


def test_a_sample_of_all_documents_counts_exactly_and_its_interval_has_the_count(planted):
    world, connection = planted
    draw_sample(world, connection, 0, share=1)
    exact = {row["other_id"]: row for row in ask(connection, "coactivation", [0]).to_pylist()}
    rows = ask(connection, "approximate_coactivation", [0]).to_pylist()
    assert {row["other_id"] for row in rows} == {*exact}
    assert [row["jaccard_low"] for row in rows] == sorted((row["jaccard_low"] for row in rows), reverse=True)
    for row in rows:
        wanted = exact[row["other_id"]]
        assert (row["n_both"], row["n_seen"]) == (wanted["n_both"],) * 2
        assert row["jaccard"] == pytest.approx(wanted["jaccard"])
        assert (row["n_feature"], row["n_other"]) == (wanted["n_feature"], wanted["n_other"])
        assert row["low"] <= row["n_both"] <= row["high"]
        assert row["jaccard_low"] - 1e-9 <= row["jaccard"] <= row["jaccard_high"] + 1e-9
    for features, thresholds in (([0, 1], [1.5, 1.2]), ([3, 2, 1], [1.0, 1.0, 1.0])):
        mine = [{t for t, f, v in world.values if f == feature and v > least} for feature, least in
                zip(features, thresholds, strict=True)]  # fmt: skip
        n = len(set.intersection(*mine))
        asked = {"features": features, "thresholds": thresholds}
        assert ask(connection, "count_where_all", asked).to_pylist() == [
            {"n_tokens": n, "density": n / (N_DOCUMENTS * DOCUMENT_TOKENS)}
        ]
        (row,) = ask(connection, "approximate_count_where_all", asked).to_pylist()
        assert (row["n_tokens"], row["n_seen"]) == (n, n)
        assert row["low"] <= n <= row["high"]


def test_the_interval_does_not_have_width_zero_where_the_sample_shows_no_difference(planted):
    """All tokens of the sampled documents fire both: it may not be so elsewhere."""
    world, connection = planted
    draw_sample(world, connection, 3, share=1 / 100)
    (row,) = ask(connection, "approximate_count_where_all", [[0], [0.5]]).to_pylist()
    assert row["low"] < row["n_tokens"] == row["high"] == row["n_rarest"]


def sampled_world(**about: Any) -> Given:
    """Forty documents of the sample and forty others, in two parts."""
    keys = [key for pair in zip(SAMPLED[:40], OTHERS[:40], strict=True) for key in pair]
    documents = [Document(key, None, [b"x"] * 4) for key in keys]
    cells = itertools.product(range(320), range(3))
    values = [(token, feature, 1.0) for token, feature in cells if token % 5 > feature]
    return Given(**{"documents": documents, "values": values, "n_parts": 2, "n_token_parts": 2} | about)


@contextlib.contextmanager
def small(tmp_path: Path, **about: Any) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(sampled_world(**about).write(tmp_path), threads=1) as connection:
        yield connection


def estimate(connection: duckdb.DuckDBPyConnection, question: str, *arguments: object) -> tuple[str, object] | None:
    chosen = find_question(question)
    return estimate_of(connection, chosen, parse_arguments(chosen, arguments))


def test_an_estimate_is_given_if_the_exact_answer_reads_many_values_and_the_sample_has_enough_documents(
    tmp_path, monkeypatch
):
    pair = ([0, 1], [0.0, 0.0])
    with small(tmp_path) as connection:
        n_values, n_of_pair = 256 + 192 + 128, 256 + 192
        for least, wanted in (
            (n_values, set()),
            (n_of_pair, {"coactivation"}),
            (0, {"coactivation", "count_where_all"}),
        ):
            monkeypatch.setattr(approximation, "CHEAP_VALUES", least)
            found = {"coactivation": estimate(connection, "coactivation", 0)}
            found["count_where_all"] = estimate(connection, "count_where_all", *pair)
            assert {name for name, given in found.items() if given} == wanted
        assert found["coactivation"] == ("approximate_coactivation", {"feature": 0})
        assert estimate(connection, "coactivation", 0, -1) is None
        assert estimate(connection, "coactivation", 3) is None, "it never fires"
        assert estimate(connection, "tokens_where", 0) is None
        monkeypatch.setattr(approximation, "FEWEST_DOCUMENTS", 41)
        assert estimate(connection, "coactivation", 0) is None


def test_a_run_with_a_part_of_an_earlier_saeflow_is_answered_exactly_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 0)
    with small(tmp_path, without_sample=[1]) as connection:
        assert estimate(connection, "coactivation", 0) is None
        with pytest.raises(UserError, match="stored no sample: saeflow compact stores it"):
            ask(connection, "approximate_coactivation", [0])


def test_a_table_that_is_empty_in_some_parts_is_listed_with_its_largest_file_first(tmp_path):
    """DuckDB plans by the rows of the first file. No document of the first part is in the sample, one of the second."""
    keys = [*OTHERS[:20], *SAMPLED[:1], *OTHERS[20:29], *SAMPLED[1:11]]
    documents = [Document(key, None, [b"x"] * 4) for key in keys]
    values = [(token, 0, 1.0) for token in range(160)]
    world = Given(documents=documents, values=values, n_parts=4, n_token_parts=4)
    (run,) = runs(world.write(tmp_path))
    for table in SAMPLE_TABLES:
        rows = [pq.read_metadata(path).num_rows for path in run.files[table]]
        assert rows[0] == max(rows) > min(rows) == 0
        assert len(rows) == 4


def test_documents_forgotten_since_are_not_in_the_sample(tmp_path):
    with small(tmp_path, hidden=[0]) as connection:
        (rows,) = connection.execute("select count(*), min(document_id) from stg_sample_documents").fetchall()
        assert rows == (39, 2)


def test_the_check_finds_a_sample_that_is_not_that_of_the_values(tmp_path):
    with small(tmp_path / "right") as connection:
        assert [name for name, rows in check(connection) if rows.num_rows] == []
    rows = {"sample": [{"feature_id": 0, "token_id": 0, "value": 1.0}]}
    with small(tmp_path / "wrong", tables=rows) as connection:
        found = {name: rows for name, rows in check(connection) if rows.num_rows}
        assert list(found) == ["sample_agrees"]
        assert len(found["sample_agrees"]) == 40
    documents = {"sample_documents": [{"document_id": 2, "first_token_id": 8, "n_tokens": 99}]}
    with small(tmp_path / "lost", tables=documents, n_parts=1, n_token_parts=1) as connection:
        assert len(dict(check(connection))["sample_agrees"]) == 40
