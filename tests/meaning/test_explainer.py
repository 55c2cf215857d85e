"""Explanations by a language model, against an endpoint on loopback that knows the truth of the store."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from saeflow.meaning.language_model.cache import AnswerCache
from saeflow.meaning.language_model.command import Outcome, explain_features
from saeflow.meaning.language_model.examples import READ, draw_examples
from saeflow.meaning.language_model.forgetting import drop_forgotten
from saeflow.meaning.language_model.prompts import Prompts
from saeflow.meaning.language_model.settings import Endpoint, ExampleCounts, ExplainSettings
from saeflow.pipeline.lifecycle import forget
from saeflow.query.connection import connect
from saeflow.query.labels import Label, put
from saeflow.runtime.errors import UserError
from saeflow.store.records import Hidden
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.meaning.test_explainer_parts import an_answer
from tests.support.command import Command
from tests.support.small_pipeline import quiet, tree
from tests.support.small_store import Document, Given
from tests.support.stub_endpoint import Stub, Truth, stub_endpoint

N_FEATURES = 10
SAE = "saes/demo-f0000001"
SMALL = ExampleCounts(bands=5, explain=2, score=3, near_misses=8, random=8, tokens=9)


def planted(seed: int = 0, n_documents: int = 100) -> Given:
    """Texts of random words. Each feature fires at three quarters of the places of its two words."""
    dice = random.Random(seed)
    documents = [
        Document(f"d{i}", "made", [f" w{dice.randrange(200)}".encode() for _ in range(40)]) for i in range(n_documents)
    ]
    given = Given(documents=documents)
    owners = {f" w{word}".encode(): word // 2 for word in range(2 * N_FEATURES)}
    given.values = [
        (token.token_id, feature, dice.randint(1, 80) / 8)
        for token in given.every_token()
        if token.document_id is not None
        and (feature := owners.get(given.vocab[token.vocab_id])) is not None
        and dice.random() < 0.75
    ]
    return given


@dataclass(frozen=True)
class Scored:
    """A store whose features were explained, and whose labels were shuffled and scored again; and what was asked."""

    root: Path
    given: Given
    truth: Truth
    explained: Outcome
    n_tokens: int
    """Tokens that the endpoint counted for the explanations and their scores."""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Do not write there."""
    given = planted()
    store, truth = given.write(tmp_path_factory.mktemp("scored") / "store"), Truth(given)
    features = list(range(N_FEATURES))
    with stub_endpoint(truth) as stub:
        explained = explain(store, stub, features, methods=("detection", "fuzzing", "simulation"))
        n_tokens = stub.n_tokens
        others = {feature: Label(f"where feature {(feature + 3) % N_FEATURES} fires") for feature in features}
        put(store, SAE, "shuffled", others)
        explain(store, stub, features, score_source="shuffled")
        assert max(stub.asked.values()) == 1
    return Scored(store.root, given, truth, explained, n_tokens)


@pytest.fixture
def store(scored: Scored, tmp_path: Path) -> Store:
    """A copy to change."""
    return Store.open(shutil.copytree(scored.root, tmp_path / "store"))


@pytest.fixture
def stub(scored: Scored) -> Iterator[Stub]:
    with stub_endpoint(scored.truth) as found:
        yield found


def explain(
    store: Store, stub: Stub, features: list[int], source: str | None = None, dry_run: bool = False, **changes: Any
) -> Outcome:
    endpoint = Endpoint(stub.url, "stub", timeout_seconds=20, first_wait_seconds=0.01)
    settings = ExplainSettings(**{"endpoint": endpoint, "counts": SMALL, "batch": 8, **changes})
    return explain_features(store, None, features, settings, Prompts.read(), quiet(), source, dry_run)


def rows(store: Store | Path, sql: str, *names: str) -> list[tuple[Any, ...]]:
    opened = store if isinstance(store, Store) else Store.open(store)
    with connect(opened, threads=1, names=names) as connection:
        return connection.execute(sql).fetchall()


def mean_score(root: Path, source: str, method: str) -> float:
    where = f"source = '{source}' and method = '{method}' and stratum = 'all'"
    found = rows(root, f"select score from explanation_scores where {where}", "explanation_scores")
    assert len(found) == N_FEATURES
    return float(sum(score for (score,) in found) / N_FEATURES)


@pytest.mark.parametrize("method", ["detection", "fuzzing", "simulation"])
def test_true_labels_score_at_least_095(method: str, scored: Scored) -> None:
    assert mean_score(scored.root, "llm-stub", method) >= 0.95


@pytest.mark.parametrize("method", ["detection", "fuzzing"])
def test_shuffled_labels_score_a_half(method: str, scored: Scored) -> None:
    assert abs(mean_score(scored.root, "shuffled", method) - 0.5) <= 0.03


def test_labels_carry_their_detection_score_and_scored_ones_stay_as_they_were(scored: Scored) -> None:
    sql = "select feature_id, label, score from feature_labels where source = '{}' order by feature_id"
    made = rows(scored.root, sql.format("llm-stub"), "feature_labels")
    assert [(feature, label) for feature, label, _ in made] == [(i, f"where feature {i} fires") for i in range(10)]
    sql = "select score from explanation_scores where source = 'llm-stub' and method = 'detection' and stratum = 'all'"
    scores = rows(scored.root, sql, "explanation_scores")
    assert [score for _, _, score in made] == [round(score, 6) for (score,) in scores]
    others = rows(scored.root, sql.format("x").split(" where")[0] + " where source = 'shuffled'", "explanation_scores")
    assert len(others) > N_FEATURES
    csv = (scored.root / "labels/demo-f0000001/shuffled.csv").read_text().splitlines()
    assert csv[1] == "0,where feature 3 fires,"


def test_each_stratum_is_scored_apart(scored: Scored) -> None:
    sql = (
        "select stratum, sum(n), min(low) >= 0 and max(high) <= 1 and bool_and(score between low and high) "
        "from explanation_scores where source = 'shuffled' and method = 'detection' group by stratum, length(stratum) "
        "order by length(stratum), stratum"
    )
    found = rows(scored.root, sql, "explanation_scores")
    assert [stratum for stratum, _, _ in found] == [
        "all", "band_1", "band_2", "band_3", "band_4", "band_5", "random", "near_misses", "against_random",
        "against_near_misses",
    ]  # fmt: skip
    counts = {stratum: n for stratum, n, _ in found}
    assert (
        counts["all"]
        == sum(n for name, n in counts.items() if name.startswith("band_")) + counts["random"] + (counts["near_misses"])
    )
    assert all(inside for _, _, inside in found)


def test_mistakes_are_the_tokens_at_which_label_and_feature_disagree(scored: Scored) -> None:
    mistakes = rows(scored.root, "select * from explanation_mistakes(3)", "explanation_mistakes")
    assert {row[0] for row in mistakes} == {"shuffled"}  # no true label costs a point
    assert len(mistakes) > 20
    for _, model, method, stratum, token, asked, answered, piece, context, _, _ in mistakes:
        assert (model, answered) == ("stub", not asked)
        assert asked == stratum.startswith("band_") == scored.truth.fires(token, 3)
        assert f"«{piece}»" in context
        if method == "fuzzing":
            assert not scored.truth.fires(token, 6) or not asked
    first = rows(scored.root, "select * from explanation_mistakes(3, 5)", "explanation_mistakes")
    groups = [(method, fires) for method in ("detection", "fuzzing") for fires in (True, False)]
    assert [row[:11] for row in first] == [
        row for group in groups for row in [each for each in mistakes if (each[2], each[5]) == group][:5]
    ]


def test_examples_that_score_share_nothing_with_those_that_explain(scored: Scored) -> None:
    with connect(Store.open(scored.root), threads=1, names=READ) as connection:
        found = draw_examples(connection, 2, SMALL)
        assert draw_examples(connection, 2, SMALL) == found
        assert draw_examples(connection, 2, ExampleCounts(**{**vars(SMALL), "seed": 1})) != found
        assert draw_examples(connection, 9, ExampleCounts(bands=100)).scoring
    assert {window.stratum for window in found.explaining} == {f"band_{i}" for i in range(1, 6)} | {"near_misses"}
    for window in found.scoring:
        assert not any(window.overlaps(other, SMALL.tokens) for other in found.explaining)
        tokens = range(window.token_id - window.place, window.token_id - window.place + len(window.pieces))
        assert [scored.truth.fires(token, 2) for token in tokens] == [value > 0 for value in window.strengths]
        if window.fires:
            assert window.strengths[window.place] == max(window.strengths)
        assert window.fires == window.stratum.startswith("band_")
    near = [window for window in found.scoring if window.stratum == "near_misses"]
    assert near
    assert {window.pieces[window.place] for window in near} <= {" w4", " w5"}


def test_the_forecast_is_within_a_tenth_of_what_was_spent(scored: Scored) -> None:
    about, meter = scored.explained.forecast, scored.explained.meter
    assert about is not None
    assert meter is not None
    assert meter.spent == scored.n_tokens
    assert about.is_counted
    assert abs(about.tokens / meter.spent - 1) <= 0.10


def test_finished_features_are_not_asked_about_again(store: Store, stub: Stub) -> None:
    before = tree(store.root)
    outcome = explain(store, stub, [3, 4, 5], methods=("detection", "fuzzing", "simulation"))
    assert (outcome.n_finished_before, outcome.explained, outcome.forecast) == (3, [], None)
    assert not stub.asked
    assert tree(store.root) == before


def test_other_settings_ask_only_what_they_change(store: Store, stub: Stub) -> None:
    explain(store, stub, [3, 4])  # without simulation: every answer is there
    assert not stub.asked
    explain(store, stub, [3, 4], batch=9)
    assert {0} == {body.count("You study one feature") for body in stub.asked}


def test_a_dry_run_asks_nothing_and_knows_what_was_counted(store: Store, stub: Stub, saeflow: Command) -> None:
    before = tree(store.root)
    outcome = explain(store, stub, [1, 2], dry_run=True, counts=ExampleCounts(seed=5))
    assert outcome.forecast is not None
    assert outcome.forecast.is_counted
    assert outcome.forecast.questions["explanation"] == 2
    typed = ["explain", "demo", "--endpoint", stub.url, "--model", "other", "--store", store.root]
    said = saeflow(*typed, "--features", "1,2", "--dry-run", "--methods", "all")
    assert said.out.startswith("forecast: 2 features, ")
    assert said.out.strip().endswith("(guessed: four characters a token)")
    assert not stub.asked
    assert tree(store.root) == before


@pytest.mark.long
def test_a_budget_is_never_passed_and_the_next_command_goes_on(store: Store, stub: Stub, saeflow: Command) -> None:
    typed = [
        "explain", "demo", "--endpoint", stub.url, "--model", "new", "--store", store.root, "--features",
        "1-4", "--context", "9", "--bands", "3", "-n", "2", "--silent", "5",
    ]  # fmt: skip
    said = saeflow(*typed, "--budget", 6000)
    assert said.code == 2
    assert "The budget of 6,000 tokens leaves" in said.err
    first = stub.n_tokens
    assert 2000 < first <= 6000
    assert saeflow(*typed, "--budget", 10).code == 2
    assert stub.n_tokens == first
    said = saeflow(*typed)
    assert said.code == 0, said.err
    assert len(said.out.splitlines()) == 1 + 4 - said.err.count("were finished before") * 1 or "finished" in said.err
    assert max(stub.asked.values()) == 1
    assert saeflow(*typed).err.count("4 features were finished before") == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--features", "3,x"], "--features is '3,x'"),
        (["--features", "9-3"], "--features has the range '9-3'"),
        (["--features", "99"], "features go from 0 to 9."),
        (["--features", "1", "--methods", "magic"], "--methods is 'magic'"),
        (["--features", "1", "--score", "nobody"], "Sources with labels: llm-stub, shuffled."),
        (["--features", "1", "--score", "shuffled", "--methods", "none"], "--score needs a method"),
        (["--features", "1", "--score", "shuffled", "--source", "x"], "--source has no meaning"),
        (["--features", "1", "--source", "../x"], "The source is '../x'"),
        (["--features", "1", "--prompts", "nowhere"], "no such folder"),
        (["--features", "1", "--key-from", "NOBODY_SET_THIS"], "no such environment variable"),
        (["--features", "1", "--endpoint", "localhost"], "--endpoint is 'localhost'"),
        (["--features", "1", "--model", " "], "--model is ' '"),
        ([], "--endpoint needs --features"),
        (["--features", "1", "--rules"], "Leave one out"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(
    typed: list[str], said: str, scored: Scored, stub: Stub, saeflow: Command
) -> None:
    usual = ["--endpoint", stub.url, "--model", "stub", "--store", scored.root]
    found = saeflow("explain", "demo", *usual, *typed)
    assert (found.code, said in found.err) == (2, True), found.err
    assert not stub.asked


def test_a_damaged_table_of_scores_is_left_out_and_nothing_stops(
    store: Store, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.root / "labels/demo-f0000001/llm-stub.scores.parquet"
    path.write_bytes(b"PAR1 no")
    assert rows(store, "select distinct source from explanation_scores", "explanation_scores") == [("shuffled",)]
    assert "llm-stub.scores.parquet is left out" in caplog.text
    explain(store, stub, [3])
    assert not stub.asked
    assert len(rows(store, "select distinct source from explanation_scores", "explanation_scores")) == 2


def test_what_quotes_a_forgotten_document_is_removed(store: Store, scored: Scored) -> None:
    document = 8
    quoting = {
        a.feature_id for a in AnswerCache(store, "demo-f0000001", "llm-stub").every() if document in a.document_ids
    }
    explained = {
        answer.feature_id
        for answer in AnswerCache(store, "demo-f0000001", "llm-stub").every()
        if document in answer.document_ids and answer.method == "explanation"
    }
    assert 0 < len(explained) < len(quoting) < N_FEATURES
    hide(store, document)
    drop_forgotten(store)
    for source in ("llm-stub", "shuffled"):
        assert all(
            document not in answer.document_ids for answer in AnswerCache(store, "demo-f0000001", source).every()
        )
    folder = store.root / "labels/demo-f0000001"
    labelled = {name: (folder / f"{name}.csv").read_text().splitlines()[1:] for name in ("llm-stub", "shuffled")}
    kept = {int(line.split(",")[0]) for line in labelled["llm-stub"]}
    assert kept == set(range(N_FEATURES)) - explained
    assert len(labelled["shuffled"]) == N_FEATURES
    left = set(pq.read_table(folder / "llm-stub.scores.parquet").column("feature_id").to_pylist())
    assert left == set(range(N_FEATURES)) - quoting
    before = tree(store.root)
    assert drop_forgotten(store) == 0
    assert tree(store.root) == before


def hide(store: Store, document: int) -> None:
    [tokens] = store.artefacts("tokens")
    generation = tokens.published()
    gone = Hidden(document_id=document, key_hash="0", reason="forgotten")
    with tokens.writing():
        tokens.publish(generation.parts, hidden={generation.parts[0].index: (gone,)})


def test_saeflow_forget_removes_kept_answers(finished: Finished, tmp_path: Path) -> None:
    store = Store.open(shutil.copytree(finished.store.root, tmp_path / "store"))
    [sae], [tokens] = store.artefacts("saes"), store.artefacts("tokens")
    key, document = rows(store, "select key, document_id from documents order by key limit 1", "documents")[0]
    cache = AnswerCache(store, sae.path.name, "llm m.1")
    cache.keep(an_answer("a", documents=(document,), tokens=tokens.id))
    cache.keep(an_answer("b", documents=(document + 1,), tokens=tokens.id))
    done = forget.forget(store, [key], quiet())
    assert done.explanations == 1
    assert [answer.key for answer in cache.every()] == ["b"]
    assert not cache.journal.exists()


def test_a_second_command_of_the_same_source_waits_its_turn(store: Store, stub: Stub) -> None:
    with store.storage.locked("explain-demo-f0000001-llm-stub"), pytest.raises(UserError, match="Another command"):
        explain(store, stub, [1])
