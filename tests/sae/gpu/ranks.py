"""Ranks that train by kernels in the interpreter: each is a process, and writes what it has in the end.

python -m tests.sae.gpu.ranks FOLDER CASE     one of them; its environment says which
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeflow.runtime.ranks import joined
from saeflow.sae.split import Split
from tests.sae.gpu import PLACE, quick
from tests.sae.gpu.test_fused import batch, begun, fused, options
from tests.support.ranks import start

CASES: dict[str, dict[str, Any]] = {
    "topk": {}, "batchtopk": {"architecture": "batchtopk"},
    "matryoshka": {"architecture": "matryoshka", "target_site": "there"},
}  # fmt: skip
N_STEPS, BY_TOKEN, ONE_ROW = 5, 1, 4
"""Steps; those in which batchtopk takes the largest of each token; those whose batch has one row."""

State = dict[str, Tensor]


def trained(case: dict[str, Any], split: Split) -> State:
    """Return figures of all steps, weights, counters and moments."""
    here = begun(PLACE, split=split, **case)
    step, figures = fused(here), []
    features = split.features
    for number in range(N_STEPS):
        n_rows = 1 if number == ONE_ROW else None
        x, target = batch(number)[:n_rows].to(PLACE), batch(number, 7)[:n_rows].to(PLACE)
        given = options(here, number == BY_TOKEN)
        given = replace(given, n_dead=int(features.total(given.n_dead)))
        step(x, target if "target_site" in case else None, given)
        figures.append(step.figures.clone())
    step.settle()
    moments = {f"moment.{number}": each for number, each in enumerate(here.moments())}
    return {"figures": torch.stack(figures), **here.sae.state_dict(), **moments}


def together(shares: list[State], whole: State) -> State:
    """Return the state of ranks that split the features, put together where a tensor is shared."""
    return {
        name: torch.cat([share[name] for share in shares]) if each.shape != shares[0][name].shape else shares[0][name]
        for name, each in whole.items()
    }


def trained_together(n: int, folder: Path, case: str) -> list[dict[str, State]]:
    """Return what each of n processes has in the end, by what they share."""
    start(n, folder, case, module="tests.sae.gpu.ranks", seconds=1500)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(n)]


def main() -> None:
    quick.interpreter.InterpretedFunction.__call__ = quick.call
    with joined() as ranks:
        splits = {"data": Split(rows=ranks), "features": Split(features=ranks)}
        found = {how: trained(CASES[sys.argv[2]], split) for how, split in splits.items()}
        torch.save(found, Path(sys.argv[1]) / f"{ranks.number}.pt")


if __name__ == "__main__":
    main()
