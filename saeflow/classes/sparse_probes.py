"""Probes of few dimensions: how well k features tell a class, beside k neurons and k directions of a random SAE.

The k dimensions are chosen on the training documents alone; a logistic regression on them is judged on the held-out
documents (Gurnee et al. 2023, arXiv 2305.01610).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score
from threadpoolctl import threadpool_limits

from saeflow.classes.membership import Ints, Membership
from saeflow.classes.samples import Sample, draw_sample, feature_values, neuron_values, random_values
from saeflow.classes.values import ValueFiles
from saeflow.features.schema import PROBE_TABLES
from saeflow.query.runs import Run
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import one_torch_thread
from saeflow.store.store import Store

SIZES = (1, 5, 16)


def sparse_table(
    store: Store, run: Run, name: str, members: Membership, seed: int, threads: int, progress: Progress
) -> pa.Table:
    """Return AUROC and F1 of each class, basis and k. Without stored activations, only features are probed."""
    sample = draw_sample(members, seed)
    rows = []
    with one_torch_thread(), progress.bar("sparse", None, "probes") as bar:
        for basis, values in _bases(store, run, members, sample, seed, threads):
            for c, label in enumerate(members.classes):
                rows += [
                    {"annotation": name, "class": label, "basis": basis} | row for row in probes(values, sample, c)
                ]
                bar.advance(len(SIZES))
    return pa.Table.from_pylist(rows, PROBE_TABLES["sparse_probes"])


def _bases(
    store: Store, run: Run, members: Membership, sample: Sample, seed: int, threads: int
) -> Iterator[tuple[str, sparse.csc_array]]:
    """Yield each basis with its values at the sampled tokens."""
    files = ValueFiles.of(run)
    features = feature_values(files, members, sample.places, threads)
    yield "features", features
    neurons = neuron_values(store, run, members.first_token, sample.places)
    if neurons is None:
        return
    yield "neurons", sparse.csc_array(neurons)
    n_active = max(1, round(features[np.flatnonzero(sample.of_all)].nnz / sample.of_all.sum()))
    yield "random", random_values(neurons, files.n_features, n_active, seed)


def probes(values: sparse.csc_array, sample: Sample, c: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each k for one class. Figures are None if training or held-out documents lack the class."""
    train, test = sample.rows(c)
    y = sample.inside[:, c]
    counts = {"n_train": len(train), "n_test": len(test)}
    able = all(0 < y[rows].sum() < len(rows) for rows in (train, test))
    order = _strongest(values, train, y[train], sample.weights(c, train), max(SIZES)) if able else np.empty(0, np.int64)
    for k in SIZES:
        chosen = order[:k]
        figures: dict[str, float | None] = {"auroc": None, "f1": None}
        if len(chosen):
            dense = values[:, chosen].toarray().astype(float)
            figures = _judged_probe(dense[train], dense[test], y, train, test, sample, c)
        yield {"k": k, "dimensions": chosen.tolist(), **counts, **figures}


def _strongest(
    values: sparse.csc_array, rows: Ints, y: NDArray[np.bool_], weights: NDArray[np.float64], n: int
) -> Ints:
    """Return the n dimensions whose values differ most between class and others, by the size of the correlation.

    The correlation is the difference of means in units of the spread, so that dimensions of any scale compare.
    """
    chosen = values[rows].astype(float)
    total, in_class = weights.sum(), weights[y].sum()
    means = chosen.T @ weights / total
    squares = chosen.power(2).T @ weights / total
    means_in = chosen.T @ (weights * y) / in_class
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes = np.abs(means_in - means) / np.sqrt(np.maximum(squares - means**2, 0))
    sizes = np.where(np.isfinite(sizes), sizes, -1.0)
    order = np.argsort(-sizes, kind="stable")[:n]
    return np.asarray(order[sizes[order] > 0])


def _judged_probe(
    x_train: NDArray[np.float64], x_test: NDArray[np.float64], y: NDArray[np.bool_], train: Ints, test: Ints,
    sample: Sample, c: int,
) -> dict[str, float | None]:  # fmt: skip
    """Fit on the training rows and judge on the others. The cut for F1 is the best one on the training rows.

    The products of a fit are so small that threads of the BLAS library take five times as long as one.
    """
    spread = x_train.std(0)
    spread[spread == 0] = 1
    model = LogisticRegression(max_iter=300)
    weights = sample.weights(c, train)
    with threadpool_limits(1, "blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x_train / spread, y[train], sample_weight=weights)
    on_train, on_test = (model.decision_function(x / spread) for x in (x_train, x_test))
    precision, recall, cuts = precision_recall_curve(y[train], on_train, sample_weight=weights)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    cut = cuts[int(np.argmax(f1[:-1]))]
    of_test = sample.weights(c, test)
    return {
        "auroc": float(roc_auc_score(y[test], on_test)),
        "f1": float(f1_score(y[test], on_test >= cut, sample_weight=of_test)),
    }
