"""A power cut at any instant: what was published stays, and the same command finishes the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import Runner
from tests.faults.__main__ import small_runner
from tests.faults.kills import collecting_runner, random_kills
from tests.faults.power import VIEWS, Disk, power_cuts, problems


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return small_runner(tmp_path_factory.mktemp("power"))


@pytest.mark.long
def test_after_a_power_cut_nothing_published_is_lost_and_the_same_command_finishes(runner: Runner) -> None:
    cuts = power_cuts(runner, 3)
    assert len(cuts) == 3
    for cut in cuts:
        for view in VIEWS:
            assert problems(runner, cut, view) == [], f"{cut.name}, {view}"


def test_a_disk_after_a_cut_holds_only_what_was_flushed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root)
    for name in ("kept", "unlisted", "torn"):
        (root / name).write_text(name)
    for path in (root / "kept", root / "torn", root):
        disk.flushed(os.open(path, os.O_RDONLY))
    (root / "unlisted").rename(root / "renamed")
    (root / "torn").write_text("torn and longer")
    disk.cut(tmp_path / "cut")
    strict, eager = (
        {p.name: p.read_text() for p in (tmp_path / "cut" / view).iterdir()} for view in ("strict", "eager")
    )
    assert strict == {"kept": "kept", "torn": "torn"}
    assert eager == {"kept": "kept", "torn": "torn", "renamed": ""}


@pytest.mark.long
def test_a_collection_killed_at_random_instants_ends_equal_to_the_undisturbed_one(tmp_path: Path) -> None:
    runner = collecting_runner(tmp_path, 150)
    found = list(random_kills(runner, 3, seed=1))
    assert len(found) >= 4
    assert [problem for _, problems in found for problem in problems] == []
