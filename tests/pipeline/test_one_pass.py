"""`activations.keep = false`: encoding in one pass of the model gives what encoding stored activations gives."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from saeflow.pipeline import collect, encode, stages, tokens, train
from saeflow.pipeline.dask import clusters
from saeflow.pipeline.judge import sweep
from saeflow.pipeline.lifecycle import forget, ingest
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.pipeline.lineage import Lineage
from saeflow.query.connection import check, connect
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store import garbage
from saeflow.store.artefact import Artefact
from saeflow.store.records import add_provenance
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.support.fake_cluster import FakeCluster, Watched
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, tree, write_corpus

SITES = ["transformer.h.0.mlp.act", "transformer.h.1"]
SAES: list[dict[str, Any]] = [
    {"sae.architecture": "topk", "sae.site": SITES[0]},
    {"sae.architecture": "jumprelu", "sae.site": SITES[1]},
    {"sae.architecture": "abstopk", "sae.site": SITES[1]},
    {"sae.architecture": "relu", "sae.site": SITES[0], "sae.l1_weight": 0.3},
    {"sae.architecture": "batchtopk", "sae.site": SITES[0], "sae.target_site": SITES[1]},
]


@dataclass
class Trained:
    """A store with SAEs that were trained on stored activations, in folders by the name of their sweep's member."""

    store: Store
    ingredients: Ingredients
    folders: list[Path]

    def recipe(self, name: str, keep: bool, n: int = len(SAES), **changes: Any) -> Recipe:
        """A recipe that encodes the first `n` of the SAEs, each made anew from its folder."""
        each = [
            {"sae.source": str(folder)} | {key: value for key, value in about.items() if "site" in key}
            for folder, about in zip(self.folders, SAES[:n], strict=False)
        ]
        about: dict[str, dict[str, Any]] = {
            "activations": {"sites": SITES, "keep": keep}, "tokens": {"part_tokens": 2000}, "sweep": {"each": each}
        }  # fmt: skip
        merged = {key: {**value, **changes.get(key, {})} for key, value in about.items()}
        return parse_recipe(recipe_data(self.ingredients, name=name, **changes | merged))


def trained_with(ingredients: Ingredients, folder: Path, saes: list[dict[str, Any]]) -> Trained:
    store = Store.create(folder / "store")
    about: dict[str, Any] = {"activations": {"sites": SITES}, "train": {"n_tokens": 2000}, "sweep": {"each": saes}}
    lineage = Lineage(store, parse_recipe(recipe_data(ingredients, **about)))
    for stage in (tokens.run, collect.run, train.run_all):
        stage(lineage, quiet())
    return Trained(store, ingredients, [member.sae.path for member in lineage.members])


@pytest.fixture(scope="module")
def trained(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_with(ingredients, tmp_path_factory.mktemp("one_pass"), SAES[:2])


@pytest.fixture(scope="module")
def trained_all(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_with(ingredients, tmp_path_factory.mktemp("one_pass_all"), SAES)


def encoded(store: Store, recipe: Recipe, progress: Progress | None = None) -> list[Artefact]:
    """The runs of a recipe, encoded."""
    lineage = Lineage(store, recipe)
    for stage in (tokens.run, collect.run, train.run_all, encode.run):
        stage(lineage, progress or quiet())
    return [member.features for member in lineage.members]


def values(run: Artefact) -> list[dict[str, bytes]]:
    """The files of each part, without the record, which names what the part was made from."""
    found = (tree(run.path / "parts" / part.folder) for part in run.published().parts)
    return [{name: content for name, content in files.items() if name != "part.json"} for files in found]


def activation_files(store: Store) -> list[Path]:
    """Everything of activations on disk but records, also what is being written."""
    found = (Path(folder) for folder, *_ in os.walk(store.root))
    norms = (Path(folder) for folder, _, names in os.walk(store.root) if "norms.parquet" in names)
    return [*(folder for folder in found if folder.suffix == ".zarr"), *norms]


VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16, isolated, threads, skipped": {
        "tokens": {"packing": "isolated"}, "threads": 3,
        "activations": {
            "dtype": "bfloat16", "forward_batch": 5, "skip_positions": [0, 3], "skip_special": True,
            "skip_norms_above": 1.2,
        },
    },
    "usual": {},
    "isolated": {"tokens": {"packing": "isolated"}},
    "float32": {"activations": {"dtype": "float32"}},
    "many parts": {"tokens": {"part_tokens": 300}},
}  # fmt: skip


@pytest.mark.long
def test_every_file_of_two_saes_at_two_sites_is_what_storing_gives_byte_for_byte(
    trained: Trained, tmp_path: Path
) -> None:
    assert_same_bytes(trained, tmp_path, next(iter(VARIANTS.values())))


@pytest.mark.long
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_file_of_every_sae_is_what_storing_gives_byte_for_byte(
    trained_all: Trained, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_same_bytes(trained_all, tmp_path, changes)


def assert_same_bytes(trained: Trained, tmp_path: Path, changes: dict[str, Any]) -> None:
    stores = [Store.create(tmp_path / name) for name in ("kept", "one_pass")]
    kept = encoded(stores[0], trained.recipe("all", keep=True, **changes))
    bars = dict[int, Bar]()
    with seen_on_disk(stores[1]) as seen:
        watched = Progress(verbosity=-1, listener=lambda bar: bars.update({id(bar): bar}))
        passed = encoded(stores[1], trained.recipe("all", keep=False, **changes), watched)
    [n_passed] = [bar.done for bar in bars.values() if bar.stage == "features"]
    assert n_passed == sum(kept[0].published().total(name) for name in ("n_tokens", "n_left_out_by_length"))
    assert len(kept) == len(passed) == len(trained.folders)
    for one, other in zip(kept, passed, strict=True):
        assert len(values(one)) > 1
        assert values(one) == values(other)
    assert activation_files(stores[0])
    assert not seen


@contextlib.contextmanager
def seen_on_disk(store: Store) -> Iterator[set[Path]]:
    """Every folder or file of activations that is in a store at any time inside the block."""
    ended, seen = threading.Event(), set[Path]()

    def watch() -> None:
        while not ended.wait(0.002):
            seen.update(activation_files(store))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        ended.set()
        watching.join()


def single(trained: Trained, name: str, keep: bool = False, **changes: Any) -> Recipe:
    """A recipe of the first SAE alone."""
    about: dict[str, Any] = {
        "sae": {"source": str(trained.folders[0]), "site": SITES[0]}, "activations": {"sites": SITES, "keep": keep}
    }  # fmt: skip
    merged = {key: {**value, **changes.get(key, {})} for key, value in about.items()}
    return parse_recipe(recipe_data(trained.ingredients, name=name, **changes | merged))


@pytest.mark.long
def test_quality_is_what_storing_gives(trained: Trained, tmp_path: Path) -> None:
    found = [
        stages.run(Lineage(Store.create(tmp_path / str(keep)), single(trained, "judged", keep)), quiet())["quality"]
        for keep in (True, False)
    ]
    assert found[1]["judged_on"] == "held-out documents"
    assert "loss_recovered_zero" in found[1]
    for name in ("n_tokens", "l0", "variance_unexplained", "loss_recovered_zero", "n_dead", "n_values"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6), name


@pytest.mark.long
def test_quality_without_held_out_documents_is_judged_on_the_others(trained: Trained, tmp_path: Path) -> None:
    recipe = single(trained, "all_train", corpus={"held_out": 0.0}, evaluate={"max_tokens": 500})
    quality = stages.run(Lineage(Store.create(tmp_path / "store"), recipe), quiet())["quality"]
    assert (quality["judged_on"], quality["n_tokens"]) == ("training data", 500)


def test_checks_verify_and_gc_find_nothing_wrong_with_parts_that_hold_no_arrays(
    trained: Trained, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "store")
    [run] = encoded(store, single(trained, "whole"))
    assert not list(verify(store, full=True))
    assert not garbage.collect_garbage(store, 0, remove=False).garbage
    with connect(store, run.id, threads=1) as connection:
        assert all(not len(rows) for _, rows in check(connection))


def test_a_lost_record_or_feature_part_is_made_again_to_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    store, recipe = Store.create(tmp_path / "store"), single(trained, "lost")
    [run] = encoded(store, recipe)
    before = tree(store.root)
    shutil.rmtree(run.path / "parts" / run.published().parts[1].folder)
    listed = Lineage(store, recipe).activations
    shutil.rmtree(listed.path / "parts" / listed.published().parts[2].folder)
    assert {each.artefact.kind for each in verify(store, full=False)} == {"features", "activations"}
    encoded(store, recipe)
    assert tree(store.root) == before


@pytest.mark.long
def test_documents_that_come_later_and_are_forgotten_or_erased_give_what_storing_gives(
    trained: Trained, tmp_path: Path
) -> None:
    rows, found = documents(60), []
    for keep in (True, False):
        corpus = write_corpus(tmp_path / "corpus.parquet", rows[:40])
        store = Store.create(tmp_path / f"store_{keep}")
        recipe = single(trained, "grows", keep, corpus={"files": [str(corpus)]}, features={"compact_parts": 2})
        stages.run(Lineage(store, recipe), quiet())
        write_corpus(corpus, rows)
        ingest.run(Lineage(store, recipe), quiet())
        done = forget.forget(store, ["letters/003"], quiet())
        assert done.runs
        assert not done.waiting
        hidden = values(Lineage(store, recipe).features)
        compact_store(Lineage(store, recipe), quiet())
        garbage.collect_garbage(store, 0, remove=True)
        assert not list(verify(store, full=True))
        found.append((hidden, values(Lineage(store, recipe).features)))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_workers_of_a_cluster_run_the_model_to_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    worker = FakeCluster(backwards=True)
    here = encoded(Store.create(tmp_path / "here"), single(trained, "spread"))
    recipe = single(trained, "spread", cluster={"address": "tcp://nobody:1"})
    with clusters.kept_open(worker.join):
        there = encoded(Store.create(tmp_path / "there"), recipe)
    assert [values(run) for run in here] == [values(run) for run in there]
    assert {work.maker.name for work in worker.works} == {"features-encode"}


@pytest.mark.long
def test_processes_of_a_cluster_run_the_model_to_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    here = encoded(Store.create(tmp_path / "here"), trained.recipe("spread", keep=False, n=2))
    store, cluster = Store.create(tmp_path / "there"), {"kind": "local", "n_workers": 2}
    with seen_on_disk(store) as seen:
        there = encoded(store, trained.recipe("spread", keep=False, n=2, cluster=cluster))
    assert len(there) == 2
    assert [values(run) for run in here] == [values(run) for run in there]
    assert not seen


@pytest.mark.long
def test_parts_made_one_by_one_as_tasks_are_given_share_the_model_to_the_same_bytes(
    trained: Trained, tmp_path: Path
) -> None:
    recipe = single(trained, "tasks", tokens={"part_tokens": 500}, threads=2)
    here = encoded(Store.create(tmp_path / "here"), recipe)
    lineage, asked = Lineage(Store.create(tmp_path / "tasks"), recipe), []
    for stage in (tokens.run, collect.run, train.run_all):
        stage(lineage, quiet())
    encode.run(lineage, quiet(), lambda executor: Watched(executor, asked.append))
    assert len(asked) > 2
    assert [values(run) for run in here] == [values(lineage.features)]


def test_another_model_at_the_same_place_is_refused_before_anything_is_encoded(
    trained: Trained, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained.ingredients.model, model)
    store, recipe = Store.create(tmp_path / "store"), single(trained, "moved", model={"path": str(model)})
    encoded(store, recipe)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.5}))
    done = forget.forget(store, ["letters/001"], quiet())
    assert "model.path" in next(iter(done.waiting.values()))


def as_named_on_the_hub(model: Path, cache: Path, name: str) -> None:
    """Put a model into a cache of the hub, as it lies there once it is downloaded."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "1" * 40
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


@pytest.mark.long
def test_a_store_names_a_model_but_only_a_recipe_makes_saeflow_ask_the_hub_for_it(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def unreachable(_: object, name: str, **__: object) -> None:
        asked.append(name)
        raise OSError("no way to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    as_named_on_the_hub(trained.ingredients.model, tmp_path / "hub", "someone/downloaded")
    store, recipe = Store.create(tmp_path / "store"), single(trained, "hub", model={"path": "someone/downloaded"})
    [run] = encoded(store, recipe)
    assert set(asked) == {"someone/downloaded"}
    asked.clear()
    assert forget.forget(store, ["letters/001"], quiet()).runs == [run.id]
    add_provenance(Lineage(store, recipe).activations.path, {"model": "stranger/model"})
    done = forget.forget(store, ["letters/003"], quiet())
    assert not asked
    assert list(done.waiting) == [run.id]
    assert "'stranger/model', which is not on this machine" in done.waiting[run.id]
    [again] = encoded(store, recipe)
    [anew] = encoded(store, recipe.model_copy(update={"name": "anew", "data": "hub"}))
    assert values(again) == values(anew)


@pytest.mark.long
def test_an_activation_that_the_precision_cannot_hold_is_refused_as_when_storing(
    trained: Trained, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained.ingredients.model, model)
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"] *= 1e6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for keep in (True, False):
        store = Store.create(tmp_path / f"store_{keep}")
        with pytest.raises(UserError, match=r"overflows float16[\s\S]*activations\.dtype"):
            encoded(store, single(trained, "loud", keep, model={"path": str(model)}))


@pytest.fixture
def sampled(ingredients: Ingredients) -> Recipe:
    about: dict[str, Any] = {"activations": {"keep": False}, "train": {"share": 0.4}}
    return parse_recipe(recipe_data(ingredients, name="sampled", **about))


def test_an_sae_is_trained_on_a_stored_sample_and_encodes_the_whole_corpus(
    ingredients: Ingredients, sampled: Recipe, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "store")
    lineage = Lineage(store, sampled)
    stages.run(lineage, quiet())
    n_sample, n_all = (each.tokens.published().total("n_documents") for each in (lineage.training, lineage))
    assert 0.2 < n_sample / n_all < 0.6
    assert lineage.features.published().total("n_tokens") == lineage.tokens.published().total("n_tokens")
    assert not any(path.is_relative_to(lineage.activations.path) for path in activation_files(store))
    alone = parse_recipe(recipe_data(ingredients, name="sampled", data="apart", corpus={"share": 0.4}))
    other = Lineage(Store.create(tmp_path / "alone"), alone)
    for stage in (tokens.run, collect.run, train.run):
        stage(other, quiet())
    weights = "sae_weights.safetensors"
    assert (other.sae.path / weights).read_bytes() == (lineage.sae.path / weights).read_bytes()
    before = tree(store.root)
    stages.run(Lineage(store, sampled), quiet())
    assert tree(store.root) == before


@pytest.mark.long
def test_what_comes_later_joins_the_sample_by_the_same_choice_and_the_next_training_sees_it(
    sampled: Recipe, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.parquet", documents(60))
    assert sampled.corpus
    recipe = sampled.model_copy(update={"corpus": sampled.corpus.model_copy(update={"files": [str(corpus)]})})
    store = Store.create(tmp_path / "store")
    stages.run(Lineage(store, recipe), quiet())
    first = Lineage(store, recipe).sae
    write_corpus(corpus, documents(120))
    found = ingest.run(Lineage(store, recipe), quiet())
    assert found["grown"] > 0.5
    keys = {
        name: {key for part in each.published().parts for key in documents_of(each, part)}
        for name, each in (("all", Lineage(store, recipe).tokens), ("sample", Lineage(store, recipe).training.tokens))
    }
    assert keys["sample"] < keys["all"]
    ingest.retrain(Lineage(store, recipe), quiet())
    assert Lineage(store, recipe).sae != first
    forget.forget(store, [max(keys["sample"])], quiet())
    compact_store(Lineage(store, recipe), quiet())
    assert all(
        max(keys["sample"]) not in documents_of(each, part)
        for each in store.artefacts("tokens")
        for part in each.published().parts
    )


def documents_of(source: Artefact, part: Any) -> list[str]:
    return list(pq.read_table(source.part_path(part) / "documents.parquet", columns=["key"])["key"].to_pylist())


@pytest.mark.long
def test_a_sweep_is_trained_on_one_sample_and_judged_by_the_model(ingredients: Ingredients, tmp_path: Path) -> None:
    about: dict[str, Any] = {
        "activations": {"keep": False}, "train": {"share": 0.4, "n_tokens": 2000}, "sweep": {"grid": {"sae.k": [2, 4]}}
    }  # fmt: skip
    store = Store.create(tmp_path / "store")
    lineage = Lineage(store, parse_recipe(recipe_data(ingredients, name="swept", **about)))
    stages.run(lineage, quiet())
    table = sweep.run(lineage, quiet())
    assert [row["judged_on"] for row in table["saes"]] == ["held-out documents"] * 2
    encode.run(lineage, quiet())
    assert all(member.features.published().parts for member in lineage.members)
    assert len(store.artefacts("activations")) == 2


A_TOY = {"kind": "sparse"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to train on": ({"activations": {"keep": False}}, "sae.source[\\s\\S]*train.share"),
    "no model": (
        {"activations": {"keep": False, "synthetic": A_TOY, "sites": []}, "model": None, "corpus": None},
        "no model can make",
    ),
    "a share of a table": (
        {"activations": {"synthetic": A_TOY, "sites": []}, "model": None, "corpus": None, "train": {"share": 0.1}},
        "train.share needs a",
    ),
    "a share swept": (
        {"activations": {"keep": False}, "sweep": {"grid": {"train.share": [0.1, 0.2]}}, "train": {"share": 0.1}},
        "cannot change",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_without_keeping_is_refused_with_the_way_out(
    ingredients: Ingredients, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(recipe_data(ingredients, **changes))
