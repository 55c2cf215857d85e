"""A sample of the fuzzers' cases: exit code 0 or 2, one message, in time. `python -m tests.fuzz` runs thousands."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import corpora, pages, recipes, stores
from tests.fuzz.oracle import Case, Ground, judge


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.made(tmp_path_factory.mktemp("fuzz"))


FEW = [("recipes", recipes.fuzz, 15), ("corpora", corpora.fuzz, 5), ("stores", stores.fuzz, 3)]
MANY = [
    ("recipes", recipes.fuzz, 300),
    ("corpora", corpora.fuzz, 80),
    ("stores", stores.fuzz, 50),
    ("pages", pages.fuzz, 100),
]


def finds(fuzz: Case, ground: Ground, seeds: range, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HOME", str(ground.home))  # a recipe may name ~
    found = []
    for seed in seeds:
        with ground.case() as folder:
            for each in fuzz(random.Random(seed), ground, folder):
                found += [f"{seed}: {' '.join(each.command)[:200]}: {problem}" for problem in each.problems]
    return found


@pytest.mark.parametrize(("fuzz", "n"), [each[1:] for each in FEW], ids=[each[0] for each in FEW])
def test_random_input_ends_in_a_result_or_one_message(
    fuzz: Case, n: int, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finds(fuzz, ground, range(n), monkeypatch) == []


@pytest.mark.long
@pytest.mark.parametrize(("fuzz", "n"), [each[1:] for each in MANY], ids=[each[0] for each in MANY])
def test_much_random_input_ends_in_a_result_or_one_message(
    fuzz: Case, n: int, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finds(fuzz, ground, range(1000, 1000 + n), monkeypatch) == []


def test_the_oracle_finds_a_command_that_takes_too_long(ground: Ground) -> None:
    assert judge(["ls", "--store", str(ground.store)]).problems == []
    assert judge(["run", str(ground.home / "small.toml"), "--store", str(ground.home / "other")], 0.05).problems
