"""What a command may do: end with exit code 0 or 2, say one message if it is 2, and hand no control to the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saeflow.cli.app import app
from saeflow.cli.common import err, exit_code_of
from saeflow.runtime.terminal import printing_logs
from tests.support.hostile_text import ACTS
from tests.support.small_pipeline import Ingredients, a_table, recipe_data, write_recipe, write_table

LIMIT_SECONDS = 60
"""A command on a few kilobytes that takes more time of the processor hangs."""
_LONGEST_MESSAGE = 4000


class Hang(BaseException):
    """The command has taken too long."""


@dataclass
class Ground:
    """What cases start from: a model, a corpus, a table, a finished store. `folder` is emptied before each case."""

    home: Path
    ingredients: Ingredients
    table: Path
    store: Path

    @classmethod
    def made(cls, home: Path) -> Ground:
        ingredients = Ingredients.write(home)
        ground = cls(home, ingredients, write_table(home / "table.npy", a_table(300)), home / "store")
        recipe = write_recipe(home / "small.toml", recipe_data(ingredients))
        judged = judge(["run", str(recipe), "-q", "--store", str(ground.store)])
        assert judged.code == 0, judged.said
        return ground

    @contextlib.contextmanager
    def case(self) -> Iterator[Path]:
        """An empty folder to work in."""
        folder, before = self.home / "case", Path.cwd()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


@dataclass
class Judged:
    """What a command did, and what of it is wrong."""

    command: Sequence[str]
    code: int
    said: str
    problems: list[str] = field(default_factory=list)


Case = Callable[[random.Random, Ground, Path], Iterator[Judged]]
"""Makes what its dice say in a folder, and yields the commands that it ran."""


def judge(command: Sequence[str], limit: float = LIMIT_SECONDS) -> Judged:
    """Run a command in this process, and judge it."""
    out, said = _Stream(), _Stream()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), _limit(limit), printing_logs(err):
            code = exit_code_of(app, "saeflow", list(command), debug=False)
    except Hang as hang:
        return Judged(command, -1, said.text, [f"takes longer than {limit:.0f} s: {_place(hang)}"])
    except BaseException as error:  # whatever comes out of a command is what is looked for
        return Judged(command, -1, said.text, [f"{type(error).__name__}: {error} {_place(error)}"])
    return Judged(command, code, said.text, list(_problems(code, out.text, said.text)))


class _Stream(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined,no-any-return]


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _place(error: BaseException) -> str:
    places = []
    trace = error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " < ".join(places[::-1][:4])


def _problems(code: int, out: str, said: str) -> Iterator[str]:
    message = [line for line in said.splitlines() if line and not re.match("(store|tokens|ask): ", line)]
    if code not in (0, 2):
        yield f"exit code {code}: {message[-2:]}"
    if "Traceback (most" in said:
        yield "traceback"
    if code == 2 and not message:
        yield "no message"
    if code == 2 and len(said) > _LONGEST_MESSAGE:
        yield f"a message of {len(said)} characters"
    for text in (out, said):
        if found := ACTS.search(text):
            yield f"acts on the terminal: {text[max(found.start() - 20, 0) : found.end() + 20]!r}"
