"""Every fault in the middle of every stage: what it cost, what was said, what the same command did afterwards.

The table of `docs/faults.md` is made of this: `python -m tests.faults --matrix --table docs/faults.md`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from tests.faults import POINTS, ROOT, Case, Fault, Point, Runner, differences, watch
from tests.support.prefect_server import prefect_server
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe

STAGES = ("tokens", "collect", "train", "encode", "compact")
MIDDLE = {
    "tokens": "after a part",
    "collect": "in the middle of a part",
    "train": "in the middle of a step",
    "encode": "after a part",
    "compact": "before the order by feature",
}
START = {"train": "before the first step", "compact": "before the order by token"}
END = {"train": "before the artefact is renamed"}

WORKER = "a worker lost"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    stage: str
    code: int | None = None
    message: str = ""
    kept: str = ""
    lost: str = ""
    again: str = ""
    problems: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.stage}"


Strike = Callable[[Runner, str, Path], int | None]
"""Runs the recipe into a store with the fault in a stage of it; gives the exit code."""


def at(stage: str, when: dict[str, str], usual: str) -> Point:
    wanted = when.get(stage, usual)
    return next(point for point in POINTS if (point.stage, point.when) == (stage, wanted))


class Matrix:
    """A recipe whose runs can be disturbed, and the undisturbed store to compare with."""

    def __init__(self, folder: Path) -> None:
        train = {"checkpoint_seconds": 0.001}
        data = recipe_data(Ingredients.write(folder), train=train, features={"compact_parts": 2})
        self.folder, self.data = folder, data
        self.runner = Runner(folder, write_recipe(folder / "small.toml", data))
        self._sweeps: Runner | None = None

    @property
    def sweeps(self) -> Runner:
        """Of the same recipe with several autoencoders: what workers train."""
        if self._sweeps is None:
            folder = self.folder / "sweep"
            folder.mkdir()
            data = self.data | {"sweep": {"grid": {"sae.k": [2, 3, 4, 6]}}}
            self._sweeps = Runner(folder, write_recipe(folder / "small.toml", data))
        return self._sweeps

    def runner_of(self, fault: str, stage: str) -> Runner:
        return self.sweeps if (fault, stage) == (WORKER, "train") else self.runner

    def rows(self, chosen: Callable[[str], bool] = lambda name: True) -> Iterator[Row]:
        for fault, (strike, why_not) in FAULTS_OF_ALL.items():
            for stage in STAGES:
                row = Row(fault, stage)
                if not chosen(row.name):
                    continue
                reason = why_not(stage)
                yield replace(row, skipped=reason) if reason else self.row(row, strike)

    def row(self, row: Row, strike: Strike) -> Row:
        runner = self.runner_of(row.fault, row.stage)
        store = runner.folder / re.sub(r"\W+", "-", row.name)
        try:
            code = strike(runner, row.stage, store)
            said, before = runner.said(store), _parts(store)
            again = runner.run(store)
            after = runner.said(store)
            own = "Prefect" not in row.fault  # Prefect's log may hold its own
            problems = [f"a traceback:\n{said}"] if own and "Traceback" in said else []
            problems += [f"the second run ended with {again}:\n{after}"] if again else []
            problems += differences(runner.undisturbed, store)
            kept = {name for name, node in before.items() if _parts(store).get(name) == node}
            return replace(
                row, code=code,
                message=_message(said.replace(str(store), "STORE").replace(str(runner.folder), "FOLDER")),
                kept=f"{len(kept)}", lost=f"{len(before) - len(kept)}",
                again="finished, equal" if not problems else "DIFFERS", problems=tuple(problems),
            )  # fmt: skip
        finally:
            shutil.rmtree(store, ignore_errors=True)


def _parts(store: Path) -> dict[str, int]:
    """Finished parts and autoencoders, by their folder: the file number of their record."""
    found = [*store.glob("*/*/parts/*/part.json"), *store.glob("saes/*/artefact.json")]
    return {str(path.parent.relative_to(store)): path.stat().st_ino for path in found}


def _message(said: str) -> str:
    """The last lines of what a run printed, from the one on that is not progress."""
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    progress = re.compile(
        r"^(store|tokens|activations|train|features|checks|compact|evaluate|loss|report|saeflow \d)[^:]*:"
    )
    last = [line for line in lines[-12:] if not progress.match(line) and not _LOGGED.search(line)]
    return " ".join(last[-2:])[:400]


_LOGGED = re.compile(r"\| (INFO|WARNING|ERROR) +\||Error logging to API|connection attempts failed")
"""Lines of Prefect's log."""


def signalled(fault: Fault, runner: Runner, stage: str, store: Path) -> int | None:
    return runner.run(store, Case(at(stage, MIDDLE, ""), fault))


def read_only(runner: Runner, stage: str, store: Path) -> int | None:
    """The store is mounted over itself, for reading only, while the stage is at work."""
    store.mkdir()
    case = Case(at(stage, MIDDLE, ""), "read-only")
    try:
        return runner.run(store, case)
    finally:
        subprocess.run(["umount", str(store)], check=False, capture_output=True)


def clock_back(runner: Runner, stage: str, store: Path) -> int | None:
    """The clock goes back three days while the stage is at work (libfaketime)."""
    clock = runner.folder / "clock"
    clock.write_text("+0\n")
    environment = os.environ | {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": str(ROOT), "SAEFLOW_TEST_CLOCK": str(clock),
    }  # fmt: skip
    return _alone(runner, store, [stage, "clock back", str(store), str(runner.recipe)], environment)


def prefect_lost(when: dict[str, str], usual: str, runner: Runner, stage: str, store: Path) -> int | None:
    """Prefect's server is killed at that point of the flow."""
    with prefect_server(runner.folder / f"prefect-{store.name}") as server:
        assert server.process is not None
        about = {"SAEFLOW_TEST_SERVER": str(server.process.pid), "PREFECT_CLIENT_MAX_RETRIES": "1"}
        environment = server.env | about
        words = [stage, "server lost", str(store), str(runner.recipe), at(stage, when, usual).when]
        return _alone(runner, store, words, environment)


MOST_SECONDS = 300
"""After so long a disturbed run is ended, and the table says so."""


def _alone(runner: Runner, store: Path, words: list[str], environment: dict[str, str]) -> int:
    """A run in a process of its own, with these variables; it prints where the runner's do."""
    command = [sys.executable, "-m", "tests.faults.matrix", *words]
    with runner.log(store).open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        try:
            return process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            log.write(f"\n(it tried on, and was killed after {MOST_SECONDS} s)\n".encode())
            return -signal.SIGKILL


def worker_lost(runner: Runner, stage: str, store: Path) -> int | None:
    """One of two Dask workers is killed while the stage is at work on them."""
    recipe = runner.recipe.with_name("on-workers.toml")
    recipe.write_text(f'{runner.recipe.read_text()}\n[cluster]\nkind = "local"\nn_workers = 2\n')
    return _alone(
        runner, store, [stage, "worker lost", str(store), str(recipe)], os.environ | {"PYTHONPATH": str(ROOT)}
    )


AT_WORK = {
    "collect": "tmp/activations-*/*/*",
    "train": "tmp/saes-*.checkpoint/restart-0",
    "encode": "tmp/features-*/*/0*",
    "compact": "tmp/features-*/*/1*",
}
"""What lies in the store while workers are in a stage."""


def kill_a_worker(stage: str, store: Path) -> None:
    """Wait until the stage is at work, then kill one of the workers that this process has started."""
    while not list(store.glob(AT_WORK[stage])):
        time.sleep(0.001)
    workers = [
        child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[-1].kill()


def _never(stage: str) -> str:
    return ""


def _no_mount(stage: str) -> str:
    return "" if os.geteuid() == 0 else "only the administrator can mount a folder for reading only"


def _no_clock(stage: str) -> str:
    return "" if FAKETIME.exists() else "libfaketime is not installed (apt-get install libfaketime)"


def _no_worker(stage: str) -> str:
    return "texts are tokenised by the client, whatever cluster there is" if stage == "tokens" else ""


FAULTS_OF_ALL: dict[str, tuple[Strike, Callable[[str], str]]] = {
    "SIGKILL": (partial(signalled, "SIGKILL"), _never),
    "SIGTERM": (partial(signalled, "SIGTERM"), _never),
    "SIGINT": (partial(signalled, "SIGINT"), _never),
    "disk full": (partial(signalled, "disk full"), _never),
    "store read-only": (read_only, _no_mount),
    WORKER: (worker_lost, _no_worker),
    "clock moved back": (clock_back, _no_clock),
    "Prefect's server lost in the middle": (partial(prefect_lost, MIDDLE, ""), _never),
    "Prefect's server lost at the start": (partial(prefect_lost, START, "before the first write"), _never),
    "Prefect's server lost at the end": (partial(prefect_lost, END, "before the manifest is renamed"), _never),
}


def main() -> None:
    """A disturbed run in this process: STAGE FAULT STORE RECIPE [WHEN]."""
    stage, fault, store, recipe, *when = sys.argv[1:]
    point = at(stage, {stage: when[0]} if when else MIDDLE, "")
    if fault == "server lost":
        from flows.pipeline import told
        from saeflow.cli.run import run_flow

        watch(Case(point, "server lost"), Path(store))
        sys.argv = ["flows.pipeline", recipe, "--store", store]
        run_flow(told)
    from saeflow.cli import app

    if fault == "worker lost":
        threading.Thread(target=kill_a_worker, args=(stage, Path(store)), daemon=True).start()
    else:
        watch(Case(point, "clock back"), Path(store))
    sys.argv = ["saeflow", "run", recipe, "--store", store]
    app.main()


HEAD = """\
# What faults do

Each row disturbs one stage of a small recipe, in its middle, by one fault. Then the same command runs again.

- *What is said*: the message of the disturbed run.
- *Kept*: finished parts and autoencoders that the second run left as they were.
- *Lost*: finished parts and autoencoders that the second run made again.
- *Equal*: the store ends like that of an undisturbed run, byte for byte (provenance and catalog aside).

`python -m tests.faults --matrix --table docs/faults.md` makes this table; `--only WORDS` makes only those rows anew.

Other ways to disturb a run, each ending with a store equal to the undisturbed one:

| command | does |
| --- | --- |
| `python -m tests.faults` | kills every stage at every named point |
| `python -m tests.faults --random-kills 20` | kills a collection at random instants |
| `python -m tests.faults --training-kills 20` | kills a sweep in training at random instants |
| `python -m tests.faults --reading-kills 20` | kills encoding and compaction while another process asks |
| `python -m tests.faults --power-cuts 20` | cuts the power at random instants: what was not flushed is gone |
| `python -m tests.faults --damages 30` | damages files of every kind, repairs, and runs again |
| `python -m tests.faults --permissions` | lets the system refuse to read or write: nothing is taken for damage |
| `python -m tests.faults --overlaps` | lets runs meet: two at once, or one that is suspended, followed and woken |

## The table

| fault | stage | exit code | what is said | kept | lost | the same command again |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table(rows: list[Row], before: str = "") -> str:
    """The page `docs/faults.md`; lines of `before` stay where there is no row for them."""
    lines = {tuple(line.split(" | ")[:2]): line for line in before.splitlines() if line.startswith("| ")}
    lines |= {(f"| {row.fault}", row.stage): _line(row) for row in rows}
    order = [(f"| {fault}", stage) for fault in FAULTS_OF_ALL for stage in STAGES]
    return HEAD + "".join(f"{lines[key]}\n" for key in order if key in lines)


def _line(row: Row) -> str:
    said = row.message.replace("|", "\\|").replace("<", "&lt;") if row.code else "(it went on to the end)"
    if row.skipped:
        return f"| {row.fault} | {row.stage} | - | ({row.skipped}) | - | - | - |"
    return f"| {row.fault} | {row.stage} | {row.code} | {said} | {row.kept} | {row.lost} | {row.again} |"


if __name__ == "__main__":
    main()
