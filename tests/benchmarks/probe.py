"""Every feature against every class: 100 million values, 16,384 features, 50 classes, on two cores.

python -m tests.benchmarks.probe            100M values: 1 GB of disk, about ten minutes to make them
python -m tests.benchmarks.probe --quick    2M values

Forty classes are planted: the tokens of one feature, a tenth of them left out at random, and as many others taken in.
Ten are classes of whole documents, of a fifth of the corpus each. SAEFLOW_BENCH_STORE names a folder that keeps the
values for a second run. The probe runs in a process of its own, whose memory is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from saeflow.classes import probing
from saeflow.classes.membership import Spans
from saeflow.query.connection import connect
from saeflow.query.runs import pick_run, runs
from saeflow.runtime.memory import peak_bytes
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.benchmarks._bars import Bar, arguments, report

N_CLASSES, N_PLANTED = 50, 40
MOST_SECONDS, MOST_BYTES = 20, 4 << 30


def plant(store: Store) -> tuple[Spans, list[int]]:
    """Classes, and for each of the first N_PLANTED the feature it was made from."""
    dice = np.random.default_rng(0)
    with connect(store, names=("stg_feature_stats", "stg_feature_major", "stg_documents")) as connection:
        ranked = connection.execute(
            "select feature_id from stg_feature_stats order by n_tokens desc, feature_id"
        ).fetchall()
        features = [ranked[int(place)][0] for place in np.geomspace(20, len(ranked) // 2, N_PLANTED)]
        documents = connection.execute("select first_token_id, n_tokens from stg_documents order by 1").fetchnumpy()
        n_tokens = int(documents["n_tokens"].sum())
        found = connection.execute(
            f"select feature_id, token_id from stg_feature_major where feature_id in {tuple(features)}"
        ).fetchnumpy()
    spans = []
    for number, feature in enumerate(features):
        own = found["token_id"][found["feature_id"] == feature]
        own = own[dice.random(len(own)) < 0.9]
        members = np.union1d(own, dice.integers(0, n_tokens, len(own) // 10))
        spans.append((np.full(len(members), number), members, members))
    firsts, lasts = documents["first_token_id"], documents["first_token_id"] + documents["n_tokens"] - 1
    for number in range(N_PLANTED, N_CLASSES):
        chosen = dice.random(len(firsts)) < 0.2
        spans.append((np.full(chosen.sum(), number), firsts[chosen], lasts[chosen]))
    numbers, firsts, lasts = (np.concatenate(each).astype(np.int64) for each in zip(*spans, strict=True))
    return Spans(tuple(f"class {number:02d}" for number in range(N_CLASSES)), numbers, firsts, lasts), features


def timed(folder: str) -> None:
    """Probe the store's run in this process; print seconds and bytes."""
    store, saved = Store.open(folder), np.load(f"{folder}/planted.npz")
    names = tuple(f"class {number:02d}" for number in range(N_CLASSES))
    spans = Spans(names, saved["numbers"], saved["firsts"], saved["lasts"])
    took, began, busy = {}, time.perf_counter(), time.process_time()
    run = pick_run(store, runs(store), None)
    members = probing.members_of(store, run, spans)
    took["members"] = time.perf_counter() - began
    tables = probing.score_tables(run, "planted", members, probing.ProbeSettings(), threads=2)
    took["figures"] = time.perf_counter() - began - took["members"]
    with tempfile.TemporaryDirectory() as place:
        probing.write_probe_tables(Path(place), tables)
        took["seconds"] = time.perf_counter() - began
        took["cpu_seconds"] = time.process_time() - busy
        pairs = pq.read_table(f"{place}/feature_classes.parquet", columns=["class", "feature_id", "auroc"])
    first = (
        pairs.sort_by([("auroc", "descending")])
        .group_by("class", use_threads=False)
        .aggregate([("feature_id", "first")])
    )
    best = dict(zip(first["class"].to_pylist(), first["feature_id_first"].to_pylist(), strict=True))
    print(json.dumps(took | {"bytes": peak_bytes(), "rows": len(pairs), "best": [best[name] for name in names]}))


@contextlib.contextmanager
def place() -> Iterator[Path]:
    kept = os.environ.get("SAEFLOW_BENCH_STORE")
    if kept:
        yield Path(kept)
        return
    with tempfile.TemporaryDirectory(prefix="saeflow-probe-") as folder:
        yield Path(folder)


def main() -> None:
    quick = arguments(__doc__).quick
    n_values = 2_000_000 if quick else 117_000_000  # a sixth of them fall together
    with place() as folder:
        store = Store.create(folder)
        if not store.artefacts("features"):
            _made_run.make(store, n_values, 32_768 if quick else 262_144)
        spans, features = plant(store)
        np.savez(folder / "planted.npz", numbers=spans.numbers, firsts=spans.firsts, lasts=spans.lasts)
        command = [sys.executable, "-c", f"from tests.benchmarks import probe; probe.timed({str(folder)!r})"]
        subprocess.run(command, check=True, capture_output=True)  # compiles the kernels
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        n_stored = store.artefacts("features")[-1].published().total("n_values")
    took = json.loads(answer.stdout.splitlines()[-1])
    right = np.mean([a == b for a, b in zip(took.pop("best"), features, strict=False)])
    bars = [
        Bar("seconds for all figures", MOST_SECONDS, "<=", round(took["seconds"], 2)),
        Bar("bytes at the peak", MOST_BYTES, "<=", took["bytes"]),
        Bar("planted classes whose feature ranks first", 1, ">=", float(right)),
    ]
    report(
        "probe",
        bars,
        n_values=n_stored,
        n_classes=N_CLASSES,
        n_features=_made_run.N_FEATURES,
        took=took,
    )


if __name__ == "__main__":
    main()
