"""Kills at random instants of a collection or of a training, each followed by the same command."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import Runner, differences
from tests.support.small_pipeline import Ingredients, documents, recipe_data, write_corpus, write_recipe


def collecting_runner(folder: Path, n_documents: int) -> Runner:
    """A run that is mostly collection: several sites in many small parts, a training of a few steps."""
    data = Ingredients.write(folder)
    write_corpus(data.corpus, documents(n_documents))
    sites = ["transformer.h.*"]
    changes = {"activations": {"sites": sites}, "sae": {"site": "transformer.h.0"}, "train": {"n_tokens": 1000}}
    return Runner(folder, write_recipe(folder / "small.toml", recipe_data(data, **changes)))


def training_runner(folder: Path, settings: list[dict[str, Any]], n_tokens: int = 20_000) -> Runner:
    """A run that is mostly the training of a sweep, with a checkpoint every tenth of a second."""
    train = {"n_tokens": n_tokens, "checkpoint_seconds": 0.1, "clip_norm": 1.0, "dead_after_tokens": 2000}
    data = recipe_data(Ingredients.write(folder), train=train, sweep={"each": settings})
    return Runner(folder, write_recipe(folder / "small.toml", data))


def one_pass_runner(folder: Path, n_documents: int) -> Runner:
    """A run that trains on a stored sample and encodes the corpus, in many small parts, without storing it."""
    data = Ingredients.write(folder)
    write_corpus(data.corpus, documents(n_documents))
    about = {"tokens": {"part_tokens": 300}, "train": {"share": 0.3, "n_tokens": 1000, "checkpoint_seconds": 0.1}}
    return Runner(folder, write_recipe(folder / "small.toml", recipe_data(data, activations={"keep": False}, **about)))


@dataclass(frozen=True)
class Work:
    """A stretch of a run, by what is in the store when it begins and when it has ended."""

    begun: Callable[[Path], bool]
    done: Callable[[Path], bool]


COLLECTION = Work(
    lambda store: any(store.glob("activations/*/artefact.json")),
    lambda store: any(store.glob("activations/*/manifest.json")),
)
TRAINING = Work(
    lambda store: any(store.glob("activations/*/manifest.json")), lambda store: any(store.glob("sweeps/*/table.json"))
)


ONE_PASS = Work(
    lambda store: any(store.glob("tokens/*/manifest.json")), lambda store: any(store.glob("features/*/quality.json"))
)


def random_kills(runner: Runner, n_kills: int, seed: int, work: Work = COLLECTION) -> Iterator[tuple[float, list[str]]]:
    """Kill `saeflow run` by SIGKILL so many times while it is at this work, running it again each time.

    Yields, for each kill, its instant (seconds after the work began, or after the start of a run that goes on with it)
    and what was wrong afterwards: a traceback, or a store that differs from the undisturbed one once it is finished.
    """
    chance = random.Random(seed)
    store, n_done, longest = runner.folder / "killed", 0, _seconds_of(work, runner)
    while n_done < n_kills:
        process = runner.start(store)
        _wait_until(work.begun, store, process.pid)
        instant = chance.uniform(0, longest)
        process.join(instant)
        if process.exitcode is None and not work.done(store):
            process.kill()
            process.join()
            n_done += 1
            found = ["a traceback:\n" + runner.said(store)] if "Traceback" in runner.said(store) else []
            yield instant, found
            continue
        if runner.finish(store, process) != 0:
            yield instant, [runner.said(store)]
        found = differences(runner.undisturbed, store)
        if found:
            yield instant, found
        shutil.rmtree(store)
    assert runner.run(store) == 0, runner.said(store)
    yield 0.0, differences(runner.undisturbed, store)


def _wait_until(begun: Callable[[Path], bool], store: Path, pid: int | None) -> None:
    """Or until the process has ended."""
    while not begun(store) and Path(f"/proc/{pid}").exists():
        time.sleep(0.001)


def _seconds_of(work: Work, runner: Runner) -> float:
    store = runner.folder / "timed"
    process = runner.start(store)
    _wait_until(work.begun, store, process.pid)
    began = time.monotonic()
    _wait_until(work.done, store, process.pid)
    seconds = time.monotonic() - began
    runner.finish(store, process)
    shutil.rmtree(store)
    return seconds
