"""What a recipe means in a store: looked up once a command, shared by the SAEs of a sweep, and the same to its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saeflow.pipeline import encode, stages, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.judge import sweep
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.small_pipeline import a_table, brought_data, quiet, write_table

_LISTED: list[str] = []
"""Folders that this process lists while `listed` is open."""
_OPEN: list[bool] = []


def _note_listing(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPEN and event in ("os.scandir", "os.listdir"):
        _LISTED.append(os.fspath(arguments[0] if isinstance(arguments[0], str | os.PathLike) else "."))


sys.addaudithook(_note_listing)


@contextlib.contextmanager
def listed() -> Iterator[list[str]]:
    """The folders that are listed inside the block."""
    _LISTED.clear()
    _OPEN.append(True)
    try:
        yield _LISTED
    finally:
        _OPEN.pop()


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    shutil.copytree(finished.store.root, tmp_path / "store")
    return Finished(Store.create(tmp_path / "store"), finished.recipe, finished.summary)


@pytest.fixture
def grids(tmp_path: Path) -> tuple[Store, Recipe]:
    """A store with a table, and the recipe of a sweep of three SAEs."""
    data = brought_data(write_table(tmp_path / "t.npy", a_table()), sweep={"grid": {"sae.k": [2, 3, 4]}})
    store, recipe = Store.create(tmp_path / "store"), parse_recipe(data)
    import_table.run(Lineage(store, recipe), quiet())
    return store, recipe


@pytest.mark.parametrize("stage", ["train", "encode", "compact", "evaluate", "report"])
def test_a_command_lists_the_saes_of_the_store_once(copied: Finished, stage: str) -> None:
    saes = str(copied.store.root / "saes")
    if stage == "encode":
        shutil.rmtree(Lineage(copied.store, copied.recipe).features.path)
    with listed() as folders:
        stages.stages_of(copied.recipe)[stage](Lineage(copied.store, copied.recipe), quiet())
    assert folders.count(saes) == 1


def test_a_whole_run_lists_the_saes_of_the_store_once(copied: Finished) -> None:
    with listed() as folders:
        stages.run(Lineage(copied.store, copied.recipe), quiet())
    assert folders.count(str(copied.store.root / "saes")) == 1


def test_a_sweep_lists_the_saes_of_the_store_once_for_all_of_them(grids: tuple[Store, Recipe]) -> None:
    train.run_all(Lineage(*grids), quiet())
    with listed() as folders:
        lineage = Lineage(*grids)
        train.run_all(lineage, quiet())
        sweep.run(lineage, quiet())
        encode.run(lineage, quiet())
    assert folders.count(str(grids[0].root / "saes")) == 1


def test_the_saes_of_a_sweep_share_tokens_and_activations(grids: tuple[Store, Recipe]) -> None:
    lineage = Lineage(*grids)
    assert [member.recipe.name for member in lineage.members] == [each.name for each in grids[1].members()]
    assert all(member.tokens is lineage.tokens for member in lineage.members)
    assert all(member.activations is lineage.activations for member in lineage.members)
    assert len({member.sae.id for member in lineage.members}) == 3
    alone = [Lineage(grids[0], recipe) for recipe in grids[1].members()]
    for kind in ("tokens", "activations", "sae", "features"):
        assert [getattr(each, kind) for each in alone] == [getattr(each, kind) for each in lineage.members]


def test_without_a_sweep_the_one_sae_is_the_lineages_own(finished: Finished) -> None:
    lineage = Lineage(finished.store, finished.recipe)
    assert lineage.members == [lineage]


def test_tokens_and_activations_are_known_before_they_are_there_and_the_sae_is_not(tmp_path: Path) -> None:
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table())))
    lineage = Lineage(Store.create(tmp_path / "store"), recipe)
    assert not lineage.tokens.exists()
    assert not lineage.activations.exists()
    with pytest.raises(UserError, match=r"tokens/.* is not finished"):
        _ = lineage.sae
    import_table.run(lineage, quiet())
    assert not lineage.sae.complete(), "asked again, once there is something to train on"


def test_an_artefact_is_the_same_object_however_often_it_is_asked_for(finished: Finished) -> None:
    lineage = Lineage(finished.store, finished.recipe)
    for kind in ("tokens", "activations", "sae", "features"):
        assert getattr(lineage, kind) is getattr(lineage, kind)


def grown(copied: Finished) -> None:
    """The activations have another generation, as if something had been appended."""
    for artefact in (Lineage(copied.store, copied.recipe).tokens, Lineage(copied.store, copied.recipe).activations):
        with artefact.writing():
            artefact.publish(artefact.published().parts[:-1])


def test_the_recipes_sae_stays_the_one_that_was_trained_however_the_store_changes(copied: Finished) -> None:
    before = Lineage(copied.store, copied.recipe).sae
    grown(copied)
    assert Lineage(copied.store, copied.recipe).sae == before


def test_a_fresh_lineage_means_an_sae_of_what_the_store_holds_now(copied: Finished) -> None:
    lineage = Lineage(copied.store, copied.recipe)
    before = lineage.sae
    assert lineage.anew(fresh=True).sae == before, "nothing has changed"
    grown(copied)
    fresh = lineage.anew(fresh=True)
    assert fresh.sae != before
    assert not fresh.sae.exists()
    made = train.run(fresh, quiet())
    assert made is fresh.sae
    assert Lineage(copied.store, copied.recipe).sae == made, "the newest from now on"


def test_a_lineage_means_one_sae_to_its_end_and_another_looks_again(copied: Finished) -> None:
    lineage = Lineage(copied.store, copied.recipe)
    before, run = lineage.sae, lineage.features
    grown(copied)
    made = train.run(lineage.anew(fresh=True), quiet())
    assert (lineage.sae, lineage.features) == (before, run)
    assert lineage.anew().sae == made != before
    assert lineage.anew().features != run


def test_a_worker_means_the_sae_that_the_client_has_chosen(grids: tuple[Store, Recipe]) -> None:
    chosen = {member.recipe.name: member for member in Lineage(*grids).members}
    whole = Lineage(*grids)
    there = [whole.member(recipe, chosen[recipe.name].sae_facts) for recipe in grids[1].members()]
    train.run_all(Lineage(*grids), quiet())
    with listed() as folders:
        assert [member.sae.id for member in there] == [member.sae.id for member in chosen.values()]
    assert str(grids[0].root / "saes") not in folders


def test_every_artefact_says_what_it_was_made_from_by_name(finished: Finished) -> None:
    lineage = Lineage(finished.store, finished.recipe)
    run = Ancestors(finished.store, lineage.features)
    assert (run.tokens, run.activations, run.sae) == (lineage.tokens, lineage.activations, lineage.sae)
    assert run.site == lineage.site
    assert run.selection() == lineage.selection()
    trained = Ancestors(finished.store, lineage.sae)
    assert (trained.tokens, trained.activations) == (lineage.tokens, lineage.activations)
    with pytest.raises(UserError, match=rf"The record of {lineage.sae.id} does not say which features"):
        finished.store.input_of(lineage.sae, "features")


def test_a_lineage_writes_nothing(copied: Finished) -> None:
    def written() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in copied.store.root.rglob("*")}

    before = written()
    for lineage in (Lineage(copied.store, copied.recipe), Lineage(copied.store, copied.recipe, fresh=True)):
        artefacts: list[Artefact] = [lineage.tokens, lineage.activations, lineage.sae, lineage.features]
        assert all(artefact.exists() for artefact in artefacts)
        assert lineage.distinct_sites == [lineage.site]
    assert written() == before
