"""What a store has forgotten stays away, whatever recipe asks for it, until it is asked to come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saeflow.corpus.forgotten import ForgottenHashes
from saeflow.corpus.ledger import key_hash
from saeflow.pipeline import tokens
from saeflow.pipeline.lifecycle.forget import forget, remember
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.records import FORGOTTEN, Damaged
from saeflow.store.store import Store
from saeflow.store.verify import repair_forgotten, verify
from tests.support.command import Command
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, write_corpus, write_recipe

ROWS = [*documents(6), {"key": "copy", "text": documents(6)[-1]["text"], "source": "copies", "title": "Copy"}]
KEY = ROWS[-2]["key"]
"""The key of the document whose text `copy` has, too."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "rows.parquet", ROWS)


def recipe_of(ingredients: Ingredients, corpus: Path, **changes: object) -> Recipe:
    return parse_recipe(recipe_data(ingredients, corpus={"files": [str(corpus)], "dedup": False}, **changes))


def keys_in(store: Store, recipe: Recipe) -> set[str]:
    """Keys that readers see after the recipe has read its corpus."""
    source = tokens.run(Lineage(store, recipe), quiet())
    return visible(store, source.id)


def visible(store: Store, id: str) -> set[str]:
    import pyarrow.parquet as pq

    generation = store.by_id(id).published()
    tables = [pq.read_table(store.by_id(id).part_file(part, "documents.parquet")) for part in generation.parts]
    rows = [row for table in tables for row in table.select(["document_id", "key"]).to_pylist()]
    return {row["key"] for row in rows if row["document_id"] not in generation.hidden_ids}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": {"context_length": 8}},
        {"tokens": {"part_tokens": 100}, "name": "other"},
        {"corpus": {"held_out": 0.0}},
        {"corpus": {"key": "title"}, "name": "by_title"},
    ],
    ids=["another context", "another recipe", "another split", "other keys"],
)
def test_what_is_forgotten_stays_away_from_every_recipe_of_the_store_and_is_counted(
    ingredients: Ingredients, corpus: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    store, said = Store.create(tmp_path / "store"), list[str]()
    keys_in(store, recipe_of(ingredients, corpus))
    forget(store, [KEY], quiet())
    data = recipe_data(ingredients, corpus={"files": [str(corpus)], "dedup": False})
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    loud = Progress(verbosity=-1)
    loud.say = lambda text, verbosity=0: said.append(text)  # type: ignore[method-assign]
    source = tokens.run(Lineage(store, parse_recipe(data)), loud)
    titles = {"copy": "Copy", KEY: ROWS[-2]["title"]}
    assert not visible(store, source.id) & {*titles, *titles.values()}
    assert len(visible(store, source.id)) == len(ROWS) - 2
    assert any("2 are left out: the store has forgotten them" in line for line in said)


def test_a_document_with_the_text_of_a_forgotten_one_is_hidden_with_it(
    ingredients: Ingredients, corpus: Path, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "store")
    recipe = recipe_of(ingredients, corpus)
    source = tokens.run(Lineage(store, recipe), quiet())
    done = forget(store, [KEY], quiet())
    assert (done.documents, done.same_texts) == ({source.id: 2}, 1)
    assert visible(store, source.id) == {row["key"] for row in ROWS} - {KEY, "copy"}
    renamed = [{**row, "key": f"new/{row['key']}"} for row in ROWS]
    write_corpus(corpus, renamed)
    assert keys_in(store, recipe) >= {f"new/{row['key']}" for row in ROWS[:-2]}
    assert not {f"new/{KEY}", "new/copy"} & keys_in(store, recipe)


def test_an_empty_text_is_forgotten_by_its_key_alone(ingredients: Ingredients, tmp_path: Path) -> None:
    rows = [{**ROWS[-1], "key": key, "text": text} for key, text in (("a", ""), ("b", ""), ("c", "words"))]
    store = Store.create(tmp_path / "store")
    recipe = recipe_of(ingredients, write_corpus(tmp_path / "rows.parquet", rows))
    keys_in(store, recipe)
    forget(store, ["a"], quiet())
    assert keys_in(store, recipe) == {"b", "c"}


def test_the_list_holds_hashes_alone_and_undo_lets_them_in_again(
    ingredients: Ingredients, corpus: Path, tmp_path: Path
) -> None:
    store, recipe = Store.create(tmp_path / "store"), recipe_of(ingredients, corpus)
    keys_in(store, recipe)
    forget(store, [KEY], quiet())
    content = (store.root / FORGOTTEN).read_text()
    assert KEY not in content
    assert {len(digits) for pair in json.loads(content)["documents"] for digits in pair} == {16}
    assert ForgottenHashes.read(store).keys == {key_hash(KEY), key_hash("copy")}
    with pytest.raises(UserError, match="'emma' is not forgotten"):
        remember(store, ["emma"])
    assert list(remember(store, [KEY]).values()) == [2]
    assert ForgottenHashes.read(store).keys == frozenset()
    assert keys_in(store, recipe) == {row["key"] for row in ROWS}


def test_keys_that_an_earlier_saeflow_forgot_in_one_artefact_are_forgotten_by_the_store(
    ingredients: Ingredients, corpus: Path, tmp_path: Path
) -> None:
    store, recipe = Store.create(tmp_path / "store"), recipe_of(ingredients, corpus)
    keys_in(store, recipe)
    forget(store, [KEY], quiet())
    (store.root / FORGOTTEN).unlink()  # as it left the store
    assert KEY not in keys_in(store, recipe_of(ingredients, corpus, tokens={"context_length": 8}))
    assert remember(store, [KEY])


def test_a_run_that_took_a_document_in_meanwhile_hides_it_at_its_next_reading(
    ingredients: Ingredients, corpus: Path, tmp_path: Path
) -> None:
    store, recipe = Store.create(tmp_path / "store"), recipe_of(ingredients, corpus)
    source = tokens.run(Lineage(store, recipe), quiet())
    everything = source.published()
    forget(store, [KEY], quiet())
    source.publish(everything.parts, hidden={})  # the run knew of nothing when it published
    assert not {KEY, "copy"} & keys_in(store, recipe)


def test_a_damaged_list_lets_nothing_in(ingredients: Ingredients, corpus: Path, tmp_path: Path) -> None:
    store, recipe = Store.create(tmp_path / "store"), recipe_of(ingredients, corpus)
    keys_in(store, recipe)
    forget(store, [KEY], quiet())
    path = store.root / FORGOTTEN
    path.write_bytes(path.read_bytes().replace(key_hash(KEY).encode(), b"0" * 16))
    with pytest.raises(Damaged, match=r"forgotten\.json is missing or damaged"):
        keys_in(store, recipe_of(ingredients, corpus, tokens={"context_length": 8}))
    with pytest.raises(Damaged, match=r"forgotten\.json is missing or damaged"):
        list(verify(store, full=False))
    assert f"moved {path} to {store.root}/damaged/" in str(repair_forgotten(store))
    assert repair_forgotten(store) is None
    assert KEY not in keys_in(store, recipe_of(ingredients, corpus, tokens={"context_length": 8}))


def test_the_command_undoes_what_it_did(
    saeflow: Command, ingredients: Ingredients, corpus: Path, tmp_path: Path
) -> None:
    data = recipe_data(ingredients, corpus={"files": [str(corpus)], "dedup": False})
    recipe, store = write_recipe(tmp_path / "small.toml", data), tmp_path / "store"
    assert saeflow("tokens", recipe, "--store", store, "-q").code == 0
    said = saeflow("forget", KEY, "--store", store)
    assert said.code == 0, said.err
    assert "1 of them have other keys" in said.out
    assert "2 documents may come in again" in saeflow("forget", KEY, "--undo", "--store", store).out
    assert "2 documents are new" in saeflow("tokens", recipe, "--store", store).err
