"""States of a store that commands change: which of them explains the answer that a page gave.

After each command the store is copied, and later the copies are asked for the same pages. A command publishes several
generations. Where no copy explains an answer, copies are turned back to the generations in between. So an answer of two
generations, an old one, and one that goes backward are found, on any page.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from starlette.testclient import TestClient

from saeflow.browser.connections import Connections
from saeflow.browser.server import Application
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store

ADDRESS = "http://127.0.0.1"

State = tuple[int, int, int, int]
"""Number of the command, generations of the tokens and of the run, 1 if the measures are those after the command."""


@dataclass(frozen=True)
class Seen:
    """An answer that a client got, and between which times."""

    path: str
    asked: float
    answered: float
    status: int
    text: str = field(repr=False)


@dataclass(frozen=True)
class Command:
    """What changed the store, when, and a copy of the store afterwards."""

    name: str
    began: float
    ended: float
    copy: Path


def comparable(text: str, store_name: str) -> str:
    """Return a page without what differs between two servers, and without times and other runs."""
    text = text.replace(store_name, "STORE")
    if not text.startswith("{"):
        return re.sub(r'(name="token" value=)"[^"]*"', r"\1", text)
    page = json.loads(text)
    for panel in page.get("panels", {}).values():
        if panel["question"] == "stages":
            panel["rows"] = []
        if panel["question"] == "runs":
            mine = (row for row in panel["rows"] if row["name"] == "small")
            panel["rows"] = [row | dict.fromkeys(("n_bytes", "written", "is_current")) for row in mine]
    return json.dumps(page)


def copy_by_links(store: Path, copy: Path) -> None:
    """Copy a store, without a byte: its files are never written again, only replaced."""
    shutil.copytree(store, copy, copy_function=os.link, ignore=shutil.ignore_patterns("locks", "tmp", "*.lock"))


class States:
    """What pages show in each state of the store."""

    def __init__(self, commands: Sequence[Command], pages: Sequence[str]) -> None:
        self.commands, self.pages = commands, pages
        self.answers: dict[State, dict[str, tuple[int, str]]] = {}
        self.between: set[int] = set()
        """Commands whose generations in between were looked at, too."""

    def wrong(self, answers: Sequence[Seen]) -> list[str]:
        """Return answers that were none of the store's, and those that came after newer ones."""
        found: list[str] = []
        feasible = {self.states(0)[-1]}
        for seen in answers:
            matching = self._matching(seen, feasible)
            if not matching:
                late = {number for number in self._possible(seen) if number} - self.between
                if late:
                    self.between |= late
                    return self.wrong(answers)  # from the beginning: earlier answers may be of these generations
                found.append(self._described(seen))
            feasible = matching or feasible
        return found

    def _possible(self, seen: Seen) -> range:
        """Return the numbers of the commands whose state an answer may show: of the last that had ended, or later."""
        first = max(i for i, command in enumerate(self.commands) if command.ended <= seen.asked)
        last = max(i for i, command in enumerate(self.commands) if command.began <= seen.answered)
        return range(first, last + 1)

    def _matching(self, seen: Seen, before: set[State]) -> set[State]:
        possible = self._possible(seen)
        states = [state for i in possible for state in (self.states(i) if i > possible[0] else self.states(i)[-1:])]
        return {
            state
            for state in states
            if self.shown(state)[seen.path] == (seen.status, seen.text) and any(follows(state, each) for each in before)
        }

    def states(self, number: int) -> list[State]:
        """Return the states that a command may have shown, the last one at the end."""
        tokens, features, _ = about = self._generations(number)
        if number not in self.between:
            return [(number, tokens, features, 1)]
        old_tokens, old_features, old_measures = self._generations(number - 1)
        measures = (0, 1) if about[2] != old_measures else (1,)
        made = itertools.product(range(old_tokens, tokens + 1), range(old_features, features + 1), measures)
        return [(number, *state) for state in made]

    @cache  # noqa: B019  (for as long as the test)
    def _generations(self, number: int) -> tuple[int, int, bytes]:
        store = Store.open(self.commands[number].copy)
        tokens, run = of_small(store)
        return tokens.published().number, run.published().number, (run.path / "quality.json").read_bytes()

    def shown(self, state: State) -> dict[str, tuple[int, str]]:
        """Return what each page shows in a state of the store."""
        if state not in self.answers:
            folder = self.commands[0].copy.with_name("turned-back")
            copy_by_links(self.commands[state[0]].copy, folder)
            store = Store.open(folder)
            tokens, run = of_small(store)
            tokens.show(state[1])
            run.show(state[2])
            if not state[3]:
                (run.path / "quality.json").unlink()
                (run.path / "quality.json").write_bytes(self._generations(state[0] - 1)[2])
            self.answers[state] = self._asked(Store.open(folder))
            shutil.rmtree(folder)
        return self.answers[state]

    def _asked(self, store: Store) -> dict[str, tuple[int, str]]:
        connections = Connections(store)
        client = TestClient(Application(store, connections=connections).app, base_url=ADDRESS)
        answers = {path: client.get(path) for path in self.pages}
        connections.close()
        return {path: (each.status_code, comparable(each.text, store.name)) for path, each in answers.items()}

    def _described(self, seen: Seen) -> str:
        began = self.commands[0].ended
        names = ", ".join(f"{i} {self.commands[i].name}" for i in self._possible(seen))
        return (
            f"{seen.path} at {seen.asked - began:.2f} s, answered after {seen.answered - seen.asked:.2f} s with "
            f"{seen.status}, is of no state of: {names}"
        )


def of_small(store: Store) -> tuple[Artefact, Artefact]:
    """Return the tokens and the run of the store's first recipe."""
    (run,) = (each for each in store.artefacts("features") if each.name == "small")
    return store.input_of(run, "tokens"), run


def follows(state: State, other: State) -> bool:
    """True if a state may come after another one, or is the same."""
    return state[0] > other[0] or all(a >= b for a, b in zip(state, other, strict=True))
