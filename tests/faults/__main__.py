"""All faults, or a tenth of them: `python -m tests.faults [--tenth N] [--only WORDS]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import CASES, Runner, tenth
from tests.small_pipeline import Ingredients, recipe_data, write_recipe

_SHOWN = 6
"""Problems printed of one case."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--tenth", type=int, metavar="N", help="only every tenth case, beginning with the N-th")
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases whose name has these words")
    chosen = parser.parse_args()
    cases = CASES if chosen.tenth is None else tenth(chosen.tenth)
    cases = [case for case in cases if chosen.only in case.name]
    n_failed = 0
    os.environ["PYTHONWARNINGS"] = "ignore"  # multiprocessing counts what the killed ones left behind
    with tempfile.TemporaryDirectory(prefix="saeflow-faults-") as folder:
        runner = small_runner(Path(folder))
        for case in cases:
            began = time.monotonic()
            problems = runner.problems(case)
            n_failed += bool(problems)
            print(f"{'FAILED' if problems else 'passed'}  {time.monotonic() - began:5.1f} s  {case.name}", flush=True)
            for problem in problems[:_SHOWN]:
                print(f"        {problem}", flush=True)
            if len(problems) > _SHOWN:
                print(f"        and {len(problems) - _SHOWN} more", flush=True)
    print(f"{len(cases) - n_failed} passed, {n_failed} failed")
    return 1 if n_failed else 0


def small_runner(folder: Path) -> Runner:
    """The small recipe, with a checkpoint after nearly every step of the training."""
    data = recipe_data(Ingredients.write(folder), train={"checkpoint_seconds": 0.001})
    return Runner(folder, write_recipe(folder / "small.toml", data))


if __name__ == "__main__":
    sys.exit(main())
