"""Stores of every format are read and continued, those of earlier ones upgraded: one of each lies in tests/stores/."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from saeflow.activations.shards import StoredArray
from saeflow.pipeline import compact, encode, stages
from saeflow.pipeline.lifecycle.forget import forget
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import ask
from saeflow.query.connection import check, connect
from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.store.files import read_json
from saeflow.store.garbage import collect_garbage
from saeflow.store.store import Store
from saeflow.store.upgrade import upgrade
from saeflow.store.verify import verify
from tests.support.s3_server import s3_server
from tests.support.small_pipeline import quiet, tree

OLD = sorted((Path(__file__).resolve().parents[1] / "stores").glob("format_*"))


@pytest.fixture(params=OLD, ids=lambda folder: folder.name)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of the store, with its model, corpus and recipe in the working directory."""
    shutil.copytree(request.param, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Store.open("store")


@pytest.fixture
def recipe(old: Store) -> Recipe:
    return load_recipe(Path("small.toml"))


def test_there_is_a_store_of_every_format() -> None:
    assert [folder.name for folder in OLD] == [f"format_{n}" for n in range(1, FORMAT_VERSION + 1)]


def rows(store: Store, sql: str) -> list[tuple[object, ...]]:
    with connect(store) as connection:
        found: list[tuple[object, ...]] = connection.execute(sql).fetchall()
        return found


FIGURES = "select count(*), sum(value), min(token_id), max(feature_id) from stg_feature_major"


def test_an_old_store_answers_and_passes_its_checks(old: Store) -> None:
    assert list(verify(old, full=True)) == []
    with connect(old) as connection:
        assert [name for name, found in check(connection) if len(found)] == []
        assert ask(connection, "tokens_where", [3, 0.0]).num_rows


def test_shards_are_found_where_the_arrays_description_says_they_lie(old: Store) -> None:
    arrays = sorted(old.root.glob("activations/*/parts/*/*.zarr"))
    assert len(arrays) == 3
    for path in arrays:
        assert (path / "c.0.0.0").is_file() != (path / "c" / "0" / "0" / "0").is_file()
        found = StoredArray(path, old.storage)
        np.testing.assert_array_equal(found.read(slice(0, found.shape[0])).numpy(), zarr.open_array(path, mode="r")[:])


def test_running_the_recipe_again_on_an_old_store_works_on_nothing_finished(old: Store, recipe: Recipe) -> None:
    before = tree(old.root)
    stages.run(Lineage(Store.create(old.root), recipe), quiet())
    after = tree(old.root)
    added = {"vocab.parquet", "density.png"}  # a column of the vocabulary, a picture the old store was made without
    assert {Path(name).name for name in after if after[name] != before.get(name)} <= added
    assert after.keys() >= before.keys()


def test_an_old_store_that_was_merged_is_not_encoded_again(old: Store, recipe: Recipe) -> None:
    store = Store.create(old.root)
    compact.run(Lineage(store, recipe), quiet(), enough=2)
    before = Lineage(store, recipe).features.published()
    encode.run(Lineage(store, recipe), quiet())
    assert Lineage(store, recipe).features.published() == before
    assert len(before.parts) == 1


@pytest.mark.parametrize("old", OLD[:-1], ids=lambda folder: folder.name, indirect=True)
def test_an_old_store_is_upgraded_without_changing_an_answer(old: Store) -> None:
    """Parts of format 1 did not say what they were made from. Those of format 2 differ only in the names of shards."""
    before, files_before = rows(old, FIGURES), tree(old.root)
    was_format_1 = read_json(old.root / "store.json")["format_version"] == 1
    assert len(upgrade(old)) == len(old.artefacts())
    assert list(verify(old, full=True)) == []
    assert bool(collect_garbage(old, grace_seconds=0, remove=True).garbage) == was_format_1  # the generation before
    records = [old.root / "store.json", *old.root.rglob("artefact.json")]
    assert {read_json(path)["format_version"] for path in records} == {FORMAT_VERSION}
    changed = {name for name, content in tree(old.root).items() if content != files_before.get(name)}
    assert was_format_1 or {Path(name).name for name in changed} == {"store.json", "artefact.json"}
    assert rows(old, FIGURES) == before
    assert "already" in upgrade(old)[0]


@pytest.mark.long
@pytest.mark.parametrize("old", OLD[:-1], ids=lambda folder: folder.name, indirect=True)
def test_an_old_store_in_a_bucket_is_upgraded_for_every_machine(
    old: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(old, FIGURES)
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = f"{server.bucket('old')}/store"
        server.upload(old.root, "old", "store")
        assert len(upgrade(Store.open(url))) == len(old.artefacts())
        monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path / "another machine"))
        store = Store.open(url)
        assert {artefact.record.format_version for artefact in store.artefacts()} == {FORMAT_VERSION}
        assert "already" in upgrade(store)[0]
        assert [str(each) for each in verify(store, full=True)] == []
        assert rows(store, FIGURES) == before


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_a_killed_upgrade_leaves_a_store_that_answers_and_goes_on(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before it renames a file or folder: that is how everything comes into place."""
    done: list[str] = []
    rename = {name: getattr(os, name) for name in ("rename", "replace")}

    def counting(name: str, last: float, *paths: str, **folders: int) -> None:
        if len(done) >= last:
            raise KeyboardInterrupt
        done.append(str(paths[-1]))
        rename[name](*paths, **folders)

    def upgraded(folder: str, last: float) -> Store:
        shutil.copytree(OLD[0] / "store", tmp_path / folder)
        done.clear()
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for name in rename:
                patch.setattr(os, name, partial(counting, name, last))
            upgrade(Store.open(tmp_path / folder))
        return Store.open(tmp_path / folder)

    whole = upgraded("whole", math.inf)
    store = upgraded("killed", round(share * len(done)))
    assert [str(each) for each in verify(store, full=True)] == []
    assert rows(store, FIGURES) == rows(whole, FIGURES)
    upgrade(Store.open(store.root))
    assert tree(store.root) == tree(whole.root)
    assert [str(each) for each in verify(Store.open(store.root), full=True)] == []


@pytest.mark.parametrize("upgraded", [False, pytest.param(True, marks=pytest.mark.long)], ids=["as it was", "upgraded"])
def test_an_old_store_grows_and_forgets(old: Store, recipe: Recipe, upgraded: bool) -> None:
    if upgraded:
        upgrade(old)
    key = rows(old, "select key from documents order by key")[0][0]
    n_before = rows(old, "select count(*) from documents")[0][0]
    old_parts = {path.name for path in old.root.glob("activations/*/parts/*")}
    corpus = pq.read_table("corpus.parquet")
    added = corpus.slice(0, 5).set_column(0, "key", pa.array([f"new/{n}" for n in range(5)]))
    pq.write_table(pa.concat_tables([corpus, added]), "corpus.parquet")
    stages.run(Lineage(Store.create(old.root), recipe), quiet())
    assert rows(old, "select count(*) from documents") == [(n_before + 5,)]
    assert {path.name for path in old.root.glob("activations/*/parts/*")} > old_parts
    forget(old, [str(key)], quiet())
    assert rows(old, "select count(*) from documents where key = '" + str(key) + "'") == [(0,)]
    with connect(old) as connection:
        assert [name for name, found in check(connection) if len(found)] == []
