"""Kill any stage, run the same command again: the store is the one of an undisturbed run, byte for byte."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from saeflow.recipe.settings import Architecture
from tests.faults import CASES, FAULTS, POINTS, STEP, Case, Point, Runner, differences, tenth
from tests.faults.damage import SITUATIONS, Situation, damages, problems_of_situation
from tests.faults.kills import ONE_PASS, one_pass_runner, random_kills, training_runner
from tests.faults.readers import Reading
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe

HALF_WAY = {
    "tokens": "after a part",
    "collect": "in the middle of a part",
    "train": "in the middle of a step",
    "encode": "after a part",
    "compact": "before the order by feature",
    "evaluate": "before the figures are renamed",
}


@pytest.fixture(scope="module")
def runner(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("kill")
    data = recipe_data(ingredients, train={"checkpoint_seconds": 0.001}, features={"compact_parts": 2})
    yield Runner(folder, write_recipe(folder / "small.toml", data))
    shutil.rmtree(folder, ignore_errors=True)


def quick_or_long(value: Any, quick: bool) -> Any:
    """One case of several: a quick one, or one of those that `make test-long` adds."""
    return pytest.param(value, marks=() if quick else pytest.mark.long)


def point(stage: str, when: str) -> Point:
    return next(p for p in POINTS if (p.stage, p.when) == (stage, when))


@pytest.mark.parametrize("stage", [quick_or_long(each, each == "train") for each in HALF_WAY])
def test_a_stage_killed_half_way_and_run_again_leaves_the_undisturbed_store(stage: str, runner: Runner) -> None:
    store = runner.folder / f"killed-{stage}"
    assert runner.run(store, Case(point(stage, HALF_WAY[stage]), "SIGKILL")) == -9
    assert differences(runner.undisturbed, store), "the kill came too late to disturb anything"
    assert runner.run(store) == 0, runner.said(store)
    diff = ["diff", "-r", "-x", "provenance.json", "-x", "catalog.sql", str(runner.undisturbed), str(store)]
    assert subprocess.run(diff, capture_output=True, text=True).stdout == ""
    assert differences(runner.undisturbed, store) == []
    if stage == "train":
        assert "train: continuing at step 1" in runner.said(store)  # of 40, killed in the 20th: at its checkpoint


@pytest.fixture(scope="module")
def sweeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("sweeping")
    yield training_runner(folder, [{"sae.architecture": name} for name in get_args(Architecture)], n_tokens=10_000)
    shutil.rmtree(folder, ignore_errors=True)


ONE_PASS_POINTS = ("after a part", "in the middle of a part", "before publication", "before the manifest is renamed")


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("passing")
    yield one_pass_runner(folder, 60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
@pytest.mark.parametrize("nth", [1, 64, 200])
def test_a_killed_sweep_leaves_the_undisturbed_store_for_every_architecture(nth: int, sweeping: Runner) -> None:
    store = sweeping.folder / f"killed-{nth}"
    assert sweeping.run(store, Case(Point("train", "in some step", STEP, "", nth), "SIGKILL")) == -9
    assert differences(sweeping.undisturbed, store), "the kill came too late to disturb anything"
    assert sweeping.run(store) == 0, sweeping.said(store)
    assert differences(sweeping.undisturbed, store) == []


@pytest.mark.long
@pytest.mark.parametrize("when", ONE_PASS_POINTS)
def test_a_killed_pass_without_stored_activations_leaves_the_undisturbed_store(when: str, passing: Runner) -> None:
    store = passing.folder / f"killed-{when.replace(' ', '-')}"
    assert passing.run(store, Case(point("encode", when), "SIGKILL")) == -9
    assert differences(passing.undisturbed, store), "the kill came too late to disturb anything"
    assert passing.run(store) == 0, passing.said(store)
    assert differences(passing.undisturbed, store) == []


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_instants_of_one_pass_leave_the_undisturbed_store(passing: Runner) -> None:
    found = list(random_kills(passing, 20, seed=1, work=ONE_PASS))
    assert sum(instant > 0 for instant, _ in found) >= 20
    assert [problems for _, problems in found if problems] == []


@pytest.mark.long
def test_who_asks_while_encoding_and_compaction_are_killed_sees_the_old_answer_or_the_new_one(tmp_path: Path) -> None:
    assert [problems for _, problems in Reading(tmp_path).kills(2, seed=1)] == [[]]


@pytest.mark.parametrize(
    "case",
    [
        Case(point("encode", "before the manifest"), "SIGKILL"),
        Case(point("train", "in the middle of a step"), "SIGINT"),
        pytest.param(Case(point("collect", "in the middle of a part"), "disk full"), marks=pytest.mark.long),
    ],
    ids=lambda case: case.name,
)
def test_faults_lose_nothing(case: Case, runner: Runner) -> None:
    assert runner.problems(case) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [2])
def test_repair_loses_nothing_that_cannot_be_made_again_and_a_run_makes_the_rest(number: int, runner: Runner) -> None:
    assert next(damages(runner, range(number, number + 1)))[1] == []


@pytest.mark.long
@pytest.mark.rotates(3)
@pytest.mark.parametrize("number", range(30))
def test_random_damages_lose_nothing_that_cannot_be_made_again(number: int, runner: Runner) -> None:
    assert next(damages(runner, range(number, number + 1)))[1] == []


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator can become somebody else")
QUICK = ("an SAE of another owner", "too many open files")


@ROOT_ONLY
@pytest.mark.parametrize(
    "situation",
    [pytest.param(each, marks=[] if each.name in QUICK else [pytest.mark.long]) for each in SITUATIONS],
    ids=lambda each: each.name,
)
def test_what_the_system_refuses_is_not_taken_for_damage(situation: Situation, runner: Runner) -> None:
    if not situation.can_be:
        pytest.skip("nobody else can enter the folder of this checkout, to run saeflow as another user")
    assert problems_of_situation(runner, situation) == []


def test_an_interrupted_run_says_how_to_continue(runner: Runner) -> None:
    store = runner.folder / "interrupted"
    assert runner.run(store, Case(point("collect", "after a part"), "SIGTERM")) == 130
    assert f"continue with: saeflow run {runner.recipe} --store {store}" in runner.said(store)


def test_a_second_run_changes_nothing_and_says_so(runner: Runner) -> None:
    before = {path: path.stat().st_mtime_ns for path in runner.undisturbed.rglob("*") if path.is_file()}
    assert runner.run(runner.undisturbed) == 0
    said = runner.said(runner.undisturbed)
    for stage in ("tokens", "activations", "train", "features", "evaluate"):
        assert f"{stage}: already done" in said
    after = {path: path.stat().st_mtime_ns for path in runner.undisturbed.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if "locks" not in p.parts} == {
        p: t for p, t in before.items() if "locks" not in p.parts
    }


def test_ten_tenths_of_the_fault_cases_are_all_of_them() -> None:
    assert sorted(case.name for n in range(10) for case in tenth(n)) == sorted(case.name for case in CASES)
    assert len(CASES) == len(POINTS) * len(FAULTS)
    for n in range(10):
        assert len({case.point.stage for case in tenth(n)}) >= 3
        assert {case.point.event for case in tenth(n)} - {STEP}


def test_differences_sees_what_diff_sees(tmp_path: Path) -> None:
    for name, text in (("a", "same"), ("b", "same")):
        (tmp_path / name / "folder").mkdir(parents=True)
        (tmp_path / name / "folder" / "file").write_text(text)
        (tmp_path / name / "provenance.json").write_text(name)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / "folder" / "file").write_text("SAME")
    (tmp_path / "b" / "left").mkdir()
    assert differences(tmp_path / "a", tmp_path / "b") == ["only in b: left", "differs: folder/file"]
