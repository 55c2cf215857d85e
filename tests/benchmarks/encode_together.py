"""Three SAEs encoded in one reading of the store, beside three runs of one.

python -m tests.benchmarks.encode_together            262,144 rows of 512, SAEs of 4,096 features, three alternations
python -m tests.benchmarks.encode_together --quick    32,768 rows, SAEs of 1,024 features, one

*Bytes* are those of activations that are read, *time* is that of whole stages. *Throttled*: activations arrive at the
rate at which one SAE takes them when reading costs nothing, and again at a quarter of it. Every run must be, byte for
byte, that of its own.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from saeflow.activations.shards import StoredArray
from saeflow.pipeline import encode, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report
from tests.benchmarks._pipe import Pipe
from tests.support.small_pipeline import tree

QUIET = Progress(verbosity=-1)
KS = (16, 32, 64)


def recipes(n_rows: int, n_features: int, n_parts: int = 8) -> list[Recipe]:
    """SAEs of three sparsities, hardly trained: how they came about does not change what encoding costs."""
    made = {"kind": "superposed", "n_samples": n_rows, "n_neurons": 512, "n_true": n_features, "l0": 32}
    about = {"synthetic": made, "dtype": "float16", "part_rows": n_rows // n_parts}
    return [
        parse_recipe(
            {
                "name": f"k{k}", "data": "rows", "activations": about, "train": {"n_tokens": 40_960},
                "features": {"check_values": 0},
                "sae": {"architecture": "topk", "n_features": n_features, "k": k},
            }
        )
        for k in KS
    ]  # fmt: skip


def measured(store: Store, groups: Sequence[Sequence[Recipe]], pipe: Pipe) -> tuple[float, int]:
    """Seconds and bytes read of encoding each group in one reading."""
    shutil.rmtree(store.root / "features", ignore_errors=True)
    pipe.n_bytes, began = 0, time.monotonic()
    for group in groups:
        encode.run_together([Lineage(store, recipe) for recipe in group], QUIET)
    return time.monotonic() - began, pipe.n_bytes


def main() -> None:
    quick = arguments(__doc__).quick
    n_rows, n_features, times = (1 << 15, 1024, 1) if quick else (1 << 18, 4096, 3)
    three, pipe = recipes(n_rows, n_features), Pipe()

    def n_bytes(array: StoredArray, rows: slice) -> int:
        start, stop, _ = rows.indices(array.shape[0])
        return (stop - start) * array.shape[1] * array.shape[2] * array.dtype.itemsize

    with tempfile.TemporaryDirectory(prefix="saeflow-together-") as temporary:
        together, apart = (Store.create(Path(temporary) / name) for name in ("together", "apart"))
        for store in (together, apart):
            import_table.run(Lineage(store, three[0]), QUIET)
            for recipe in three:
                train.run(Lineage(store, recipe), QUIET)
        with pipe.installed(StoredArray, "read", n_bytes):
            measured(apart, [three[:1]], pipe)  # compiles
            one_seconds, one_bytes = measured(apart, [three[:1]], pipe)
            ratios: dict[str, list[float]] = {}
            bytes_ratio, same = 0.0, True
            rate = one_bytes / one_seconds
            for name, throttle in {"free": None, "just feeds one": rate, "a quarter of that": rate / 4}.items():
                pipe.rate = throttle
                for _ in range(1 if name == "a quarter of that" else times):
                    many, read = measured(together, [three], pipe)
                    each, _ = measured(apart, [[recipe] for recipe in three], pipe)
                    ratios.setdefault(name, []).append(many / each)
                    bytes_ratio = read / one_bytes
                    same = same and tree(together.root / "features") == tree(apart.root / "features")
                    print(f"  {name}: {many:.1f} s together, {each:.1f} s apart", flush=True)
    middle = {name: statistics.median(each) for name, each in ratios.items()}
    spread = {name: max(each) - min(each) for name, each in ratios.items()}
    throttled = "the same, the store throttled to what just feeds one"
    report(
        "encode_together",
        [
            Bar("bytes read for three over one reading", 1.05, "<=", bytes_ratio),
            Bar("time of three in one reading over three runs", 1.0, "<=", middle["free"], spread["free"]),
            Bar(throttled, 0.45, "<=", middle["just feeds one"], spread["just feeds one"]),
            Bar("the same, at a quarter of that rate", 0.45, "<=", middle["a quarter of that"]),
            Bar("runs equal to their own, byte for byte", 1, ">=", float(same)),
        ],
        rows=n_rows,
        n_features=n_features,
        one_seconds=one_seconds,
        one_bytes_per_s=rate,
    )


if __name__ == "__main__":
    main()
