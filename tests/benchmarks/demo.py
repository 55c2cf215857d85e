"""The demo from nothing in a fresh store, and once more: seconds, and the quality of the SAE it trains.

python -m tests.benchmarks.demo            a fresh store, through Prefect, twice
python -m tests.benchmarks.demo --quick    the quality of the store that `make demo` left
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import load_recipe
from saeflow.store.files import read_json
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "flows" / "recipes" / "demo.toml"


def seconds_of_a_run(store: Path) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "flows.pipeline", RECIPE, "--store", store], check=True, cwd=ROOT)
    return time.monotonic() - began


def quality_bars(store: Path) -> list[Bar]:
    recipe = load_recipe(RECIPE)
    path = Lineage(Store.open(store), recipe).features.path / "quality.json"
    if not path.is_file():
        return [Bar("quality", 0, ">=", None, reason=f"no finished demo in {store}; run `make demo` first")]
    quality = read_json(path)
    return [
        Bar("loss recovered against zero-ablation", 0.99, ">=", quality["loss_recovered_zero"]),
        Bar("loss recovered against mean-ablation", 0.98, ">=", quality["loss_recovered_mean"]),
        Bar("variance unexplained", 0.11, "<=", quality["variance_unexplained"]),
        Bar("L0", 32, "<=", quality["l0"]),
        Bar("dead share", 0.01, "<=", quality["dead_share"]),
    ]


def main() -> None:
    if arguments(__doc__).quick:
        report("demo", quality_bars(ROOT / "data" / "store"))
        return
    with tempfile.TemporaryDirectory(prefix="saeflow-demo-", dir=ROOT / "data") as folder:
        store = Path(folder) / "store"
        first, second = seconds_of_a_run(store), seconds_of_a_run(store)
        times = [Bar("seconds of the first run", 200, "<=", first), Bar("seconds of the second run", 45, "<=", second)]
        report("demo", times + quality_bars(store))


if __name__ == "__main__":
    main()
