"""A corpus that changes: exactly what is new is read, stored, encoded and answered about; a new SAE once enough has
come."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from saeflow.cli import app as cli
from saeflow.corpus.document import Document
from saeflow.corpus.ledger import Entry, Ledger
from saeflow.features.compaction import MergeSettings, PartMerger
from saeflow.pipeline import collect, stages, tokens, train
from saeflow.pipeline.dask.clusters import kept_open, workers_of
from saeflow.pipeline.lifecycle import forget, ingest
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import PartWork
from saeflow.query.ask import query
from saeflow.query.connection import check, connect
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.schedule import ScheduleConfig, next_time
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.store import garbage
from saeflow.store import verify as integrity
from saeflow.store.files import read_json, write_json
from saeflow.store.records import KINDS, Generation
from saeflow.store.store import Store
from tests.support.fake_cluster import FakeCluster
from tests.support.small_pipeline import (
    Ingredients,
    a_table,
    brought_data,
    documents,
    quiet,
    recipe_data,
    tree,
    write_table,
)

WORD = "zebu"
"""In none of the first texts."""

FIRST = {f"{number:02d}.txt": row["text"] for number, row in enumerate(documents()[-24:])}
NEW = {f"new{number}.txt": f"{row['text']} {WORD}." for number, row in enumerate(documents(9, seed=5)[6:9])}


@dataclass
class Watched:
    """A store, and the folder of texts that it follows."""

    store: Store
    recipe: Recipe
    texts: Path

    def ingest(self) -> dict[str, Any]:
        return ingest.run(Lineage(self.store, self.recipe), quiet())

    def drop(self, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            (self.texts / name).write_text(text, "utf-8")

    def lose(self, *names: str) -> None:
        for name in names:
            (self.texts / name).unlink()

    def with_schedule(self, **settings: Any) -> Watched:
        schedule = self.recipe.schedule.model_copy(update=settings)
        return Watched(self.store, self.recipe.model_copy(update={"schedule": schedule}), self.texts)

    def sql(self, text: str) -> list[dict[str, Any]]:
        with contextlib.closing(connect(self.store)) as connection:
            return list(query(connection, text).to_pylist())

    def held(self) -> list[str]:
        return sorted(row["key"] for row in self.sql("select key from documents"))

    def says(self, word: str, run: str | None = None) -> bool:
        """Does a run (default: the newest) know features that fire on this word?"""
        with contextlib.closing(connect(self.store, run)) as connection:
            return len(query(connection, f"from features_on('{word}', 5)")) > 0

    def broken_checks(self) -> list[str]:
        with contextlib.closing(connect(self.store)) as connection:
            return [name for name, rows in check(connection) if len(rows)]

    def written(self) -> dict[str, int]:
        """When each file of the artefacts was written."""
        files = [path for kind in KINDS for path in (self.store.root / kind).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.store.root)): path.stat().st_mtime_ns for path in files}

    def folders(self) -> set[str]:
        return {path.name for kind in KINDS for path in (self.store.root / kind).glob("*/parts/*")}


def fill(texts: Path) -> None:
    shutil.rmtree(texts, ignore_errors=True)
    texts.mkdir()
    Watched(Store(texts), Recipe.model_construct(), texts).drop(FIRST)


@pytest.fixture(scope="module")
def first_night(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, dict[str, Any]]:
    """What the first ingest makes of a folder of texts, and what it says."""
    folder = tmp_path_factory.mktemp("night")
    fill(folder / "texts")
    corpus = {"files": [str(folder / "texts" / "*.txt")]}
    recipe = parse_recipe(recipe_data(ingredients, corpus=corpus, train={"n_tokens": 2000}))
    watched = Watched(Store.create(folder / "store"), recipe, folder / "texts")
    return watched, watched.ingest()


@pytest.fixture
def night(first_night: tuple[Watched, dict[str, Any]], tmp_path: Path) -> Watched:
    """A copy of its store, with the texts as they were."""
    watched, _ = first_night
    shutil.copytree(watched.store.root, tmp_path / "store")
    fill(watched.texts)
    return Watched(Store.create(tmp_path / "store"), watched.recipe, watched.texts)


def test_the_first_ingest_trains_and_ends_with_answers(first_night: tuple[Watched, dict[str, Any]]) -> None:
    watched, summary = first_night
    assert summary["trained"]
    assert summary["n_documents"] == len(FIRST)
    assert summary["grown"] == 0
    assert watched.held() == sorted(FIRST)
    assert watched.says("the cat")
    assert not watched.says(WORD)


def test_an_ingest_of_the_same_corpus_writes_nothing(night: Watched) -> None:
    before = night.written()
    night.ingest()
    touched = night.written()
    summary = night.ingest()
    assert night.written() == touched
    assert {name for name in touched if touched[name] != before.get(name)} <= {
        name for name in touched if name.endswith(("provenance.json", "vocab.parquet"))
    }
    assert (summary["n_documents"], summary["n_tokens"], summary["trained"]) == (0, 0, False)
    assert not any(summary["parts"].values())


def test_exactly_the_new_documents_tokens_and_parts_are_touched(night: Watched) -> None:
    night.ingest()
    before, folders = night.written(), night.folders()
    night.drop(NEW)
    summary = night.ingest()
    assert night.says(WORD)
    assert night.held() == sorted([*FIRST, *NEW])
    assert summary["n_documents"] == len(NEW)
    new = ", ".join(f"'{name}'" for name in NEW)
    [counted] = night.sql(f"select sum(n_tokens)::bigint as n from documents where key in ({new})")
    assert summary["n_tokens"] == counted["n"]
    assert {name.partition("/")[0]: len(parts) for name, parts in summary["parts"].items()} == {
        "tokens": 1, "activations": 1, "features": 1,
    }  # fmt: skip
    changed = [name for name, when in night.written().items() if name in before and before[name] != when]
    assert {Path(name).name for name in changed} <= {"manifest.json", "provenance.json", "vocab.parquet"}, (
        "something old was written"
    )
    assert not summary["trained"]
    assert len(night.folders() - folders) == 3
    assert not night.broken_checks()


def test_a_changed_document_takes_the_place_of_the_old_one(night: Watched) -> None:
    night.drop({"03.txt": f"Now it speaks of a {WORD}."})
    summary = night.ingest()
    assert summary["n_documents"] == 1
    assert night.held() == sorted(FIRST)
    assert night.says(WORD)
    assert not night.broken_checks()


def test_every_published_run_over_the_activations_follows(night: Watched) -> None:
    data = night.recipe.model_dump(mode="json")
    other = parse_recipe(data | {"name": "other", "data": "small", "sae": data["sae"] | {"k": 2}})
    stages.run(Lineage(night.store, other), quiet())
    night.drop(NEW)
    summary = night.ingest()
    grown = {name: parts for name, parts in summary["parts"].items() if name.startswith("features/")}
    assert sorted(name.partition("-")[0] for name in grown) == ["features/other", "features/small"]
    for name in grown:
        assert len(night.store.by_id(name).published().parts) == len(
            Lineage(night.store, night.recipe).activations.published().parts
        )


@pytest.mark.long
def test_a_run_that_is_being_written_follows_later_and_one_that_cannot_is_named_after_the_others(
    night: Watched,
) -> None:
    data = night.recipe.model_dump(mode="json")
    other = parse_recipe(data | {"name": "other", "data": "small", "sae": data["sae"] | {"k": 2}})
    stages.run(Lineage(night.store, other), quiet())
    night.drop(NEW)
    name = Lineage(night.store, other).features.id
    with Lineage(night.store, other).features.writing():
        assert night.ingest()["parts"][name] == []
    assert night.says(WORD, Lineage(night.store, night.recipe).features.id)
    assert night.ingest()["parts"][name] != []
    night.drop({"another.txt": FIRST["00.txt"]})
    shutil.rmtree(Lineage(night.store, other).sae.path)
    with pytest.raises(UserError, match=rf"{name} does not hold the new documents yet"):
        night.ingest()
    own = Lineage(night.store, night.recipe).features.published()
    assert len(own.parts) == len(Lineage(night.store, night.recipe).activations.published().parts)


def test_published_runs_follow_though_the_recipes_own_cannot_be_made_and_it_is_named(night: Watched) -> None:
    data = night.recipe.model_dump(mode="json")
    own = parse_recipe(data | {"sae": data["sae"] | {"k": 3, "n_features": 10**9}})
    night.drop(NEW)
    with pytest.raises(UserError, match=r"^small does not hold the new documents yet: .*of memory"):
        ingest.run(Lineage(night.store, own), quiet())
    assert night.says(WORD, Lineage(night.store, night.recipe).features.id)


@pytest.mark.long
def test_whatever_ends_one_run_the_others_follow(night: Watched) -> None:
    data = night.recipe.model_dump(mode="json")
    other = parse_recipe(data | {"name": "a", "data": "small", "sae": data["sae"] | {"k": 2}})
    stages.run(Lineage(night.store, other), quiet())
    first, own = (Lineage(night.store, each).features for each in (other, night.recipe))
    night.drop(NEW)

    def break_down(work: PartWork, item: Any) -> None:
        if first in work.targets:
            raise RuntimeError("CUDA error: out of memory")

    with (
        kept_open(FakeCluster(before=break_down).join),
        pytest.raises(UserError, match=f"^{first.id} does not hold .*: RuntimeError: CUDA error: out of memory$"),
    ):
        ingest.run(Lineage(night.store, on_a_cluster(night)), quiet())
    assert night.says(WORD, own.id)
    assert own.published().parts[-1].folder in (night.store.root / "catalog.sql").read_text()


def begin_another(night: Watched) -> str:
    """A run whose first encoding was killed."""
    own = Lineage(night.store, night.recipe).features
    begun = night.store.artefact("features", "a", "00000000")
    begun.create(own.record.facts, own.record.inputs)
    return begun.id


def test_a_run_that_was_never_finished_keeps_no_other_from_following_or_being_compacted(night: Watched) -> None:
    begin_another(night)
    night.drop(NEW)
    night.ingest()
    assert night.says(WORD)
    compact_store(Lineage(night.store, night.recipe), quiet())
    assert len(Lineage(night.store, night.recipe).features.published().parts) == 1


def test_the_catalog_is_written_though_a_run_cannot_be_compacted(night: Watched) -> None:
    (night.store.root / "catalog.sql").unlink()
    run = Lineage(night.store, night.recipe).features
    with run.writing(), pytest.raises(UserError, match=f"Another run is writing {run.id}"):
        compact_store(Lineage(night.store, night.recipe), quiet())
    assert (night.store.root / "catalog.sql").is_file()


def merging(night: Watched) -> Watched:
    """The same night, whose runs merge every two parts."""
    features = night.recipe.features.model_copy(update={"compact_parts": 2})
    return Watched(night.store, night.recipe.model_copy(update={"features": features}), night.texts)


def test_after_an_append_parts_are_merged_and_answers_stay(night: Watched) -> None:
    run = Lineage(night.store, night.recipe).features
    n_encoded = len(Lineage(night.store, night.recipe).activations.published().parts)
    night.drop(NEW)
    night.ingest()
    values = "select token_id, feature_id, value from stg_token_major order by all"
    before = night.sql(values)
    n_parts = len(run.published().parts)
    assert n_parts > n_encoded
    summary = merging(night).ingest()
    assert summary["parts"][run.id] == [], "merged parts hold nothing new"
    assert len(run.published().parts) <= n_parts.bit_length()
    assert night.sql(values) == before
    assert run.published().parts[-1].folder in (night.store.root / "catalog.sql").read_text()
    assert not night.broken_checks()
    written = night.written()
    merging(night).ingest()
    assert night.written() == written


def test_an_ingest_finishes_the_merge_that_was_killed(night: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(night.store.root, night.store.root.with_name("alone"))
    alone = merging(Watched(Store(night.store.root.with_name("alone")), night.recipe, night.texts))
    with monkeypatch.context() as patched:
        patched.setattr(PartMerger, "_write_by_feature", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merging(night).ingest()
    assert night.says("the cat")
    for each in (merging(night), alone):
        each.ingest()
    run = Lineage(night.store, night.recipe).features
    assert tree(run.path / "parts") == tree(Lineage(alone.store, night.recipe).features.path / "parts")
    assert len(run.published().parts) < len(Lineage(night.store, night.recipe).activations.published().parts)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_append_does_not_fail_for_want_of_room_to_merge(night: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: Store, n_bytes: int, purpose: str) -> None:
        if purpose.startswith("Merging") and n_bytes:
            raise UserError("no room")

    said: list[str] = []
    monkeypatch.setattr(Store, "require_free", refuse)
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    night.drop(NEW)
    assert merging(night).ingest()["n_documents"] == len(NEW)
    assert night.says(WORD)
    [words] = [text for text in said if "not merged" in text]
    assert words == f"ingest: parts of {Lineage(night.store, night.recipe).features.id} are not merged: no room"


def test_merges_after_an_append_are_bounded(night: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Lineage(night.store, night.recipe).features
    before = run.published().parts
    smallest = min(part.counts["n_values"] for part in before)
    for most, merged in ((smallest, False), (10**9, True)):
        monkeypatch.setattr(ingest, "AFTER_APPEND", MergeSettings(most_values=most, most_at_once=most))
        merging(night).ingest()
        assert (run.published().parts != before) is merged


def test_new_parts_are_encoded_and_checked_as_the_recipe_says(night: Watched) -> None:
    data = night.recipe.model_dump(mode="json")
    about = {"device": "cpu", "batch_rows": 7, "check_values": 3, "compact_parts": 100}
    recipe, cluster, totals = parse_recipe(data | {"features": about}), FakeCluster(), dict[str, int | None]()
    on_it = recipe.model_copy(update={"cluster": on_a_cluster(night).cluster})
    run = Lineage(night.store, night.recipe).features
    before = {part.folder for part in run.published().parts}
    night.drop({f"many{number}.txt": row["text"] for number, row in enumerate(documents(40, seed=5)[6:])})
    with kept_open(cluster.join):
        hear = Progress(verbosity=-1, listener=lambda bar: totals.update({bar.stage: bar.total}))
        ingest.run(Lineage(night.store, on_it), hear)
    [work] = [each for each in cluster.works if each.maker.name == "features-encode"]
    assert work.settings["features"] == recipe.features.model_dump(mode="json")
    assert work.n_at_once == n_threads(recipe.threads)
    assert "features" in totals
    fresh = [part for part in run.published().parts if part.folder not in before]
    assert len(fresh) > 1
    assert totals["checks"] == fresh[-1].counts["n_values"], "one part has more than 3 values: it alone is checked"


def test_a_disk_without_room_for_the_new_values_is_said_before_they_are_encoded(
    night: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    night.drop(NEW)
    real = Store.require_free

    def full(self: Store, n_bytes: int, purpose: str) -> None:
        real(self, n_bytes if purpose != "Storing every feature activation" else 1 << 60, purpose)

    monkeypatch.setattr(Store, "require_free", full)
    with pytest.raises(UserError, match="does not hold the new documents yet: Storing every feature activation needs"):
        night.ingest()


def on_a_cluster(night: Watched) -> Recipe:
    return parse_recipe(night.recipe.model_dump(mode="json") | {"cluster": {"kind": "local", "n_workers": 2}})


def test_workers_encode_what_an_ingest_found_where_the_recipe_has_a_cluster(night: Watched) -> None:
    night.drop(NEW)
    tokens.run(Lineage(night.store, night.recipe), quiet())
    collect.run(Lineage(night.store, night.recipe), quiet())
    cluster = FakeCluster()
    with kept_open(cluster.join):
        ingest.run(Lineage(night.store, on_a_cluster(night)), quiet())
    assert [work.maker.name for work in cluster.works] == ["features-encode"]
    assert night.says(WORD)
    assert not night.broken_checks()


def test_a_cluster_of_its_own_is_started_once_however_many_blocks_keep_it_open(night: Watched) -> None:
    cluster, config = FakeCluster(), on_a_cluster(night).cluster
    assert config is not None
    with kept_open(cluster.join):
        for _ in range(2):
            with kept_open(), workers_of(night.store, config, quiet()):
                pass
    assert cluster.n_joined == 1


def test_a_stage_holds_a_place_while_it_works_and_an_ingest_of_nothing_new_waits_for_none(night: Watched) -> None:
    held: list[str] = []

    @contextlib.contextmanager
    def place(stage: str) -> Iterator[None]:
        assert not [name for name in held if name.startswith("in ")], "two places at once"
        held.append(f"in {stage}")
        yield
        held[-1] = stage

    def asked() -> list[str]:
        found = held.copy()
        held.clear()
        return found

    ingest.run(Lineage(night.store, night.recipe), quiet(), place)
    assert asked() == []
    night.drop(NEW)
    ingest.run(Lineage(night.store, night.recipe), quiet(), place)
    assert asked() == ["collect", "encode"]
    ingest.retrain(Lineage(night.store, night.recipe), quiet(), place=place)
    assert asked() == ["train", "encode", "compact", "evaluate", "report"]
    compact_store(Lineage(night.store, night.recipe), quiet(), place=place)
    assert asked() == []


def test_a_place_is_that_of_a_gpu_that_the_stage_would_use(night: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.support import tasks

    taken: list[str] = []

    @contextlib.contextmanager
    def counted(*_: Any, **__: Any) -> Iterator[None]:
        taken.append("a place")
        yield

    monkeypatch.setattr(tasks, "concurrency", counted)
    data = night.recipe.model_dump(mode="json")

    def stages_on_gpu(**changes: Any) -> set[str]:
        recipe, found = parse_recipe(data | changes), set[str]()
        for stage in ("tokens", "collect", "train", "encode", "compact", "evaluate", "report"):
            taken.clear()
            with tasks.places(recipe)(stage):
                found |= {stage} if taken else set()
        return found

    on_gpu = {"model": data["model"] | {"device": "cuda"}, "features": {"device": "cpu"}}
    assert stages_on_gpu() == set()
    assert stages_on_gpu(**on_gpu) == {"collect", "encode", "evaluate"}
    assert stages_on_gpu(**on_gpu, cluster={"kind": "local"}) == {"evaluate"}
    assert stages_on_gpu(train=data["train"] | {"device": "cuda"}) == {"train"}


def test_a_training_is_asked_for_by_the_next_ingest_where_the_one_that_read_the_documents_failed(
    night: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.ingest import has_grown

    night = night.with_schedule(train_growth=0.01)
    night.drop(NEW)

    def killed(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(collect, "run", killed)
        with pytest.raises(OSError, match="the disk is gone"):
            night.ingest()
    found = night.ingest()
    assert found["n_documents"] == 0
    assert has_grown(night.recipe, found)
    assert has_grown(night.recipe, night.ingest()), "asked again until an SAE is trained"
    ingest.retrain(Lineage(night.store, night.recipe), quiet())
    assert not has_grown(night.recipe, night.ingest())
    assert not has_grown(night.with_schedule(train_growth=0.0).recipe, found)
    assert not has_grown(night.recipe, {"grown": math.inf}), "the first SAE is at work elsewhere"


def test_an_ingest_of_nothing_new_reads_the_lists_of_parts_once_whatever_the_stages(
    night: Watched,
) -> None:
    data = night.recipe.model_dump(mode="json")
    stages.run(
        Lineage(night.store, parse_recipe(data | {"name": "other", "corpus": {**data["corpus"], "share": 0.5}})),
        quiet(),
    )
    night.ingest()
    times = Counter[str]()

    class Counted(WeakValueDictionary[tuple[str, int, str], Generation]):
        def __setitem__(self, key: tuple[str, int, str], generation: Generation) -> None:
            times[key[0]] += 1
            super().__setitem__(key, generation)

    night.store.storage.lists = Counted()
    night.ingest()
    lineage = Lineage(night.store, night.recipe)
    assert times[lineage.tokens.id] == times[lineage.activations.id] == 1
    assert max(times.values()) <= 2, "of a run once more, for catalog.sql"


@pytest.mark.long
def test_of_the_recipes_own_runs_only_the_newest_follow_where_it_keeps_so_many(night: Watched) -> None:
    data = night.recipe.model_dump(mode="json")
    other = parse_recipe(data | {"name": "other", "data": "small", "sae": data["sae"] | {"k": 2}})
    stages.run(Lineage(night.store, other), quiet())
    own = [Lineage(night.store, night.recipe).features]
    for number in range(2):
        night.drop({f"{number}.txt": FIRST["00.txt"]})
        night.ingest()
        ingest.retrain(Lineage(night.store, night.recipe), quiet())
        own.append(Lineage(night.store, night.recipe).features)
    night = night.with_schedule(keep_runs=2)
    night.drop(NEW)
    parts = night.ingest()["parts"]
    assert [bool(parts[each.id]) for each in own] == [False, True, True]
    assert parts[Lineage(night.store, other).features.id]
    assert not night.says(WORD, own[0].id)
    assert night.with_schedule(keep_runs=0).ingest()["parts"][own[0].id]


def test_documents_that_are_gone_are_kept_unless_the_recipe_says_so(night: Watched) -> None:
    night.lose("05.txt", "06.txt")
    assert night.ingest()["n_removed"] == 0
    assert night.held() == sorted(FIRST)


@pytest.mark.long
def test_documents_that_are_gone_are_forgotten_where_the_recipe_says_so_and_come_back_as_new(night: Watched) -> None:
    night = night.with_schedule(removed="forget")
    assert night.ingest()["n_removed"] == 0
    night.lose("05.txt", "06.txt")
    assert night.ingest()["n_removed"] == 2
    assert night.held() == sorted(set(FIRST) - {"05.txt", "06.txt"})
    assert night.ingest()["n_removed"] == 0
    night.drop({"05.txt": FIRST["05.txt"]})
    assert night.ingest()["n_documents"] == 1
    assert night.held() == sorted(set(FIRST) - {"06.txt"})
    assert not night.broken_checks()


def test_documents_that_went_before_the_setting_was_made_go_too(night: Watched) -> None:
    night.lose("05.txt")
    night.ingest()
    assert night.with_schedule(removed="forget").ingest()["n_removed"] == 1


@pytest.mark.long
def test_a_disk_that_is_not_mounted_forgets_nothing_and_what_is_new_comes_in_all_the_same(night: Watched) -> None:
    night = night.with_schedule(removed="forget", most_removed=0.25)
    night.lose(*sorted(FIRST)[:7])
    night.drop(NEW)
    with pytest.raises(UserError, match=r"7 of 24 documents are gone .*29%; schedule\.most_removed is 0\.25"):
        night.ingest()
    assert night.held() == sorted([*FIRST, *NEW])
    assert night.says(WORD)
    with pytest.raises(UserError, match=r"7 of 27 documents are gone"):  # again, although nothing has changed
        night.ingest()
    assert night.with_schedule(removed="forget", most_removed=0.3).ingest()["n_removed"] == 7
    night.lose(*sorted(FIRST)[7:], *NEW)
    with pytest.raises(UserError, match="nothing matches"):
        night.ingest()
    assert len(night.held()) == len(FIRST) - 7 + len(NEW)


def test_an_ingest_killed_between_forgetting_and_reading_forgets_no_more_and_no_less(
    night: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = night.with_schedule(removed="forget")
    night.lose("05.txt")
    night.drop(NEW)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tokens, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            night.ingest()
    summary = night.ingest()
    assert summary["n_documents"] == len(NEW)
    assert night.held() == sorted([*(set(FIRST) - {"05.txt"}), *NEW])


def test_a_document_deleted_while_the_corpus_is_looked_through_is_forgotten_by_the_next_ingest(
    night: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = night.with_schedule(removed="forget")
    night.lose("05.txt")

    def deleted_meanwhile(*arguments: Any) -> Any:
        found = forget.forget_removed(*arguments)
        night.lose("06.txt")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(ingest, "forget_removed", deleted_meanwhile)
        assert night.ingest()["n_removed"] == 1
    assert "06.txt" in night.held()
    assert night.ingest()["n_removed"] == 1
    assert night.held() == sorted(set(FIRST) - {"05.txt", "06.txt"})


def test_of_documents_of_one_key_the_one_that_is_gone_goes(ingredients: Ingredients, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"

    def write(*texts: str) -> None:
        path.write_text("".join(json.dumps({"key": "austen", "text": text}) + "\n" for text in texts), "utf-8")

    write("Emma is gone.", WORD)
    corpus = {"files": [str(path)], "held_out": 0.0}
    data = recipe_data(ingredients, corpus=corpus, schedule={"removed": "forget"})
    recipe = parse_recipe(data)
    store = Store.create(tmp_path / "store")
    tokens.run(Lineage(store, recipe), quiet())
    write(WORD)
    found = forget.forget_removed(Lineage(store, recipe), quiet())
    source = tokens.run(Lineage(store, recipe), quiet())
    [hidden] = source.published().hidden_ids
    assert (found.n, hidden) == (1, 0)


_DOCUMENTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("ABCD")), min_size=1, max_size=6).map(
    lambda documents: sorted(documents, key=lambda each: each[0])
)
"""Keys and texts, equal keys one after the other, as files give them."""


def looked_through(
    stored: list[tuple[Entry, tuple[str, str]]], now: list[tuple[str, str]], about: CorpusConfig
) -> set[int]:
    """Places of what is gone from the corpus."""
    ledger = Ledger.of([(entry.key, entry.document.content_hash) for entry, _ in stored])
    forget.look_through(ledger, (Document(key, text, "files") for key, text in now), about)
    return set(ledger.ids_not_met().tolist())


def taken_in(
    stored: list[tuple[Entry, tuple[str, str]]], now: list[tuple[str, str]], about: CorpusConfig
) -> list[tuple[Entry, tuple[str, str]]]:
    """What is stored after the next reading."""
    ledger = Ledger.of([(entry.key, entry.document.content_hash) for entry, _ in stored])
    texts = [text for _, text in now]
    read = [each for place, each in enumerate(now) if not (about.dedup and each[1] in texts[:place])]
    new = list(ledger.entries_to_store((Document(key, text, "files") for key, text in read), about))
    replaced = {each.document_id for each in ledger.changed}
    held = [each for place, each in enumerate(stored) if place not in replaced] + [
        (entry, (entry.document.key, entry.document.text)) for entry in new
    ]
    return held if ledger.is_complete else taken_in(held, now, about)


@given(nights=st.lists(_DOCUMENTS, min_size=1, max_size=3), dedup=st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_is_gone_goes_and_nothing_that_is_there_whatever_keys_and_texts_are_equal(
    nights: list[list[tuple[str, str]]], dedup: bool
) -> None:
    about, stored = CorpusConfig(files=["texts"], dedup=dedup), []
    for now in nights:
        gone = looked_through(stored, now, about)
        if dedup:
            assert not [place for place in gone if stored[place][1] in now]
        stored = taken_in([each for place, each in enumerate(stored) if place not in gone], now, about)
        found = [each for _, each in stored]
        if dedup:
            assert set(found) <= set(now)
            assert {text for _, text in found} == {text for _, text in now}
        else:
            assert sorted(found) == sorted(now)


@pytest.mark.long
def test_of_equal_texts_one_is_kept_while_one_of_them_is_there(ingredients: Ingredients, tmp_path: Path) -> None:
    fill(tmp_path / "texts")
    corpus = {"files": [str(tmp_path / "texts" / "*.txt")], "dedup": True}
    recipe = parse_recipe(
        recipe_data(ingredients, corpus=corpus, train={"n_tokens": 500}, schedule={"removed": "forget"})
    )
    watched = Watched(Store.create(tmp_path / "store"), recipe, tmp_path / "texts")
    watched.drop({"x.txt": WORD, "y.txt": WORD})
    watched.ingest()
    assert "y.txt" not in watched.held()
    watched.lose("x.txt")
    watched.ingest()
    assert "y.txt" in watched.held()
    assert "x.txt" not in watched.held()


@pytest.mark.long
def test_growth_counts_from_the_newest_sae_and_a_new_one_is_trained_once_it_is_enough(night: Watched) -> None:
    store, recipe = night.store, night.recipe
    assert ingest.grown(Lineage(store, recipe)) == 0
    night.drop(NEW)
    growth = night.ingest()["grown"]
    stored = Lineage(store, recipe).activations
    now, then = (stored.generation(n).total("n_train_tokens") for n in (2, 1))  # type: ignore[union-attr]
    assert growth == pytest.approx(now / then - 1)
    assert growth > 0
    assert ingest.retrain(Lineage(store, recipe), quiet(), share=growth * 1.01)["trained"] == []
    before = Lineage(store, recipe).features.id
    made = ingest.retrain(Lineage(store, recipe), quiet(), share=growth)
    assert made["trained"] == [Lineage(store, recipe).sae.id]
    assert made["runs"] == [Lineage(store, recipe).features.id] != [before]
    assert ingest.grown(Lineage(store, recipe)) == 0
    assert ingest.retrain(Lineage(store, recipe), quiet(), share=growth)["trained"] == []
    assert {row["key"] for row in night.sql("select key from documents")} == {*FIRST, *NEW}
    assert ingest.run(Lineage(store, recipe), quiet())["trained"] is False


def test_growth_is_known_after_old_generations_were_collected(night: Watched) -> None:
    night.drop(NEW)
    growth = night.ingest()["grown"]
    garbage.collect_garbage(night.store, 0, remove=True)
    assert Lineage(night.store, night.recipe).activations.numbers() == [2]
    assert ingest.grown(Lineage(night.store, night.recipe)) == growth
    path = Lineage(night.store, night.recipe).sae.path / "provenance.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != "n_train_tokens"})
    assert ingest.grown(Lineage(night.store, night.recipe)) == 0  # of an earlier saeflow: nothing that is kept tells


def test_a_training_that_was_killed_before_its_values_were_encoded_is_finished_by_the_next_ingest(
    night: Watched,
) -> None:
    night.drop(NEW)
    night.ingest()
    train.run(Lineage(night.store, night.recipe, fresh=True), quiet())
    assert night.ingest()["trained"]
    assert (Lineage(night.store, night.recipe).features.path / "quality.json").is_file()


def test_an_ingest_leaves_a_new_run_to_the_training_that_is_making_it(night: Watched) -> None:
    night.drop(NEW)
    night.ingest()
    train.run(Lineage(night.store, night.recipe, fresh=True), quiet())
    night.drop({"another.txt": FIRST["00.txt"]})
    with Lineage(night.store, night.recipe).features.writing():
        summary = night.ingest()
    assert (summary["n_documents"], summary["trained"]) == (1, False)
    assert "another.txt" in night.held()


def test_an_sae_from_elsewhere_is_never_trained_anew(night: Watched) -> None:
    folder = str(Lineage(night.store, night.recipe).sae.path)
    data = night.recipe.model_dump(mode="json")
    recipe = parse_recipe(data | {"name": "theirs", "data": "small", "sae": data["sae"] | {"source": folder}})
    stages.run(Lineage(night.store, recipe), quiet())
    assert ingest.retrain(Lineage(night.store, recipe), quiet()) == {"run": "theirs", "trained": [], "grown": 0}


@pytest.mark.long
def test_a_sweep_is_followed_by_each_of_its_saes(night: Watched) -> None:
    data = night.recipe.model_dump(mode="json") | {"sweep": {"grid": {"sae.k": [2, 3], "train.n_tokens": [800]}}}
    recipe = parse_recipe(data)
    assert ingest.run(Lineage(night.store, recipe), quiet())["trained"]
    night.drop(NEW)
    summary = ingest.run(Lineage(night.store, recipe), quiet())
    assert not summary["trained"]
    assert [len(parts) for name, parts in summary["parts"].items() if name.startswith("features/")] == [1, 1, 1]


def test_a_brought_table_is_taken_in_too(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.npy", a_table(300))
    recipe = parse_recipe(brought_data(table, train={"n_tokens": 800}, schedule={"removed": "forget"}))
    store = Store.create(tmp_path / "store")
    assert ingest.run(Lineage(store, recipe), quiet())["n_tokens"] == 300
    assert ingest.run(Lineage(store, recipe), quiet())["n_tokens"] == 0


def flip(path: Path) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_on_so_many_days_in_a_row_every_byte_is_read_and_on_one_day_a_share(night: Watched) -> None:
    parts = {
        part.folder: artefact.part_path(part)
        for artefact in night.store.artefacts("tokens", "activations", "features")
        for part in artefact.published().parts
    }
    for folder in parts.values():
        flip(
            max(
                (path for path in folder.rglob("*") if path.is_file() and path.name != "part.json"), key=os.path.getsize
            )
        )
    assert len(parts) >= 6
    found = []
    for day in range(3):
        share = integrity.share_of_day(3, date(2026, 5, 1) + timedelta(days=day))
        found.append({each.part.folder for each in integrity.verify(night.store, False, share) if each.part})
    assert set.union(*found) == set(parts)
    assert sum(map(len, found)) == len(parts), "a part was read twice"
    assert max(map(len, found)) < len(parts)


def test_verify_takes_a_share_and_says_what_it_does_not_understand(night: Watched) -> None:
    runner = CliRunner()
    done = runner.invoke(cli.app, ["verify", "--share", "1/7", "--store", str(night.store.root)])
    assert done.exit_code == 0, done.output
    for wrong in ("2/7", "1/0", "7", "1/x"):
        with pytest.raises(UserError, match="--share is"):
            runner.invoke(
                cli.app, ["verify", "--share", wrong, "--store", str(night.store.root)], catch_exceptions=False
            )


NOON = datetime(2026, 3, 28, 12, 7, tzinfo=UTC)


@pytest.mark.parametrize(
    ("when", "zone", "expected"),
    [
        ("15m", "UTC", datetime(2026, 3, 28, 12, 15, tzinfo=UTC)),
        ("2h", "UTC", datetime(2026, 3, 28, 14, 0, tzinfo=UTC)),
        ("1d", "UTC", datetime(2026, 3, 29, 0, 0, tzinfo=UTC)),
        ("0 3 * * *", "UTC", datetime(2026, 3, 29, 3, 0, tzinfo=UTC)),
        (
            "30 12 * * *",
            "Europe/Berlin",
            datetime(2026, 3, 29, 10, 30, tzinfo=UTC),
        ),  # the clock went forward that night
        ("0 9 * * mon", "UTC", datetime(2026, 3, 30, 9, 0, tzinfo=UTC)),
        ("never", "UTC", None),
    ],
)
def test_the_next_time_is_what_the_setting_says(when: str, zone: str, expected: datetime | None) -> None:
    assert next_time(when, zone, NOON) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ingest": "15 minutes"}, ["schedule.ingest is '15 minutes'", "15m", "0 3 * * *", "never"]),
        ({"train": "0 25 * * *"}, ["schedule.train is '0 25 * * *'", "bad hour"]),
        ({"verify": "0 3 * *"}, ["schedule.verify is '0 3 * *'"]),
        ({"ingest": "0m"}, ["schedule.ingest is '0m'"]),
        ({"timezone": "Mars/Olympus"}, ["schedule.timezone is 'Mars/Olympus'", "Europe/Berlin"]),
        ({"timezone": "../etc"}, ["schedule.timezone"]),
        ({"verify_nights": 0}, ["schedule.verify_nights is 0", "greater than 0"]),
        ({"most_removed": 1.5}, ["schedule.most_removed is 1.5", "less than or equal to 1"]),
        ({"removed": "drop"}, ["schedule.removed is 'drop'", "keep", "forget"]),
        ({"ingests": "15m"}, ["schedule.ingests", "Did you mean ingest?"]),
    ],
)
def test_a_time_that_cannot_be_is_refused_by_the_settings_name(settings: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe({"name": "n", "activations": {"source": "t.npy"}, "schedule": settings}, "my.toml")
    assert not [words for words in says if words not in str(caught.value)], caught.value


def test_the_schedule_is_no_part_of_what_an_artefact_is(night: Watched) -> None:
    other = night.with_schedule(ingest="5s", removed="forget", timezone="Europe/Berlin")
    one, two = (Lineage(night.store, recipe) for recipe in (night.recipe, other.recipe))
    for kind in ("tokens", "activations", "sae", "features"):
        assert getattr(one, kind) == getattr(two, kind)
    assert ScheduleConfig().train == "never"
    assert math.isfinite(ingest.grown(Lineage(night.store, night.recipe)))
