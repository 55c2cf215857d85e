"""Eight SAEs on one reading of the store, beside eight runs of one.

python -m tests.benchmarks.sweep            262,144 rows of 256, SAEs of 4,096 features, thrice (half an hour)
python -m tests.benchmarks.sweep --quick    32,768 rows, SAEs of 1,024 features, once

The sweep is over k and the learning rate. *Bytes* are those that the feeds read, *time* is that of whole trainings,
from the first read to publication. *Throttled*: blocks arrive at the rate at which one SAE takes them when reading
costs nothing, and again at a quarter of it: at the first rate the processor is the limit of eight SAEs, at the second
the store is that of one. Every SAE of the sweep must be, byte for byte, that of its separate run.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from saeflow.activations.feed import Feed
from saeflow.pipeline import train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks import _superposed
from tests.benchmarks._bars import Bar, arguments, report
from tests.benchmarks._pipe import Pipe
from tests.support.small_pipeline import tree

QUIET = Progress(verbosity=-1)
WIDTH, N_SAES = 256, 8


def a_recipe(folder: Path, n_rows: int, n_features: int) -> Recipe:
    """Eight SAEs over a table that takes eight pools, each seeing it once."""
    np.save(folder / "rows.npy", _superposed.rows(n_rows, WIDTH, n_features // 2, 16, seed=0))
    return parse_recipe(
        {
            "name": "eight",
            "activations": {"source": str(folder / "rows.npy"), "dtype": "float16"},
            "feed": {"pool_bytes": n_rows * WIDTH * 2 // 4, "block_bytes": n_rows * WIDTH * 2 // 64},
            "sae": {"architecture": "topk", "n_features": n_features},
            "train": {"n_tokens": n_rows},
            "sweep": {"grid": {"sae.k": [8, 16, 24, 32], "train.lr": [5e-4, 1e-3]}},
        }
    )


def measured(store: Store, recipes: list[Recipe], pipe: Pipe) -> tuple[float, int]:
    """Seconds and bytes read of training all recipes, one after the other, from nothing."""
    shutil.rmtree(Path(store.name) / "saes", ignore_errors=True)
    pipe.n_bytes, began = 0, time.monotonic()
    for recipe in recipes:
        train.run(Lineage(store, recipe), QUIET)
    return time.monotonic() - began, pipe.n_bytes


def main() -> None:
    quick = arguments(__doc__).quick
    n_rows, n_features, times = (1 << 15, 1024, 1) if quick else (1 << 18, 4096, 3)
    pipe = Pipe()
    with (
        tempfile.TemporaryDirectory(prefix="saeflow-sweep-") as temporary,
        pipe.installed(Feed, "_read_block", lambda feed, block, out: sum(e.numel() * e.element_size() for e in out)),
    ):
        recipe = a_recipe(Path(temporary), n_rows, n_features)
        members = recipe.members()
        together, apart = (Store.create(Path(temporary) / name) for name in ("together", "apart"))
        for store in (together, apart):
            import_table.run(Lineage(store, recipe), QUIET)
        one_seconds, one_bytes = measured(apart, members[:1], pipe)
        one_rate = one_bytes / one_seconds
        ratios: dict[str, list[float]] = {}
        bytes_ratio, same = 0.0, True
        for name, rate in {"free": None, "just feeds one": one_rate, "a quarter of that": one_rate / 4}.items():
            pipe.rate = rate
            for _ in range(1 if name == "a quarter of that" else times):
                many, n_bytes = measured(together, [recipe], pipe)
                each, _ = measured(apart, members, pipe)
                ratios.setdefault(name, []).append(many / each)
                bytes_ratio = n_bytes / one_bytes
                same = same and tree(together.root / "saes") == tree(apart.root / "saes")
                print(f"  {name}: {many:.1f} s together, {each:.1f} s apart", flush=True)
    middle = {name: statistics.median(each) for name, each in ratios.items()}
    spread = {name: max(each) - min(each) for name, each in ratios.items()}
    report(
        "sweep",
        [
            Bar("bytes read by eight over one", 1.05, "<=", bytes_ratio),
            Bar("time of eight in one reading over eight runs", 1.0, "<=", middle["free"], spread["free"]),
            Bar(
                "the same, the store throttled to what just feeds one", 0.25, "<=",
                middle["just feeds one"], spread["just feeds one"],
            ),
            Bar("the same, at a quarter of that rate", 0.25, "<=", middle["a quarter of that"]),
            Bar("SAEs equal to their separate runs, byte for byte", 1, ">=", float(same)),
        ],
        rows=n_rows,
        n_features=n_features,
        one_seconds=one_seconds,
        one_bytes_per_s=one_rate,
    )  # fmt: skip


if __name__ == "__main__":
    main()
