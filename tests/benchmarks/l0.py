"""Is L0 on held-out tokens what JumpReLU was asked for, and what does that cost beside BatchTopK?

python -m tests.benchmarks.l0                three kinds of data, three values of k, two lengths (half an hour)
python -m tests.benchmarks.l0 --quick        made data, two values of k, 400 steps
python -m tests.benchmarks.l0 --store DIR    keep activations and SAEs there, and go on where a stopped run was

*made*: a known dictionary, judged on fresh rows. *demo*: the demo corpus. *smollm2*: an eighth of it through
SmolLM2-135M, if `make data/models/smollm2` has fetched the model. Held-out documents judge the last two: a few
documents are denser or less dense than the rest by several percent, so they must be many.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from saeflow.cli.synth import train_and_score
from saeflow.pipeline import collect, tokens, train
from saeflow.pipeline.judge import sweep
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, load_recipe, parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, report

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "flows" / "recipes"
MODEL = ROOT / "data" / "models" / "smollm2"
BATCH = 256
STEPS, KS = [400, 1000], [16, 32, 64]
OFF, COST = 0.05, 0.02
"""How far L0 may be from k, as a share; how much more variance JumpReLU may leave than BatchTopK with the same k."""

MADE: dict[str, Any] = {
    "name": "l0_made",
    "activations": {
        "synthetic": {"kind": "superposed", "n_samples": 200_000, "n_neurons": 64, "n_true": 512, "l0": 8.0}
    },
    "feed": {"batch_rows": BATCH},
    "sae": {"n_features": 1024},
}
CORPUS: dict[str, dict[str, Any]] = {
    "demo": {"sae.n_features": 1024},
    "smollm2": {"corpus.share": 0.12, "sae.n_features": 1536},
}


def swept(ks: list[int], steps: list[int]) -> dict[str, Any]:
    lengths = [BATCH * n for n in steps]
    return {"grid": {"sae.architecture": ["batchtopk", "jumprelu"], "sae.k": ks, "train.n_tokens": lengths}}


def on_made_data(store: Store, ks: list[int], steps: list[int]) -> list[dict[str, Any]]:
    judged = train_and_score(store, [parse_recipe({**MADE, "sweep": swept(ks, steps)})], Progress())
    return [row_of(each.recipe, each.scores.l0, each.scores.variance_unexplained) for each in judged]


def on_a_corpus(store: Store, name: str, ks: list[int], steps: list[int]) -> list[dict[str, Any]]:
    source = load_recipe(RECIPES / f"{name}.toml", **CORPUS[name])
    data = source.model_dump(include={"corpus", "model", "tokens", "activations"}, exclude_unset=True, mode="json")
    about = {"feed": {"batch_rows": BATCH}, "sae": {"n_features": source.sae.n_features}, "sweep": swept(ks, steps)}
    about |= {"name": f"l0_{name}", "data": name, "evaluate": {"max_tokens": 250_000}}
    lineage = Lineage(store, parse_recipe(data | about))
    for stage in (tokens.run, collect.run, train.run_all):
        stage(lineage, Progress())
    rows = sweep.run(lineage, Progress())["saes"]
    pairs = zip(lineage.recipe.members(), rows, strict=True)
    return [row_of(member, row["l0"], row["variance_unexplained"]) for member, row in pairs]


def row_of(recipe: Recipe, l0: float, unexplained: float) -> dict[str, Any]:
    k, n_steps = recipe.sae.k, recipe.train.n_tokens // BATCH
    return {
        "architecture": recipe.sae.architecture, "n_steps": n_steps, "k": k, "l0": l0, "l0_over_k": l0 / k,
        "variance_unexplained": unexplained,
    }  # fmt: skip


def bars_of(name: str, rows: list[dict[str, Any]]) -> list[Bar]:
    bars = []
    beside = {(row["k"], row["n_steps"]): row for row in rows if row["architecture"] == "batchtopk"}
    for row in rows:
        if row["architecture"] == "jumprelu":
            about = f"{name}, k {row['k']}, {row['n_steps']} steps: JumpReLU's"
            more = row["variance_unexplained"] - beside[row["k"], row["n_steps"]]["variance_unexplained"]
            bars.append(Bar(f"{about} L0 off k, as a share", OFF, "<=", abs(row["l0_over_k"] - 1)))
            bars.append(Bar(f"{about} variance unexplained less BatchTopK's", COST, "<=", more))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    parser.add_argument("--store", help="folder to keep everything in; default: one that goes away")
    parser.add_argument("--data", default="made,demo,smollm2", help="comma-separated")
    asked = parser.parse_args()
    names = ["made"] if asked.quick else asked.data.split(",")
    ks, steps = ([8, 24], STEPS[:1]) if asked.quick else (KS, STEPS)
    found: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="saeflow-l0-") as temporary:
        store = Store.create(asked.store or temporary)
        for name in names:
            if name == "smollm2" and not MODEL.exists():
                skipped[name] = "the model is not there: make data/models/smollm2"
                continue
            made = on_made_data(store, ks, steps) if name == "made" else on_a_corpus(store, name, ks, steps)
            found[name] = made
            for row in made:
                print(name, row, flush=True)
    report(
        "l0", [bar for name in found for bar in bars_of(name, found[name])], batch=BATCH, skipped=skipped, saes=found
    )


if __name__ == "__main__":
    main()
