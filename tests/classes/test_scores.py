"""Figures of features with classes equal slow, obvious ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from saeflow.classes.membership import Membership, Spans, membership
from saeflow.classes.scores import (
    Counts,
    Scores,
    expected_in_documents,
    false_discovery_rates,
    score_classes,
    scores_of,
)
from saeflow.classes.values import FeatureEntries, ValueFiles, cut_features

N_TOKENS, N_FEATURES, N_CLASSES = 900, 12, 70


def spans_of(classes: np.ndarray, first: int) -> Spans:
    """Spans of a table (tokens, classes) of membership."""
    padded = np.pad(classes.astype(int), ((1, 1), (0, 0)))
    begins, ends = (np.argwhere(sign == np.diff(padded, axis=0).T) for sign in (1, -1))
    names = tuple(f"class {c}" for c in range(classes.shape[1]))
    return Spans(names, begins[:, 0], begins[:, 1] + first, ends[:, 1] + first - 1)


def write(folder: Path, values: np.ndarray, first: int, cuts: tuple[int, ...]) -> ValueFiles:
    """Files of the values (tokens, features), one for each range of tokens."""
    paths = []
    for number, rows in enumerate(np.split(np.arange(len(values)), cuts)):
        features, places = np.nonzero(values[rows].T)
        columns = {
            "feature_id": pa.array(features, pa.int32()),
            "token_id": pa.array(rows[places] + first, pa.int64()),
            "value": pa.array(values[rows].T[features, places], pa.float32()),
        }
        paths.append(folder / f"{number}.parquet")
        pq.write_table(pa.table(columns), paths[-1], row_group_size=200)
    return ValueFiles(tuple(paths), values.shape[1])


def rounded(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def made(seed: int = 0, signed: bool = False, shuffled: bool = False):
    """Values with many ties, classes that overlap, documents, and which tokens count."""
    dice = np.random.default_rng(seed)
    values = rounded(dice.lognormal(0, 1, (N_TOKENS, N_FEATURES)))
    values[:, 1] = np.round(values[:, 1])
    values *= dice.random((N_TOKENS, N_FEATURES)) < np.linspace(0.01, 1, N_FEATURES)
    if signed:
        values *= dice.choice([-1, 1], values.shape)
    values[:, 3] = 0
    classes = dice.random((N_TOKENS, N_CLASSES)) < np.r_[0, 1, np.linspace(0.01, 0.9, N_CLASSES - 2)]
    classes[:, 2] = values[:, 5] > 1
    documents = np.sort(dice.integers(0, 40, N_TOKENS)) * 3
    if shuffled:
        dice.shuffle(documents)
    return values, classes, documents, dice.random(N_TOKENS) < 0.9


def scored(folder: Path, *args, **options) -> tuple[Scores, np.ndarray, np.ndarray, np.ndarray, Membership]:
    values, classes, documents, counted = made(*args, **options)
    first = 5_000
    members = membership(spans_of(classes, first), np.flatnonzero(counted) + first, documents[counted])
    found = score_classes(write(folder, values, first, (300, 700)), members, threads=2, block_values=1_000)
    return found, values[counted], classes[counted], documents[counted], members


@pytest.mark.parametrize("signed", [False, True])
def test_figures_are_those_of_scikit_learn_and_scipy(tmp_path, signed):
    found, values, classes, _, _ = scored(tmp_path, signed=signed)
    for f in range(N_FEATURES):
        for c in range(2, N_CLASSES, 5):
            v, y = values[:, f].astype(float), classes[:, c]
            assert found.auroc[f, c] == pytest.approx(roc_auc_score(y, v), abs=1e-12)
            assert found.average_precision[f, c] == pytest.approx(average_precision_score(y, v), abs=1e-12)
            assert found.n_both[f, c] == (y & (v != 0)).sum()
            if not (v[y] > 0).any():
                assert np.isnan(found.f1[f, c])
                continue
            precision, recall, thresholds = precision_recall_curve(y, v)
            above = np.flatnonzero(thresholds > 0)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
            assert found.f1[f, c] == pytest.approx(f1[above].max(), abs=1e-12)
            at = above[thresholds[above] == found.threshold[f, c]][0]
            assert found.precision[f, c] == pytest.approx(precision[at], abs=1e-12)
            assert found.recall[f, c] == pytest.approx(recall[at], abs=1e-12)
            assert found.lift[f, c] == pytest.approx(y[v != 0].mean() / y.mean(), abs=1e-12)
            assert found.correlation[f, c] == pytest.approx(stats.pointbiserialr(y, v).statistic, abs=1e-12)


@pytest.mark.parametrize("shuffled", [False, True])
def test_t_is_that_of_what_documents_add(tmp_path, shuffled):
    found, values, classes, documents, members = scored(tmp_path, shuffled=shuffled)
    assert members.together is not shuffled
    for f in range(N_FEATURES):
        for c in range(2, N_CLASSES, 7):
            v, y = values[:, f].astype(float), classes[:, c]
            each = (y - y.mean()) * (v - v.mean())
            added = np.array([each[documents == d].sum() for d in np.unique(documents)])
            if not v.any():
                assert np.isnan(found.p[f, c])
                continue
            expected = stats.ttest_1samp(added, 0)
            assert found.t[f, c] == pytest.approx(expected.statistic, rel=1e-9)
            assert found.p[f, c] == pytest.approx(expected.pvalue, rel=1e-9)


def test_a_class_of_none_or_of_all_tokens_has_no_auroc(tmp_path):
    found, *_ = scored(tmp_path)
    assert np.isnan(found.auroc[:, :2]).all()
    assert np.isnan(found.average_precision[:, 0]).all()


def test_the_number_of_threads_and_the_size_of_blocks_change_nothing(tmp_path):
    values, classes, documents, counted = made()
    members = membership(spans_of(classes, 0), np.flatnonzero(counted), documents[counted])
    files = write(tmp_path, values, 0, (450,))
    whole, cut = score_classes(files, members, 1), score_classes(files, members, 2, 100)
    for name in whole.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_values_with_all_24_bits_are_ranked_exactly(tmp_path):
    dice = np.random.default_rng(3)
    values = dice.lognormal(0, 3, (500, 1)).astype(np.float32)
    y = dice.random(500) < 0.3
    members = membership(spans_of(y[:, None], 0), np.arange(500), np.arange(500) // 10)
    found = score_classes(write(tmp_path, values, 0, ()), members)
    assert found.auroc[0, 0] == pytest.approx(roc_auc_score(y, values[:, 0]), abs=1e-12)
    assert found.average_precision[0, 0] == pytest.approx(average_precision_score(y, values[:, 0]), abs=1e-12)


def test_p_holds_its_level_although_tokens_of_a_document_are_alike():
    """Values and classes that follow the document: a test over tokens would reject nearly always."""
    dice = np.random.default_rng(0)
    n_documents, size, n_trials = 60, 50, 400
    documents = np.repeat(np.arange(n_documents), size)
    of_document = dice.random((n_documents, n_trials)) < 0.3
    members = membership(spans_of(of_document[documents], 0), np.arange(len(documents)), documents)
    levels = dice.lognormal(0, 1, n_documents)[documents]
    values = (levels * dice.random(len(documents)))[:, None]
    flat = rounded(values)[:, 0]
    codes = members.codes
    entries = FeatureEntries(0, np.array([0]), np.array([len(flat)]), flat, codes, members.documents)
    counts, expected = Counts.none(1, n_trials), expected_in_documents(members)
    counts.add(entries, members, expected)
    p = scores_of(counts, members, expected).p[0]
    naive = [stats.pointbiserialr(y, flat).pvalue for y in of_document[documents].T[:100]]
    assert (p < 0.05).mean() < 0.09
    assert (np.array(naive) < 0.05).mean() > 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_q_is_that_of_benjamini_and_hochberg(p):
    np.testing.assert_allclose(false_discovery_rates(np.array(p)), stats.false_discovery_control(p), atol=1e-15)


@given(st.integers(1, 60), st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_blocks_hold_every_feature_once(n_features, block_values, seed):
    dice = np.random.default_rng(seed)
    ends = np.sort(dice.integers(0, n_features, (5, 2)), axis=1)
    blocks = cut_features(ends[:, 0], ends[:, 1], dice.integers(1, 300, 5), n_features, block_values)
    assert [f for first, last in blocks for f in range(first, last + 1)] == list(range(n_features))


def test_overlapping_spans_of_one_class_are_refused():
    spans = Spans(("a",), np.array([0, 0]), np.array([0, 3]), np.array([3, 5]))
    with pytest.raises(ValueError, match="'a' overlap at token"):
        membership(spans, np.arange(10), np.zeros(10, int))
