"""Do moments in 8 bits and weights in bfloat16 cost quality? Known features found with them, beside float32.

python -m tests.benchmarks.low_precision              topk and batchtopk, four seeds, 300,000 tokens each
python -m tests.benchmarks.low_precision --quick      one seed, 20,000 tokens, half the width: is it alive?
python -m tests.benchmarks.low_precision --store DIR  keep rows and SAEs there, and go on where a stopped run was

The world has the crowding of flows/recipes/synth.toml in 64 neurons. All SAEs are trained on the same rows in the same
order, in small batches, at a high rate. A bar compares the means over the seeds; its spread is the standard error of
the mean of the differences, seed by seed. `seed_noise` is the standard deviation of float32's own scores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from dataclasses import asdict
from statistics import mean, stdev

from saeflow.cli.synth import Synth, train_and_score
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks import synth
from tests.benchmarks._bars import Bar, report

LOSS = 0.01
"""How much worse a score may be than float32's."""
SCORES = {"found": "found_share", "precision": "precision", "F1": "f1"}
ARCHITECTURES = ["topk", "batchtopk"]
WAYS = {
    "float32": ("float32", "float32"), "8-bit moments": ("8bit", "float32"),
    "bfloat16 weights": ("float32", "bfloat16"), "both": ("8bit", "bfloat16"),
}  # fmt: skip
"""What is compared: moments and weights."""


def recipe_of(n_tokens: int, seeds: list[int], quick: bool) -> Recipe:
    """Return a sweep over architectures, ways and seeds: all read the same batches."""
    moments, weights = (list(dict.fromkeys(each)) for each in zip(*WAYS.values(), strict=True))
    each = [{"sae.architecture": name} | synth.SETTINGS[name] for name in ARCHITECTURES]
    grid = {"train.moments": moments, "train.weights": weights, "sae.seed": seeds}
    about = {
        "name": "low", "activations.synthetic.n_samples": n_tokens, "train.n_tokens": n_tokens, "train.lr": 3e-3,
        "feed.batch_rows": 512, "threads": 1,
    }  # fmt: skip
    narrow = {
        "activations.synthetic.n_neurons": 32, "activations.synthetic.n_true": 256, "sae.n_features": 512,
    }  # fmt: skip
    world = synth.QUICK | about | (narrow if quick else {})
    return load_recipe(synth.RECIPE, **world, **{"sweep.grid": grid, "sweep.each": each})


def by_way(judged: list[Synth]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return scores in the order of seeds, by architecture and way."""
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    names = {ways: name for name, ways in WAYS.items()}
    for each in sorted(judged, key=lambda each: each.recipe.sae.seed):
        sae, train = each.recipe.sae, each.recipe.train
        found[sae.architecture][names[train.moments, train.weights]].append(asdict(each.scores))
    return found


def bars_of(architecture: str, found: dict[str, list[dict[str, float]]]) -> list[Bar]:
    bars = []
    for way in list(WAYS)[1:]:
        for name, field in SCORES.items():
            pairs = zip(found["float32"], found[way], strict=True)
            losses = [wide[field] - narrow[field] for wide, narrow in pairs]
            spread = stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
            bars.append(Bar(f"{architecture}, {way}: {name} less than float32's", LOSS, "<=", mean(losses), spread))
    return bars


def means_of(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    fields = *SCORES.values(), "variance_unexplained", "l0"
    return {way: {name: round(mean(each[name] for each in saes), 5) for name in fields} for way, saes in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    parser.add_argument("--store", help="folder to keep everything in; default: one that goes away")
    asked = parser.parse_args()
    n_tokens, seeds = (20_000, [0]) if asked.quick else (300_000, [0, 1, 2, 3])
    recipe = recipe_of(n_tokens, seeds, asked.quick)
    with tempfile.TemporaryDirectory(prefix="saeflow-low-precision-") as temporary:
        judged = train_and_score(Store.create(asked.store or temporary), [recipe], Progress())
    found = by_way(judged)
    noise = {
        name: {score: round(stdev(each[field] for each in ways["float32"]), 5) for score, field in SCORES.items()}
        for name, ways in found.items()
        if len(seeds) > 1
    }
    report(
        "low_precision", [bar for name, ways in found.items() for bar in bars_of(name, ways)], tokens=n_tokens,
        seeds=seeds, means={name: means_of(ways) for name, ways in found.items()}, seed_noise=noise,
    )  # fmt: skip


if __name__ == "__main__":
    main()
