"""Prompts from files that a user can edit, and examples as a model reads them.

A file of a prompt holds the system message, a line `--- user ---`, and the user's message. `{{name}}` stands for what
saeflow fills in. Nothing in it is code: what is filled in is text, and is not looked through again.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saeflow.meaning.language_model.answers import STRONGEST
from saeflow.meaning.language_model.examples import Examples, Window
from saeflow.meaning.language_model.settings import Method
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_BETWEEN = re.compile(r"^--- user ---[ \t]*$", re.MULTILINE)
_FILLED: dict[Method, frozenset[str]] = {
    "explanation": frozenset({"examples"}),
    "detection": frozenset({"examples", "explanation", "n", "form"}),
    "fuzzing": frozenset({"examples", "explanation", "n", "form"}),
    "simulation": frozenset({"examples", "explanation", "n"}),
}
_NEEDED_PLACEHOLDERS = {method: names & {"examples", "explanation"} for method, names in _FILLED.items()}

_MOST_ANSWER_TOKENS: dict[Method, int] = {"explanation": 400, "detection": 200, "fuzzing": 200, "simulation": 400}
"""Tokens that an answer may have. A model that thinks aloud needs more: `--answer-tokens`."""

Message = tuple[str, str]
"""Role and content."""


@dataclass(frozen=True)
class Prompt:
    """One question to the model. `n` is what its answer counts: examples, or tokens of a simulation."""

    method: Method
    messages: tuple[Message, ...]
    n: int
    most_answer_tokens: int

    @property
    def n_chars(self) -> int:
        return sum(len(content) for _, content in self.messages)

    @property
    def n_bytes(self) -> int:
        return sum(len(content.encode("utf-8", "replace")) for _, content in self.messages)

    def again(self, answer: str) -> Prompt:
        """Return the question with an answer that could not be read, and a reminder of the form."""
        shown = brief(answer, 400) or "(nothing)"
        reminder = "That answer cannot be read. Answer in the form that was asked for, and with nothing else."
        return Prompt(
            self.method, (*self.messages, ("assistant", shown), ("user", reminder)), self.n, self.most_answer_tokens
        )


@dataclass(frozen=True)
class Prompts:
    """The texts of all prompts, by method."""

    templates: Mapping[Method, tuple[str, str]]
    answer_tokens: int | None = None

    @classmethod
    def read(cls, folder: Path | None = None, answer_tokens: int | None = None) -> Prompts:
        """Read saeflow's prompts, and in their place those that the folder has.

        Raises UserError for a folder or file that cannot be read, an unknown {{name}}, or one that is missing.
        """
        if folder is not None and not folder.is_dir():
            raise UserError(f"--prompts is {sanitise(str(folder))}, but there is no such folder.")
        if folder is not None and not any(_file(folder, method).is_file() for method in _FILLED):
            names = ", ".join(_file(folder, method).name for method in _FILLED)
            raise UserError(f"--prompts {sanitise(str(folder))} holds none of {names}.")
        return cls({method: _template(method, folder) for method in _FILLED}, answer_tokens)

    @property
    def texts(self) -> list[str]:
        """The texts, to tell edited prompts apart."""
        return [part for method in sorted(self.templates) for part in self.templates[method]]

    def explanation(self, examples: Examples) -> Prompt:
        lines = [_strong_example(window, examples.strongest) for window in examples.explaining if window.fires]
        numbered = [f"Example {i}: {line}" for i, line in enumerate(lines, 1)]
        near = [with_marks(window, [window.place]) for window in examples.explaining if not window.fires]
        numbered += [f"Near miss {i}: {line}" for i, line in enumerate(near, 1)]
        return self._filled("explanation", {"examples": "\n".join(numbered)}, len(numbered))

    def judgement(self, method: Method, explanation: str, texts: Sequence[str]) -> Prompt:
        """Return the question about texts that `plain` or `with_marks` gave, for detection or fuzzing."""
        n = len(texts)
        values = {
            "examples": "\n".join(f"Example {i}: {text}" for i, text in enumerate(texts, 1)),
            "explanation": explanation,
            "n": str(n),
            "form": f"[{', '.join('10'[i % 2] for i in range(n))}]",
        }
        return self._filled(method, values, n)

    def simulation(self, explanation: str, window: Window) -> Prompt:
        lines = [f"{i} {_on_one_line(piece)}" for i, piece in enumerate(window.pieces, 1)]
        n = len(lines)
        return self._filled("simulation", {"examples": "\n".join(lines), "explanation": explanation, "n": str(n)}, n)

    def _filled(self, method: Method, values: Mapping[str, str], n: int) -> Prompt:
        texts = [_PLACEHOLDER.sub(lambda found: values[found[1]], part).strip() for part in self.templates[method]]
        messages = [(role, text) for role, text in zip(("system", "user"), texts, strict=True) if text]
        return Prompt(method, tuple(messages), n, self.answer_tokens or _MOST_ANSWER_TOKENS[method])


def _file(folder: Path, method: Method) -> Path:
    return folder / f"{method}.txt"


def own_folder() -> Path:
    """Return the folder of saeflow's own prompts."""
    return Path(__file__).with_name("prompts")


def _template(method: Method, folder: Path | None) -> tuple[str, str]:
    path = own_folder() / f"{method}.txt"
    if folder is not None and _file(folder, method).exists():
        path = _file(folder, method)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt {sanitise(str(path))} cannot be read: {brief(str(error))}.") from None
    names = set(_PLACEHOLDER.findall(text))
    if unknown := sorted(names - _FILLED[method]):
        known = ", ".join(f"{{{{{name}}}}}" for name in sorted(_FILLED[method]))
        raise UserError(f"{sanitise(str(path))} has {{{{{unknown[0]}}}}}, but only these are filled in: {known}.")
    if missing := sorted(_NEEDED_PLACEHOLDERS[method] - names):
        raise UserError(f"{sanitise(str(path))} lacks {{{{{missing[0]}}}}}.")
    between = _BETWEEN.search(text)
    return (text[: between.start()], text[between.end() :]) if between else ("", text)


def _strong_example(window: Window, strongest: float) -> str:
    told = [
        f"{json.dumps(window.pieces[place], ensure_ascii=False)} {strength_told(window.strengths[place], strongest)}"
        for place in window.active
    ]
    return f"{with_marks(window, window.active)}\n  strengths: {', '.join(told)}"


def strength_told(value: float, strongest: float) -> int:
    """Return a strength from 0 to 10; any value above zero is at least 1."""
    return min(STRONGEST, math.ceil(STRONGEST * value / strongest)) if value > 0 and strongest > 0 else 0


def plain(window: Window) -> str:
    return _on_one_line(window.text)


def with_marks(window: Window, places: Sequence[int]) -> str:
    """Return the text with tokens between << and >>. Neighbours stand together."""
    chosen, text = set(places), ""
    for place, piece in enumerate(window.pieces):
        text += "<<" if place in chosen and place - 1 not in chosen else ""
        text += piece
        text += ">>" if place in chosen and place + 1 not in chosen else ""
    return _on_one_line(text)


def wrong_places(window: Window, n_marked: int, seed: int) -> list[int]:
    """Return places of tokens that are not the feature's, for fuzzing: the near miss, or the drawn token, and others.

    Wrong examples have as many marks as right ones have, so that the number tells nothing.
    """
    dice = random.Random(f"{seed}:{window.token_id}")
    others = [place for place in range(len(window.pieces)) if place != window.place and window.pieces[place].strip()]
    return sorted([window.place, *dice.sample(others, min(n_marked - 1, len(others)))])


def _on_one_line(text: str) -> str:
    """Show line breaks as \\n, so that each example is one line."""
    return text.replace("\r\n", "\\n").replace("\n", "\\n").replace("\r", "\\n")
