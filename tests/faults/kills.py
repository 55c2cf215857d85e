"""Kills at random instants of a collection, each followed by the same command."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults import Runner, differences
from tests.small_pipeline import Ingredients, documents, recipe_data, write_corpus, write_recipe


def collecting_runner(folder: Path, n_documents: int) -> Runner:
    """A run that is mostly collection: several sites in many small parts, a training of a few steps."""
    data = Ingredients.write(folder)
    write_corpus(data.corpus, documents(n_documents))
    sites = ["transformer.h.*"]
    changes = {"activations": {"sites": sites}, "sae": {"site": "transformer.h.0"}, "train": {"n_tokens": 1000}}
    return Runner(folder, write_recipe(folder / "small.toml", recipe_data(data, **changes)))


def random_kills(runner: Runner, n_kills: int, seed: int) -> Iterator[tuple[float, list[str]]]:
    """Kill `saeflow run` by SIGKILL so many times while it collects, running it again each time.

    Yields, for each kill, its instant (seconds after the start of the collection) and what was wrong afterwards: a
    traceback, or a store that differs from the undisturbed one once it is finished.
    """
    chance = random.Random(seed)
    store, n_done, longest = runner.folder / "killed", 0, _seconds_of_collection(runner)
    while n_done < n_kills:
        process = runner.start(store)
        _wait_for_collection(store, process.pid)
        instant = chance.uniform(0, longest)
        process.join(instant)
        if process.exitcode is None and not _collected(store):
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


def _collected(store: Path) -> bool:
    return any(store.glob("activations/*/manifest.json"))


def _wait_for_collection(store: Path, pid: int | None) -> None:
    """Until the tokens are there and the activations have begun, or the process has ended."""
    while not any(store.glob("activations/*/artefact.json")) and Path(f"/proc/{pid}").exists():
        time.sleep(0.001)


def _seconds_of_collection(runner: Runner) -> float:
    store = runner.folder / "timed"
    process = runner.start(store)
    _wait_for_collection(store, process.pid)
    began = time.monotonic()
    while not _collected(store):
        time.sleep(0.001)
    seconds = time.monotonic() - began
    runner.finish(store, process)
    shutil.rmtree(store)
    return seconds
