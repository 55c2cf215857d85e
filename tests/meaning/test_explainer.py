"""Explanations by a language model, against an endpoint on loopback that knows the truth of the store."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saeflow.meaning.language_model.command import Outcome, explain_features
from saeflow.meaning.language_model.prompts import Prompts
from saeflow.meaning.language_model.settings import Endpoint, ExampleCounts, ExplainSettings
from saeflow.query.connection import connect
from saeflow.query.labels import Label, put
from saeflow.store.store import Store
from tests.support.small_pipeline import quiet
from tests.support.small_store import Document, Given
from tests.support.stub_endpoint import Stub, Truth, stub_endpoint

N_FEATURES = 16
SAE = "saes/demo-f0000001"
SMALL = ExampleCounts(bands=5, explain=2, score=3, near_misses=8, random=8, tokens=9)


@pytest.fixture(autouse=True, scope="module")
def _no_flush() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    given = planted()
    return given.write(tmp_path_factory.mktemp("prepared") / "store").root, Truth(given)


@pytest.fixture
def store(prepared: tuple[Path, Truth], tmp_path: Path) -> Store:
    return Store.open(shutil.copytree(prepared[0], tmp_path / "store"))


@pytest.fixture
def stub(prepared: tuple[Path, Truth]) -> Iterator[Stub]:
    with stub_endpoint(prepared[1]) as found:
        yield found


def explain(store: Store, stub: Stub, features: list[int], source: str | None = None, **changes: Any) -> Outcome:
    endpoint = Endpoint(stub.url, "stub", timeout_seconds=20, first_wait_seconds=0.01)
    settings = ExplainSettings(**{"endpoint": endpoint, "counts": SMALL, "batch": 8, **changes})
    return explain_features(store, None, features, settings, Prompts.read(), quiet(), source)


def scores(store: Store, where: str) -> list[tuple[Any, ...]]:
    with connect(store, threads=1, names=["explanation_scores"]) as connection:
        return connection.execute(
            f"select feature_id, source, method, stratum, score, low, high, n from explanation_scores where {where}"
        ).fetchall()


def mean_score(store: Store, source: str, method: str) -> float:
    found = [row[4] for row in scores(store, f"source = '{source}' and method = '{method}' and stratum = 'all'")]
    assert len(found) == N_FEATURES
    return sum(found) / len(found)


def test_true_labels_score_near_one_and_shuffled_ones_a_half(store: Store, stub: Stub) -> None:
    features = list(range(N_FEATURES))
    explain(store, stub, features, methods=("detection", "fuzzing", "simulation"))
    assert mean_score(store, "llm-stub", "detection") >= 0.95
    assert mean_score(store, "llm-stub", "fuzzing") >= 0.95
    assert mean_score(store, "llm-stub", "simulation") >= 0.95
    others = {feature: Label(f"where feature {(feature + 7) % N_FEATURES} fires") for feature in features}
    put(store, SAE, "shuffled", others)
    explain(store, stub, features, score_source="shuffled")
    assert abs(mean_score(store, "shuffled", "detection") - 0.5) <= 0.03
    assert abs(mean_score(store, "shuffled", "fuzzing") - 0.5) <= 0.03
