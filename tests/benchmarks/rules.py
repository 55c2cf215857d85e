"""Rules without a language model: how many demo features have one, and how long many features take.

python -m tests.benchmarks.rules           the demo's store, then 131,072 made features with 100 million values
python -m tests.benchmarks.rules --quick   every sixteenth of these features, and their time sixteen-fold

The demo's rules are chosen as `saeflow explain` does, in a copy of the store made of links. Made features fire on the
demo's tokens: seven in ten firings on one vocabulary entry each, the others anywhere, and one feature fires everywhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saeflow.meaning.token_rules import token_table
from saeflow.meaning.token_rules.choose import Chooser
from saeflow.meaning.token_rules.counting import Firings
from saeflow.meaning.token_rules.explain import explain_run
from saeflow.meaning.token_rules.families import make_families
from saeflow.meaning.token_rules.firings import plan_chunks
from saeflow.meaning.token_rules.stored import share_of_rules
from saeflow.meaning.token_rules.token_table import TokenTable
from saeflow.query.connection import connect
from saeflow.runtime.memory import peak_bytes
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

DEMO = Path(__file__).resolve().parents[2] / "data" / "store"
_ASKED = {0.8: 0.383, 0.5: 0.637}
"""Shares that an earlier version reached."""


@contextlib.contextmanager
def _linked(root: Path) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        copy = Path(folder) / "store"
        shutil.copytree(
            root, copy, copy_function=os.link, ignore=shutil.ignore_patterns("labels", "tmp", "catalog.sql")
        )
        yield Store.open(copy)


def _seconds() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def demo_bars(root: Path) -> list[Bar]:
    """Choose the demo's rules, and return the shares of live features, and the processor's seconds."""
    with _linked(root) as store:
        began = _seconds()
        explain_run(store, None, None, False, Progress(verbosity=-1))
        wall, cpu = (now - then for now, then in zip(_seconds(), began, strict=True))
        with connect(store, names=["feature_rules"]) as connection:
            scores = [row[0] for row in connection.execute("select f1 from feature_rules").fetchall()]
    bars = [
        Bar(f"live demo features with F1 of at least {least}", asked, ">=", share_of_rules(scores, least))
        for least, asked in _ASKED.items()
    ]
    return [*bars, Bar("demo, processor seconds", 60, "<=", cpu), Bar("demo, seconds", 60, "<=", wall)]


def _made_counts(n_features: int, n_values: int, n_tokens: int) -> np.ndarray:
    counts = 1 / np.arange(1, n_features + 1) ** 0.7
    counts = np.minimum(counts / counts.sum() * n_values, n_tokens // 2).astype(np.int64) + 2
    counts[0] = n_tokens
    return counts


def _made_firings(table: TokenTable, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray, seed: int) -> Firings:
    dice = np.random.default_rng(seed)
    parts = []
    for n in counts:
        entry = dice.integers(0, len(starts) - 1)
        own = tokens[starts[entry] : starts[entry + 1]][: int(n * 0.7)]
        anywhere = dice.integers(0, len(table.vocab_ids), n - len(own)).astype(np.int32)
        parts.append(np.concatenate([own, anywhere]))
    ends = np.cumsum(counts)
    return Firings(ends - counts, ends, np.concatenate(parts))


def made_bars(root: Path, every: int) -> list[Bar]:
    """Choose rules of every so-many-th made feature. Return the minutes for all, making them aside, and the memory."""
    n_features = 131_072
    with connect(Store.open(root), names=token_table.TOKEN_TABLES) as connection:
        table = token_table.read_token_table(connection)
    threads = n_threads(0)
    began = _seconds()
    families = make_families(table, threads)
    spent = [now - then for now, then in zip(_seconds(), began, strict=True)]
    tokens = np.argsort(table.vocab_ids, kind="stable").astype(np.int32)
    starts = np.searchsorted(table.vocab_ids[tokens], np.arange(len(table.pieces) + 1))
    chooser = Chooser(table, families, np.full((n_features, 20), -1, np.int32), threads)
    counts = _made_counts(n_features, 100_000_000, len(table.vocab_ids))
    before = list(spent)
    for chunk in plan_chunks(range(0, n_features, every), counts):
        firings = _made_firings(table, tokens, starts, counts[chunk], chunk[0])
        began = _seconds()
        chooser.rules(chunk, firings)
        spent = [total + now - then for total, now, then in zip(spent, _seconds(), began, strict=True)]
    spent = [kept + every * (total - kept) for total, kept in zip(spent, before, strict=True)]
    name = f"{n_features:,} features, {int(counts.sum()) / 1e6:.0f} million values"
    name += f", by every {every}th" if every > 1 else ""
    return [
        Bar(f"{name}: processor minutes", 10, "<=", spent[1] / 60),
        Bar(f"{name}: minutes", 5, "<=", spent[0] / 60),
        Bar("most memory, GB", 8, "<=", peak_bytes() / 1e9),
    ]


def main() -> None:
    every = 16 if arguments(__doc__).quick else 1
    report("rules", [*demo_bars(DEMO), *made_bars(DEMO, every)])


if __name__ == "__main__":
    main()
