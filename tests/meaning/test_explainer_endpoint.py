"""Endpoints that err, stall, answer nonsense, limit the rate, redirect or die; and commands that are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeflow.meaning.language_model.command import Outcome, explain_features
from saeflow.meaning.language_model.prompts import Prompts
from saeflow.meaning.language_model.settings import Endpoint, ExampleCounts, ExplainSettings
from saeflow.query.connection import connect
from saeflow.query.labels import Label, put
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.meaning.test_explainer import SAE, planted
from tests.support.command import SAEFLOW, Command
from tests.support.small_pipeline import quiet, tree
from tests.support.stub_endpoint import Misbehaviour, Stub, Truth, stub_endpoint

KEY = "sk-do-not-tell-0123456789"
FEW = ExampleCounts(bands=2, explain=2, score=2, near_misses=3, random=3, tokens=9)
FEATURES = [3, 8]
TYPED = ["--bands", "2", "-n", "2", "--silent", "3", "--context", "9", "--features", "3,8"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    given = planted(n_documents=60)
    return given.write(tmp_path_factory.mktemp("prepared") / "store").root, Truth(given)


@pytest.fixture
def store(prepared: tuple[Path, Truth], tmp_path: Path) -> Store:
    return Store.open(shutil.copytree(prepared[0], tmp_path / "store"))


@pytest.fixture
def stub(prepared: tuple[Path, Truth]) -> Iterator[Stub]:
    with stub_endpoint(prepared[1]) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(prepared: tuple[Path, Truth], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the command leaves if nothing goes wrong."""
    store = Store.open(shutil.copytree(prepared[0], tmp_path_factory.mktemp("undisturbed") / "store"))
    with stub_endpoint(prepared[1]) as stub:
        explain(store, stub)
        assert max(stub.asked.values()) == 1
    return tree(store.root)


def explain(store: Store, stub: Stub, retries: int = 3, timeout: float = 20.0, parallel: int = 4) -> Outcome:
    endpoint = Endpoint(
        stub.url, "stub", KEY, parallel=parallel, timeout_seconds=timeout, retries=retries, first_wait_seconds=0.01
    )
    settings = ExplainSettings(endpoint, FEW, nonsense_retries=1)
    return explain_features(store, None, FEATURES, settings, Prompts.read(), quiet())


def in_turn(*behaviours: Misbehaviour) -> object:
    return lambda number: behaviours[number - 1] if number <= len(behaviours) else None


@pytest.mark.parametrize(
    "behaviour",
    [
        (429, {"Retry-After": "0"}),
        *(pytest.param((status, {}), marks=pytest.mark.long) for status in (408, 500, 503, 529)),
        pytest.param((429, {"Retry-After": "soon"}), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_an_error_that_may_pass_is_asked_again_and_nothing_else_is(
    behaviour: Misbehaviour, store: Store, stub: Stub, undisturbed: dict[str, bytes]
) -> None:
    stub.misbehave = lambda number: behaviour if number % 3 == 1 else None
    outcome = explain(store, stub, retries=20)
    assert tree(store.root) == undisturbed
    assert max(stub.answered.values()) == 1
    assert outcome.meter is not None
    assert outcome.meter.n_retries == sum(stub.asked.values()) - sum(stub.answered.values()) > 0


def test_retry_after_is_obeyed_by_every_question(store: Store, stub: Stub) -> None:
    times: list[float] = []

    def limit(number: int) -> Misbehaviour:
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.7"}) if number == 2 else None

    stub.misbehave = limit
    explain(store, stub, parallel=1)
    assert times[2] - times[1] >= 0.69
    shutil.rmtree(store.root / "labels")
    stub.misbehave = lambda number: (429, {"Retry-After": "9000"})
    with pytest.raises(UserError, match="asks to wait 9,000 s"):
        explain(store, stub)


def test_an_answer_that_stalls_is_asked_again(store: Store, stub: Stub, undisturbed: dict[str, bytes]) -> None:
    stub.misbehave = in_turn(1.5)  # type: ignore[assignment]
    explain(store, stub, timeout=0.7)
    assert tree(store.root) == undisturbed


def test_nonsense_is_counted_asked_again_so_often_and_then_recorded(store: Store, stub: Stub) -> None:
    stub.misbehave = lambda number: "As a model I cannot say.\nReally." if number % 2 else None
    outcome = explain(store, stub, parallel=1)
    assert outcome.n_nonsense > 2
    assert outcome.forecast is not None
    assert outcome.meter is not None
    assert abs(outcome.forecast.tokens / outcome.meter.spent - 1) <= 0.10  # repeated questions are part of it
    assert {each.explanation is None for each in outcome.explained} == {False}
    stub.misbehave = lambda number: "¯\\_(ツ)_/¯\n\ud800 [0, 1"
    (store.root / "labels" / SAE.removeprefix("saes/") / "llm-stub.answers.parquet").unlink()
    (store.root / "labels" / SAE.removeprefix("saes/") / "llm-stub.scores.parquet").unlink()
    before = sum(stub.asked.values())
    outcome = explain(store, stub)
    assert [each.explanation for each in outcome.explained] == [None] * 2
    assert sum(stub.asked.values()) - before == 2 * 2
    assert explain(store, stub).n_finished_before == 2
    with connect(store, threads=1, names=["feature_labels", "stg_explanation_scores"]) as connection:
        assert connection.execute("select count(*) from feature_labels").fetchall() == [(0,)]
        sql = "select sum(n_unusable) from stg_explanation_scores where method = 'explanation'"
        assert connection.execute(sql).fetchall() == [(2,)]


def test_an_endpoint_that_is_down_says_so_and_the_next_command_goes_on(
    store: Store, stub: Stub, undisturbed: dict[str, bytes]
) -> None:
    stub.misbehave = lambda number: (500, {}) if number > 4 else None
    with pytest.raises(UserError, match=r"failed 3 times in a row: HTTP 500.*\n.*Every answer so far is kept"):
        explain(store, stub, retries=2, parallel=1)
    stub.misbehave = lambda number: None
    explain(store, stub)
    assert tree(store.root) == undisturbed
    assert max(stub.answered.values()) == 1


def test_nobody_listens(store: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "stub", retries=1, first_wait_seconds=0.01)
        with pytest.raises(UserError, match="no connection"):
            explain_features(store, None, [3], ExplainSettings(endpoint, FEW), Prompts.read(), quiet())


@pytest.mark.parametrize(
    "status", [pytest.param(301, marks=pytest.mark.long), 307, pytest.param(308, marks=pytest.mark.long)]
)
def test_a_redirect_is_not_followed(status: int, store: Store, stub: Stub, prepared: tuple[Path, Truth]) -> None:
    with stub_endpoint(prepared[1]) as other:
        stub.misbehave = lambda number: (status, {"Location": f"{other.url}/chat/completions"})
        with pytest.raises(UserError, match="redirects to another address"):
            explain(store, stub)
        assert not other.asked


def test_a_proxy_of_the_environment_is_not_used(store: Store, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert len(explain(store, stub, retries=0).explained) == 2


@pytest.mark.parametrize("status", [401, *(pytest.param(status, marks=pytest.mark.long) for status in (400, 403, 404))])
def test_a_refusal_stops_at_once(status: int, store: Store, stub: Stub) -> None:
    stub.misbehave = lambda number: (status, {})
    with pytest.raises(UserError, match=rf"refuses the model stub: HTTP {status}"):
        explain(store, stub)
    assert sum(stub.asked.values()) == 1


@pytest.mark.long
def test_a_question_that_is_refused_later_is_recorded_as_unusable(store: Store, stub: Stub) -> None:
    stub.misbehave = lambda number: (413, {}) if number == 2 else None
    outcome = explain(store, stub, parallel=1)
    assert len(outcome.explained) == 2
    assert max(s.n_unusable for each in outcome.explained for found in each.scores.values() for s in found) == 5


@pytest.mark.long
def test_models_that_want_other_options_get_them(store: Store, stub: Stub) -> None:
    bodies: list[str] = []

    def demand(number: int) -> Misbehaviour:
        body = list(stub.asked)[-1]
        bodies.append(body)
        return (400, {}) if '"max_tokens"' in body else None

    stub.misbehave = demand
    stub.says = "use max_completion_tokens instead"
    assert len(explain(store, stub, parallel=1).explained) == 2
    assert '"max_tokens"' in bodies[0]
    assert all('"max_completion_tokens"' in body for body in bodies[1:])


def test_questions_that_are_refused_side_by_side_are_all_sent_again_without_a_retry(store: Store, stub: Stub) -> None:
    put(store, SAE, "own", {feature: Label(f"where feature {feature} fires") for feature in FEATURES})
    stub.says = "use max_completion_tokens instead"
    first = threading.Barrier(2)

    def both_at_first(number: int) -> Misbehaviour:
        if number <= 2:
            first.wait(30)
            return (400, {})
        return None

    stub.misbehave = both_at_first
    settings = ExplainSettings(Endpoint(stub.url, "stub", parallel=2, retries=0), FEW, score_source="own")
    outcome = explain_features(store, None, [*FEATURES, 5], settings, Prompts.read(), quiet())
    assert len(outcome.explained) == 2
    assert outcome.n_finished_before == 0  # feature 5 has no label


def test_the_key_is_sent_and_is_in_no_file_and_no_message(
    store: Store, stub: Stub, saeflow: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", KEY)
    stub.misbehave = lambda number: f"Explanation: your key is {KEY}" if number == 1 else None
    typed = ["explain", "demo", "--endpoint", stub.url, "--model", "stub", "--store", store.root, *TYPED]
    done = saeflow(*typed, "--key-from", "THEIR_KEY")
    assert done.code == 0, done.err
    assert set(stub.keys) == {f"Bearer {KEY}"}
    stub.misbehave = lambda number: (401, {})  # the stub repeats the key in its error
    refused = saeflow("--debug", *typed, "--key-from", "THEIR_KEY", "--seed", 1)
    assert "no, (key), not now" in refused.out + refused.err
    for said in (done, refused):
        assert KEY not in said.out + said.err
    assert not [path for path in store.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    with connect(store, threads=1, names=["feature_labels"]) as connection:
        sql = "select label from feature_labels order by feature_id limit 1"
        assert connection.execute(sql).fetchall() == [("your key is (key)",)]


@pytest.mark.long
def test_a_stand_in_for_a_key_spoils_no_answer(store: Store, stub: Stub) -> None:
    settings = ExplainSettings(Endpoint(stub.url, "stub", "0"), FEW)
    outcome = explain_features(store, None, FEATURES, settings, Prompts.read(), quiet())
    assert outcome.n_nonsense == 0


def test_without_a_key_none_is_sent_but_a_word(store: Store, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = Endpoint(stub.url, "stub", first_wait_seconds=0.01)
    explain_features(store, None, [3], ExplainSettings(endpoint, FEW), Prompts.read(), quiet())
    assert set(stub.keys) == {"Bearer none"}
    assert set(stub.paths) == {"/v1/chat/completions"}


@pytest.mark.parametrize("at", [7, *(pytest.param(at, marks=pytest.mark.long) for at in (1, 2, 5, 10))])
def test_a_command_that_is_killed_asks_nothing_twice_and_ends_as_undisturbed(
    at: int, store: Store, stub: Stub, undisturbed: dict[str, bytes]
) -> None:
    """Killed with a question on its way: that one alone was not answered, and is asked again."""
    typed = ["explain", "demo", "--endpoint", stub.url, "--model", "stub", "--store", str(store.root)]
    killed: list[subprocess.Popen[bytes]] = []

    def kill(number: int) -> Misbehaviour:
        if number == at:
            os.kill(killed[0].pid, signal.SIGKILL)
            killed[0].wait()
            raise ConnectionAbortedError
        return None

    stub.misbehave = kill
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    with open(os.devnull, "wb") as nowhere:
        command = [*SAEFLOW, *typed, *TYPED, "--parallel", "1"]
        killed.append(subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere))
        assert killed[0].wait() == -signal.SIGKILL
    assert sum(stub.asked.values()) == at
    stub.misbehave = lambda number: None
    with contextlib.suppress(FileNotFoundError):
        assert len((store.root / "tmp" / "answers-demo-f0000001-llm-stub.jsonl").read_text().splitlines()) == at - 1
    settings = ExplainSettings(Endpoint(stub.url, "stub"), FEW)
    explain_features(store, None, FEATURES, settings, Prompts.read(), quiet())
    assert max(stub.answered.values()) == 1
    assert sum(stub.asked.values()) == len(stub.answered) + 1
    assert answers_and_scores(tree(store.root)) == answers_and_scores(undisturbed)


def answers_and_scores(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files beside the labels, but for the settings: the undisturbed command had other retries of nonsense."""
    return {name: content for name, content in files.items() if name.startswith("labels/") and "scores" not in name}
