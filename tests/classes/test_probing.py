"""The artefact of a probe: what it holds, how it is asked, and that nothing is lost when it is killed."""

from __future__ import annotations

import io
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

import saeflow
from saeflow.classes import probing
from saeflow.classes.annotations import Source, annotate, erase_hidden_spans
from saeflow.classes.membership import membership
from saeflow.classes.probing import ProbeSettings, estimate, members_of, probe, read_spans, score_tables, still_shown
from saeflow.classes.samples import draw_sample, random_values
from saeflow.classes.sparse_probes import probes
from saeflow.features import part_encoder, sample
from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.query.runs import pick_run, runs
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.terminal import Terminal
from saeflow.store import garbage
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.classes.test_scores import rounded, spans_of
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.small_pipeline import quiet
from tests.support.small_store import Given

CLASSES = "class,token_id,last_token_id\nstart,0,1\nstart,5,5\nlove,1,1\nlove,5,5\nlove,7,7\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Eight tokens of two documents with the annotations `words`."""
    made = Given().write(tmp_path / "store")
    (tmp_path / "words.csv").write_text(CLASSES)
    annotate(made, None, "words", Source(tmp_path / "words.csv"), quiet())
    return made


def probed(store: Store, **settings: object) -> Artefact:
    return probe(store, pick_run(store, runs(store), None), "words", ProbeSettings(replicates=20, **settings), 1)


def test_questions_answer_what_the_values_say(store):
    probed(store)
    values = np.zeros((8, 4))
    for token, feature, value in Given().values:
        values[token, feature] = value
    love = np.isin(np.arange(8), [1, 5, 7])
    with connect(store, threads=1) as connection:
        every = ask(connection, "feature_classes", []).to_pylist()
        of_class = ask(connection, "features_of_class", ["love"]).to_pylist()
        of_feature = ask(connection, "classes_of_feature", [0]).to_pylist()
    assert {(row["class"], row["feature_id"]) for row in every} == {
        (c, f) for c in ("love", "start") for f in (0, 1, 2)
    }
    assert [(row["feature_id"], row["n_both"]) for row in of_class] == [(0, 3), (2, 2)]
    assert [row["auroc"] for row in of_class] == pytest.approx([roc_auc_score(love, values[:, f]) for f in (0, 2)])
    assert [row["class"] for row in of_feature] == ["love", "start"]
    assert [row["auroc_low"] is not None for row in of_class] == [True, True]


def test_equal_probes_have_equal_bytes_and_another_seed_has_another_name(store, tmp_path):
    first = probed(store)
    before = {file.name: (first.path / file.name).read_bytes() for file in first.record.files}
    assert probed(store).id == first.id
    first.remove(first.path)
    again = probed(store)
    assert again.id == first.id
    assert before == {file.name: (again.path / file.name).read_bytes() for file in again.record.files}
    assert probed(store, seed=1).id != first.id


def test_a_probe_that_is_stopped_leaves_nothing_and_is_made_again(store, monkeypatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("saeflow.classes.probing.write_probe_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            probed(store)
    assert store.artefacts("probes") == []
    assert probed(store).complete()


def test_only_wanted_classes_are_probed_and_unknown_ones_refused(store):
    made = probed(store, classes=("love",))
    assert set(pq.read_table(made.path / "feature_classes.parquet")["class"].to_pylist()) == {"love"}
    with pytest.raises(UserError, match="no class 'lov'"):
        probed(store, classes=("lov",))
    with pytest.raises(UserError, match="no annotations 'verbs'"):
        probe(store, pick_run(store, runs(store), None), "verbs", ProbeSettings())


def test_more_classes_than_fit_into_memory_are_refused_with_both_numbers(store, monkeypatch):
    monkeypatch.setattr("saeflow.runtime.memory.total_memory", lambda: 4_000)
    with pytest.raises(UserError, match=r"4 features and 2 classes take 2\.5 KiB of memory, but half .* is 2\.0 KiB"):
        probed(store)
    assert probed(store, classes=("love",)).complete()


def test_a_later_probe_leaves_visible_what_it_does_not_replace(store):
    """Of the same values: sparse probes, if it makes none, and the classes that it was not asked for."""
    sparse, plain = probed(store, sparse=True), probed(store)
    with saeflow.open(store.root) as run:
        every = run.ask("feature_classes").to_pylist()
        assert {row["class"] for row in run.ask("sparse_probes").to_pylist()} == {"love", "start"}
    assert still_shown(store, plain) == [f"sparse probes of {sparse.id}"]
    one = probed(store, classes=("love",), seed=3)
    assert still_shown(store, one)[0] == f"other classes of {plain.id}"
    garbage.collect_garbage(store, 0, remove=True)
    assert store.artefacts("probes") == [sparse, plain, one]
    with saeflow.open(store.root) as run:
        assert {row["class"] for row in run.ask("sparse_probes").to_pylist()} == {"love", "start"}
        now = run.ask("feature_classes").to_pylist()
    place = [(row["class"], row["feature_id"], row["auroc"]) for row in now]
    assert sorted(place) == sorted((row["class"], row["feature_id"], row["auroc"]) for row in every)
    again = probed(store, sparse=True, seed=3)
    assert still_shown(store, again) == []
    garbage.collect_garbage(store, 0, remove=True)
    assert store.artefacts("probes") == [again]


def test_sparse_probes_of_other_values_are_not_shown(store):
    probed(store, sparse=True)
    (run,) = store.artefacts("features")
    with run.writing():
        (part,) = run.published().parts
        with run.new_part(part.index, dict(part.counts), {"other": "values"}) as work:
            shutil.copytree(run.part_path(part), work, dirs_exist_ok=True)
            (work / "part.json").unlink()
        run.publish([run.made[part.index]])
    plain = probed(store)
    assert still_shown(store, plain) == []
    with saeflow.open(store.root) as opened:
        assert opened.ask("sparse_probes").num_rows == 0
        assert opened.ask("feature_classes").num_rows > 0


def test_a_probe_says_how_far_it_is(store):
    said: list[str] = []
    progress = Progress(console=Terminal(file=io.StringIO()), log=said.append)
    chosen = pick_run(store, runs(store), None)
    probe(store, chosen, "words", ProbeSettings(replicates=20, sparse=True), 2, progress)
    units = [line.split(" in ")[0] for line in said]
    assert units == ["probe: 4 features", "intervals: 2 features", "sparse: 6 probes"]


def test_a_planted_direction_is_found_by_one_feature_and_not_by_random_ones():
    """Four features decide a class each; neurons mix them, and random directions hold a bit of all."""
    dice = np.random.default_rng(0)
    n, n_features, width = 4_000, 24, 16
    active = rounded(dice.lognormal(0, 0.3, (n, n_features)) * (dice.random((n, n_features)) < 0.15))
    directions = dice.normal(size=(n_features, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    neurons = (active @ directions).astype(np.float32)
    classes = active[:, :4] > 0
    members = membership(spans_of(classes, 0), np.arange(n), np.arange(n) // 40)
    sample = draw_sample(members, 0, 2_000, 500)
    found = {}
    for basis, values in {
        "features": sparse.csc_array(active[sample.places]),
        "neurons": sparse.csc_array(neurons[sample.places]),
        "random": random_values(neurons[sample.places], n_features, 4, 0),
    }.items():
        found[basis] = [{row["k"]: row for row in probes(values, sample, c)} for c in range(4)]
    for c in range(4):
        assert found["features"][c][1]["dimensions"] == [c]
        assert found["features"][c][1]["auroc"] == 1
        assert found["features"][c][1]["f1"] == 1
        assert max(found[basis][c][1]["auroc"] for basis in ("neurons", "random")) < 0.95
    assert sample.is_test.mean() == pytest.approx(0.3, abs=0.05)
    held = {int(d) for d in (sample.places // 40)[sample.is_test]}
    assert held.isdisjoint((sample.places // 40)[~sample.is_test].tolist())


def test_a_class_is_judged_against_the_corpus_and_not_against_the_tokens_of_other_classes():
    """The feature fires at every token of a common class, and at those of a rare one, which is drawn more often."""
    dice = np.random.default_rng(0)
    n = 40_000
    common, rare = dice.random((2, n)) < np.array([[0.2], [0.01]])
    fires = np.where(common | rare, dice.random(n) + 1, dice.random(n)).astype(np.float32)
    members = membership(spans_of(np.stack([common, rare], 1), 0), np.arange(n), np.arange(n) // 100)
    sample = draw_sample(members, 0, 2_000, 1_000)
    row = next(iter(probes(sparse.csc_array(fires[sample.places, None]), sample, 0)))
    assert row["auroc"] == pytest.approx(roc_auc_score(common, fires), abs=0.01)
    assert row["n_train"] + row["n_test"] < 2_000 + 1_000


def test_annotations_whose_documents_are_all_forgotten_are_an_error_in_words(store, tmp_path):
    for kind in ("tokens", "features"):
        shutil.rmtree(store.root / kind)
    forgotten = Given(hidden=[0, 1]).write(store.root)
    erase_hidden_spans(forgotten, forgotten.artefacts("tokens")[0], quiet())
    with pytest.raises(UserError, match="no span left"):
        probed(forgotten)


def test_the_command_probes_neurons_and_random_directions_too(saeflow: Command, finished: Finished, tmp_path):
    shutil.copytree(finished.store.root, tmp_path / "store")
    store = ["--store", tmp_path / "store"]
    sql = "select token_id, if(token_id % 3 = 0, 'a', 'b') as class from tokens"
    assert saeflow("annotate", "thirds", "--sql", sql, *store).code == 0
    said = saeflow("probe", "thirds", "--sparse", "--replicates", 20, *store)
    assert said.code == 0, said.err
    assert "random SAE" in said.out
    rows = saeflow("ask", "sparse_probes", "-f", "csv", *store).out.splitlines()
    assert len(rows) == 1 + 2 * 3 * 3


def test_the_command_says_that_no_feature_fires_in_a_class_and_shows_intervals_from_zero(
    saeflow: Command, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "odd.csv").write_text("class,token_id\nsilent,2\nlow,0\nlow,1\nlow,3\nlow,5\nlow,7\n")
    place = ["--store", store.root]
    assert saeflow("annotate", "odd", tmp_path / "odd.csv", *place).code == 0
    said = saeflow("probe", "odd", "--replicates", 20, *place)
    assert said.code == 0, said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert ["silent", "1", "none", "fires", "-", "-", "-", "-"] in rows
    assert "None" not in said.out


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two parts of 94 documents, half of which are in the sample, and the annotations `words`: where feature 3 fires,
    or 5. A part's sample has several stretches."""
    monkeypatch.setattr(sample, "SAMPLED_BELOW", "80")
    monkeypatch.setattr(part_encoder, "SampleWriter", partial(sample.SampleWriter, sorted_values=50_000))
    made = Store.create(tmp_path / "store")
    _made_run.make(made, 1 << 21, part_tokens=[1 << 14, 3 << 14], n_features=64)
    with connect(made) as connection:
        rows = connection.sql(
            "select feature_id, token_id from stg_feature_major where feature_id in (3, 5)"
        ).fetchall()
    lines = [f"{name},{token},{token}" for f, token in sorted(rows) for name in [f"of {f}"] if token % 3]
    (tmp_path / "words.csv").write_text("\n".join(["class,token_id,last_token_id", *lines]))
    annotate(made, None, "words", Source(tmp_path / "words.csv"), quiet())
    return made


def test_an_estimate_has_the_figures_of_all_tokens_of_sampled_documents(sampled, monkeypatch):
    run, settings = pick_run(sampled, runs(sampled), None), ProbeSettings(replicates=20)
    assert estimate(sampled, run, "words", settings) is None  # there are few values
    monkeypatch.setattr(probing, "QUICK_VALUES", 1_000)
    found = estimate(sampled, run, "words", settings, threads=2)
    members = members_of(sampled, run, read_spans(probing.find_annotations(sampled, run, "words")), sampled=True)
    assert 30 <= members.n_documents < 80
    expected = score_tables(run, "words", members, settings, threads=2)
    assert found == expected
    best = probing.best_of_each_class(found["class_sizes"], found["feature_classes"])
    assert [row["feature_id"] for row in best] == [3, 5]
    probe(sampled, run, "words", settings, 1)
    assert estimate(sampled, run, "words", settings) is None  # the exact figures are there


def test_without_a_sampled_document_a_probe_is_not_estimated(sampled, monkeypatch):
    monkeypatch.setattr(probing, "QUICK_VALUES", 1_000)
    monkeypatch.setattr(probing, "_SAMPLED_TOKENS", "select 1 where false")  # would be refused as no tokens
    monkeypatch.setattr(probing, "FEWEST_DOCUMENTS", 10_000)
    assert estimate(sampled, pick_run(sampled, runs(sampled), None), "words", ProbeSettings(replicates=20)) is None


def test_the_command_prints_figures_of_the_sample_first_unless_told_to_wait(saeflow: Command, sampled, monkeypatch):
    monkeypatch.setattr(probing, "QUICK_VALUES", 1_000)
    for options, is_first in ((["--seed", "3"], False), (["--exact", "--seed", "1"], False), (["--seed", "2"], True)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda on_terminal="3" not in options: on_terminal)
        said = saeflow("probe", "words", "--store", sampled.root, *options)
        assert said.code == 0, said.err
        assert ("Approximate" in said.err) == is_first
        assert said.out.count("of 3") == 1 + is_first
