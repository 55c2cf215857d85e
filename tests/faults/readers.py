"""Encoding and compaction killed at random instants while another process asks on and on: no answer is ever half of
one."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

from tests.faults import Runner, differences
from tests.support.small_pipeline import Ingredients, documents, recipe_data, write_corpus, write_recipe

N_OLD, N_NEW = 40, 240
"""Documents that are encoded at first, and at the end."""

Answer = tuple[int, ...]
"""Number of values and what their hashes add up to, in both orders; and what the statistics count."""


def answer(store: Path) -> Answer:
    """What a reader sees."""
    from saeflow.query.connection import connect
    from saeflow.store.store import Store

    hashed = "select count(*), sum(hash(token_id, feature_id, value)::hugeint)::varchar::hugeint from "
    with contextlib.closing(connect(Store.open(store), threads=1)) as connection:
        rows = [connection.execute(hashed + order).fetchall()[0] for order in ("stg_token_major", "stg_feature_major")]
        counted = connection.execute("select sum(n_tokens)::bigint from stg_feature_stats").fetchall()[0]
    return tuple(int(number) for row in (*rows, counted) for number in row)


def ask_on(store: Path, allowed: set[Answer], log: Path, stop: Event, quiet: bool = True) -> None:
    """Ask until told to stop; note every answer that is not allowed, and how many there were."""
    if quiet:
        logging.disable(logging.WARNING)
    n_asked = 0
    with log.open("w") as file:
        while not stop.is_set():
            try:
                found = answer(store)
            except Exception as error:
                print(f"failed: {error!r}", file=file, flush=True)
            else:
                if found not in allowed:
                    print(f"wrong: {found}", file=file, flush=True)
            n_asked += 1
        print(f"asked {n_asked}", file=file)


class Reading:
    """A store that grows and is compacted, and what may be seen of it meanwhile."""

    def __init__(self, folder: Path) -> None:
        data = Ingredients.write(folder)
        write_corpus(data.corpus, documents(N_OLD))
        self.runner = Runner(folder, write_recipe(folder / "small.toml", recipe_data(data)))
        self.old = self.runner.undisturbed
        write_corpus(data.corpus, documents(N_NEW))
        self.new = folder / "grown"
        shutil.copytree(self.old, self.new)
        self.seconds = {command: self._timed(command) for command in ("run", "compact")}
        self.allowed = {answer(self.old), answer(self.new)}
        assert len(self.allowed) == 2

    def _timed(self, command: str) -> float:
        began = time.monotonic()
        assert self.runner.finish(self.new, self.runner.start(self.new, command=command)) == 0, self.runner.said(
            self.new
        )
        return time.monotonic() - began

    def kills(self, n_kills: int, seed: int) -> Iterator[tuple[str, list[str]]]:
        """Two kills at a time: one of `saeflow run`, which encodes, one of `saeflow compact`. Yields when, and what was
        wrong."""
        chance = random.Random(seed)
        for number in range(-(-n_kills // 2)):
            store = self.runner.folder / f"read-{number}"
            shutil.copytree(self.old, store)
            instants = {command: chance.uniform(0.2, 1) * self.seconds[command] for command in ("run", "compact")}
            problems = self._disturbed(store, instants)
            yield " and ".join(f"{at:.2f} s into {command}" for command, at in instants.items()), problems
            shutil.rmtree(store)

    def _disturbed(self, store: Path, instants: dict[str, float]) -> list[str]:
        stop, log = self.runner.context.Event(), self.runner.folder / f"{store.name}.answers"
        reader = self.runner.context.Process(target=partial(ask_on, store, self.allowed, log, stop))
        reader.start()
        problems = []
        for command, instant in instants.items():
            process = self.runner.start(store, command=command)
            process.join(instant)
            process.kill()
            process.join()
            if self.runner.finish(store, self.runner.start(store, command=command)) != 0:
                problems.append(self.runner.said(store))
        stop.set()
        reader.join(60)
        said = log.read_text().splitlines()
        problems += [line for line in said if not line.startswith("asked")]
        if not said or not said[-1].startswith("asked ") or int(said[-1].split()[1]) < 3:
            problems.append(f"the reader did not ask: {said[-1:]}")
        return problems + differences(self.new, store)
