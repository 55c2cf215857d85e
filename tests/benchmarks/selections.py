"""Absorption that is planted and found, the features of chosen tokens in seconds, and two seeds of the demo compared.

python -m tests.benchmarks.selections            with data/store as `make demo` leaves it, or SAEFLOW_STORE
python -m tests.benchmarks.selections --quick    planted absorption alone

The seeds are compared if the store has a run `demo_seed` (docs/how-to/compare-seeds.md says how to train it).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saeflow.meaning.matching import FOUND_AGAIN, QUESTIONS, match_runs
from saeflow.query.api import OpenRun
from saeflow.query.ask import ask
from saeflow.query.connection import connect, connect_to_run
from saeflow.query.runs import pick_run, runs
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report
from tests.support.planted_absorption import Planted

ROOT = Path(__file__).resolve().parents[2]
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45)


def largest_error(seeds: int) -> float:
    """The largest distance of a found absorption rate from the planted one."""
    errors = []
    for seed in range(seeds):
        for n, rate in enumerate(RATES):
            planted = Planted.of(rate, min(n, 5), 0.1, 100 * seed + n)
            with tempfile.TemporaryDirectory() as folder:
                planted.write(Path(folder))
                tokens = pa.array(np.flatnonzero(planted.members))
                with connect(Store.open(folder), threads=1, names=["absorption"]) as connection:
                    found = ask(connection, "absorption", {"sql": "chosen"}, readings=tokens).to_pylist()[0]
            errors.append(abs(found["absorption_rate"] - sum(planted.absorbed.values())))
    return max(errors)


def seconds(run: OpenRun, **chosen: Any) -> float:
    """The median of three."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        run.ask("features_of_selection", **chosen)
        times.append(time.monotonic() - began)
    return sorted(times)[1]


def selection_bars(store: Path) -> list[Bar]:
    with OpenRun.open(store, "demo") as run:
        million = "select token_id from tokens limit 1000000"
        five = np.random.default_rng(0).integers(0, run.n_tokens or 1, 5).tolist()
        return [
            Bar("seconds of five tokens", 1.0, "<=", seconds(run, tokens=five)),
            Bar("seconds of a million tokens", 10.0, "<=", seconds(run, sql=million)),
        ]


def seed_stability(store: Store) -> dict[str, float]:
    run, connection = connect_to_run(store, "demo", names=QUESTIONS)
    with connection:
        matched = match_runs(store, connection, run, pick_run(store, runs(store), "demo_seed"), compare_values=False)
    return {f"found again at cosine {cosine}": matched.share_found(cosine) for cosine in FOUND_AGAIN} | {
        f"share of values at cosine {cosine}": matched.share_of_values(cosine) for cosine in FOUND_AGAIN
    }


def main() -> None:
    quick = arguments(__doc__).quick
    bars = [Bar("largest error of a planted absorption rate", 0.02, "<=", largest_error(1 if quick else 3))]
    folder = Path(os.environ.get("SAEFLOW_STORE") or ROOT / "data" / "store")
    facts: dict[str, Any] = {}
    if not quick and (folder / "store.json").is_file():
        bars += selection_bars(folder)
        if any(each.schema == "demo_seed" for each in runs(Store.open(folder))):
            facts["seeds"] = seed_stability(Store.open(folder))
    report("selections", bars, **facts)


if __name__ == "__main__":
    main()
