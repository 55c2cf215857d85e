"""Pages that stay open and are loaded again and again, while other processes change the store under them.

Every answer must be one that the store gave at that time: `tests.faults.states` finds out. The server's memory and open
files stay bounded, and it leaves nothing behind.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import psutil

from saeflow.pipeline.lifecycle import ingest
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import load_recipe
from saeflow.store.store import Store
from tests.faults import Runner, run_command
from tests.faults.states import Command, Seen, States, comparable, copy_by_links
from tests.support.served_pages import served
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, write_corpus, write_recipe

N_FIRST, N_MORE = 40, 4
"""Documents at first, and those that come in at a time."""

PAGES = [
    "/.json", "/runs/small.json", "/runs/small/features", "/runs/small/features.csv?sort=density",
    "/runs/small/features/1", "/runs/small/features/2.json?all=1", "/runs/small/features/3?source=tales&threshold=0.1",
    "/runs/small/doc?key=letters/001", "/runs/small/doc.json?key=tales/002", "/runs/small/docs",
    "/runs/small/tokens-at/40.json", "/runs/small/tokens.json?text=a", "/runs/small/compare?a=1&b=2",
    "/runs/small/selection.json?tokens=3,40", "/runs/small/ask/feature_summary.json",
]  # fmt: skip

TURN = ("ingest", "run_second", "forget", "run", "compact", "label", "remove_second", "gc")
"""Commands that change the store, over and over."""

PAGES_OF_SECOND = ["/runs/second", "/runs/second/features", "/runs/second/features/1.json", "/"]
"""Pages of a run that comes and goes, and the list of runs."""


class Client(threading.Thread):
    """Loads pages one after the other until told to stop."""

    def __init__(self, address: str, pages: Sequence[str], pause: float, store_name: str) -> None:
        super().__init__(daemon=True)
        self.address, self.pages, self.pause, self.store_name = address, pages, pause, store_name
        self.seen: list[Seen] = []
        self.texts: dict[str, str] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=60) as client:
            for path in itertools.cycle(self.pages):
                if self.stopped.wait(self.pause):
                    return
                asked = time.time()
                try:
                    answer = client.get(path)
                    status, text = answer.status_code, answer.text
                except httpx.HTTPError as error:
                    status, text = 0, repr(error)
                answered = time.time()
                text = comparable(text, self.store_name)
                self.seen.append(Seen(path, asked, answered, status, self.texts.setdefault(text, text)))


class Watch(threading.Thread):
    """Notes memory, open files and threads of the server, four times a second."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.stopped = process, threading.Event()
        self.rows: list[tuple[int, int, int]] = []

    def run(self) -> None:
        while not self.stopped.wait(0.25):
            with self.process.oneshot():
                about = self.process.memory_info().rss, self.process.num_fds(), self.process.num_threads()
            self.rows.append(about)

    def medians(self) -> Iterator[tuple[str, float, float, int]]:
        """Yield what, its median in the second fifth of the time and in the last, and its peak."""
        n = max(len(self.rows) // 5, 1)
        for what, column in zip(
            ("bytes of memory", "open files", "threads"), zip(*self.rows, strict=True), strict=True
        ):
            yield what, statistics.median(column[n : 2 * n] or column), statistics.median(column[-n:]), max(column)

    def problems(self) -> list[str]:
        return [
            f"{early:,.0f} {what} became {late:,.0f}"
            for what, early, late, _ in self.medians()
            if late > 1.25 * early + (100 << 20 if "bytes" in what else 20)
        ]


class OpenPages:
    """A small store that one command after the other changes, with pages open on it."""

    def __init__(self, folder: Path, pause: float = 0.1) -> None:
        self.folder, self.pause = folder, pause
        self.data = Ingredients.write(folder)
        self.documents = documents(N_FIRST)
        write_corpus(self.data.corpus, self.documents)
        small = recipe_data(self.data, train={"n_tokens": 5_000})
        self.recipe = write_recipe(folder / "small.toml", small)
        self.second = write_recipe(folder / "second.toml", {**small, "name": "second"})
        self.runner = Runner(folder, self.recipe)
        self.store, self.log = self.runner.undisturbed, folder / "commands.log"
        self.commands: list[Command] = []
        self.problems: list[str] = []
        self.about = ""

    def watch(self, seconds: float) -> list[str]:
        """Change the store for so long, with pages open. Return what was wrong."""
        temporary, said = self.folder / "tmp", self.folder / "browse.log"
        temporary.mkdir()
        self._note("begin", time.time())
        with served(self.store, said, TMPDIR=str(temporary)) as (address, process):
            watch = Watch(process)
            starts = (PAGES, PAGES[7:] + PAGES[:7], PAGES_OF_SECOND)
            clients = [Client(address, pages, self.pause, str(self.store)) for pages in starts]
            threads: list[Client | Watch] = [*clients, watch]
            for thread in threads:
                thread.start()
            self._change(time.time() + seconds)
            for thread in threads:
                thread.stopped.set()
                thread.join(60)
            family = [process, *process.children(recursive=True)]
        self.problems += [f"{each} is left" for each in family if each.is_running()]
        self.problems += [f"{path} is left" for path in temporary.rglob("*")]
        if "Traceback" in said.read_text("utf-8"):
            self.problems.append(f"saeflow browse said: {said.read_text('utf-8')[-3000:]}")
        self.about = describe(clients, watch, self.commands)
        states = States(self.commands, PAGES)
        wrong = itertools.chain(*(states.wrong(client.seen) for client in clients[:-1]))
        return [*self.problems, *watch.problems(), *wrong_of_second(clients[-1].seen, self.commands), *wrong]

    def _change(self, end: float) -> None:
        """Let one command after the other change the store until the end."""
        for name in itertools.cycle(TURN):
            if time.time() > end:
                return
            began = time.time()
            code = getattr(self, f"_{name}")()
            if code:
                self.problems.append(f"{name} ended with {code}: {self.log.read_text('utf-8')[-2000:]}")
            self._note(name, began)

    def _note(self, name: str, began: float) -> None:
        copy = self.folder / f"copy-{len(self.commands):04d}"
        self.commands.append(Command(name, began, time.time(), copy))
        copy_by_links(self.store, copy)

    def _ingest(self) -> int | None:
        self._grow()
        return self._finish(ingest_here, self.recipe, self.store, self.log)

    def _run(self) -> int | None:
        self._grow()
        return self._command("run", self.recipe)

    def _run_second(self) -> int | None:
        return self._command("run", self.second)

    def _remove_second(self) -> None:
        for path in self.store.glob("features/second-*"):
            shutil.rmtree(path)

    def _forget(self) -> int | None:
        return self._command("forget", self.documents.pop()["key"])

    def _compact(self) -> int | None:
        return self._command("compact", self.recipe)

    def _label(self) -> int | None:
        return self._command("label", "1", f"called so at {time.time():.2f}")

    def _gc(self) -> int | None:
        return self._command("gc", "--grace", "0", "--yes")

    def _grow(self) -> None:
        """Write a corpus of more documents. Their keys are new."""
        place = len(self.commands)
        more = [row | {"key": f"more/{place}-{i}"} for i, row in enumerate(documents(N_MORE, seed=place)[-N_MORE:])]
        self.documents += more
        write_corpus(self.data.corpus, self.documents)

    def _command(self, *arguments: str | Path) -> int | None:
        return self._finish(run_command, [*map(str, arguments), "--store", str(self.store)], self.log, None)

    def _finish(self, does: Callable[..., None], *arguments: object) -> int | None:
        process = self.runner.context.Process(target=does, args=arguments)
        process.start()
        return self.runner.finish(self.store, process)


def ingest_here(recipe: Path, store: Path, log: Path) -> None:
    """Bring the new documents of the corpus through every run, as the flow `ingest` does."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    ingest.run(Lineage(Store.open(store), load_recipe(recipe)), quiet())


def wrong_of_second(seen: Sequence[Seen], commands: Sequence[Command]) -> list[str]:
    """Return pages of the second run that were not shown although it was there, or as a fault of the server."""
    removed = [command.name == "remove_second" for command in commands]
    made = [command.name == "run_second" for command in commands]
    found = []
    for each in seen:
        before = [i for i, command in enumerate(commands) if command.began <= each.answered and (removed[i] or made[i])]
        is_there = bool(before) and made[before[-1]] and commands[before[-1]].ended <= each.asked
        if each.status != 200 and (
            is_there or each.path == "/" or each.status != 404 or ('"/"' not in each.text and each.text[0] == "<")
        ):
            found.append(f"{each.path} was answered with {each.status}: {each.text[:300]}")
    return found


def describe(clients: Sequence[Client], watch: Watch, commands: Sequence[Command]) -> str:
    """Return how many commands and answers there were, how long these took, and what the server held."""
    seen = [each for client in clients for each in client.seen]
    times = sorted(each.answered - each.asked for each in seen)
    quantiles = ", ".join(
        f"{q:.0%} {1e3 * times[min(int(q * len(times)), len(times) - 1)]:.0f}" for q in (0.5, 0.9, 0.99, 1)
    )
    held = "; ".join(
        f"{what} {early:,.0f}, at the end {late:,.0f}, at most {most:,}" for what, early, late, most in watch.medians()
    )
    done = ", ".join(f"{n} {name}" for name, n in Counter(command.name for command in commands[1:]).items())
    statuses = ", ".join(f"{n} with {status}" for status, n in sorted(Counter(each.status for each in seen).items()))
    return f"{done}\n{len(seen)} answers ({statuses}), milliseconds: {quantiles}\n{held}"
