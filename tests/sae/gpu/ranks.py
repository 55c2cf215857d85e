"""Ranks that train by kernels in the interpreter: each is a process, and writes what it has in the end.

python -m tests.sae.gpu.ranks FOLDER     one of them; its environment says which
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeflow.runtime.ranks import joined
from saeflow.sae.split import Split
from tests.sae.gpu import PLACE, quick
from tests.sae.gpu.test_fused import batch, begun, fused, options
from tests.support.ranks import ROOT, environment, free_port

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
    for number in range(N_STEPS):
        n_rows = 1 if number == ONE_ROW else None
        x, target = batch(number)[:n_rows].to(PLACE), batch(number, 7)[:n_rows].to(PLACE)
        step(x, target if "target_site" in case else None, options(here, number == BY_TOKEN))
        figures.append(step.figures.clone())
    step.settle()
    moments = {f"moment.{number}": each for number, each in enumerate(here.moments())}
    return {"figures": torch.stack(figures), **here.sae.state_dict(), **moments}


def trained_together(n: int, folder: Path) -> list[dict[str, State]]:
    """Return what each of n processes has in the end, of each case."""
    command, port = [sys.executable, "-m", "tests.sae.gpu.ranks", str(folder)], free_port()
    started = [subprocess.Popen(command, cwd=ROOT, env=environment(number, n, port)) for number in range(n)]
    try:
        codes = [each.wait(timeout=280) for each in started]
    finally:
        for each in started:
            each.kill()
    assert codes == [0] * n
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(n)]


def main() -> None:
    quick.interpreter.InterpretedFunction.__call__ = quick.call
    with joined() as ranks:
        found = {name: trained(case, Split(rows=ranks)) for name, case in CASES.items()}
        torch.save(found, Path(sys.argv[1]) / f"{ranks.number}.pt")


if __name__ == "__main__":
    main()
