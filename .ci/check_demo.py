"""Did the demo answer, did its second run do nothing twice, and do keys alone lead through its pages?

`PYTHONPATH=. check_demo.py STORE FIRST_LOG SECOND_LOG`. Prints the figures beside what is promised; fails on answers
that are missing or absurd, and if headless Chromium cannot walk through the pages of `saeflow browse`. Where there is
no Chromium, a line says that the pages were NOT CHECKED.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.chromium import CHROMIUM
from tests.support.walk import walk_through

PROMISED = {
    "loss_recovered_zero": ("at least", 0.99),
    "loss_recovered_mean": ("at least", 0.98),
    "variance_unexplained": ("at most", 0.11),
    "dead_share": ("at most", 0.01),
    "l0": ("at most", 32),
}
ABSURD = {
    "loss_recovered_zero": 0.9,
    "loss_recovered_mean": 0.9,
    "variance_unexplained": 0.2,
    "dead_share": 0.2,
    "l0": 64,
}
STAGES = ["tokens", "activations", "train", "features", "evaluate"]


def problems(store: Path, first: str, second: str) -> list[str]:
    [file] = store.glob("features/demo-*/quality.json")
    quality = json.loads(file.read_text())
    found = []
    for name, (side, promise) in PROMISED.items():
        value, limit = quality[name], ABSURD[name]
        kept = value >= promise if side == "at least" else value <= promise
        print(f"{name:22} {value:9.4f}   promised: {side} {promise}   {'kept' if kept else 'NOT KEPT'}")
        if not (value >= limit if side == "at least" else value <= limit):
            found.append(f"{name} is {value}, which is absurd")
    for which, log in (("first", first), ("second", second)):
        n_answers = log.count("$ saeflow ask ")
        if n_answers != 3:
            found.append(f"the {which} run gave {n_answers} answers instead of three")
    found += [f"the second run did {s} again" for s in STAGES if f"{s}: already done" not in second]
    return found


if __name__ == "__main__":
    store = Path(sys.argv[1])
    found = problems(store, *(Path(log).read_text() for log in sys.argv[2:4]))
    stopped = walk_through(store)
    if CHROMIUM is None:
        print("NOT CHECKED:", *stopped)
    else:
        found += stopped
    print("\n".join(found) or "the demo answers")
    sys.exit(1 if found else 0)
