"""What README.md says can be typed, can be typed; what it says is there, is there."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from saeflow.cli import app as cli
from saeflow.query import ask
from saeflow.recipe.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def typed(program: str) -> list[list[str]]:
    """The words of every documented command line that begins with `program`."""
    lines = [line for fence in fences("sh") for line in fence.splitlines() if line.startswith(f"{program} ")]
    return [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]


@pytest.mark.parametrize("words", typed("saeflow"), ids=" ".join)
def test_a_documented_command_parses(words: list[str]) -> None:
    _, name, *arguments = words
    with COMMANDS[name].make_context(name, arguments) as context:
        assert context.params


@pytest.mark.parametrize("words", [w for w in typed("saeflow") if w[1] == "ask" and len(w) > 2], ids=" ".join)
def test_a_documented_question_is_one(words: list[str]) -> None:
    known = {question.name: question for question in ask.questions()}
    question, arguments = known[words[2]], list(itertools.takewhile(lambda word: not word.startswith("--"), words[3:]))
    for parameter, word in zip(question.parameters, arguments, strict=False):
        parameter.parse(word)
    explained = not arguments  # a question alone says what it needs
    assert explained or all(parameter.default is not None for parameter in question.parameters[len(arguments) :])


def test_the_table_of_questions_is_complete() -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    written = {found for row in rows for found in re.findall(r"`(\w+)(?:\(([\w, ]*)\))?`", row)}
    known = {(q.name, ", ".join(p.name for p in q.parameters)) for q in ask.questions()}
    assert known <= written


def test_documented_recipes_and_modules_are_there() -> None:
    for words in typed("saeflow") + typed("python"):
        for word in words:
            if word.startswith("flows/recipes/"):
                assert (ROOT / word).is_file(), word
    for words in typed("python"):
        assert words[1] == "-m"
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()


def test_documented_make_targets_are_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in typed("make"):
        assert words[1] in targets


def test_documented_settings_are_those_of_a_recipe() -> None:
    """A fence without a name goes on where the first one, a whole recipe, ends."""
    whole = tomllib.loads(fences("toml")[0])
    for fence in fences("toml"):
        recipe = parse_recipe(whole | tomllib.loads(fence))
        assert recipe.members()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
