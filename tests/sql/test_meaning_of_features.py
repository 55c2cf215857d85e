"""What is known beside a run: scores of labels, classes of tokens in the text, effects of one feature."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.query.labels import Label, put
from tests.support.beside import put_effects, put_scores, put_spans
from tests.support.small_store import Given


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The small corpus: tokens 0 to 4 are of `emma`, 5 to 7 of `psalm`."""
    store = Given().write(tmp_path_factory.mktemp("known") / "store")
    (run,), (tokens,) = store.artefacts("features"), store.artefacts("tokens")
    put(store, "demo-f0000001", "judged", {0: Label("love")})
    scores = [
        {"feature_id": feature, "method": method, "stratum": stratum, "score": 0.5, "n": n}
        for n, (feature, method, stratum) in enumerate(
            [(0, "fuzzing", "random"), (0, "fuzzing", "all"), (0, "detection", "band_2"), (0, "detection", "all"),
             (0, "detection", "against_random"), (1, "detection", "all")]
        )
    ]  # fmt: skip
    put_scores(store, run, "judged", scores, [])
    put_spans(store, tokens, "marks", [("love", 0, 1, 2), ("love", 1, 5, 5), ("other", 0, 4, 4)])
    firings = [
        {"feature_id": 0, "token_id": token, "document_id": document, "value": 1.0, "loss_change": change, "kl": kl,
         "ahead": ahead, "up": [(0, 0.1, 0.2)], "down": [(1, 0.5, 0.25)]}
        for token, document, change, kl, ahead in
        [(0, 0, 1.0, 0.5, 0), (1, 0, 3.0, 1.5, 0), (5, 1, -1.0, 1.0, 0), (5, 1, None, 0.25, 1),
         (0, 0, 1.0, 0.5, 2), (7, 1, None, 1.5, 2)]
    ]  # fmt: skip
    put_effects(store, run, firings, [{"feature_id": 0, "vocab_id": 0, "logit": 2.0}])
    with contextlib.closing(connect(store, threads=1)) as connection:
        yield lambda question, *arguments: ask(connection, question, arguments).to_pylist()


def test_scores_of_a_label_come_with_the_whole_of_each_method_first(known):
    rows = [(row["method"], row["stratum"], row["n"]) for row in known("scores_of_labels", 0)]
    assert rows == [
        ("detection", "all", 3), ("fuzzing", "all", 1), ("detection", "against_random", 4), ("detection", "band_2", 2),
        ("fuzzing", "random", 0),
    ]  # fmt: skip
    assert known("scores_of_labels", 2) == []


def test_effects_of_a_feature_are_means_over_its_firings_with_intervals_by_document(known):
    at, ahead, last = known("measured_effects", 0)
    assert (at["effect"], at["change"], at["ahead"], at["n_firings"]) == ("zeroed", "zero", 0, 3)
    assert (at["mean_loss_change"], at["mean_kl"], at["worse_share"]) == (1.0, 1.0, pytest.approx(2 / 3))
    error = 1.96 * (2 * (2.0**2 + 2.0**2)) ** 0.5 / 3  # two documents, whose sums lie 2 above and below their share
    assert (at["loss_change_low"], at["loss_change_high"]) == (pytest.approx(1 - error), pytest.approx(1 + error))
    assert (ahead["ahead"], ahead["mean_loss_change"], ahead["mean_kl"]) == (1, None, 0.25)
    assert ahead["kl_low"] is None
    assert (last["mean_loss_change"], last["loss_change_low"]) == (
        1.0,
        None,
    )  # no token follows in one of two documents
    assert last["kl_low"] == pytest.approx(1 - 1.96 * (2 * (0.5**2 + 0.5**2)) ** 0.5 / 2)
    assert known("measured_effects", 1) == []


def test_spans_of_a_class_stand_in_the_text_with_the_tokens_that_have_it(known):
    rows = known("class_in_text", "marks", "love", 10, 1, 2)
    assert sorted((row["token_id"], row["n_tokens"], row["place"]) for row in rows) == [(1, 2, 2), (5, 1, 1)]
    found = {row["token_id"]: (row["pieces"], row["feature_values"], row["key"]) for row in rows}
    assert found[1] == (["Emma", " loves", " no", " one"], [0.0, 1.0, 1.0, 0.0], "emma")
    assert found[5] == (["Love", " thy", " love"], [1.0, 0.0, 0.0], "psalm")
    assert known("class_in_text", "marks", "love", 1, 1, 2) == rows[:1]
    assert known("class_in_text", "marks", "none") == known("class_in_text", "none", "love") == []
