"""Training, feed, collection and encoding on one GPU: right, and how near to what the card can do?

python -m tests.benchmarks.gpu            at most ten minutes
python -m tests.benchmarks.gpu --quick    at most three: the smaller size, topk and batchtopk, no peers
python -m tests.benchmarks.gpu --dry      no GPU: the script's own code at toy sizes, on the processor

Needs a CUDA device, a CUDA build of torch with Triton, and what saeflow needs; SAELens and sparsify if they are there.
*Correct*: each kernel at D = 2,304, F = 65,536, B = 8,192 against float64. *Parts*: each part of a step; its limit is
what it has to compute and to move, at the rates that this card reaches in a product of two square matrices and in a
copy, measured in the same run. *Steps*: whole steps with the optimizer, as a training takes them, beside the dense step
by torch.compile. A part that fails says so in its row; the others are measured. `gpu.json` and `gpu.md` are written to
`--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saeflow.runtime.devices import choose_device
from tests.benchmarks._bars import report
from tests.benchmarks._gpu.measure import Card, Row
from tests.benchmarks._gpu.work import Part, child, command_of, do_tasks, failed, rows_of

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "torch sees no CUDA device, so nothing is measured; --dry runs the script's own code on the processor."
WHOLE_SECONDS, QUICK_SECONDS = 580.0, 170.0


def parts() -> list[Part]:
    """Return all parts, the most telling ones first."""
    from tests.benchmarks._gpu import around, correct, steps
    from tests.benchmarks._gpu import parts as pieces

    return [
        Part("limits", pieces.limits, 25),
        Part("correct", correct.tasks, 130),
        Part("parts, small", pieces.small, 50),
        Part("steps, quick", steps.quick, 60),
        Part("around", around.tasks, 60),
        Part("parts, large", pieces.large, 50, is_quick=False),
        Part("steps, large", steps.large, 60, is_quick=False),
        Part("steps, public", steps.public, 50, is_quick=False),
        Part("steps, small", steps.others, 100, is_quick=False),
        Part("peers", steps.peers, 100, is_quick=False),
    ]


def measured(chosen: list[Part], card: Card, whole_seconds: float) -> dict[str, list[Row]]:
    """Return the rows of each part; on the card each part has a process of its own."""
    ends, found = time.monotonic() + whole_seconds, dict[str, list[Row]]()
    for number, part in enumerate(chosen):
        print(part.name, flush=True)
        seconds = part.share_of(chosen[number:], ends - time.monotonic())
        if card.is_toy:
            found[part.name] = [Row(**said) for said in do_tasks(part, card) if "name" in said]
        elif seconds < 5:
            found[part.name] = [failed(part.name, "no time was left")]
        else:
            found[part.name] = rows_of(part, command_of(part, card.is_toy), seconds)
    return found


def about_card(card: Card) -> dict[str, Any]:
    """Return the names and versions of what was measured."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if card.on_gpu:
        about = torch.cuda.get_device_properties(card.place)
        facts |= {
            "gpu": about.name,
            "memory_gb": round(about.total_memory / 1e9, 1),
        }
        facts |= {"capability": f"{about.major}.{about.minor}", "multiprocessors": about.multi_processor_count}
    return facts


def write(found: dict[str, list[Row]], card: Card, seconds: float, folder: Path) -> None:
    """Write JSON and the table, and print the bars."""
    from tests.benchmarks._gpu.tables import Tables

    tables, about = Tables(found, card.is_toy), about_card(card) | {"seconds": round(seconds, 1)}
    bars, rows = tables.bars(), tables.as_json()
    folder.mkdir(parents=True, exist_ok=True)
    kept = about | {"bars": [asdict(bar) | {"holds": bar.holds} for bar in bars], "rows": rows}
    (folder / "gpu.json").write_text(json.dumps(kept, indent=1), "utf-8")
    (folder / "gpu.md").write_text(tables.markdown(about), "utf-8")
    print(f"{folder / 'gpu.json'} and {folder / 'gpu.md'} have all figures.")
    report("gpu", bars, **about)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most three minutes")
    parser.add_argument("--dry", action="store_true", help="run the script's own code at toy sizes on the processor")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "gpu", help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", help="names of parts, parted by semicolons")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--without", type=json.loads, default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    if not torch.cuda.is_available() and not asked.dry:
        print(NO_GPU)
        report("gpu", [], reason=NO_GPU)
        return
    if asked.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    card = Card(choose_device("the place", "cpu" if asked.dry else "cuda"), asked.dry)  # sums stay in float32
    names = asked.only.split(";") if asked.only else None
    chosen = [part for part in parts() if (part.is_quick or not asked.quick) and (not names or part.name in names)]
    if asked.part:
        child(next(part for part in parts() if part.name == asked.part), card, asked.without)
        return
    began = time.monotonic()
    found = measured(chosen, card, QUICK_SECONDS if asked.quick else WHOLE_SECONDS)
    write(found, card, time.monotonic() - began, asked.out)


if __name__ == "__main__":
    sys.exit(main())
