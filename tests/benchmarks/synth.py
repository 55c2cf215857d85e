"""How many known features does each architecture find? All are trained on the same stored rows.

python -m tests.benchmarks.synth                                 every architecture, 4M tokens each
python -m tests.benchmarks.synth --tokens 20_000_000             for longer
python -m tests.benchmarks.synth --architectures topk,batchtopk  some of them
python -m tests.benchmarks.synth --peers ""                      ours alone
python -m tests.benchmarks.synth --quick                         a quarter of the width, 100,000 tokens: is it alive?

The world is that of flows/recipes/synth.toml; its two million rows are read again by who asks for more tokens. With
--store a stopped run goes on where it was. Beside the scores stands what a linear detector reaches that knows the true
features. The peers train on the same rows from a file, brought to the same scale, with the same batch, width, k (theirs
does not fall) and schedule of the rate; they come with `make peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeflow.activations import synthetic
from saeflow.activations.synthetic import GroundTruth
from saeflow.cli.synth import Synth, print_scores, train_and_score
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.sae import recovery
from saeflow.sae.formats.load import load_sae
from saeflow.sae.recovery import RecoveryScores
from saeflow.store.store import Store
from saeflow.train.training import mean_and_scale
from tests.benchmarks import _peers
from tests.benchmarks._bars import Bar, report

RECIPE = Path(__file__).resolve().parents[2] / "flows" / "recipes" / "synth.toml"

PENALISED: dict[str, Any] = {"sae.encoder_scale": 1.0, "train.sparsity_warmup_share": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {**PENALISED, "sae.l1_weight": 40.0, "train.resample_at": [0.2, 0.4]},
    "gated": {**PENALISED, "sae.l1_weight": 40.0},
    "topk": {"train.token_topk_share": 0.0},
    "mp": {"train.token_topk_share": 0.0},
    "abstopk": {"train.token_topk_share": 0.0},
    "whitened-topk": {"sae.architecture": "topk", "sae.whiten": True, "train.token_topk_share": 0.0},
    "batchtopk": {},
    "matryoshka": {},
    "jumprelu": {**PENALISED, "sae.penalty": "l0"},
}
"""What differs from the recipe, by architecture. All aim at the true number of active features, k."""

QUICK: dict[str, Any] = {
    "activations.synthetic.n_neurons": 64, "activations.synthetic.n_true": 512, "activations.synthetic.l0": 4.0,
    "sae.n_features": 1024, "sae.k": 4, "train.k_start": 10,
}  # fmt: skip
"""The same crowding (features and active ones a neuron) at a sixteenth of the work."""

PEERS = "saelens-topk,saelens-batchtopk,sparsify-topk"
FOUND, PRECISION, F1 = 0.97, 0.85, 0.85


def recipe_of(architecture: str, n_tokens: int, quick: bool) -> Recipe:
    changes = {"sae.architecture": architecture, "train.n_tokens": n_tokens} | SETTINGS[architecture]
    if quick:
        changes = {**QUICK, **changes, "activations.synthetic.n_samples": n_tokens}
    return load_recipe(RECIPE, **changes)


def peer_scores(recipe: Recipe, peer: str, architecture: str, folder: Path) -> RecoveryScores:
    """Train a peer's autoencoder on the recipe's rows from a file and judge it as ours are."""
    made = recipe.activations.synthetic
    assert made is not None
    scale = write_rows(recipe, folder / "rows.npy")
    n_steps = max(recipe.train.n_tokens // recipe.feed.batch_rows, 1)
    saved = folder / f"{peer}-{architecture}"
    _peers.train(
        peer=peer, architecture=architecture, data=folder / "rows.npy", held_out=folder / "rows-held-out.npy",
        batch=recipe.feed.batch_rows, lr=recipe.train.lr, n_features=recipe.sae.n_features, k=recipe.sae.k,
        n_steps=n_steps, n_timed=0, lr_warmup_steps=round(recipe.train.warmup_share * n_steps),
        decay_steps=round(recipe.train.decay_share * n_steps), threads=torch.get_num_threads(), save=saved,
    )  # fmt: skip
    sae = load_sae(saved)
    return recovery.score_directions(
        sae.W_dec.detach(), lambda x: sae.encode_sparse(x * scale), lambda sparse: sae.decode(sparse) / scale,
        synthetic.truth_of(made), recipe.train.n_tokens,
    )  # fmt: skip


def write_rows(recipe: Recipe, path: Path) -> float:
    """The recipe's rows, scaled to a mean squared distance of D from their mean, once; returns the scale."""
    made = recipe.activations.synthetic
    assert made is not None
    blocks = [values for values, _ in itertools.islice(synthetic.superposed_rows(made).blocks(0), 16)]
    _, scale = mean_and_scale(torch.from_numpy(np.concatenate(blocks)), normalise=True)
    if not path.exists():
        rows = np.lib.format.open_memmap(path, "w+", np.float32, (made.n_samples, made.n_neurons))
        start = 0
        for values, _ in synthetic.superposed_rows(made).blocks(0):
            rows[start : start + len(values)] = values[: len(rows) - start] * np.float32(scale)
            start += len(values)
        rows.flush()
        fresh, _ = next(synthetic.truth_of(made).fresh())
        np.save(path.with_name("rows-held-out.npy"), fresh * np.float32(scale))
    return scale


def linear_f1(truth: GroundTruth, n_blocks: int = 16, n_features: int = 256) -> float:
    """Mean F1 of firing of the best linear detector of each feature (Fisher's discriminant: the inverse covariance of
    rows times the direction), each at its best threshold; of a sample of features."""
    blocks = list(itertools.islice(truth.fresh(), n_blocks))
    x = torch.from_numpy(np.concatenate([rows for rows, _ in blocks]))
    chosen = np.linspace(0, len(truth.directions) - 1, min(n_features, len(truth.directions))).astype(int)
    detectors = torch.linalg.solve(torch.cov(x.T), torch.from_numpy(truth.directions[chosen]).T)
    outputs = (x @ detectors).numpy()
    fires = np.zeros((len(x), len(truth.directions)), bool)
    starts = np.cumsum([0, *(len(rows) for rows, _ in blocks)])
    for start, (_, codes) in zip(starts, blocks, strict=False):
        fires[start + codes.rows, codes.feature_ids] = True
    found = []
    for column, feature in enumerate(chosen):
        right = fires[np.argsort(-outputs[:, column]), feature]
        found.append((2 * right.cumsum() / (np.arange(1, len(right) + 1) + max(right.sum(), 1))).max())
    return float(np.mean(found))


def trained(
    store: Store, recipes: Mapping[str, Recipe], skipped: dict[str, str]
) -> Iterator[tuple[str, tuple[Synth, float]]]:
    """Each with the seconds it took; those that this version cannot train are skipped, with the reason."""
    for name, recipe in recipes.items():
        began = time.monotonic()
        try:
            [found] = train_and_score(store, [recipe], Progress())
        except (UserError, NotImplementedError, KeyError) as error:
            reason = skipped[name] = f"{type(error).__name__}: {error}"
            print(f"{name} is skipped: {reason}")
            continue
        yield name, (found, time.monotonic() - began)


def worst_share(scores: RecoveryScores) -> float:
    """Of what is asked, the share reached where it is least."""
    return min(scores.found_share_frequent / FOUND, scores.precision / PRECISION, scores.f1 / F1)


def main() -> None:
    asked = _arguments()
    n_tokens = asked.tokens or (100_000 if asked.quick else 4_000_000)
    recipes = {name: recipe_of(name, n_tokens, asked.quick) for name in asked.architectures.split(",")}
    first = next(iter(recipes.values()))
    made = first.activations.synthetic
    assert made is not None
    skipped: dict[str, str] = {}
    peers: dict[str, RecoveryScores] = {}
    with contextlib.ExitStack() as stack:
        folder = asked.store or stack.enter_context(tempfile.TemporaryDirectory(prefix="saeflow-synth-"))
        found = dict(trained(Store.create(folder), recipes, skipped))
        if found:
            print_scores([each for each, _ in found.values()])
        rows = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saeflow-peers-")))
        for peer, architecture in asked.peers:
            if not _peers.available():
                skipped[f"{peer} {architecture}"] = "the peers are not installed: make peers"
                continue
            peers[f"{peer} {architecture}"] = peer_scores(first, peer, architecture, rows)
            print(f"{peer} {architecture}: {dataclasses.asdict(peers[f'{peer} {architecture}'])}", flush=True)
    best = max(found, key=lambda name: worst_share(found[name][0].scores), default=None)
    scores = found[best][0].scores if best else None
    names = ("found of those that fire 1,000 times", "precision", "F1 of firing")
    measured = (scores.found_share_frequent, scores.precision, scores.f1) if scores else (None,) * 3
    report(
        "synth",
        [
            Bar(f"{name}, best architecture", bar, ">=", value, reason=None if scores else "nothing was trained")
            for name, bar, value in zip(names, (FOUND, PRECISION, F1), measured, strict=True)
        ],
        tokens=n_tokens,
        best=best,
        linear_detector_f1=round(linear_f1(synthetic.truth_of(made)), 4),
        seconds={name: round(seconds, 1) for name, (_, seconds) in found.items()},
        scores={name: dataclasses.asdict(each.scores) for name, (each, _) in found.items()},
        peers={name: dataclasses.asdict(each) for name, each in peers.items()},
        skipped=skipped,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute, smaller sizes")
    parser.add_argument("--tokens", type=int, help="how many each is trained on")
    parser.add_argument("--architectures", default=",".join(SETTINGS), help="comma-separated")
    parser.add_argument("--peers", default=PEERS, help="peer-architecture, comma-separated")
    parser.add_argument("--store", help="folder to keep rows and autoencoders in; default: one that goes away")
    asked = parser.parse_args()
    unknown = set(asked.architectures.split(",")) - SETTINGS.keys()
    if unknown:
        parser.error(f"--architectures: {', '.join(sorted(unknown))} is none of {', '.join(SETTINGS)}")
    asked.peers = [] if asked.quick else [name.split("-") for name in asked.peers.split(",") if name]
    return asked


if __name__ == "__main__":
    main()
