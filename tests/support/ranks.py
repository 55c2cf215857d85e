"""Processes that train together without `torchrun`: they are started once and train all recipes of a list.

python -m tests.support.ranks STORE RECIPES [ROWS]     one of them; its environment says which

With ROWS the first one is asked to stop, as `torchrun` asks, after so many rows of each training.
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
from saeflow.runtime.progress import Bar
from saeflow.runtime.ranks import joined
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
    path, port = store.with_name(f"recipes-{n}.json"), free_port()
    path.write_text(json.dumps(recipes))
    command = [sys.executable, "-m", "tests.support.ranks", str(store), str(path)]
    command += [] if stop_after is None else [str(stop_after)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment(number, n, port)) for number in range(n)]
    try:
        codes = [each.wait(timeout=280) for each in started]
    finally:
        for each in started:
            each.kill()
    assert codes == [0] * n


def _stopping_after(rows: int) -> Callable[[Bar], None]:
    def listen(bar: Bar) -> None:
        if bar.stage == "train" and bar.done > rows:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def main() -> None:
    store, path, *stop_after = sys.argv[1:]
    training.fast_dtype = lambda place: torch.float32
    os.fsync = lambda _: None
    with joined() as ranks:
        progress = quiet()
        if stop_after and ranks.is_first:
            progress.listener = _stopping_after(int(stop_after[0]))
        for data in json.loads(Path(path).read_text()):
            with contextlib.suppress(KeyboardInterrupt):
                train.run_all(Lineage(Store(Path(store)), parse_recipe(data)), progress, ranks=ranks)


if __name__ == "__main__":
    main()
