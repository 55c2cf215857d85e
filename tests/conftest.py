"""Fixtures that all tests share; what they are made of is in tests/support/small_pipeline.py.

`ingredients`  a small real model and corpus on disk: read-only, made once.
`finished`     a store in which every stage of the small recipe has run: read-only, made once.
`progress`     a Progress that says nothing.
`saeflow`      the command, run in this process.

Everything works offline and on one processor thread.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import zlib

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job and all that it starts ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ.pop("SAEFLOW_STORE", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process that a test starts compiles saeflow anew

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock
from hypothesis import settings

from saeflow.pipeline import stages
from saeflow.pipeline.lineage import Lineage
from saeflow.query.kept_catalog import expect_many_connections
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.files import read_json, write_json
from saeflow.store.store import Store
from tests.support.command import saeflow  # noqa: F401  (a fixture)
from tests.support.small_pipeline import Ingredients, quiet, recipe_data

expect_many_connections()
settings.register_profile("saeflow", deadline=None)  # how long an example takes depends on the machine's load
settings.load_profile("saeflow")


@dataclass(frozen=True)
class Finished:
    """A store in which `recipe` has run to the end, and the summary it gave."""

    store: Store
    recipe: Recipe
    summary: dict[str, Any]


@pytest.fixture(scope="session")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    """A two-layer random GPT-2 and 66 documents in many scripts; do not write there."""
    with _made_once(tmp_path_factory, "ingredients") as (folder, is_made):
        return Ingredients.at(folder) if is_made else Ingredients.write(folder)


@pytest.fixture(scope="session")
def finished(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The small recipe run through all stages; do not write there (copy the store to change it)."""
    recipe = parse_recipe(recipe_data(ingredients))
    with _made_once(tmp_path_factory, "finished") as (folder, is_made):
        store = Store.create(folder / "store")
        if not is_made:
            write_json(folder / "summary.json", stages.run(Lineage(store, recipe), quiet()))
        return Finished(store, recipe, read_json(folder / "summary.json"))


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of it, to write into."""
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    return Finished(store, finished.recipe, finished.summary)


@contextlib.contextmanager
def _made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Give a folder that all workers of pytest-xdist share, and whether one of them has filled it.

    The first worker fills it while the others wait, so that kernels are compiled once.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        done = folder / "done"
        yield folder, done.exists()
        done.touch()


LONG = [
    "kill", "hostile_stores", "ranks", "docs", "serve", "flows", "ranks_on_workers", "one_pass", "cluster", "fuzz",
    "cancel", "storage", "newcomer", "terminal", "ingest", "power", "random_features", "append", "estimates",
    "open_pages", "app", "wheel", "remote", "forecast", "import_sae",
]  # fmt: skip
"""Files that take longest, in this order: they come first, so that no worker is left with one of them at the end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, where `SAEFLOW_TENTH` is a digit, tests that another day takes: of `rotates(10)` nine tenths."""
    left_out = [item for item in items if _is_of_another_day(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def _is_of_another_day(item: pytest.Item) -> bool:
    digit, mark = os.environ.get("SAEFLOW_TENTH"), item.get_closest_marker("rotates")
    if not digit or mark is None:
        return False
    (n_days,) = mark.args
    return bool(zlib.crc32(item.nodeid.encode()) % n_days != int(digit) % n_days)


def pytest_collection() -> None:
    """Do not look for garbage while tests are imported: nearly all objects of a module stay to the end."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not among those objects."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def progress() -> Progress:
    return quiet()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers, and the commands they start, share a cache. Nobody reads or writes the user's."""
    with _made_once(tmp_path_factory, "cache") as (folder, _):
        folder.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEFLOW_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_flush() -> Iterator[None]:
    """No test cuts the power in this process (`tests/faults` does in its own), and flushing takes much of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_command_tree() -> Iterator[None]:
    """Typer builds the tree of commands anew for each command line, which takes longer than most commands do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small things run quicker, and always alike, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
