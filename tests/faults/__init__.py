"""Runs cut off at named points, then run again with the plain command.

A point is a change of the file system as Python makes it (a folder made, a file opened for writing, a rename),
seen by an audit hook: nothing of saeflow is replaced. There the process kills itself, gets a signal, or finds
the disk full. Afterwards the same command must finish the work, and the store must equal an undisturbed one.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from tests.support.small_pipeline import NOT_COMPARED

Fault = Literal[
    "SIGKILL", "SIGTERM", "SIGINT", "disk full", "SIGSTOP", "read-only", "clock back", "server lost"
]  # fmt: skip
FAULTS: tuple[Fault, ...] = ("SIGKILL", "SIGTERM", "SIGINT", "disk full")
EXIT_CODES = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 130, "SIGINT": 130, "disk full": 2}

_HEAVY = [
    "saeflow.cli.app",
    "saeflow.pipeline.run",
    "saeflow.query.first_answers",
    "saeflow.cli.answers.render",
    "matplotlib.backends.backend_agg",
    "transformers.models.gpt2.modeling_gpt2",
    "tests.faults",
]

ROOT = Path(__file__).resolve().parents[2]

STEP = "a training step"
"""An event besides those of the file system: weights are changed, the step is not counted yet."""


@dataclass(frozen=True)
class Point:
    """The `nth` time that `event` happens to a path that `path` matches, seen from the store's folder."""

    stage: str
    when: str
    event: str
    path: str
    nth: int = 1


def _parts(stage: str, kind: str) -> list[Point]:
    """Points in a stage that makes an artefact of parts."""
    return [
        Point(stage, "before the first write", "os.mkdir", rf"{kind}/[^/]+/parts$"),
        Point(stage, "in the middle of a part", "open", rf"tmp/{kind}-[^/]+/[^/]+/000002/\.part\.json\.new$"),
        Point(stage, "before a part is renamed", "os.rename", rf"tmp/{kind}-[^/]+/[^/]+/000001$"),
        Point(stage, "after a part", "os.mkdir", rf"tmp/{kind}-[^/]+/[^/]+/000003$"),
        Point(stage, "before publication", "os.mkdir", rf"{kind}/[^/]+/generations$"),
        Point(stage, "before the manifest", "open", rf"{kind}/[^/]+/\.manifest\.json\.new$"),
        Point(stage, "before the manifest is renamed", "os.rename", rf"{kind}/[^/]+/\.manifest\.json\.new$"),
    ]


POINTS = [
    *_parts("tokens", "tokens"),
    *_parts("collect", "activations"),
    Point("train", "before the first step", "os.mkdir", r"tmp/saes-[^/]+/[^/]+/restart-0\.fresh$"),
    Point("train", "in the middle of a step", STEP, "", 20),
    Point("train", "in the middle of a checkpoint", "open", r"/restart-0\.fresh/\.state\.json\.new$", 3),
    Point("train", "before a checkpoint is renamed", "os.rename", r"\.checkpoint/restart-0\.new$", 3),
    Point("train", "before publication", "os.mkdir", r"tmp/saes-[^/]+/[^/]+/whole$"),
    Point("train", "before the record", "open", r"whole/\.artefact\.json\.new$"),
    Point("train", "before the artefact is renamed", "os.rename", r"whole$"),
    Point("train", "after publication", "shutil.rmtree", r"tmp/saes-[^/]+\.checkpoint$", -1),
    *_parts("encode", "features"),
    Point("compact", "before the order by token", "os.mkdir", r"tmp/features-[^/]+/[^/]+/1\d{7}/token_major"),
    Point("compact", "before the order by feature", "os.mkdir", r"tmp/features-[^/]+/[^/]+/1\d{7}/feature_major"),
    Point("compact", "before the part is renamed", "os.rename", r"tmp/features-[^/]+/[^/]+/1\d{7}$"),
    Point("compact", "before the manifest", "open", r"features/[^/]+/\.manifest\.json\.new$", 2),
    Point("compact", "before the manifest is renamed", "os.rename", r"features/[^/]+/\.manifest\.json\.new$", 2),
    Point("evaluate", "before the figures", "open", r"features/[^/]+/\.quality\.json\.new$"),
    Point("evaluate", "before the figures are renamed", "os.rename", r"features/[^/]+/\.quality\.json\.new$"),
    Point("report", "before the picture is renamed", "os.rename", r"features/[^/]+/\.density\.png\.new$"),
]
"""`nth` -1: the first time after the SAE is published."""


@dataclass(frozen=True)
class Case:
    point: Point
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.point.stage}, {self.point.when}, {self.fault}"


CASES = [Case(point, fault) for point in POINTS for fault in FAULTS]


def tenth(n: int) -> list[Case]:
    """Every tenth case, beginning with the n-th: ten of them are all, and each holds several stages and faults."""
    return CASES[n % 10 :: 10]


_FOLDER_HELD = {"os.mkdir": 2, "os.rename": 2, "shutil.rmtree": 1}
"""Which argument of an audit event is the handle of the folder that the path lies in; -1 or None if there is none."""


class Strike:
    """Watches for the point and lets the fault happen there, once."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case, self.root = case, f"{root}/"
        self.wanted = re.compile(case.point.path)
        self.left = abs(case.point.nth)
        self.struck = False

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.struck or event != self.case.point.event:
            return
        if event != STEP and not self._is_here(event, arguments):
            return
        self.left -= 1
        if not self.left:
            self.struck = True
            self._strike(str(arguments[0]) if arguments else "")

    def _is_here(self, event: str, arguments: tuple[object, ...]) -> bool:
        path = str(arguments[0])
        folder = arguments[_FOLDER_HELD[event]] if event in _FOLDER_HELD else None
        if folder is not None and int(str(folder)) >= 0:  # the path is a name in a folder that is held open
            path = f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
        if event == "open" and not str(arguments[1] or "").startswith(("w", "x", "a")):
            return False
        if self.case.point.nth < 0 and not list(Path(self.root).glob("saes/*/artefact.json")):
            return False
        return path.startswith(self.root) and self.wanted.search(path.removeprefix(self.root)) is not None

    def _strike(self, path: str) -> None:
        match self.case.fault:
            case "disk full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path or None)
            case "read-only":
                for words in (["--bind", self.root, self.root], ["-o", "remount,ro,bind", self.root]):
                    subprocess.run(["mount", *words], check=True)
            case "clock back":
                Path(os.environ["SAEFLOW_TEST_CLOCK"]).write_text("-3d\n")
            case "server lost":
                os.kill(int(os.environ["SAEFLOW_TEST_SERVER"]), signal.SIGKILL)
            case name:
                os.kill(os.getpid(), getattr(signal, name))


def watch(case: Case, root: Path) -> None:
    """Let the fault happen in this process once its point is reached."""
    from saeflow.sae import autoencoder

    strike = Strike(case, root)
    sys.addaudithook(strike)
    after = autoencoder.SparseAutoencoder.after_step

    def after_step(self: autoencoder.SparseAutoencoder, in_bfloat16: bool = False) -> None:
        after(self, in_bfloat16)
        strike(STEP, ())

    autoencoder.SparseAutoencoder.after_step = after_step  # type: ignore[method-assign]


def run_command(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    """What `saeflow ARGUMENTS` does, in this process, after `prepare`; the terminal goes to `log`."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from saeflow.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    if prepare is not None:
        prepare()
    sys.argv = ["saeflow", *arguments]
    app.main()


class Runner:
    """Runs `saeflow` in fresh processes that have the heavy modules loaded already."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(_HEAVY)
        self.undisturbed = folder / "undisturbed"
        code = self.run(self.undisturbed)
        assert code == 0, self.said(self.undisturbed)

    def run(self, store: Path, case: Case | None = None) -> int | None:
        """The exit code of `saeflow run` into `store`; minus the signal's number where one killed it."""
        return self.finish(store, self.start(store, partial(watch, case, store) if case else None))

    def start(
        self, store: Path, prepare: Callable[[], None] | None = None, command: str = "run", log: str = ""
    ) -> ForkServerProcess:
        """`log`: its own name, where several runs of one store print at once."""
        arguments = [command, str(self.recipe), "--store", str(store)]
        path = self.log(store).with_stem(f"{store.name}-{log}") if log else self.log(store)
        process = self.context.Process(target=run_command, args=(arguments, path, prepare))
        process.start()
        return process

    def finish(self, store: Path, process: ForkServerProcess) -> int | None:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"a run did not end:\n{self.said(store)}")
        return process.exitcode

    def said(self, store: Path) -> str:
        """What the last run printed."""
        return self.log(store).read_text("utf-8")

    def log(self, store: Path) -> Path:
        """Where runs into a store print."""
        return self.folder / f"{store.name}.log"

    def problems(self, case: Case) -> list[str]:
        """Let the fault happen, run the plain command again, and compare; nothing found is good."""
        store = self.folder / re.sub(r"\W+", "-", case.name)
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, store, ignore_errors=True)
            code = self.run(store, case)
            if code != EXIT_CODES[case.fault]:
                return [f"exit code {code} instead of {EXIT_CODES[case.fault]}:\n{self.said(store)}"]
            if "Traceback" in self.said(store):
                return [f"a traceback:\n{self.said(store)}"]
            code = self.run(store)
            if code != 0:
                return [f"the second run ended with {code}:\n{self.said(store)}"]
            return differences(self.undisturbed, store)


def differences(a: Path, b: Path) -> list[str]:
    """What `diff -r -x provenance.json -x catalog.sql -x '*.lock' a b` would say: files on one side only, or of other
    bytes.

    Locks are empty files, which a power cut may take.
    """
    files_a, files_b = (
        {
            str(p.relative_to(root))
            for p in root.rglob("*")
            if p.name not in NOT_COMPARED and p.suffix != ".lock" and p.relative_to(root).parts[0] != "damaged"
        }
        for root in (a, b)
    )
    both = sorted(name for name in files_a & files_b if (a / name).is_file())
    found = [f"only in {a.name}: {name}" for name in sorted(files_a - files_b)]
    found += [f"only in {b.name}: {name}" for name in sorted(files_b - files_a)]
    return found + [f"differs: {name}" for name in both if not filecmp.cmp(a / name, b / name, shallow=False)]
