"""Bootstrap intervals by document equal those of documents drawn one by one."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from saeflow.classes import intervals
from saeflow.classes.best import BestEntries
from saeflow.classes.membership import membership
from saeflow.classes.scores import score_classes
from tests.classes.test_scores import made, rounded, spans_of, write


@pytest.mark.parametrize("signed", [pytest.param(False, marks=pytest.mark.long), True])
def test_intervals_are_those_of_repeated_documents(tmp_path, signed):
    values, classes, documents, _ = made(1, signed=signed)
    values, classes = values[:, :6], classes[:, [2, 20, 40]]
    members = membership(spans_of(classes, 0), np.arange(len(values)), documents)
    files = write(tmp_path, values, 0, (200,))
    scores = score_classes(files, members)
    weights = intervals.draw_documents(members.n_documents, 0, 12)
    held = BestEntries(3, 10_000)
    score_classes(files, members, 2, 300, held)
    found = intervals.intervals(files, members, scores, 3, weights, 2, held)
    again = intervals.intervals(files, members, scores, 3, weights, 2)
    np.testing.assert_array_equal(found.low["auroc"], again.low["auroc"])
    ids = np.unique(documents)
    assert (np.isfinite(found.low["auroc"]).sum(0) == 3).all()
    for f, c in np.argwhere(np.isfinite(found.low["auroc"])):
        drawn = {name: [] for name in intervals.FIGURES_WITH_INTERVALS}
        for replicate in range(weights.shape[1]):
            rows = np.concatenate(
                [
                    np.flatnonzero(documents == d)
                    for d, n in zip(ids, weights[:, replicate], strict=True)
                    for _ in range(n)
                ]
            )
            v, y = values[rows, f], classes[rows, c]
            drawn["auroc"].append(roc_auc_score(y, v))
            drawn["f1"].append(f1_score(y, v >= scores.threshold[f, c]))
        for name, figures in drawn.items():
            limits = np.quantile(figures, intervals.LEVELS)
            assert [found.low[name][f, c], found.high[name][f, c]] == pytest.approx(limits, abs=1e-12)


def test_tokens_of_replicates_are_counted_in_little_memory():
    weights = np.random.default_rng(0).integers(0, 3, (200_000, 64), np.uint8)
    tokens = np.arange(400_000).reshape(-1, 2) % 7
    tracemalloc.start()
    found = intervals.count_drawn(weights, tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found[5] == weights[:, 5].astype(np.int64) @ tokens).all()
    assert peak < 4 * weights.nbytes


def test_intervals_by_document_are_wider_than_those_by_token(tmp_path):
    """A feature that follows the document is not as sure as its many tokens would make it."""
    dice = np.random.default_rng(0)
    documents = np.repeat(np.arange(30), 40)
    of_document = dice.random(30) < 0.5
    values = rounded((of_document + dice.lognormal(0, 0.7, 30))[documents] * dice.lognormal(0, 0.1, 1200))[:, None]
    classes = of_document[documents][:, None]
    widths = []
    for owners in (documents, np.arange(1200)):
        members = membership(spans_of(classes, 0), np.arange(1200), owners)
        files = write(tmp_path, values, 0, ())
        drawn = intervals.draw_documents(members.n_documents, 0, 300)
        found = intervals.intervals(files, members, score_classes(files, members), 1, drawn)
        widths.append(found.high["auroc"][0, 0] - found.low["auroc"][0, 0])
    assert widths[0] > 3 * widths[1]
