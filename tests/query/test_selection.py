"""features_of_selection: a few examples, the tokens of a select, or documents; and the select only reads."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

import saeflow as package
from saeflow.query.api import OpenRun
from saeflow.query.questions import find_question
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.command import Command
from tests.support.small_store import Document, Given

N_TOKENS, DENSE, SHARED, HALF = 2000, 0, 1, 2
EXAMPLES = [17, 420, 801, 1303, 1999]
"""Five tokens with nothing in common but the feature SHARED."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A dense feature, a rare one of the examples, one of the first half of the tokens, and 60 that fire by chance."""
    dice = np.random.default_rng(3)
    values = [(token, DENSE, 5.0) for token in range(N_TOKENS) if dice.random() < 0.9 or token in EXAMPLES]
    values += [(token, SHARED, 1.0) for token in {*EXAMPLES, *dice.integers(0, N_TOKENS, 20).tolist()}]
    values += [(token, HALF, 2.0) for token in range(N_TOKENS // 2)]
    for feature in range(3, 63):
        values += [(token, feature, 3.0) for token in set(dice.integers(0, N_TOKENS, 5 * feature).tolist())]
    documents = [Document(f"d{i}", "even" if i % 2 == 0 else "odd", [b"x"] * 100) for i in range(N_TOKENS // 100)]
    return Given(documents=documents, values=values).write(tmp_path_factory.mktemp("selection") / "store")


@pytest.fixture(scope="module")
def run(store: Store) -> Iterator[OpenRun]:
    with package.open(store.root, threads=1) as opened:
        yield opened


def test_five_examples_name_the_rare_feature_they_share_before_dense_ones_and_chance(run: OpenRun) -> None:
    rows = run.ask("features_of_selection", tokens=EXAMPLES, n=99).to_pylist()
    assert (rows[0]["feature_id"], rows[0]["n_tokens"], rows[0]["share"]) == (SHARED, 5, 1.0)
    (dense,) = [row for row in rows if row["feature_id"] == DENSE]
    assert dense["score"] < 0 < rows[0]["score"]
    assert rows[0]["score"] > 2 * rows[1]["score"]


@pytest.mark.parametrize(
    "sql",
    [
        "select token_id from tokens where token_id < 1000",
        "select token_id, piece from tokens where token_id < 1000 order by random()",
        "select token_id as anything from tokens where token_id < 1000",
        "from range(1000)",
        "select unnest([null, 1]) union all select token_id from tokens_where(2)",
        "select key from documents where document_id < 10",
        "select document_id, source from documents where document_id < 10",
        "with mine as (from documents where document_id < 10) select key from mine -- half of them",
        "select token_id from tokens where token_id < 1000;",
    ],
)
def test_a_select_chooses_tokens_by_number_or_by_their_documents(run: OpenRun, sql: str) -> None:
    first = run.ask("features_of_selection", sql).to_pylist()[0]
    assert (first["feature_id"], first["n_tokens"], first["n_rest"], first["lift"]) == (HALF, 1000, 0, None)
    assert first["score"] > 7


def test_a_million_numbers_are_chosen_from_and_only_those_of_tokens_count(run: OpenRun) -> None:
    rows = run.ask("features_of_selection", sql="select i as token_id from range(1000, 1_001_000) as t(i)", n=99)
    assert {row["feature_id"]: row["n_tokens"] + row["n_rest"] for row in rows.to_pylist()}.keys() >= {DENSE, SHARED}
    assert rows.column("share").to_pylist()[0] <= 1
    expected = run.ask("features_of_selection", tokens=range(1000, 2000), n=99)
    assert rows.equals(expected)


def test_a_select_names_nothing_of_the_question_s_own(run: OpenRun) -> None:
    """The question's own parts and parameters have names, too: a select means the run's, or fails."""
    named = "with mine as (select token_id as n from tokens) select n as token_id from mine where n < 1000"
    assert run.ask("features_of_selection", named).to_pylist()[0]["feature_id"] == HALF
    with pytest.raises(UserError, match="wanted"):
        run.ask("features_of_selection", "select token_id from wanted")


def test_a_parameter_that_there_is_not_is_refused_by_name(saeflow: Command) -> None:
    said = saeflow("ask", "features_of_selection", "--select", "select 1", "--store", "nowhere")
    assert said.code == 2
    assert "features_of_selection has no parameter --select. It has: --sql, --tokens, --n." in said.err


WRITES = [
    "copy (select 1 as token_id) to 'x.csv'",
    "create table t as select 1 as token_id",
    "select 1 as token_id; drop view tokens",
    "with x as (copy (select 1) to 'x.csv') select 1 as token_id",
    "select token_id from tokens) union (select 1",
    "set threads = 1",
    "insert into tokens values (1)",
]


@pytest.mark.parametrize("question", ["features_of_selection", "absorption"])
@pytest.mark.parametrize("sql", WRITES)
def test_a_select_that_does_more_than_read_is_refused(run: OpenRun, question: str, sql: str) -> None:
    with pytest.raises(UserError, match=r"Only one statement that reads|cannot be run"):
        run.ask(question, sql)
    assert run.ask(question, tokens=[1]).num_rows


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "needs sql or tokens, one of the two"),
        ({"sql": "  "}, "needs sql or tokens, one of the two"),
        ({"sql": "select 1", "tokens": [1]}, "not both"),
        ({"sql": "select piece, source from tokens"}, "must give token_id or document_id"),
        ({"sql": "select value from tokens_where(0)"}, r"value \(float\)"),
        ({"sql": "select key, 1 as a from tokens where token_id = 'x'"}, "failed|cannot be run"),
        ({"sql": "select 1e30::hugeint as token_id"}, "must give token_id|beyond"),
    ],
)
def test_what_chooses_no_tokens_is_said(run: OpenRun, arguments: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run.ask("features_of_selection", **arguments)


def test_a_select_of_nothing_has_no_features(run: OpenRun) -> None:
    assert run.ask("features_of_selection", "select token_id from tokens where false").num_rows == 0
    assert run.ask("absorption", "select key from documents where false").to_pylist()[0]["n_class"] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--sql", "select token_id from tokens where token_id < 1000"],
        ["--sql", "select key from documents where document_id < 10", "--n", 3],
        ["--n=3", "--sql", "select token_id from tokens where token_id < 1000"],
        ["--tokens", ",".join(map(str, range(0, 1000, 3)))],
        ["select token_id from tokens where token_id < 1000"],
    ],
)
def test_the_command_takes_a_select_or_tokens_by_name(saeflow: Command, store: Store, words: list[object]) -> None:
    said = saeflow("ask", "features_of_selection", *words, "-f", "json", "--store", store.root)
    assert said.code == 0, said.err
    rows = json.loads(said.out)
    assert rows[0]["feature_id"] == HALF
    assert len(rows) == (3 if any("--n" in str(word) for word in words) else 20)


def test_the_command_refuses_a_name_twice_and_shows_the_sql_of_tokens(saeflow: Command, store: Store) -> None:
    twice = saeflow("ask", "features_of_selection", "--tokens", "1", "--tokens", "2", "--store", store.root)
    assert (twice.code, "given --tokens twice" in twice.err) == (2, True)
    shown = saeflow("ask", "features_of_selection", "--tokens", "1,2", "--sql", "--store", store.root)
    assert shown.out == "select * from \"demo\".features_of_selection('', [1, 2]::bigint[], 20);\n"


def test_a_parameter_of_any_question_may_be_named(saeflow: Command, store: Store) -> None:
    named, in_order = (
        saeflow("ask", "tokens_where", *words, "-f", "json", "--store", store.root)
        for words in (["--threshold", "-2.5", "--feature=1"], ["1", "-2.5"])
    )
    assert json.loads(named.out) == json.loads(in_order.out) != []


def test_the_example_of_a_header_is_a_command_that_names_what_it_names() -> None:
    assert find_question("features_of_selection").command == "saeflow ask features_of_selection --tokens 1,2,3"
    assert find_question("top_tokens").command.startswith("saeflow ask top_tokens 12")
