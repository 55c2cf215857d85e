"""Questions to a compacted run of 10 and of 100 million values, cold and warm, beside two ways of keeping values.

python -m tests.benchmarks.queries            10M and 100M values: 2 GB of disk and of memory, about ten minutes
python -m tests.benchmarks.queries --quick    1M and 10M
python -m tests.benchmarks.queries --values 1e9 --keep FOLDER    one run of 1e8, 1e9 or 1e10 values, in a process of its
                                              own; 1e10 take 49 GB of disk and 40 minutes: they stay in the folder

A run of `--values` is one of ten million values, copied with its tokens renumbered (`_copied_run` says how).

*Warm*: asked before on the same connection, of other features. *Cold*: a new connection, and the files dropped from the
system's cache. Besides: one file a part with its values unsorted; and files of a fifth of the features each, which have
to be loaded for one feature (as delphi keeps its latents: safetensors, int64 places and float32 values).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction
from saeflow.features.files import files_of
from saeflow.query.ask import ask, query
from saeflow.query.connection import connect_to_run
from saeflow.query.runs import Run
from saeflow.runtime.memory import peak_bytes
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.benchmarks import _copied_run, _made_run
from tests.benchmarks._bars import Bar, report

ALTERNATIONS = 3
ORIGINAL = 10_000_000
"""Values of the run that is copied."""

RARE, COMMON = 100, 30_000
N_SPLITS = 5
QUIET = Progress(verbosity=-1)


@dataclass(frozen=True)
class Asked:
    """A question with the arguments it is asked with, one after the other, and the milliseconds it may take."""

    name: str
    question: str
    arguments: Sequence[Sequence[object]]
    most_ms: float | None
    grows: bool = False
    """May it take at most 1.5 times as long with ten times the values?"""
    limit: int | None = None


def asked(counts: np.ndarray, n_tokens: int) -> list[Asked]:
    """`counts` (F,): on how many tokens each feature fires."""
    rare, common = nearest(counts, RARE), nearest(counts, COMMON)
    tokens = np.random.default_rng(0).integers(0, n_tokens, 16).tolist()
    each = [[f] for f in nearest(counts, 1000)]
    return [
        Asked("tokens_where, rare", "tokens_where", [[f, 0.0] for f in rare], 10, True),
        Asked("tokens_where, common", "tokens_where", [[f, 0.0] for f in common], 30, True),
        Asked("top_tokens", "top_tokens", [[f, 20] for f in nearest(counts, 1000)], 10, True),
        Asked("token_features", "token_features", [[t] for t in tokens], 10, True),
        Asked("context", "context", [[t] for t in tokens], None, True),
        Asked("contexts with values", "contexts", [[f, 20] for f in nearest(counts, 1000)], 50),
        Asked("coactive_features", "coactive_features", each, 10),
        Asked("feature_histogram", "feature_histogram", each, 10),
        Asked("position_profile", "position_profile", each, 10),
        Asked("similar_features", "similar_features", each, 10),
        Asked("feature_summary, a page", "feature_summary", [[]] * 8, 20, limit=50),
        Asked("source_contrast", "source_contrast", [["source 0", "source 1"]] * 4, None),
        Asked("feature_quantile_examples", "feature_quantile_examples", each[:8], None),
        Asked("coactivation, from the values", "coactivation", each[:4], None),
        Asked("coactivation, common", "coactivation", [[f] for f in common[:1]], None),
        Asked("approximate_coactivation", "approximate_coactivation", [[f] for f in common[:4]], None),
    ]


Opened = tuple[Run, duckdb.DuckDBPyConnection]


def nearest(counts: np.ndarray, wanted: int, n: int = 16) -> list[int]:
    """Features that fire on about so many tokens."""
    return [int(f) for f in np.argsort(np.abs(counts - wanted), kind="stable")[:n]]


def milliseconds(opened: Opened, each: Asked, arguments: Sequence[object]) -> float:
    run, connection = opened
    began = time.perf_counter()
    ask(connection, each.question, list(arguments), each.limit, run=run)
    return 1e3 * (time.perf_counter() - began)


@dataclass
class Made:
    """A store, its one run, and what it is asked."""

    store: Store
    run: Artefact
    opened: Opened
    every: list[Asked]


def measured(stores: Sequence[Made]) -> list[dict[str, dict[str, Any]]]:
    """Median and 95th percentile of every question, warm; the median of three, cold. The stores are asked in turn."""
    warm: dict[tuple[int, str], list[list[float]]] = {}
    for _ in range(ALTERNATIONS):
        for number, made in enumerate(stores):
            for each in made.every:
                milliseconds(made.opened, each, each.arguments[0])
                times = [milliseconds(made.opened, each, a) for a in each.arguments]
                warm.setdefault((number, each.name), []).append(times)
    answers: list[dict[str, dict[str, Any]]] = []
    for number, made in enumerate(stores):
        answers.append({})
        for each in made.every:
            times = np.array(warm[number, each.name])
            medians = np.median(times, axis=1)
            answers[-1][each.name] = {
                "asked_ms": each.most_ms, "grows": each.grows, "median_ms": round(float(np.median(medians)), 2),
                "medians_ms": medians.round(2).tolist(), "p95_ms": round(float(np.quantile(times, 0.95)), 2),
                "cold_ms": round(float(np.median([cold(made, each, a) for a in each.arguments[:3]])), 1),
            }  # fmt: skip
            print(f"{each.name:32}", answers[-1][each.name], flush=True)
    return answers


def cold(made: Made, each: Asked, arguments: Sequence[object]) -> float:
    for path in made.store.root.rglob("*.parquet"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    opened = connect_to_run(made.store)
    with contextlib.closing(opened[1]):
        return milliseconds(opened, each, arguments)


def unsorted(run: Artefact, folder: Path, features: Sequence[int]) -> float:
    """Milliseconds to find a feature's values where each part is one file in no order."""
    folder.mkdir()
    for part in run.published().parts:
        for number, name in enumerate(files_of(part, "token_major")):
            table = pq.read_table(run.part_path(part) / name, partitioning=None)
            order = np.random.default_rng(0).permutation(len(table))
            pq.write_table(
                table.take(pa.array(order)), folder / f"{part.index:06d}-{number}.parquet", compression="zstd"
            )
    files = sorted(map(str, folder.glob("*.parquet")))
    with duckdb.connect() as connection:
        return typical(lambda f: connection.sql(
            "select token_id, value from read_parquet($files) where feature_id = $f order by token_id",
            params={"files": files, "f": f},
        ).to_arrow_table(), features)  # fmt: skip


def as_splits(run: Artefact, folder: Path, features: Sequence[int]) -> float:
    """Milliseconds to load the split that holds a feature and pick its rows."""
    folder.mkdir()
    size = -(-_made_run.N_FEATURES // N_SPLITS)
    for split in range(N_SPLITS):
        wanted = [("feature_id", ">=", split * size), ("feature_id", "<", (split + 1) * size)]
        tables = [
            pq.read_table(run.part_path(part) / name, filters=wanted, partitioning=None)
            for part in run.published().parts
            for name in files_of(part, "feature_major", split * size, (split + 1) * size - 1)
        ]
        table = pa.concat_tables(tables)
        token, feature = (table.column(c).to_numpy().astype(np.int64) for c in ("token_id", "feature_id"))
        places = np.stack([token // _made_run.LENGTH, token % _made_run.LENGTH, feature], 1)
        save_file(
            {"locations": places, "activations": table.column("value").to_numpy()}, folder / f"{split}.safetensors"
        )

    def load(f: int) -> Any:
        held = load_file(folder / f"{f // size}.safetensors")
        return held["activations"][held["locations"][:, 2] == f]

    return typical(load, features[:4])


def typical(ask: Callable[[int], Any], features: Sequence[int]) -> float:
    times = []
    for f in features:
        began = time.perf_counter()
        ask(f)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def made(folder: Path, n_values: int) -> tuple[Made, float]:
    """And values/s of its compaction."""
    store = Store.create(folder / f"store-{n_values}")
    run = _made_run.make(store, n_values)
    source = store.by_id(run.record.inputs[0])
    began = time.perf_counter()
    compact(run, source)
    seconds = time.perf_counter() - began
    return opened(store, run), run.published().total("n_values") / seconds


def opened(store: Store, run: Artefact) -> Made:
    found = connect_to_run(store)
    return Made(
        store, run, found, asked(counts_of(found[1]), store.input_of(run, "tokens").published().total("n_tokens"))
    )


def compact(run: Artefact, source: Artefact) -> None:
    used, parts = TokenSelection(source), run.published().parts
    with QUIET.bar("compact", None, "values") as bar:
        for group in compaction.plan_merges(parts, used.spans):
            compaction.replace_group(run, group, compaction.merge_whole_parts(run, used, group, bar), clear=True)


def counts_of(connection: duckdb.DuckDBPyConnection) -> np.ndarray:
    found = query(connection, "select n_tokens from stg_feature_stats order by feature_id")
    return np.asarray(found.column(0).to_numpy())


def bars(small: dict[str, dict[str, Any]], large: dict[str, dict[str, Any]], full: bool) -> list[Bar]:
    found = []
    for name, each in large.items():
        medians = np.array(each["medians_ms"])
        if each["asked_ms"] is not None and full:
            spread = round(float(np.ptp(medians)), 2)
            found.append(Bar(f"{name}: milliseconds, warm", each["asked_ms"], "<=", each["median_ms"], spread))
        if each["grows"]:
            grown = medians / np.array(small[name]["medians_ms"])
            middle, spread = round(float(np.median(grown)), 2), round(float(np.ptp(grown)), 2)
            found.append(Bar(f"{name}: time at ten times the values", 1.5, "<=", middle, spread))
    return found


AT_SIZE: dict[int, dict[str, float]] = {
    100_000_000: {"tokens_where, rare": 8, "top_tokens": 10},
    10_000_000_000: {
        "tokens_where, rare": 20, "tokens_where, common": 40, "top_tokens": 15, "token_features": 10,
        "contexts with values": 50, "coactivation, from the values": 3000, "coactivation, common": 3000,
        **dict.fromkeys(("coactive_features", "feature_histogram", "position_profile", "feature_summary, a page"), 20),
    },
}  # fmt: skip
"""Milliseconds that questions may take at a size, warm."""


def copied_store(folder: Path, n_values: int) -> Store:
    """Make the store of a run of so many values in the folder, or find it there."""
    kept, base = folder / f"copied-{n_values}", folder / "original"
    if not kept.exists():
        shutil.rmtree(base, ignore_errors=True)
        original, _ = made(base, ORIGINAL)
        original.opened[1].close()
        making = folder / f"making-{n_values}"
        shutil.rmtree(making, ignore_errors=True)
        _copied_run.copied(original.store, original.run, Store.create(making), n_values // ORIGINAL)
        making.rename(kept)
    return Store.open(kept)


def ask_alone(store: Store) -> dict[str, Any]:
    """Connect and ask every question; to be done in a process that has done nothing else.

    The first two connections make the run's views, and keep them for later ones: they are listed apart.
    """
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        connect_to_run(store)[1].close()
        taken.append(time.perf_counter() - began)
    connected_bytes = peak_bytes()
    found = opened(store, store.artefacts("features")[0])
    (answers,) = measured([found])
    files = sum(map(len, found.opened[0].files.values()))
    return {
        "connect_first_s": [round(each, 2) for each in taken[:2]],
        "connect_s": [round(each, 2) for each in taken[2:]], "files": files, "connected_bytes": connected_bytes,
        "peak_bytes": peak_bytes(), "answers": answers,
    }  # fmt: skip


def at_size(n_values: int, folder: Path) -> None:
    store = copied_store(folder, n_values)
    command = [sys.executable, "-m", "tests.benchmarks.queries", "--ask", str(store.root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    limits = AT_SIZE.get(n_values, AT_SIZE[10_000_000_000])
    listed = [
        Bar(
            "connect: seconds",
            1,
            "<=",
            float(np.median(found["connect_s"])),
            round(float(np.ptp(found["connect_s"])), 2),
        ),
        Bar("memory of a process that has connected: bytes", 1_000_000_000, "<=", found["connected_bytes"]),
    ]
    for name, most in limits.items():
        each = found["answers"][name]
        spread = round(float(np.ptp(each["medians_ms"])), 2)
        listed.append(Bar(f"{name}: milliseconds, warm", most, "<=", each["median_ms"], spread))
    report("queries", listed, values=n_values, **found)


def main() -> None:
    options = options_of()
    if options.ask:
        return print(json.dumps(ask_alone(Store.open(options.ask))))
    if options.values:
        with tempfile.TemporaryDirectory() as temporary:
            return at_size(int(options.values), options.keep or Path(temporary))
    beside_other_ways(options.quick)
    return None


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    parser.add_argument("--values", type=float, choices=(1e8, 1e9, 1e10), help="one run of so many values")
    parser.add_argument("--keep", type=Path, help="make the run in this folder, or find it there")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def beside_other_ways(quick: bool) -> None:
    sizes = (1_000_000, 10_000_000) if quick else (10_000_000, 100_000_000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stores, rates = zip(*(made(folder, n_values) for n_values in sizes), strict=True)
        answers = measured(stores)
        large = stores[-1]
        rare = nearest(counts_of(large.opened[1]), RARE)
        peers = {
            "unsorted files": unsorted(large.run, folder / "unsorted", rare),
            "splits loaded": as_splits(large.run, folder / "splits", rare),
        }
        for each in stores:
            each.opened[1].close()
    facts = {
        "compaction_values_per_s": [round(rate) for rate in rates],
        "one rare feature elsewhere, milliseconds": {name: round(ms, 1) for name, ms in peers.items()},
    }
    report("queries", bars(answers[0], answers[1], not quick), sizes=list(sizes), warm=answers, **facts)


if __name__ == "__main__":
    main()
