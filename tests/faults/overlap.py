"""Two runs of one recipe at once: side by side, and one that is halted past its lease, followed, and then continued."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from tests.faults import POINTS, Case, Point, Runner, differences, watch
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe

LEASE_SECONDS = "2"


def waiting_runner(folder: Path) -> Runner:
    """Of a small recipe whose runs wait for one another."""
    data = recipe_data(
        Ingredients.write(folder), overlap="wait", train={"checkpoint_seconds": 0.001}, features={"compact_parts": 2}
    )
    return Runner(folder, write_recipe(folder / "small.toml", data))


def halted(runner: Runner, point: Point) -> list[str]:
    """A run that stops dead at the point, another that waits and finishes the work, then the first continued.

    The first then says that it has lost the lease, and changes nothing that readers see.
    """
    store = runner.folder / f"halted-{POINTS.index(point)}"
    first = runner.start(store, partial(_watched, Case(point, "SIGSTOP"), store))
    try:
        _wait(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
        second = runner.start(store, _short_lease, log="second")
        if _publishing(point):  # nobody may pass: it holds the lock
            time.sleep(3 * float(LEASE_SECONDS))
            os.kill(first.pid or 0, signal.SIGCONT)
        codes, published = [runner.finish(store, second)], _published(store)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid or 0, signal.SIGCONT)
    codes.append(runner.finish(store, first))
    wrong = [*_wrong(runner, store, codes, (0, 2)), *differences(runner.undisturbed, store)]
    return wrong if _publishing(point) else wrong + _late(runner, store, point, published)


def _publishing(point: Point) -> bool:
    """Does the process hold the lock at this point?"""
    made_at_once = any(word in point.when for word in ("manifest", "figures", "picture", "artefact"))
    return made_at_once or ("before publication" in point.when and point.stage != "train")


def _published(store: Path) -> dict[str, tuple[int, int]]:
    """Files that readers see: which they are, and when they were written."""
    seen = [path for path in store.rglob("*") if path.is_file() and not path.is_relative_to(store / "tmp")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in seen}


def _late(runner: Runner, store: Path, point: Point, before: dict[str, tuple[int, int]]) -> list[str]:
    """What a run did that woke up after another had finished its work."""
    changed = sorted(name for name, about in (_published(store).items() ^ before.items()))
    found = [f"written by the run that woke up: {name}" for name in dict.fromkeys(changed)]
    said, done = runner.said(store), point.when == "after publication"  # there it had nothing left to publish
    if not done and not any(words in said for words in ("taken over", "has published")):
        found.append(f"the run that woke up does not say that another has taken over:\n{said}")
    return found


def side_by_side(runner: Runner, n: int = 2) -> list[str]:
    """Several runs from the first instant on, all of which wait for one another."""
    store = runner.folder / "side-by-side"
    processes = [runner.start(store, _short_lease, log=str(i)) for i in range(n)]
    codes = [runner.finish(store, process) for process in processes]
    return [*_wrong(runner, store, codes, (0,)), *differences(runner.undisturbed, store)]


def overlaps(folder: Path, only: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every case whose name has the words of `only`, and what was wrong."""
    runner = waiting_runner(folder)
    cases: dict[str, Callable[[], list[str]]] = {
        "two runs side by side": partial(side_by_side, runner),
        "four runs side by side": partial(side_by_side, runner, 4),
    }
    cases |= {f"halted: {point.stage}, {point.when}": partial(halted, runner, point) for point in POINTS}
    for name, case in cases.items():
        if only in name:
            yield name, case()


def _short_lease() -> None:
    os.environ["SAEFLOW_LEASE_SECONDS"] = LEASE_SECONDS


def _watched(case: Case, store: Path) -> None:
    _short_lease()
    watch(case, store)


def _wait(until: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "the run never came to that point"
        time.sleep(0.02)


def _wrong(runner: Runner, store: Path, codes: list[int | None], allowed: tuple[int, ...]) -> list[str]:
    """Exit codes and tracebacks that should not be."""
    logs = {path.name: path.read_text("utf-8") for path in sorted(runner.folder.glob(f"{store.name}*.log"))}
    said = "\n".join(f"{name}:\n{text}" for name, text in logs.items())
    found = [f"exit codes {codes}:\n{said}"] if codes[0] != 0 or any(code not in allowed for code in codes) else []
    return found + [f"a traceback in {name}:\n{text}" for name, text in logs.items() if "Traceback" in text]
