"""Is `saeflow plan` right? Forecast and actual of a fresh run of the demo and of SmolLM2, side by side.

    python -m tests.benchmarks.forecast            # about ten minutes
    python -m tests.benchmarks.forecast --quick    # a piece of the demo

Each figure is the larger of forecast over actual and actual over forecast.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from saeflow.pipeline import forecast, stages
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "flows" / "recipes"
QUICK: dict[str, Any] = {"corpus.share": 0.05, "train.n_tokens": 200_000, "evaluate.max_tokens": 4096}


def apart(foreseen: float, actual: float) -> float:
    return max(foreseen / actual, actual / foreseen)


def compare(recipe: Recipe, figures: dict[str, Any]) -> list[Bar]:
    quiet = Progress(verbosity=-1)
    with tempfile.TemporaryDirectory(prefix="saeflow-forecast-", dir=ROOT / "data") as temporary:
        store = Store.create(temporary)
        foreseen = forecast.plan(store, recipe, quiet)
        summary = stages.run(Lineage(store, recipe), quiet)
        n_bytes = sum(artefact.storage.footprint(artefact.path)[0] for artefact in store.artefacts())
    actual = {
        "bytes": n_bytes,
        "peak_bytes": max(summary["peak_bytes"].values()),
        "seconds": sum(summary["seconds"].values()),
    }
    said = {"bytes": foreseen.n_bytes, "peak_bytes": foreseen.peak_bytes, "seconds": foreseen.seconds}
    parts = {stage.name: [stage.peak_bytes, stage.seconds] for stage in foreseen.stages}
    real = {name: [summary["peak_bytes"][name], summary["seconds"][name]] for name in summary["seconds"]}
    figures[recipe.name] = {"forecast": said, "actual": actual, "stages": {"forecast": parts, "actual": real}}
    return [
        Bar(f"{recipe.name}: {what}", asked, "<=", apart(said[name], actual[name]))
        for what, name, asked in (
            ("bytes", "bytes", 1.2),
            ("peak memory", "peak_bytes", 1.2),
            ("hours", "seconds", 2.0),
        )
    ]


def main() -> None:
    quick = arguments(__doc__).quick
    figures: dict[str, Any] = {}
    bars = compare(load_recipe(RECIPES / "demo.toml", **(QUICK if quick else {})), figures)
    recipe = load_recipe(RECIPES / "smollm2.toml")
    assert recipe.model is not None
    if quick or not Path(recipe.model.path).exists():
        reason = "left out by --quick" if quick else "no model here; `make smollm2` fetches it"
        bars += [Bar(f"smollm2: {what}", 1.2, "<=", None, reason=reason) for what in ("bytes", "peak memory", "hours")]
    else:
        bars += compare(recipe, figures)
    report("forecast", bars, **figures)


if __name__ == "__main__":
    main()
