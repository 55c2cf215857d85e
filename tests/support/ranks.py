"""Processes that train together without `torchrun`: they are started once and train all recipes of a list.

python -m tests.support.ranks STORE RECIPES [ROWS]     one of them; its environment says which

With ROWS the first one is asked to stop, as `torchrun` asks, after so many rows of each training. Given a file of
settings alone, they train on random rows in float64, and the first one writes the losses beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saeflow.pipeline import train
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.progress import Bar
from saeflow.runtime.ranks import ALONE, Ranks, joined
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.split import Split
from saeflow.store.store import Store
from saeflow.train import training
from tests.support.small_pipeline import quiet

ROOT = Path(__file__).resolve().parents[2]


def environment(number: int, n: int, port: int) -> dict[str, str]:
    """What `torchrun` tells process `number` of `n`."""
    told = {"RANK": number, "WORLD_SIZE": n, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def train_together(n: int, store: Path, recipes: list[dict[str, Any]], stop_after: int | None = None) -> None:
    """Train and publish the SAEs of these recipes one after the other, each by n processes.

    With `stop_after`, stop each after so many rows.
    """
    path = store.with_name(f"recipes-{n}.json")
    path.write_text(json.dumps(recipes))
    start(n, store, path, *([] if stop_after is None else [stop_after]))


def exact_losses_of_ranks(n: int, settings: list[dict[str, Any]], folder: Path) -> list[list[float]]:
    """Return what `exact_losses` gives for these settings, each computed by n processes."""
    path = folder / f"settings-{n}.json"
    path.write_text(json.dumps(settings))
    start(n, path)
    found: list[list[float]] = json.loads(path.with_suffix(".losses").read_text())
    return found


def start(n: int, *arguments: object, module: str = "tests.support.ranks", seconds: float = 280) -> None:
    """Run a module, by default this one, in n processes, to their end, which must come within so many seconds."""
    command, port = [sys.executable, "-m", module, *map(str, arguments)], free_port()
    started = [subprocess.Popen(command, cwd=ROOT, env=environment(number, n, port)) for number in range(n)]
    try:
        codes = [each.wait(timeout=seconds) for each in started]
    finally:
        for each in started:
            each.kill()
    assert codes == [0] * n


def exact_losses(settings: dict[str, Any], ranks: Ranks = ALONE, n_steps: int = 20) -> list[float]:
    """Return the losses of a training in which every product and sum is in float64."""
    split = Split.of(ranks, settings.get("parallel", "data"))
    sae = SparseAutoencoder(SAEConfig.model_validate(settings["sae"]), 16, split=split).double()
    sae.use_kernels, sae.product_dtype = False, torch.float64
    adam = torch.optim.Adam(sae.parameters(), lr=5e-3)
    losses = []
    for step in range(n_steps):
        x = torch.randn(100, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss, _ = sae.training_loss(x, aux_weight=1 / 32, dead_after_tokens=100)
        loss.backward()
        adam.step()
        adam.zero_grad()
        sae.after_step()
        losses.append(loss.item())
    return losses


def _stopping_after(rows: int) -> Callable[[Bar], None]:
    def listen(bar: Bar) -> None:
        if bar.stage == "train" and bar.done > rows:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def main() -> None:
    path, *more = map(Path, sys.argv[1:])
    with joined() as ranks:
        if more:
            _train_recipes(path, *more, ranks=ranks)
            return
        losses = [exact_losses(settings, ranks) for settings in json.loads(path.read_text())]
        if ranks.is_first:
            path.with_suffix(".losses").write_text(json.dumps(losses))


def _train_recipes(store: Path, path: Path, *stop_after: Path, ranks: Ranks) -> None:
    training.fast_dtype = lambda place: torch.float32
    os.fsync = lambda _: None
    progress = quiet()
    if stop_after and ranks.is_first:
        progress.listener = _stopping_after(int(str(stop_after[0])))
    for data in json.loads(path.read_text()):
        with contextlib.suppress(KeyboardInterrupt):
            train.run_all(Lineage(Store(store), parse_recipe(data)), progress, ranks=ranks)


if __name__ == "__main__":
    main()
