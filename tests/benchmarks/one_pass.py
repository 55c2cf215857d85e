"""Encoding in one pass of the model, beside the model alone and beside encoding activations that are stored.

python -m tests.benchmarks.one_pass            a quarter of the demo corpus by its own model, a hundredth by SmolLM2
python -m tests.benchmarks.one_pass --quick    a twentieth and a hundred-and-sixtieth

All three have the same tokens and processors, in turns. *Encoding* and *one pass* are whole stages: Parquet, statistics
and publication. The model and encoding want the same cores: `limit` is what one pass could reach at most if each took
as much of the processors as alone. SmolLM2 comes with `make smollm2`; SAEFLOW_SMOLLM2 names it where it lies.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saeflow.pipeline import collect, encode, tokens, train
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Executor
from saeflow.recipe.recipe import Recipe, load_recipe, parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report
from tests.support.small_pipeline import tree

ROOT = Path(__file__).resolve().parents[2]
QUIET = Progress(verbosity=-1)


class Stopwatch:
    """Seconds, and processor seconds, of what parts take: loading the model aside."""

    def __init__(self) -> None:
        self.began = self.cpu = 0.0

    def __call__(self, executor: Executor) -> Executor:
        self.began, self.cpu = time.perf_counter(), time.process_time()
        return executor

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.began, time.process_time() - self.cpu


def model_alone(kept: Lineage) -> tuple[float, float]:
    parts, watch = kept.tokens.published().parts, Stopwatch()
    forward = collect.open_collector(kept, []).forward
    watch(None)  # type: ignore[arg-type]
    for part in parts:
        deque(forward.run(part, lambda *_: None), 0)
    return watch.read()


def encoded(lineage: Lineage) -> tuple[float, float]:
    shutil.rmtree(lineage.features.path, ignore_errors=True)
    watch = Stopwatch()
    encode.run(lineage, QUIET, watch)
    return watch.read()


def values(lineage: Lineage) -> list[dict[str, bytes]]:
    run = lineage.features
    found = (tree(run.path / "parts" / part.folder) for part in run.published().parts)
    return [{name: content for name, content in files.items() if name != "part.json"} for files in found]


def peak_bytes(store: Store, work: Callable[[], object]) -> int:
    """The most bytes of arrays in the store's folders at any instant, seen from another thread."""
    ended, most = threading.Event(), 0

    def look() -> None:
        nonlocal most
        while not ended.wait(0.02):
            n_bytes = 0
            for folder, _, names in os.walk(store.root):
                for name in names if ".zarr" in folder else ():
                    try:
                        n_bytes += (Path(folder) / name).stat().st_size
                    except OSError:
                        continue
            most = max(most, n_bytes)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        work()
    finally:
        ended.set()
        looking.join()
    return most


def _bar(name: str, ratios: list[float]) -> Bar:
    return Bar(name, 0.9, ">=", statistics.median(ratios), max(ratios) - min(ratios))


def measured(name: str, recipe: Recipe, share: float, times: int) -> tuple[list[Bar], dict[str, Any]]:
    """Bars and figures of one model."""
    assert recipe.corpus is not None
    data = recipe.model_dump(exclude_unset=True) | {"name": "one", "sae": {}, "train": {"n_tokens": 8192}}
    data["corpus"] |= {"share": share}
    data["sae"] = {"architecture": "topk", "n_features": recipe.sae.n_features, "k": recipe.sae.k}
    data["features"] = {"check_values": 0}
    with tempfile.TemporaryDirectory(prefix="saeflow-one-pass-", dir=ROOT / "data") as temporary:
        apart, store = (Store.create(Path(temporary) / each) for each in ("apart", "store"))
        first = Lineage(apart, parse_recipe(data))
        for stage in (tokens.run, collect.run, train.run):
            stage(first, QUIET)
        data["sae"] = {"source": str(first.sae.path)}
        kept = Lineage(apart, parse_recipe(data))
        passing = Lineage(store, parse_recipe(data | {"activations": data["activations"] | {"keep": False}}))
        train.run(kept, QUIET)
        every = (tokens.run, collect.run, train.run, encode.run)
        peak = peak_bytes(store, lambda: [stage(passing, QUIET) for stage in every])
        encoded(kept)  # compiles
        rounds = [(model_alone(kept), encoded(kept), encoded(passing)) for _ in range(times)]
        same = values(kept) == values(passing)
        n_tokens = kept.tokens.published().total("n_tokens")
    wall = [[seconds for seconds, _ in each] for each in rounds]
    over_slower = [max(model, stored) / one for model, stored, one in wall]
    over_limit = [(model + stored) / one for model, stored, one in wall]
    cpu = statistics.median(one[1] / (model[1] + stored[1]) for model, stored, one in rounds)
    middle = [statistics.median(each) for each in zip(*wall, strict=True)]
    figures = dict(zip(("model", "encoding", "one_pass"), (n_tokens / each for each in middle), strict=True))
    return [
        _bar(f"one pass over the slower of model and encoding, {name}", over_slower),
        _bar(f"one pass over the limit, {name}", over_limit),
        Bar(f"processor seconds over those of model and encoding, {name}", 1.05, "<=", cpu),
        Bar(f"peak bytes of activations on disk, {name}", 0, "<=", peak),
        Bar(f"Parquet equal to that of a store, byte for byte, {name}", 1, ">=", float(same)),
    ], figures | {"limit": n_tokens / (middle[0] + middle[1]), "tokens": n_tokens}


def main() -> None:
    quick = arguments(__doc__).quick
    recipes = {name: load_recipe(ROOT / "flows" / "recipes" / f"{name}.toml") for name in ("demo", "smollm2")}
    elsewhere = os.environ.get("SAEFLOW_SMOLLM2")
    model = recipes["smollm2"].model
    assert model is not None
    path = elsewhere or model.path
    recipes["smollm2"] = recipes["smollm2"].model_copy(update={"model": model.model_copy(update={"path": path})})
    bars, figures = measured("demo model", recipes["demo"], 0.05 if quick else 0.25, 1 if quick else 5)
    about = {"demo": figures}
    if Path(path).exists():
        more, about["smollm2"] = measured("SmolLM2", recipes["smollm2"], 0.004 if quick else 0.01, 1 if quick else 3)
        bars += more
    else:
        why = "no SmolLM2 here; `make smollm2` fetches it"
        bars.append(Bar("one pass over the slower of model and encoding, SmolLM2", 0.9, ">=", None, reason=why))
    report("one_pass", bars, tokens_per_second=about)


if __name__ == "__main__":
    main()
