"""The six selects for the demo corpus, on a few documents of its kind that are looked at by eye."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from saeflow.classes.annotations import Source, annotate
from saeflow.query.ask import ask, query
from saeflow.query.connection import connect
from saeflow.store.store import Store
from tests.support.small_pipeline import quiet
from tests.support.small_store import Document, Given

RECIPES = Path(__file__).resolve().parents[2] / "flows" / "recipes" / "annotations"

NOVEL = [
    "She",
    " said",
    ",",
    ' "',
    "Not",
    " in",
    " Cape",
    " Verde",
    '."',
    "\n",
    '"',
    "In",
    " CHAD",
    '?"',
    " 12",
    " Ruth",
    ".",
]
BIBLE = [
    "Ruth",
    " 1",
    "\n",
    "\n",
    "In",
    " the",
    " days",
    "\n",
    "\n",
    "Ruth",
    " 2",
    "\n",
    "\n",
    "And",
    " (",
    "Ruth",
    ")",
    " was",
    ".",
]
COUNTRY = [
    "Cape",
    " Verde",
    "\n",
    "\n",
    "Area",
    ":",
    " 4",
    ",",
    "033",
    ' "',
    "so",
    '-called"',
    " Cape",
    " Ver",
    "de",
    "'s",
    " port",
    ";",
]
DOCUMENTS = [
    Document(key, source, [piece.encode() for piece in pieces])
    for key, source, pieces in [
        ("austen/x/chapter-01", "austen", NOVEL),
        ("kjv/ruth", "kjv", BIBLE),
        ("factbook/a/cape-verde", "factbook", COUNTRY),
    ]
]  # fmt: skip

EXPECTED = {
    "source": {"austen": [NOVEL], "kjv": [BIBLE], "factbook": [COUNTRY]},
    "digits": {"digits": [[" 12"], [" 1"], [" 2"], [" 4"], ["033"]]},
    "capitals": {
        "all": [[" CHAD"]],
        "first": [["She"], ["Not"], [" Cape", " Verde"], ["In"], [" Ruth"], ["Ruth"], ["In"], ["Ruth"], ["And"],
                  ["Ruth"], ["Cape", " Verde"], ["Area"], [" Cape", " Ver"]],
    },
    "dialogue": {
        "dialogue": [[' "', "Not", " in", " Cape", " Verde", '."'], ['"', "In", " CHAD", '?"']],
        "quoted": [[' "', "so", '-called"']],
    },
    "openings": {
        "book": [BIBLE], "chapter": [NOVEL, BIBLE[4:]], "country": [COUNTRY],
    },
    "names": {
        "book": [[" Ruth", "."], ["Ruth"], ["Ruth"], [" (", "Ruth", ")"]],
        "country": [[" Cape", " Verde", '."'], ["Cape", " Verde"]],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    titles = pa.array(["X, chapter 1", "Ruth", "Cape Verde"])
    given = Given(documents=DOCUMENTS, values=[(0, 0, 1.0)], metadata={"title": titles})
    return given.write(tmp_path_factory.mktemp("recipes") / "store")


def test_every_recipe_is_tried_here() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*")) == sorted(EXPECTED)


@pytest.mark.long
@pytest.mark.parametrize("name", EXPECTED)
def test_a_select_for_the_demo_corpus_gives_the_tokens_that_it_promises(store: Store, name: str) -> None:
    annotate(store, None, name, Source(RECIPES / f"{name}.sql"), quiet())
    assert f"saeflow annotate {name} flows/recipes/annotations/{name}.sql" in (RECIPES / f"{name}.sql").read_text()
    with connect(store, threads=1) as connection:
        pieces = dict(zip(*query(connection, "select token_id, piece from tokens").to_pydict().values(), strict=True))
        found: dict[str, dict[int, list[str]]] = {}
        for row in ask(connection, "annotated_tokens", [name]).to_pylist():
            spans = found.setdefault(row["class"], {})
            spans.setdefault(row["first_token_id"], []).append(pieces[row["token_id"]])
    assert {each: list(spans.values()) for each, spans in found.items()} == EXPECTED[name]
