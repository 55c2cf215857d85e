"""Pictures of a run, and the table that a small one is drawn from."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.pipeline import encode, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.judge import evaluate, report
from saeflow.pipeline.judge.report import feature_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.benchmarks.toys import active_sets
from tests.support.small_pipeline import brought_data, quiet, take_over, value_file

PNG = b"\x89PNG\r\n"
PHRASES = "phrase,a,b,c\n" + "".join(
    f"{label} ${i},{i % 3},{i % 5},{0.5 * i}\n" for i, label in enumerate("猫狗€$xyz_^")
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run on nine labelled rows, whose labels try matplotlib's markup."""
    folder = tmp_path_factory.mktemp("phrases")
    (folder / "t.csv").write_text(PHRASES, "utf-8")
    store = Store.create(folder / "store")
    recipe = parse_recipe(brought_data(folder / "t.csv", sae={"n_features": 8, "k": 2}, activations={"part_rows": 4}))
    for stage in (import_table.run, train.run, encode.run):
        stage(Lineage(store, recipe), quiet())
    return store, recipe


def test_a_small_table_is_drawn_whole_and_only_once(small):
    store, recipe = small
    path = report.run(Lineage(store, recipe), quiet())
    assert path.name == "features.png"
    assert path.read_bytes().startswith(PNG)
    before = path.stat().st_mtime_ns
    assert report.run(Lineage(store, recipe), quiet()) == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.long
def test_the_picture_is_drawn_again_once_the_features_are_others(tmp_path):
    (tmp_path / "t.csv").write_text(PHRASES, "utf-8")
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(tmp_path / "t.csv", sae={"n_features": 8}, activations={"part_rows": 4}))
    for stage in (import_table.run, train.run, encode.run):
        stage(Lineage(store, recipe), quiet())
    target = Lineage(store, recipe).features
    every = target.published().parts
    target.publish(every[:-1])
    before = report.run(Lineage(store, recipe), quiet()).read_bytes()
    target.publish(every)
    after = report.run(Lineage(store, recipe), quiet()).read_bytes()
    assert before != after
    report.run(Lineage(store, recipe), quiet()).unlink()
    assert report.run(Lineage(store, recipe), quiet()).read_bytes() == after


def test_the_same_run_gives_the_same_picture_byte_for_byte(small):
    store, recipe = small
    path = report.run(Lineage(store, recipe), quiet())
    before = path.read_bytes()
    path.unlink()
    assert report.run(Lineage(store, recipe), quiet()).read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "made", "name"),
    [(report.run, "report._heat_map", "features.png"), (evaluate.run, "evaluate._liveness", "quality.json")],
)
def test_who_has_lost_the_lease_writes_no_figures_and_no_picture(small, tmp_path, monkeypatch, stage, made, name):
    shutil.copytree(small[0].root, tmp_path / "store")
    store, recipe = Store(tmp_path / "store"), small[1]
    target = Lineage(store, recipe).features
    (target.path / name).unlink(missing_ok=True)
    module, function = {"report": report, "evaluate": evaluate}[made.split(".")[0]], made.split(".")[1]
    make = getattr(module, function)

    def slow(*arguments):
        take_over(target.slot)
        return make(*arguments)

    monkeypatch.setattr(module, function, slow)
    with pytest.raises(UserError, match="has taken over"):
        stage(Lineage(store, recipe), quiet())
    assert not (target.path / name).exists()


def test_a_run_on_a_corpus_is_drawn_as_a_histogram_of_densities(finished):
    path = Lineage(finished.store, finished.recipe).features.path / "density.png"
    assert path.read_bytes().startswith(PNG)


def test_the_table_of_features_holds_the_stored_values_under_the_rows_own_labels(small):
    store, recipe = small
    labels, values = feature_table(Lineage(store, recipe))
    assert labels == [line.split(",")[0] for line in PHRASES.splitlines()[1:]]
    artefact = Lineage(store, recipe).features
    wanted = np.zeros((9, 8), np.float32)
    for part in artefact.published().parts:
        rows = pq.read_table(value_file(artefact.part_path(part))).to_pydict()
        wanted[rows["token_id"], rows["feature_id"]] = rows["value"]
    np.testing.assert_array_equal(values, wanted)
    assert values.any()


def test_a_feature_is_active_above_a_tenth_of_its_own_maximum():
    values = np.array([[5.0, 0, 0.2], [0.5, 0, 0.01], [0.51, 0, 0.0]])
    assert active_sets(["cat", "dog", "robot"], values) == {0: frozenset({"cat", "robot"}), 2: frozenset({"cat"})}


@pytest.mark.parametrize("n_tokens", [[1], [1000], [1000, 1000, 20], [1000, 1], [999, 100, 10, 0]])
def test_every_live_feature_is_in_the_histogram(tmp_path, n_tokens):
    target = Store.create(tmp_path).artefact("features", "live", "00000000")
    target.create({})
    with target.new_part(0, {"n_tokens": 1000}) as folder:
        pq.write_table(pa.table({"n_tokens": np.array(n_tokens, np.int64)}), folder / "feature_stats.parquet")
    target.publish(target.parts().values())
    (axes,) = report._densities(target).axes
    assert sum(bar.get_height() for bar in axes.patches) == np.count_nonzero(n_tokens)


@pytest.mark.parametrize("n_features", [1, 8])
def test_a_run_in_which_nothing_fires_is_drawn_too(tmp_path, n_features):
    target = Store.create(tmp_path).artefact("features", "dead", "00000000")
    target.create({})
    with target.new_part(0, {"n_tokens": 9}) as folder:
        pq.write_table(pa.table({"n_tokens": np.zeros(n_features, np.int64)}), folder / "feature_stats.parquet")
    target.publish(target.parts().values())
    (axes,) = report._densities(target).axes
    assert axes.get_title() == f"0 live features, {n_features} dead"
