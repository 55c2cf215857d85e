"""Many readers of one run at once: processes that ask, the pages, and commands.

python -m tests.benchmarks.readers            a run of 10^8 values, 16 processes (0.6 GB of disk, some minutes)
python -m tests.benchmarks.readers --quick    10^7 values, 4 processes, under a minute

Each process opens the run as `saeflow.open` does and asks one question after the other. *Slowdown* is the questions a
second that as many processes as there are cores answer, over those of all processes: 1 if readers take nothing from
each other but cores. A third round does the same while a browser reads pages. Memory is the most that a process had in
its resident set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from saeflow.query.connection import connect
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, report
from tests.benchmarks.queries import copied_store, made
from tests.support.served_pages import served

MEMORY = 300_000_000
"""Bytes that a reader may take."""

ROUNDS = 3


def together(store: Path, n: int, seconds: float) -> list[dict[str, float]]:
    """Let so many processes ask at once."""
    command = [sys.executable, "-m", "tests.benchmarks._reader", str(store), str(seconds)]
    readers = [
        subprocess.Popen([*command, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for place in range(n)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
    answers = []
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    for reader in readers:
        said, _ = reader.communicate()
        if reader.returncode:
            raise RuntimeError(f"a reader ended with {reader.returncode}")
        answers.append(json.loads(said.splitlines()[-1]))
    return answers


@contextmanager
def browsing(store: Path) -> Iterator[list[float]]:
    """While open, one client reads pages of features. Gives the milliseconds of each."""
    taken: list[float] = []
    stop = threading.Event()
    with connect(Store.open(store)) as connection:
        features = connection.execute("select feature_id from stg_feature_stats where n_tokens > 50").fetchall()

    def read(address: str) -> None:
        with httpx.Client(timeout=300) as client:
            for (feature,) in itertools.cycle(features):
                if stop.is_set():
                    return
                began = time.perf_counter()
                client.get(f"{address}/runs/made/features/{feature}").raise_for_status()
                taken.append(1e3 * (time.perf_counter() - began))

    with tempfile.NamedTemporaryFile() as said, served(store, Path(said.name)) as (address, _):
        reader = threading.Thread(target=read, args=(address,))
        reader.start()
        try:
            yield taken
        finally:
            stop.set()
            reader.join()


def measured(store: Path, n_readers: int, seconds: float) -> tuple[list[Bar], dict[str, Any]]:
    cores = os.cpu_count() or 1
    few, many, beside, pages, peaks = [], [], [], [], []
    for _ in range(ROUNDS):
        few.append(rate(together(store, cores, seconds)))
        every = together(store, n_readers, seconds)
        many.append(rate(every))
        with browsing(store) as taken:
            besides = together(store, n_readers, seconds)
        beside.append(rate(besides))
        pages += taken
        peaks += [each["peak_bytes"] for each in (*every, *besides)]
    slowdown = [one / other for one, other in zip(few, many, strict=True)]
    bars = [
        Bar(f"memory of a reader, the most of {n_readers}: bytes", MEMORY, "<=", max(peaks)),
        Bar(
            f"slowdown of {n_readers} readers on {cores} cores",
            1.15,
            "<=",
            round(statistics.median(slowdown), 3),
            round(max(slowdown) - min(slowdown), 3),
        ),
    ]
    facts = {
        "cores": cores,
        "readers": n_readers,
        "questions_per_second": {"of the cores": few, "of all": many, "beside a browser": beside},
        "pages_ms": round(statistics.median(pages), 1) if pages else None,
        "n_pages": len(pages),
    }
    return bars, facts


def rate(answers: list[dict[str, float]]) -> float:
    return round(sum(each["per_second"] for each in answers), 1)


def main() -> None:
    options = options_of()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        if options.quick:
            store, n_readers, seconds = Path(made(folder, 10_000_000)[0].store.root), 4, 2.0
        else:
            store, n_readers, seconds = Path(copied_store(folder, 100_000_000).root), 16, 10.0
        bars, facts = measured(store, n_readers, seconds)
    report("readers", bars, **facts)


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    parser.add_argument("--keep", type=Path, help="make the run in this folder, or find it there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
