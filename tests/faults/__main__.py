"""Faults at named points, kills at random instants, power cuts.

python -m tests.faults                       every fault at every named point
python -m tests.faults --tenth 3             a tenth of them
python -m tests.faults --only train          those whose name has these words
python -m tests.faults --random-kills 20     a collection killed so often, resumed each time
python -m tests.faults --training-kills 20   a sweep of every architecture, killed in training, likewise
python -m tests.faults --reading-kills 20    encoding and compaction killed so often while another process asks
python -m tests.faults --overlaps            runs side by side; one halted at every named point, followed, continued
python -m tests.faults --matrix --table docs/faults.md    every kind of fault in every stage, and a page of it
python -m tests.faults --damages 30          random damages, each repaired and run again
python -m tests.faults --permissions         what the system refuses to read or write is not taken for damage
python -m tests.faults --power-cuts 20       about so many power cuts in one run
python -m tests.faults --open-pages 10       pages loaded again and again for so many minutes while the store changes
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from saeflow.recipe.settings import Architecture
from tests.faults import CASES, Runner, damage, matrix, power, tenth
from tests.faults.kills import TRAINING, collecting_runner, random_kills, training_runner
from tests.faults.open_pages import OpenPages
from tests.faults.overlap import overlaps
from tests.faults.power import VIEWS, power_cuts
from tests.faults.readers import Reading
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe

_SHOWN = 6
"""Problems printed of one case."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tenth", type=int, metavar="N", help="only every tenth case, beginning with the N-th")
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases whose name has these words")
    parser.add_argument("--random-kills", type=int, metavar="N", help="only kills at N random instants of a collection")
    parser.add_argument("--training-kills", type=int, metavar="N", help="only kills at N random instants of a training")
    parser.add_argument("--reading-kills", type=int, metavar="N", help="only N kills beside a reader")
    parser.add_argument("--matrix", action="store_true", help="only every kind of fault once in every stage")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where to write what the matrix found")
    parser.add_argument("--damages", type=int, metavar="N", help="only N random damages")
    parser.add_argument("--permissions", action="store_true", help="only situations in which the system refuses")
    parser.add_argument("--overlaps", action="store_true", help="only two runs at once")
    parser.add_argument("--power-cuts", type=int, metavar="N", help="only about N power cuts")
    parser.add_argument("--open-pages", type=float, metavar="MINUTES", help="only pages, while the store changes")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    chosen = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"  # multiprocessing counts what the killed ones left behind
    with tempfile.TemporaryDirectory(prefix="saeflow-faults-") as folder:
        found = list(map(_said, _results(chosen, Path(folder))))
    n_failed = sum(found)
    print(f"{len(found) - n_failed} passed, {n_failed} failed")
    return 1 if n_failed else 0


def _results(chosen: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Names of cases and what was wrong."""
    if chosen.random_kills:
        runner = collecting_runner(folder, 1500)
        for instant, problems in random_kills(runner, chosen.random_kills, chosen.seed):
            yield f"a kill {instant:.2f} s into the collection" if instant else "finished after the last kill", problems
    elif chosen.training_kills:
        runner = training_runner(folder, [{"sae.architecture": name} for name in get_args(Architecture)])
        for instant, problems in random_kills(runner, chosen.training_kills, chosen.seed, TRAINING):
            yield f"a kill {instant:.2f} s into the training" if instant else "finished after the last kill", problems
    elif chosen.reading_kills:
        yield from Reading(folder).kills(chosen.reading_kills, chosen.seed)
    elif chosen.matrix:
        yield from matrix_results(chosen, folder)
    elif chosen.damages or chosen.permissions:
        runner = small_runner(folder)
        yield from damage.damages(runner, range(chosen.seed, chosen.seed + (chosen.damages or 0)), chosen.only)
        if chosen.permissions:
            yield from damage.permissions(runner, chosen.only)
    elif chosen.overlaps:
        yield from overlaps(folder, chosen.only)
    elif chosen.open_pages:
        pages = OpenPages(folder)
        problems = pages.watch(60 * chosen.open_pages)
        yield f"pages open for {chosen.open_pages:g} minutes\n{pages.about}", problems
    elif chosen.power_cuts:
        runner = small_runner(folder)
        for cut in power_cuts(runner, chosen.power_cuts):
            for view in VIEWS:
                yield f"power cut at flush {cut.name}, {view}", power.problems(runner, cut, view)
    else:
        cases = CASES if chosen.tenth is None else tenth(chosen.tenth)
        runner = small_runner(folder)
        for case in cases:
            if chosen.only in case.name:
                yield case.name, runner.problems(case)


def matrix_results(chosen: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[str]]]:
    names = [f"{fault}, {stage}" for fault in matrix.FAULTS_OF_ALL for stage in matrix.STAGES]
    wanted = names if chosen.tenth is None else names[chosen.tenth % 10 :: 10]
    rows, before = [], chosen.table.read_text("utf-8") if chosen.table and chosen.table.exists() else ""
    for row in matrix.Matrix(folder).rows(lambda name: name in wanted and chosen.only in name):
        rows.append(row)
        if chosen.table:  # what is known so far, however long the rest takes
            chosen.table.write_text(matrix.table(rows, before), "utf-8")
        yield f"{row.name}{f': skipped, {row.skipped}' if row.skipped else ''}", list(row.problems)


def _said(result: tuple[str, list[str]]) -> bool:
    """Print one case; is something wrong?"""
    name, problems = result
    print(f"{'FAILED' if problems else 'passed'}  {name}", flush=True)
    for problem in problems[:_SHOWN]:
        print(f"        {problem}", flush=True)
    if len(problems) > _SHOWN:
        print(f"        and {len(problems) - _SHOWN} more", flush=True)
    return bool(problems)


def small_runner(folder: Path) -> Runner:
    """The small recipe, with a checkpoint after nearly every step of the training."""
    data = recipe_data(Ingredients.write(folder), train={"checkpoint_seconds": 0.001}, features={"compact_parts": 2})
    return Runner(folder, write_recipe(folder / "small.toml", data))


if __name__ == "__main__":
    sys.exit(main())
