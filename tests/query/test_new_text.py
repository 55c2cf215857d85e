"""features_of_text: the model and the SAE read a text that need not be in the corpus."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator

import pytest

import saeflow
from saeflow.pipeline import collect, encode, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.query import new_text
from saeflow.query.api import OpenRun
from saeflow.query.new_text import letters_of
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.small_pipeline import (
    Ingredients,
    a_table,
    brought_data,
    documents,
    quiet,
    recipe_data,
    write_table,
)

SETTINGS = {
    "isolated": {"tokens": {"packing": "isolated"}},
    "concatenated": {"tokens": {"context_length": 64}},
    "skipping": {
        "tokens": {"packing": "isolated"},
        "activations": {"skip_positions": [0, 3], "skip_special": True, "dtype": "bfloat16"},
        "sae": {"architecture": "jumprelu"},
    },
    "signed": {"tokens": {"packing": "isolated"}, "sae": {"architecture": "abstopk"}},
}


@pytest.fixture(
    scope="module",
    params=[name if name == "skipping" else pytest.param(name, marks=pytest.mark.long) for name in SETTINGS],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenRun]:
    folder = tmp_path_factory.mktemp("new_text")
    recipe = parse_recipe(recipe_data(Ingredients.write(folder), **SETTINGS[request.param]))
    store = Store.create(folder / "store")
    for stage in (tokens, collect, train, encode):
        stage.run(Lineage(store, recipe), quiet())
    with saeflow.open(store.root) as opened:
        yield opened


STORED = """
select feature_id, count(*) as n_tokens, max_by(value, (abs(value), value)) as max_value
from stg_token_major join stg_tokens using (token_id) join stg_documents using (document_id)
where key = ? group by feature_id
"""


def first_document_of_a_sequence(run: OpenRun) -> list[str]:
    """Documents that begin at position 0 and end in their first sequence: the model saw nothing before them."""
    sql = """
        select key from stg_documents, stg_shape
        where first_token_id % context_length = 0 and n_tokens <= context_length and n_tokens > 3
    """
    return [str(row["key"]) for row in run.sql(sql).to_pylist()]


def test_a_text_of_the_corpus_has_the_values_that_are_stored(run):
    texts = {row["key"]: row["text"] for row in documents()}
    keys = first_document_of_a_sequence(run)[:6]
    assert keys
    for key in keys:
        stored = {row["feature_id"]: row for row in run.sql(STORED, [key]).to_pylist()}
        rows = run.ask("features_of_text", texts[key], 9999).to_pylist()
        found = {row["feature_id"]: (row["n_tokens"], row["max_value"]) for row in rows}
        assert found == {feature: (row["n_tokens"], row["max_value"]) for feature, row in stored.items()}


TOKENS = """
select vocab_id, value, (select count(*) from stg_token_major where token_id = tokens.token_id)
from stg_tokens as tokens join stg_documents using (document_id)
left join stg_token_major as fired on fired.token_id = tokens.token_id and fired.feature_id = ?
where key = ? order by tokens.token_id
"""


def test_each_token_of_a_text_of_the_corpus_has_the_value_that_is_stored(run):
    texts = {row["key"]: row["text"] for row in documents()}
    for key in first_document_of_a_sequence(run)[:3]:
        strongest = run.ask("features_of_text", texts[key], 1).to_pylist()[0]["feature_id"]
        rows = run.ask("text_tokens", texts[key], strongest).to_pylist()
        stored = [tuple(row.values()) for row in run.sql(TOKENS, [strongest, key]).to_pylist()]
        assert [(row["vocab_id"], row["value"] or None, row["n_features"] or 0) for row in rows] == stored
        assert [row["place"] for row in rows] == list(range(len(rows)))
        assert any(row["value"] for row in rows)
        assert {row["value"] for row in run.ask("text_tokens", texts[key]).to_pylist()} == {None}


def test_a_letter_of_several_tokens_belongs_to_the_one_that_begins_it():
    assert letters_of([b"a\xf0\x9f", b"\x90", b"\x98b", b"\xc3", b"\xa9"]) == ["a🐘", "", "b", "é", ""]
    assert letters_of([b"\x90", b"a\xf0\x9f", b"", b"\xc3"]) == ["\ufffd", "a\ufffd", "", "\ufffd"]
    assert letters_of([]) == []


def test_a_model_that_was_asked_stays_in_memory_alone(run):
    first, again = (run.ask("text_tokens", text).to_pylist() for text in ("a cat", "a cat"))
    (reader,) = new_text._kept.values()
    assert first == again
    run.ask("features_of_text", "a dog")
    assert [*new_text._kept.values()] == [reader]


def test_the_score_is_the_strength_times_the_bits_of_the_density(run):
    summary = {row["feature_id"]: row for row in run.ask("feature_summary").to_pylist()}
    rows = run.ask("features_of_text", "The old sailor remembers a robot. " * 30, n=9999).to_pylist()
    assert rows
    any_below_zero = any(row["max_value"] < 0 for row in rows)
    for row in rows:
        about = summary[row["feature_id"]]
        assert row["density"] == pytest.approx(about["density"])
        if not about["n_tokens"]:
            assert row["score"] is None
            continue
        squares = about["mean_value"] ** 2 + about["std_value"] ** 2
        usual = math.sqrt(squares) if any_below_zero else about["mean_value"]
        assert row["strength"] == pytest.approx(abs(row["max_value"]) / usual)
        assert row["score"] == pytest.approx(row["strength"] * -math.log2(about["density"]))
        assert 0 < row["share"] <= 1
    order = [(row["score"] is None, -(row["score"] or 0), row["feature_id"]) for row in rows]
    assert order == sorted(order)
    assert run.ask("features_of_text", "The old sailor remembers a robot. " * 30, 3).to_pylist() == rows[:3]


@pytest.mark.parametrize("text", ["", " ", "\x00", "<|endoftext|>", "猫" * 50])
def test_any_text_is_read(run, text):
    assert run.ask("features_of_text", text).num_rows <= 20


def test_a_model_that_was_moved_is_named_and_another_is_refused(run, tmp_path):
    recorded = run.store.artefacts("activations")[0].path / "provenance.json"

    model = json.loads(recorded.read_text())["model"]
    shutil.copytree(model, tmp_path / "moved")
    wanted = run.ask("features_of_text", "the cat").to_pylist()
    assert run.ask("features_of_text", "the cat", model=str(tmp_path / "moved")).to_pylist() == wanted
    (tmp_path / "moved" / "config.json").write_text((tmp_path / "moved" / "config.json").read_text() + " ")
    for wrong in (tmp_path / "moved", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="features_of_text TEXT 20 MODEL_FOLDER"):
            run.ask("features_of_text", "the cat", model=str(wrong))


def test_a_store_that_does_not_say_where_its_model_lies_asks_for_it(run, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(run.store.root, copy)
    next(copy.glob("activations/*/provenance.json")).unlink()
    with saeflow.open(copy) as opened, pytest.raises(UserError, match="does not say where its model lies"):
        opened.ask("features_of_text", "the cat")


@pytest.mark.long
def test_a_run_of_a_table_has_no_model_to_read_with(tmp_path):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table())))
    for stage in (import_table, train, encode):
        stage.run(Lineage(store, recipe), quiet())
    with saeflow.open(store.root) as opened, pytest.raises(UserError, match="of a table"):
        opened.ask("features_of_text", "the cat")
