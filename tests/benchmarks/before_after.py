"""What stages take in another checkout of saeflow and in this one, in turn, in one run.

python -m tests.benchmarks.before_after CHECKOUT            five alternations
python -m tests.benchmarks.before_after CHECKOUT --quick    two, smaller sizes
python -m tests.benchmarks.before_after CHECKOUT CHECKOUT   with itself: how far ratios are from 1 by chance

Each alternation starts a process for either checkout. Every case runs once in both before it is timed in both, so
that imports and compilation are left out and two timings that are compared lie seconds apart; who goes first changes.
*Ratio* is the median of the seconds before over the median of those after. Its spread is that of the pairs' ratios. The
JSON also has the ratios of CPU seconds, which tell more where other processes keep the machine busy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks._bars import Bar, report
from tests.support.checkouts import entry
from tests.support.small_pipeline import write_recipe

ROOT = Path(__file__).resolve().parents[2]
ASKED = 0.97
CASES = ("encode", "queries", "feed", "collect", "train TopK", "train BatchTopK")


@dataclass(frozen=True)
class Size:
    alternations: int
    n_rows: int
    """Made activations, of width 256."""
    n_train: int
    share: float
    """Share of the demo corpus whose activations are collected."""
    n_batches: int
    n_each: int
    """How often each question is asked."""


FULL = Size(5, 1 << 17, 300_000, 0.05, 3_000, 60)
QUICK = Size(2, 1 << 14, 20_000, 0.012, 300, 5)


def recipes(folder: Path, size: Size) -> dict[str, str]:
    """Write the recipes of the stores and return their paths."""
    made = {"kind": "superposed", "n_samples": size.n_rows, "n_neurons": 256, "n_true": 4096, "l0": 16.0}
    rows = {
        "name": "rows",
        "activations": {"synthetic": made, "dtype": "float16", "part_rows": size.n_rows // 4},
        "feed": {"batch_rows": 4096, "pool_bytes": 32 << 20},
        "sae": {"architecture": "topk", "n_features": 4096, "k": 16},
        "train": {"n_tokens": size.n_train},
    }
    demo = ROOT / "data" / "demo"
    texts = {
        "name": "texts",
        "corpus": {"files": [str(demo / "corpus.parquet")], "share": size.share},
        "model": {"path": str(demo / "model")},
        "activations": {"sites": ["transformer.h.0.mlp.act"], "forward_batch": 16},
    }
    data = {"rows": rows, "trained": rows, "texts": texts}
    return {store: str(write_recipe(folder / f"{store}.toml", each)) for store, each in data.items()}


class Side:
    """A process that runs cases with the saeflow of a checkout."""

    def __init__(self, checkout: Path, folder: Path, about: dict[str, Any]) -> None:
        program = Path(__file__).with_name("_side.py")
        command = [sys.executable, "-P", program, folder, *entry(checkout), json.dumps(about)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            list(map(str, command)), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, case: str) -> dict[str, float]:
        """Run a case and return its `seconds` and `cpu_seconds`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(case, file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{case} ended its process; see its error above")
        return dict(json.loads(line))

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


Pair = tuple[dict[str, float], dict[str, float]]
"""What a case took before and after."""


def alternation(
    checkouts: Sequence[Path], cases: Sequence[str], folder: Path, about: dict[str, Any], turned: bool
) -> dict[str, Pair]:
    """Run the cases before and after, in new processes."""
    found: dict[str, Pair] = {}
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Side(path, folder / str(i), about)) for i, path in enumerate(checkouts)]
        order = [1, 0] if turned else [0, 1]
        for case in cases:
            for i in order:
                sides[i](case)
            taken = {i: sides[i](case) for i in order}
            found[case] = taken[0], taken[1]
            print(f"  {case}: {taken[0]['seconds']:.3f} s before, {taken[1]['seconds']:.3f} s after", flush=True)
    return found


def ratio(pairs: Sequence[Pair], of: str) -> tuple[float, float]:
    """Return the ratio of the medians, and the spread of the pairs' ratios."""
    before, after = (statistics.median(pair[i][of] for pair in pairs) for i in (0, 1))
    ratios = [pair[0][of] / pair[1][of] for pair in pairs]
    return round(before / after, 3), round(max(ratios) - min(ratios), 3)


def name(case: str) -> str:
    return f"{case}: seconds before over seconds after"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=lambda text: Path(text).resolve(), nargs="?", help="the state before")
    parser.add_argument(
        "after", type=lambda text: Path(text).resolve(), nargs="?", default=ROOT, help="the state after; default: this"
    )
    parser.add_argument("--only", choices=CASES, action="append", help="one case; may be repeated")
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    if asked.checkout is None:
        reason = "no checkout to compare with was named"
        report("before_after", [Bar(name(case), ASKED, ">=", None, reason=reason) for case in CASES])
        return
    size, cases = QUICK if asked.quick else FULL, asked.only or CASES
    found: dict[str, list[Pair]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="saeflow-before-after-", dir=ROOT / "data") as temporary:
        folder = Path(temporary)
        about = asdict(size) | {"recipes": recipes(folder, size)}
        for number in range(size.alternations):
            print(f"alternation {number + 1} of {size.alternations}", flush=True)
            checkouts = asked.checkout, asked.after
            for case, pair in alternation(checkouts, cases, folder, about, number % 2 == 1).items():
                found[case].append(pair)
    bars = [Bar(name(case), ASKED, ">=", *ratio(pairs, "seconds")) for case, pairs in found.items()]
    cpu = {case: ratio(pairs, "cpu_seconds")[0] for case, pairs in found.items()}
    report("before_after", bars, cpu_ratio=cpu, taken=found)


if __name__ == "__main__":
    main()
