"""Processes that train together without `torchrun`: they are started once and train all recipes of a list.

python -m tests.support.ranks STORE RECIPES     one of them; its environment says which
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from saeflow.pipeline import train
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
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


def train_together(n: int, store: Path, recipes: list[dict[str, Any]]) -> None:
    """Train and publish the SAEs of these recipes one after the other, each by n processes."""
    path, port = store.with_name(f"recipes-{n}.json"), free_port()
    path.write_text(json.dumps(recipes))
    command = [sys.executable, "-m", "tests.support.ranks", str(store), str(path)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment(number, n, port)) for number in range(n)]
    try:
        codes = [each.wait(timeout=280) for each in started]
    finally:
        for each in started:
            each.kill()
    assert codes == [0] * n


def main() -> None:
    store, path = map(Path, sys.argv[1:])
    training.fast_dtype = lambda place: torch.float32
    os.fsync = lambda _: None
    with joined() as ranks:
        for data in json.loads(path.read_text()):
            train.run_all(Lineage(Store(store), parse_recipe(data)), quiet(), ranks=ranks)


if __name__ == "__main__":
    main()
