"""Variance that TopK and BatchTopK leave with default rates, beside SAELens and sparsify with theirs.

python -m tests.benchmarks.defaults            four sizes, three lengths (half an hour)
python -m tests.benchmarks.defaults --quick    the smallest size, the shortest length

Every training reads the same rows of a known dictionary in the same batches. Ours takes the rate that a recipe without
`train.lr` gets. SAELens takes its default: 3e-4 throughout. sparsify takes its own default, too: signs of averaged
gradients at 5e-3 / sqrt(F / 2^14), without a schedule. The peers come with `make peers`. Judged on held-out rows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.linear import fast_dtype
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.metrics import Reconstruction
from saeflow.train.schedules import with_rate
from saeflow.train.training import FeedBatch, Training, mean_and_scale
from tests.benchmarks import _peers, _superposed
from tests.benchmarks._bars import Bar, arguments, report

SIZES = [(64, 512, 8), (64, 2048, 8), (128, 1024, 16), (256, 2048, 16)]
"""Neurons, features, and active features of a row."""
LENGTHS = [100, 300, 900]
BATCH, N_ROWS, N_HELD_OUT = 256, 150_000, 8192
SPARSIFY, SAELENS = 0.005, 0.0
"""How much more than theirs ours may leave."""


def rows_in(folder: Path, width: int, n_features: int, k: int) -> tuple[Path, Path]:
    """Write training rows and held-out rows, scaled as a training scales them."""
    made = _superposed.rows(N_ROWS + N_HELD_OUT, width, n_features // 2, k, seed=0)
    _, scale = mean_and_scale(torch.from_numpy(made[:65_536]), normalise=True)
    made *= np.float32(scale)
    paths = folder / f"{width}-{n_features}.npy", folder / f"{width}-{n_features}-held-out.npy"
    for path, rows in zip(paths, (made[:N_ROWS], made[N_ROWS:]), strict=True):
        np.save(path, rows)
    return paths


def ours(paths: tuple[Path, Path], architecture: str, n_features: int, k: int, n_steps: int) -> dict[str, float]:
    rows, held_out = (torch.from_numpy(np.load(path)) for path in paths)
    recipe = parse_recipe(
        {
            "name": "defaults",
            "activations": {"source": str(paths[0])},
            "feed": {"batch_rows": BATCH},
            "sae": {"architecture": architecture, "n_features": n_features, "k": k},
            "train": {"n_tokens": BATCH * n_steps, "log_every": 10**9},
        }
    )
    sae, config = SparseAutoencoder(recipe.sae, rows.shape[1], threads=1), with_rate(recipe, rows.shape[1])
    sae.product_dtype = fast_dtype()
    sae.initialise(rows[:65_536].mean(0))
    adam = torch.optim.Adam(sae.parameters(), betas=(config.beta1, config.beta2), fused=True)
    training = Training(sae, adam, config, (1.0,), n_steps)
    draw = np.random.default_rng(0)
    order = np.concatenate([draw.permutation(N_ROWS)[: N_ROWS // BATCH * BATCH] for _ in range(2)])
    for step in range(n_steps):
        x = rows[torch.from_numpy(order[step * BATCH : (step + 1) * BATCH])]
        training.advance(FeedBatch(step, (x,), None))  # type: ignore[arg-type]  # no feed to look into
    sums, n_values = Reconstruction(rows.shape[1]), 0
    for x in held_out.split(4096):
        sparse = sae.eval().encode_sparse(x)
        sums.add(x, sae.decode(sparse))
        n_values += len(sparse.values)
    return {
        "lr": config.lr or 0.0, "variance_unexplained": sums.variance_unexplained, "l0": n_values / len(held_out)
    }  # fmt: skip


def theirs(paths: tuple[Path, Path], n_features: int, k: int, lengths: list[int]) -> list[dict[str, Any]]:
    """Figures of the peers, first by length, then sparsify's TopK, SAELens' TopK and BatchTopK."""
    common = {"n_features": n_features, "k": k, "batch": BATCH, "n_timed": 0, "threads": torch.get_num_threads()}
    common |= {"data": paths[0], "held_out": paths[1]}
    kinds: list[dict[str, Any]] = [
        {"peer": "sparsify", "architecture": "topk", "optimizer": "signum", "lr": 5e-3 / (n_features / 2**14) ** 0.5},
        {"peer": "saelens", "architecture": "topk", "lr": 3e-4},
        {"peer": "saelens", "architecture": "batchtopk", "lr": 3e-4},
    ]
    return _peers.train_several([common | kind | {"n_steps": n_steps} for n_steps in lengths for kind in kinds])


def compare(folder: Path, size: tuple[int, int, int], lengths: list[int]) -> tuple[list[Bar], list[dict[str, Any]]]:
    width, n_features, k = size
    paths = rows_in(folder, *size)
    peers = iter(theirs(paths, n_features, k, lengths) if _peers.available() else [])
    bars, found = [], []
    for n_steps in lengths:
        left: dict[str, Any] = {
            f"ours {name}": ours(paths, name, n_features, k, n_steps) for name in ("topk", "batchtopk")
        }
        names = "sparsify topk", "saelens topk", "saelens batchtopk"
        for name, known in zip(names, peers, strict=False):
            left[name] = {figure: known[figure] for figure in ("variance_unexplained", "l0")}
        found.append({"width": width, "n_features": n_features, "k": k, "n_steps": n_steps, **left})
        print(found[-1], flush=True)
        for name, more in zip(names, (SPARSIFY, SAELENS, SAELENS), strict=True):
            architecture, reason = name.partition(" ")[2], None if name in left else "the peers are not installed"
            over = left[f"ours {architecture}"]["variance_unexplained"]
            measured = over - left[name]["variance_unexplained"] if name in left else None
            about = f"D={width} F={n_features:,} K={k}, {n_steps} steps: {architecture}, variance unexplained less"
            bars.append(Bar(f"{about} {name.partition(' ')[0]}'s", more, "<=", measured, reason=reason))
    return bars, found


def main() -> None:
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    bars, found = [], []
    with tempfile.TemporaryDirectory(prefix="saeflow-defaults-") as temporary:
        for size in SIZES[:1] if quick else SIZES:
            more, figures = compare(Path(temporary), size, LENGTHS[:1] if quick else LENGTHS)
            bars, found = bars + more, found + figures
    report("defaults", bars, batch=BATCH, rows=N_ROWS, trainings=found)


if __name__ == "__main__":
    main()
