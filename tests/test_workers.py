"""What a cluster's client and workers do with one another, without processes of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from saeflow import compaction, features
from saeflow.artefact import Artefact
from saeflow.progress import Bar
from saeflow.records import PartRecord
from saeflow.sections import UserError
from tests.conftest import Finished
from tests.small_pipeline import quiet, tree


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    store = replace(finished.store, root=tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    return Finished(store, finished.recipe, finished.summary)


def test_a_group_that_workers_merged_before_an_earlier_one_is_there_when_it_is_shown(
    copied: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = features.artefact(copied.store, copied.recipe)
    used = features.used_of(copied.store, run)
    n_values = [part.counts["n_values"] for part in run.published().parts]
    monkeypatch.setattr(compaction, "plan", partial(compaction.plan, most_values=sum(n_values) * 2 // 3))
    alone = tmp_path / "alone"
    shutil.copytree(copied.store.root, alone)

    def last_first(groups: list[list[PartRecord]], bar: Bar) -> Iterator[PartRecord]:
        assert len(groups) > 1
        worker = replace(run, shared=True, made={})
        made = [compaction.merge_whole(worker, used, group, bar) for group in reversed(groups)]
        yield from reversed(made)

    compaction.run(run, used, quiet(), 2, by_workers=last_first)
    compaction.run(replace(run, root=alone), used, quiet(), 2)
    assert not [run.part_path(part) for part in run.published().parts if not run.part_path(part).is_dir()]
    assert tree(copied.store.root) == tree(alone)


def test_a_part_whose_folder_is_gone_is_not_published(tmp_path: Path) -> None:
    target = Artefact(tmp_path, "features", "run", "00000000")
    target.begin({})
    for index in range(2):
        with target.new_part(index, {"n": 1}) as folder:
            (folder / "file").write_text("values")
    target.publish([target.made[0]], clear=False)
    shutil.rmtree(target.part_path(target.made[1]))
    with pytest.raises(UserError, match=f"Part {target.made[1].folder} of features/run-00000000 is gone"):
        target.publish(target.made.values())
    assert target.published().parts == (target.made[0],)
