"""What tokenising a corpus takes in another checkout of saeflow and in this one, in turn: time, and the most memory.

python -m tests.benchmarks.corpora CHECKOUT                     the demo's corpus, and 1 GB of CSV made of its texts
python -m tests.benchmarks.corpora CHECKOUT --megabytes 100     a smaller file
python -m tests.benchmarks.corpora CHECKOUT --quick             10 MB

Every run begins a new store in a new process. *Ratio* is the median of the CPU seconds after over that of those before;
its spread is that of the pairs' ratios. The JSON also has the seconds of the clock.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from tests.benchmarks._bars import Bar, report
from tests.support.checkouts import command
from tests.support.small_pipeline import write_recipe

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo"
TEXT_CHARACTERS = 3000
MEMORY = 2 << 30


class Taken(NamedTuple):
    cpu_seconds: float
    seconds: float
    most_bytes: int


def tokenised(checkout: Path, corpus: Path, folder: Path) -> Taken:
    """Run `saeflow tokens` on a corpus in a store of its own."""
    about = {"corpus": {"files": [str(corpus)]}, "model": {"path": str(DEMO / "model")},
             "activations": {"sites": ["transformer.h.0.mlp.act"]}, "name": "texts"}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as store:
        recipe = write_recipe(Path(store) / "texts.toml", about)
        words = command(checkout, "tokens", str(recipe), "--store", f"{store}/store")
        began = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, code, usage = os.wait4(process.pid, 0)
        if code:
            sys.exit(said)
        return Taken(usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss << 10)


def write_csv(path: Path, n_bytes: int) -> None:
    """Write rows of key, text, date and number, made of the demo's texts over and over."""
    texts = pq.read_table(DEMO / "corpus.parquet").column("text").to_pylist()
    pieces = [text[i : i + TEXT_CHARACTERS] for text in texts for i in range(0, len(text), TEXT_CHARACTERS)]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "text", "date", "score"])
        for n, text in enumerate(itertools.cycle(pieces)):
            if n % 1000 == 0 and file.tell() >= n_bytes:
                return
            table.writerow([f"{n:09}", text, f"2024-09-{n % 30 + 1:02}T06:37:50Z", f"{n / 8}"])


def compared(before: Path, corpus: Path, folder: Path, times: int) -> list[tuple[Taken, Taken]]:
    """Tokenise a corpus in both checkouts; who goes first changes."""
    pairs = []
    for turn in range(times):
        order = [before, ROOT] if turn % 2 == 0 else [ROOT, before]
        taken = {path: tokenised(path, corpus, folder) for path in order}
        pairs.append((taken[before], taken[ROOT]))
        print(f"  {corpus.name}: before {pairs[-1][0]}, after {pairs[-1][1]}", flush=True)
    return pairs


def bars_of(name: str, pairs: list[tuple[Taken, Taken]]) -> list[Bar]:
    before, after = (statistics.median(pair[i].cpu_seconds for pair in pairs) for i in (0, 1))
    ratios = [pair[1].cpu_seconds / pair[0].cpu_seconds for pair in pairs]
    spread = round(max(ratios) - min(ratios), 3)
    return [
        Bar(f"{name}: CPU seconds after over before", 1.10, "<=", round(after / before, 3), spread),
        Bar(f"{name}: most memory in bytes", MEMORY, "<=", max(after.most_bytes for _, after in pairs)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=lambda text: Path(text).resolve(), help="the state before")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the CSV file")
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="under a minute: 10 MB, one alternation")
    asked = parser.parse_args()
    n_bytes, times = (10 * 10**6, 1) if asked.quick else (asked.megabytes * 10**6, asked.alternations)
    bars, seconds = [], {}
    with tempfile.TemporaryDirectory(prefix="saeflow-corpora-") as temporary:
        folder = Path(temporary)
        write_csv(folder / "texts.csv", n_bytes)
        for name, corpus in {"demo corpus": DEMO / "corpus.parquet", "CSV": folder / "texts.csv"}.items():
            pairs = compared(asked.checkout, corpus, folder, times)
            bars += bars_of(name, pairs)
            seconds[name] = [[round(each.seconds, 2) for each in pair] for pair in pairs]
    report("corpora", bars, csv_bytes=n_bytes, seconds_before_and_after=seconds)


if __name__ == "__main__":
    main()
