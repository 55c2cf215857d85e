"""The founding article's toys, each beside chance.

python -m tests.benchmarks.toys            10 seeds of each; chance over 1,000 seeds (about 40 minutes)
python -m tests.benchmarks.toys --quick    4 seeds, chance over 50

*Eight phrases*: in how many seeds does one feature each fire on exactly the animals, exactly robot and AI assistant,
and exactly the four that are not animals? *Superposition*: are the toy model's directions found again?
*Five neurons*: how many of the 20 known directions are found? Chance is an untrained SAE of the same
initialisation, and an SAE trained on the table with each column shuffled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from saeflow.activations.synthetic import make_table
from saeflow.activations.tables.source import load_table
from saeflow.activations.tables.stream import InMemoryTable
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.train import open_feed
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.runtime.progress import Progress
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.store.store import Store
from saeflow.train.group import fit
from saeflow.train.training import Training
from tests.benchmarks._bars import Bar, arguments, report

RECIPES = Path(__file__).resolve().parents[2] / "flows" / "recipes"
QUIET = Progress(verbosity=-1)

ANIMALS = frozenset({"cat", "happy cat", "dog", "loyal dog"})
MACHINES = frozenset({"robot", "AI assistant"})
NOT_ANIMALS = MACHINES | {"not cat", "not dog"}
LARGEST_ERROR = 0.001


ACTIVE = 0.1
"""A feature is drawn as active above this share of its own maximum."""


def active_sets(labels: list[str], values: np.ndarray) -> dict[int, frozenset[str]]:
    """Map each live feature to the rows on which it is above `ACTIVE` of its own maximum."""
    sets = {}
    for feature, column in enumerate(values.T):
        if column.max() > 0:
            sets[feature] = frozenset(np.array(labels)[column > ACTIVE * column.max()].tolist())
    return sets


def has_all_three(labels: list[str], values: np.ndarray) -> bool:
    sets = set(active_sets(labels, values).values())
    return {ANIMALS, MACHINES, NOT_ANIMALS} <= sets


@contextmanager
def stored(recipe: Recipe) -> Iterator[Callable[[Recipe], Training]]:
    """A store with the recipe's activations, as a function that trains another SAE on them."""
    with tempfile.TemporaryDirectory(prefix="saeflow-toys-") as folder:
        store = Store.create(folder)
        import_table.run(Lineage(store, recipe), QUIET)

        def train(changed: Recipe) -> Training:
            with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
                return fit(open_feed(Lineage(store, changed)), changed, Path(checkpoints), QUIET)

        yield train


def reseeded(recipe: Recipe, seed: int, **sae: int | float) -> Recipe:
    return recipe.model_copy(update={"sae": recipe.sae.model_copy(update={"seed": 1000 * seed, **sae})})


def dense(sae: SparseAutoencoder, x: torch.Tensor) -> np.ndarray:
    sparse = sae.eval().encode_sparse(x)
    values = np.zeros((len(x), sae.config.n_features), np.float32)
    values[np.repeat(np.arange(len(x)), np.diff(sparse.row_starts)), sparse.feature_ids] = sparse.values
    return values


def found_phrases(table: InMemoryTable, sae: SparseAutoencoder, need_error: bool = True) -> bool:
    x = torch.from_numpy(table.values)
    good = not need_error or float((sae.eval().reconstruct(x) - x).square().mean()) <= LARGEST_ERROR
    return good and has_all_three(table.labels, dense(sae, x))


def shuffled(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.column_stack([generator.permutation(column) for column in values.T])


def trained_on(values: np.ndarray, recipe: Recipe, folder: Path) -> SparseAutoencoder:
    """Train on another table of the same shape."""
    np.save(folder / "table.npy", values)
    changed = recipe.model_copy(
        update={
            "activations": recipe.activations.model_copy(
                update={"source": str(folder / "table.npy"), "synthetic": None}
            )
        }
    )
    with stored(changed) as train:
        return train(changed).sae


def phrases(n_seeds: int, n_chance: int) -> Iterator[tuple[int, dict[str, float]]]:
    recipe = load_recipe(RECIPES / "toy.toml")
    table = load_table(str(recipe.activations.source))
    with stored(recipe) as train, tempfile.TemporaryDirectory() as folder:
        for n_features in (8, 16, 64):
            sized = partial(reseeded, recipe, n_features=n_features, l1_weight=0.005 * n_features)
            counts = {
                "trained": np.mean([found_phrases(table, train(sized(seed)).sae) for seed in range(n_seeds)]),
                "untrained": np.mean(
                    [found_phrases(table, SparseAutoencoder(sized(s).sae, 4), False) for s in range(n_chance)]
                ),
                "untrained on a shuffled table": np.mean(
                    [
                        found_phrases(
                            InMemoryTable(table.labels, shuffled(table.values, s)),
                            SparseAutoencoder(sized(s).sae, 4),
                            False,
                        )
                        for s in range(n_chance)
                    ]
                ),
            }
            if n_features == 16:
                hits = [
                    found_phrases(
                        InMemoryTable(table.labels, shuffled(table.values, s)),
                        trained_on(shuffled(table.values, s), sized(s), Path(folder)),
                    )
                    for s in range(max(n_chance // 10, 5))
                ]
                counts["trained on a shuffled table"] = np.mean(hits)
            yield n_features, {name: round(float(share), 4) for name, share in counts.items()}


def matched(found: torch.Tensor, directions: np.ndarray) -> np.ndarray:
    """Cosine of each true direction (norm above 0.5) with the dictionary row matched to it, one to one."""
    true = torch.from_numpy(directions)
    true = true[true.norm(dim=1) > 0.5]
    cosines = (torch.nn.functional.normalize(true, dim=1) @ torch.nn.functional.normalize(found, dim=1).T).numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return np.asarray(cosines[rows, columns])


def made(name: str, seed: int) -> tuple[Recipe, InMemoryTable]:
    recipe = load_recipe(RECIPES / f"{name}.toml", **{"activations.synthetic.seed": seed})
    assert recipe.activations.synthetic is not None
    return reseeded(recipe, seed), make_table(recipe.activations.synthetic)


def directions(name: str, n_seeds: int, n_chance: int) -> dict[str, list[np.ndarray]]:
    """Matched cosines by seed: trained, untrained, and trained on shuffled columns."""
    cosines: dict[str, list[np.ndarray]] = {"trained": [], "untrained": [], "trained on shuffled columns": []}
    for seed in range(n_seeds):
        recipe, table = made(name, seed)
        assert table.directions is not None
        with stored(recipe) as train:
            cosines["trained"].append(matched(train(recipe).sae.W_dec.detach(), table.directions))
        for chance in range(max(1, n_chance // n_seeds)):
            untrained = SparseAutoencoder(reseeded(recipe, seed + 7 * chance + 1).sae, table.values.shape[1])
            cosines["untrained"].append(matched(untrained.W_dec.detach(), table.directions))
        with tempfile.TemporaryDirectory() as folder:
            other = trained_on(shuffled(table.values, seed), recipe, Path(folder))
        cosines["trained on shuffled columns"].append(matched(other.W_dec.detach(), table.directions))
    return cosines


def main() -> None:
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    n_seeds, n_chance = (4, 50) if quick else (10, 1000)
    of_phrases = dict(phrases(n_seeds, n_chance))
    of_superposition = directions("superposition", n_seeds, n_chance)
    of_neurons = directions("five_neurons", n_seeds, n_chance)
    shares = {
        f"superposition, share of seeds with all cosines above {bar}": {
            name: float(np.mean([each.min() > bar for each in lists])) for name, lists in of_superposition.items()
        }
        for bar in (0.95, 0.99)
    }
    numbers = {
        f"five neurons, directions of 20 with cosine above {bar}": {
            name: float(np.mean([(each > bar).sum() for each in lists])) for name, lists in of_neurons.items()
        }
        for bar in (0.9, 0.95)
    }
    report(
        "toys",
        [
            Bar("eight phrases, share of seeds, 16 features", 0.9, ">=", of_phrases[16]["trained"]),
            Bar("superposition, share of seeds above 0.95", 0.9, ">=", next(iter(shares.values()))["trained"]),
        ],
        eight_phrases=of_phrases,
        seeds=n_seeds,
        **shares,
        **numbers,
    )


if __name__ == "__main__":
    main()
