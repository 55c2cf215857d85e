"""Features chosen at random, each without a filter and under one: what a person reads is what the SQL links answer."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from saeflow.browser.server import application
from saeflow.pipeline import compact, stages
from saeflow.pipeline.lineage import Lineage
from saeflow.query import labels
from saeflow.query.connection import connect
from saeflow.recipe.recipe import parse_recipe
from saeflow.store.store import Store
from tests.browser.conftest import ADDRESS
from tests.browser.reader import Reader, as_query, random_filter
from tests.conftest import Finished
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, write_corpus

N_FEATURES = 256
CHOSEN = random.Random(22).sample(range(N_FEATURES), 200)
AT_ONCE = 10


def read_twice(reader: Reader, feature: int) -> None:
    """Read a feature's page without a filter and under one that the feature chooses, and there one panel's own page."""
    dice, here = random.Random(feature), f"{reader.run}/features/{feature}"
    under = random_filter(dice, reader)
    for chosen in ({}, under):
        assert len(reader.read(f"{here}?{as_query(all=1, **chosen)}")) >= 10
    alone = dice.choice(["strongest", "bands", "random"])
    window = {"before": dice.randint(0, 20), "after": dice.randint(0, 20)}
    assert reader.read(f"{here}/{alone}?{as_query(**window, **under)}") == [alone]


@pytest.mark.parametrize("feature", random.Random(7).sample(range(64), 2))
def test_a_random_feature_reads_as_its_sql_answers_filtered_and_not(
    pages: TestClient, finished: Finished, feature: int
):
    with contextlib.closing(connect(finished.store)) as connection:
        read_twice(Reader(pages, connection, "small", follows=False), feature)


@pytest.fixture(scope="module")
def wide(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A compacted run of 256 features, some of them labelled, on dated documents."""
    folder = tmp_path_factory.mktemp("wide")
    dated = [row | {"date": f"{1805 + i % 20}-03-{1 + i % 28:02d}"} for i, row in enumerate(documents(120))]
    corpus = write_corpus(folder / "dated.parquet", dated)
    recipe = parse_recipe(recipe_data(
        ingredients, corpus={"files": [str(corpus)]}, sae={"n_features": N_FEATURES, "k": 8},
        train={"n_tokens": 30_000},
    ))  # fmt: skip
    lineage = Lineage(Store.create(folder / "store"), recipe)
    stages.run(lineage, quiet())
    compact.run(lineage, quiet(), enough=2)
    labels.put(
        lineage.store,
        lineage.sae.id,
        "own",
        {CHOSEN[i]: labels.Label(f"<b>label {i}</b> & \u202e") for i in range(0, 200, 3)},
    )
    with contextlib.closing(connect(lineage.store)) as connection:
        pages = TestClient(application(lineage.store), base_url=ADDRESS, raise_server_exceptions=False)
        yield Reader(pages, connection, "small", follows=False)


@pytest.mark.long
@pytest.mark.rotates(5)
@pytest.mark.parametrize("first", range(0, len(CHOSEN), AT_ONCE))
def test_200_random_features_read_as_their_sql_answers_filtered_and_not(wide: Reader, first: int):
    for feature in CHOSEN[first : first + AT_ONCE]:
        read_twice(wide, feature)
