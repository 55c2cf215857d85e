"""What attention sinks at random places cost an SAE, and what leaving them out by their length gives back.

python -m tests.benchmarks.sinks            80,000 rows of 64 neurons, 800,000 training tokens (two minutes)
python -m tests.benchmarks.sinks --quick    40,000 rows, 200,000 training tokens

One row in a hundred, drawn at random, is made 100 times as long as the median row and turned to one of three random
directions, as sinks share few directions. Three SAEs are trained: on the rows without sinks, on all rows, and on all
rows with `activations.skip_norms_above = 10`. The held-out rows that are no sinks judge all of them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeflow.activations.feed import held_out_rows
from saeflow.pipeline import encode, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import query
from saeflow.query.connection import connect
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.sae.formats.load import load_sae
from saeflow.sae.metrics import Reconstruction
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

SHARE, LENGTH, ABOVE = 0.01, 100, 10.0


def made_rows(n_rows: int, width: int = 64, n_true: int = 512) -> np.ndarray:
    """Rows float32 (n, D): sums of about eight known features, and noise."""
    dice = np.random.default_rng(0)
    directions = dice.normal(size=(n_true, width)) / width**0.5
    rows = np.empty((n_rows, width), np.float32)
    for start in range(0, n_rows, 10_000):
        shape = len(rows[start : start + 10_000]), n_true
        strengths = (1 + dice.random(shape)) * (dice.random(shape) < 8 / n_true)
        rows[start : start + 10_000] = strengths @ directions + 0.02 * dice.normal(size=(shape[0], width))
    return rows


def planted(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with sinks in place of some, and which rows those are."""
    dice = np.random.default_rng(1)
    sinks = np.sort(dice.choice(len(rows), round(SHARE * len(rows)), replace=False))
    directions = dice.normal(size=(3, rows.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = rows.copy()
    found[sinks] = LENGTH * np.median(np.linalg.norm(rows, axis=1)) * directions[dice.integers(3, size=len(sinks))]
    return found, sinks


def trained(store: Store, table: Path, name: str, n_tokens: int, above: float | None = None) -> Lineage:
    skips = {"skip_norms_above": above} if above else {}
    data: dict[str, Any] = {
        "name": name, "activations": {"source": str(table), "dtype": "float32"} | skips, "corpus": {"held_out": 0.1},
        "feed": {"batch_rows": 1024}, "sae": {"architecture": "batchtopk", "n_features": 1024, "k": 8},
        "train": {"n_tokens": n_tokens},
    }  # fmt: skip
    lineage = Lineage(store, parse_recipe(data))
    for stage in (import_table, train, encode):
        stage.run(lineage, Progress(verbosity=-1))
    return lineage


def unexplained(lineage: Lineage, x: torch.Tensor) -> float:
    sums = Reconstruction(x.shape[1])
    sums.add(x, load_sae(lineage.sae.path).reconstruct(x))
    return sums.variance_unexplained


def main() -> None:
    quick = arguments(__doc__).quick
    n_rows, n_tokens = (40_000, 200_000) if quick else (80_000, 800_000)
    with tempfile.TemporaryDirectory() as folder:
        rows = made_rows(n_rows)
        spoilt, sinks = planted(rows)
        tables = {"clean": np.delete(rows, sinks, axis=0), "spoilt": spoilt}
        for name, values in tables.items():
            np.save(f"{folder}/{name}.npy", values)
        store = Store.create(Path(folder) / "store")
        clean = trained(store, Path(folder) / "clean.npy", "clean", n_tokens)
        before = trained(store, Path(folder) / "spoilt.npy", "before", n_tokens)
        after = trained(store, Path(folder) / "spoilt.npy", "after", n_tokens, ABOVE)
        x = torch.cat(list(held_out_rows(after.selection(), after.activations, after.site, n_rows)))
        with connect(store, after.features.id) as connection:
            left_out = query(connection, "select piece from left_out").column("piece").to_pylist()
        names = {f"row {row}" for row in sinks}
        found = {name: unexplained(each, x) for name, each in (("clean", clean), ("before", before), ("after", after))}
    report(
        "sinks",
        [
            Bar("sinks left out, as a share of those planted", 1.0, ">=", len(names & set(left_out)) / len(names)),
            Bar("other rows left out", 0, "<=", len(set(left_out) - names)),
            Bar("variance unexplained, after over before", 0.5, "<=", found["after"] / found["before"]),
            Bar("variance unexplained, after over without any sinks", 1.05, "<=", found["after"] / found["clean"]),
        ],
        n_rows=n_rows, n_sinks=len(sinks), n_train_tokens=n_tokens, n_judged=len(x), quick=quick,
        variance_unexplained=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
