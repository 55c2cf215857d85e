"""Corpora that are tokenised already: a column of vocabulary ids instead of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.model.load import load_tokenizer
from saeflow.pipeline import tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import ModelConfig
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.small_pipeline import Ingredients, documents, recipe_data

ROWS = documents()
ID_TYPES = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())]


def tokenizer_of(ingredients: Ingredients) -> Any:
    return load_tokenizer(ModelConfig(path=str(ingredients.model)))


def ids_of(ingredients: Ingredients) -> list[list[int]]:
    return list(tokenizer_of(ingredients)([row["text"] for row in ROWS])["input_ids"])


def write(path: Path, ids: list[Any], kind: pa.DataType | None = None) -> Path:
    keys = pa.array([row["key"] for row in ROWS[: len(ids)]])
    pq.write_table(pa.table({"key": keys, "input_ids": pa.array(ids, kind)}), path)
    return path


def tokenise(store: Path, ingredients: Ingredients, corpus: Path, progress: Progress, **settings: Any) -> Artefact:
    about = {"files": [str(corpus)], **({"token_ids": "input_ids"} if corpus.stem == "ids" else {})}
    data = recipe_data(ingredients, corpus=about, tokens=settings)
    return tokens.run(Lineage(Store.create(store), parse_recipe(data)), progress)


def tables(artefact: Artefact) -> list[pa.Table]:
    parts = artefact.published().parts
    return [pq.read_table(artefact.part_file(part, "tokens.parquet")) for part in parts]


@pytest.mark.parametrize("kind", ID_TYPES, ids=str)
def test_ids_are_stored_as_the_text_they_stand_for_would_be(
    tmp_path: Path, ingredients: Ingredients, progress: Progress, kind: pa.DataType
) -> None:
    path = write(tmp_path / "ids.parquet", ids_of(ingredients), kind)
    one_part = {"part_tokens": 1_000_000}
    from_ids = tokenise(tmp_path / "store", ingredients, path, progress, **one_part)
    from_text = tokenise(tmp_path / "store", ingredients, ingredients.corpus, progress, **one_part)
    without = (each.drop_columns(["char_start", "char_end"]) for made in (from_ids, from_text) for each in tables(made))
    assert next(without).equals(next(without)), "but for the characters of a text that is not there"
    assert from_ids.id != from_text.id


def test_ids_are_taken_as_they_are_unless_bos_is_asked_for(
    tmp_path: Path, ingredients: Ingredients, progress: Progress
) -> None:
    path = write(tmp_path / "ids.parquet", [[5, 6, 7], [8]])
    bos = tokenizer_of(ingredients).bos_token_id
    for asked, expected in ((None, [5, 6, 7]), (True, [bos, 5, 6, 7]), (False, [5, 6, 7])):
        settings = {} if asked is None else {"prepend_bos": asked}
        made = tokenise(
            tmp_path / f"store-{asked}", ingredients, path, progress, **settings, packing="isolated", context_length=4
        )
        table = pa.concat_tables(tables(made))
        rows = table.filter(table.column("mask")).to_pylist()
        firsts = [[row["vocab_id"] for row in rows if row["document_id"] == n] for n in (0, 1)]
        assert expected in firsts


def test_more_rows_of_ids_are_appended_and_changed_ones_replaced(
    tmp_path: Path, ingredients: Ingredients, progress: Progress
) -> None:
    path = write(tmp_path / "ids.parquet", [[5, 6, 7], [8], [9, 9]])
    before = tokenise(tmp_path / "store", ingredients, path, progress).published()
    write(path, [[5, 6, 7], [8, 8], [9, 9], [10]])
    after = tokenise(tmp_path / "store", ingredients, path, progress).published()
    assert after.parts[: len(before.parts)] == before.parts
    assert after.parts[-1].counts["n_documents"] == 2
    assert sum(map(len, after.hidden.values())) == 1


@pytest.mark.parametrize(
    ("ids", "kind", "says"),
    [
        ([[5, 400_000]], None, r"has the id 400000, but the model's tokenizer has 0 to 399"),
        ([[5, -1]], None, r"has the id -1,"),
        ([[5, None]], pa.list_(pa.int32()), r"has the id -1,"),
        ([[5.0]], None, r"a column of type DOUBLE\[\], but it must be a list of integers"),
        ([5], None, r"a column of type BIGINT, but it must be a list of integers"),
        (["5 6"], None, r"a column of type VARCHAR, but it must be a list of integers"),
    ],
)
def test_a_column_that_holds_no_ids_of_this_model_is_refused(
    tmp_path: Path, ingredients: Ingredients, progress: Progress, ids: list[Any], kind: pa.DataType | None, says: str
) -> None:
    path = write(tmp_path / "ids.parquet", ids, kind)
    with pytest.raises(UserError, match=says):
        tokenise(tmp_path / "store", ingredients, path, progress)


def test_an_unknown_column_of_ids_names_those_there_are(
    tmp_path: Path, ingredients: Ingredients, progress: Progress
) -> None:
    data = recipe_data(ingredients, corpus={"token_ids": "input_ids"})
    with pytest.raises(UserError, match=r"no column 'input_ids'; it has: key, text, source, title"):
        tokens.run(Lineage(Store.create(tmp_path / "store"), parse_recipe(data)), progress)


def test_plain_texts_have_no_column_of_ids(tmp_path: Path, ingredients: Ingredients, progress: Progress) -> None:
    (tmp_path / "a.txt").write_text("text")
    data = recipe_data(ingredients, corpus={"files": [str(tmp_path / "a.txt")], "token_ids": "ids"})
    with pytest.raises(UserError, match=r"token_ids names a column, but .* plain texts"):
        tokens.run(Lineage(Store.create(tmp_path / "store"), parse_recipe(data)), progress)
