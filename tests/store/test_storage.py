"""Stores by URL, against a real server that speaks S3: the same bytes, the same answers, nothing lost."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import obstore
import pyarrow.parquet as pq
import pytest

from saeflow.activations.shards import open_site, stored_sites
from saeflow.corpus import forgotten
from saeflow.pipeline import stages, train
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog, labels, runs
from saeflow.query.ask import ask, query
from saeflow.query.connection import connect
from saeflow.query.questions import questions
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.terminal import Terminal
from saeflow.sae.loss import StepInfo
from saeflow.store import garbage
from saeflow.store import verify as integrity
from saeflow.store.artefact import Artefact
from saeflow.store.records import Damaged, checked_text
from saeflow.store.storage.bucket import Bucket
from saeflow.store.storage.duckdb_files import BucketFiles
from saeflow.store.storage.local_copy import Listing
from saeflow.store.storage.objects import Found, Objects
from saeflow.store.store import Store
from saeflow.store.user_cache import cache_folder
from saeflow.train.checkpoint import CHECKPOINT, STATE, is_checkpoint
from saeflow.train.group import TrainingGroup
from saeflow.train.training import FeedBatch, Training
from tests.conftest import Finished
from tests.support.s3_server import SECRET, Server, s3_server
from tests.support.small_pipeline import NOT_COMPARED, Ingredients, documents, quiet, recipe_data, tree, write_corpus
from tests.support.work_done import n_calls

numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        patch.setenv("SAEFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        started.bucket("bucket")
        yield started


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    """A store of its own."""
    server.drop(0)
    yield f"s3://bucket/deep/store-{next(numbers)}"
    server.drop(0)


@pytest.fixture(scope="module")
def recipe(ingredients: Ingredients) -> Recipe:
    return parse_recipe(recipe_data(ingredients))


@pytest.fixture(scope="module")
def local(finished: Finished) -> Store:
    return finished.store


@pytest.fixture(scope="module")
def remote(recipe: Recipe, server: Server) -> str:
    """A finished store that tests only read."""
    server.drop(0)
    stages.run(Lineage(Store.create("s3://bucket/finished"), recipe), quiet())
    return "s3://bucket/finished"


@contextlib.contextmanager
def another_machine(tmp_path: Path) -> Iterator[Path]:
    """One that has seen nothing of the store yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEFLOW_CACHE", str(tmp_path / f"machine-{next(numbers)}"))
        yield Path(os.environ["SAEFLOW_CACHE"])


def there(server: Server, url: str) -> dict[str, bytes]:
    """The objects of a store by their path in it, as `tree` gives a folder's files; leases, which all are nobody's,
    aside."""
    found = server.files("bucket", url.removeprefix("s3://bucket/"))
    leases = {key for key in found if key.startswith("tmp/locks/")}
    assert {found[key] for key in leases} <= {b"{}\n"}
    aside = {key for key in found if key.startswith("damaged/")} | leases
    return {key: content for key, content in found.items() if not key.endswith(NOT_COMPARED) and key not in aside}


def here(store: Store) -> dict[str, bytes]:
    return {name: content for name, content in tree(store.root).items() if not name.startswith("tmp/")}


def answers(store: Store) -> dict[str, Any]:
    """What each named question answers to its first arguments."""
    words = {"feature": 3, "threshold": 0.1, "n": 5, "token": 20, "text": "the", "a": "tales", "b": "letters"}
    words |= {"features": [3, 4], "thresholds": [0.0, 0.0], "window": 5, "other": 4, "vocab": 20}
    words |= {"document_key": "tales/000", "first_char": 0, "end_char": 5, "tokens": [20, 21, 300]}
    words |= {"other_run": "small", "matches": [4, 5], "annotation": "none", "class": "none"}
    with contextlib.closing(connect(store)) as connection:
        found = {}
        for question in (each for each in questions() if each.name not in ("runs", "stages") and not each.runs_model):
            known = words | ({"a": "small", "b": "small"} if question.name.endswith("_runs") else {})
            given = {p.name: known[p.name] for p in question.parameters if p.name in known}
            found[question.name] = ask(connection, question.name, given).to_pylist()
        return found


def test_a_store_by_url_holds_the_bytes_of_a_local_one(server: Server, remote: str, local: Store) -> None:
    assert there(server, remote) == here(local)


@pytest.mark.long
def test_connections_dropped_at_random_change_nothing(server: Server, url: str, recipe: Recipe, local: Store) -> None:
    server.drop(0.1, seed=1)
    before = server.n_dropped
    store = Store.create(url)
    stages.run(Lineage(store, recipe), quiet())
    assert answers(store) == answers(local)
    assert server.n_dropped - before > 10
    server.drop(0)
    assert there(server, url) == here(local)


@pytest.mark.long
def test_another_machine_answers_the_same_and_fetches_no_arrays_and_no_values(
    remote: str, local: Store, tmp_path: Path
) -> None:
    with another_machine(tmp_path) as cache:
        store = Store.open(remote)
        assert answers(store) == answers(local)
        kept = [path for path in cache.rglob("*.parquet") if "generations" not in path.parts]
        assert kept == []
        assert not list(cache.rglob("c.*"))


@pytest.mark.long
def test_what_one_machine_began_another_finishes(
    server: Server, url: str, recipe: Recipe, local: Store, tmp_path: Path
) -> None:
    class Breaking(Bucket):
        def send_as(self, pairs: Iterable[tuple[Path, Path]]) -> None:
            pairs = [*pairs]
            if any("activations/" in self.key(target) and target.name == "part.json" for _, target in pairs):
                raise ConnectionError("the machine is gone")  # its record still missing
            super().send_as(pairs)

    with pytest.raises(ConnectionError):
        stages.run(Lineage(Store.create(Breaking(Objects(url), cache_folder(url))), recipe), quiet())
    begun = set(there(server, url))
    assert any(name.startswith("activations/") for name in begun)
    assert not any(name.startswith("saes/") for name in begun)
    with another_machine(tmp_path):
        stages.run(Lineage(Store.create(url), recipe), quiet())
    assert there(server, url) == here(local)


def lost_at_step(monkeypatch: pytest.MonkeyPatch, url: str, recipe: Recipe, step: int, name: str = "") -> Store:
    """The store of a pipeline whose machine is gone at a step of a training, of that name if there is one."""
    advance, store = Training.advance, Store.create(url)

    def lost(self: Training, batch: FeedBatch) -> StepInfo:
        if self.step == step and name in ("", self.name):
            raise ConnectionError("the machine is gone")
        return advance(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", lost)
        with pytest.raises(ConnectionError):
            stages.run(Lineage(store, recipe), quiet())
    return store


@pytest.mark.long
def test_a_training_goes_on_on_another_machine_where_this_one_was_lost(
    server: Server, url: str, ingredients: Ingredients, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = parse_recipe(recipe_data(ingredients, train={"checkpoint_seconds": 0.001}))
    lost_at_step(monkeypatch, url, often, 20)
    console = Terminal(record=True, file=io.StringIO(), width=200)
    with another_machine(tmp_path):
        stages.run(Lineage(Store.create(url), often), Progress(console))
    assert "continuing at step 20 of" in console.export_text()
    assert there(server, url) == here(local)


def test_a_training_goes_on_on_another_machine_although_documents_were_appended_since(
    server: Server, url: str, ingredients: Ingredients, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = parse_recipe(recipe_data(ingredients, train={"checkpoint_seconds": 0.001}))
    store = lost_at_step(monkeypatch, url, often, 20)
    stored = Lineage(store, often).activations
    stored.publish(stored.published().parts[:-1])  # any other list of parts
    with another_machine(tmp_path):
        assert train.run(Lineage(Store.create(url), often, fresh=True), quiet()).record.facts["generation"] == 1
    saes = {name: content for name, content in there(server, url).items() if name.startswith("saes/")}
    assert saes == {name: content for name, content in here(local).items() if name.startswith("saes/")}


@pytest.mark.long
def test_a_sweep_goes_on_and_is_read_on_another_machine(
    server: Server, url: str, ingredients: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = {"grid": {"sae.k": [2, 4]}}
    often = parse_recipe(recipe_data(ingredients, train={"checkpoint_seconds": 0.001, "n_tokens": 3000}, sweep=sweep))
    lost_at_step(monkeypatch, url, often, 6, "small_k4")
    console = Terminal(record=True, file=io.StringIO(), width=200)
    with another_machine(tmp_path):
        stages.run(Lineage(Store.create(url), often), Progress(console))
    assert "small_k2 continuing at step 6 of" in console.export_text(clear=False)
    assert "small_k4 continuing at step 6 of" in console.export_text()
    with another_machine(tmp_path / "third"):
        stages.run(Lineage(Store.create(url), often), Progress(console))
    assert "evaluate: already done, 2 SAEs" in console.export_text()
    alone = Store.create(tmp_path / "alone")
    stages.run(Lineage(alone, often), quiet())
    assert there(server, url) == here(alone)


def test_a_second_run_sends_nothing(remote: str, recipe: Recipe) -> None:
    sent: list[str] = []

    class Watched(Objects):
        def upload(self, path: Path, key: str) -> str:
            sent.append(key)
            return super().upload(path, key)

    stages.run(Lineage(Store.create(Bucket(Watched(remote), cache_folder(remote))), recipe), quiet())
    assert sent == []


def shard_key(server: Server, url: str) -> str:
    prefix = url.removeprefix("s3://bucket/")
    return next(f"{prefix}/{name}" for name in sorted(there(server, url)) if "/c." in name)


@pytest.mark.parametrize("harm", [pytest.param("deleted", marks=pytest.mark.long), "flipped"])
def test_a_shard_that_is_gone_or_changed_is_named_never_read_and_made_again(
    harm: str, server: Server, url: str, remote: str, recipe: Recipe, local: Store
) -> None:
    server.copy("bucket", *(each.removeprefix("s3://bucket/") for each in (remote, url)))
    key, client = shard_key(server, url), server.client()
    if harm == "deleted":
        client.delete_object(Bucket="bucket", Key=key)
    else:
        content = bytearray(client.get_object(Bucket="bucket", Key=key)["Body"].read())
        content[100] ^= 1
        client.put_object(Bucket="bucket", Key=key, Body=bytes(content))
    store = Store.open(url)
    stored = Lineage(store, recipe).activations
    part = stored.published().parts[0]
    with pytest.raises(Damaged, match="rows 0 to"):
        open_site(stored, part, stored_sites(stored)[0]).read(slice(None))
    found = list(integrity.verify(store, full=True))
    assert [each.part.index for each in found if each.part] == [part.index]
    for each in found:
        integrity.repair(each)
    stages.run(Lineage(Store.create(url), recipe), quiet())
    assert list(integrity.verify(Store.open(url), full=True)) == []
    assert there(server, url) == here(local)


def test_two_machines_never_undo_each_other(url: str, recipe: Recipe, tmp_path: Path) -> None:
    stages.stages_of(recipe)["tokens"](Lineage(Store.create(url), recipe), quiet())
    mine = Lineage(Store.create(url), recipe).tokens
    with another_machine(tmp_path):
        others = Lineage(Store.create(url), recipe).tokens
        others.publish(others.published().parts[:-1])
    with pytest.raises(UserError, match=r"(?s)Another machine has published or removed .*run the same command again"):
        mine.publish(mine.published().parts[:-2])
    now = Lineage(Store.create(url), recipe).tokens
    assert len(now.published().parts) == len(mine.parts()) - 1


@pytest.mark.long
def test_documents_are_appended_and_forgotten_and_their_bytes_leave(
    server: Server, url: str, ingredients: Ingredients, tmp_path: Path
) -> None:
    rows = documents(40)
    secret = "Quetzalcoatl sings in the garden."
    rows.append({"key": "secret", "text": secret, "source": "letters", "title": "S"})
    corpus = write_corpus(tmp_path / "corpus.parquet", rows)
    recipe = parse_recipe(recipe_data(ingredients, corpus={"files": [str(corpus)], "held_out": 0.2}))
    stages.run(Lineage(Store.create(url), recipe), quiet())
    n_before = len(Lineage(Store.open(url), recipe).activations.published().parts)
    write_corpus(tmp_path / "corpus.parquet", [*rows, *documents(60)[46:]])
    stages.run(Lineage(Store.create(url), recipe), quiet())
    assert len(Lineage(Store.open(url), recipe).activations.published().parts) > n_before
    forget.forget(Store.create(url), ["secret"], quiet())
    with contextlib.closing(connect(Store.open(url))) as connection:
        assert query(connection, "select key from documents where key = 'secret'").num_rows == 0
    store = Store.create(url)
    compact_store(Lineage(store, recipe), quiet())
    garbage.collect_garbage(Store.open(url), grace_seconds=0, remove=True)
    for name, content in there(server, url).items():
        if name.endswith("/documents.parquet"):
            (tmp_path / "documents.parquet").write_bytes(content)
            assert "secret" not in pq.read_table(tmp_path / "documents.parquet").column("key").to_pylist()
    assert list(integrity.verify(Store.open(url), full=True)) == []


def test_a_bucket_that_is_not_there_is_named_and_no_secret_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(url: str) -> Store:
        return Store.open(Bucket(Objects(url, n_tries=1), cache_folder(url)))

    with pytest.raises(UserError) as missing:
        opened("s3://no-such-bucket/store")
    assert "s3://no-such-bucket/store" in str(missing.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL") as silent:
        opened("s3://bucket/store")
    assert SECRET not in str(missing.value) + str(silent.value)


def test_a_url_that_is_no_object_store_is_refused() -> None:
    with pytest.raises(UserError, match="gopher://somewhere cannot be opened"):
        Store.open("gopher://somewhere")


def test_a_store_that_cannot_compare_before_it_replaces_is_refused(tmp_path: Path) -> None:
    plain = Bucket(Objects(tmp_path.as_uri()), tmp_path / "cache")
    record = tmp_path / "cache" / "manifest.json"
    plain.put_if_unchanged(record, b"1", None)
    with pytest.raises(UserError, match="conditional put"):
        plain.put_if_unchanged(record, b"2", plain.tag(record))


class Dying(Objects):
    """Gives one object and no more."""

    def download(self, key: str, path: Path) -> str:
        if self._n_given:
            raise ConnectionError("killed")
        self._n_given = 1
        return super().download(key, path)

    _n_given = 0


def test_a_checkpoint_of_which_a_kill_left_half_is_brought_again(tmp_path: Path) -> None:
    folder, there = tmp_path / "cache" / "tmp" / "one", tmp_path / "there"
    there.mkdir()
    bucket = Bucket(Objects(there.as_uri()), tmp_path / "cache")
    folder.mkdir(parents=True)
    for name in (CHECKPOINT, STATE):
        (folder / name).write_text("new")
    bucket.work.keep(folder, 1, CHECKPOINT)
    (folder / STATE).write_text("of an older checkpoint")
    (folder / CHECKPOINT).unlink()
    with pytest.raises(ConnectionError):
        Bucket(Dying(there.as_uri()), tmp_path / "cache").work.bring_back(folder, CHECKPOINT)
    assert not is_checkpoint(folder)
    reading: Any = SimpleNamespace(jobs=[])
    job: Any = SimpleNamespace(folder=lambda restart: folder, target=SimpleNamespace(storage=bucket))
    TrainingGroup._restored(reading, job, lambda: MagicMock(done=True), 0)
    assert [(folder / name).read_text() for name in (CHECKPOINT, STATE)] == ["new", "new"]


def test_what_lies_below_a_key_is_found_without_a_walk_through_the_listing() -> None:
    def look(n_parts: int) -> None:
        listing = Listing(
            {f"tokens/x-0/parts/{n:06d}/{name}": Found(1, 0.0, "tag") for n in range(n_parts) for name in "ab"}
        )
        listing.below("tokens/x-0/parts/000001")
        counted.append(n_calls(lambda: found.append(listing.below("tokens/x-0/parts/000070"))))

    counted: list[int] = []
    found: list[list[str]] = []
    look(100)
    look(50_000)
    assert counted[1] < 2 * counted[0]
    assert found[1] == ["tokens/x-0/parts/000070/a", "tokens/x-0/parts/000070/b"]


class Machines:
    """Machines that share a bucket in memory, each with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = Objects("memory:///")

    def store(self, name: str, kind: type[Bucket] = Bucket) -> Store:
        """As a process of that machine sees it that has just begun."""
        return Store.at(kind(self.objects, self.folder / name))

    def content(self, key: str) -> bytes:
        return bytes(obstore.get(self.objects.store, key).bytes())


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


def an_sae(target: Artefact, weights: str) -> None:
    with target.publish_folder({}, [], {}) as folder:
        (folder / "weights").write_text(weights)


def test_who_takes_a_lease_sees_what_another_machine_has_published_since_it_began(machines: Machines) -> None:
    one, two = (machines.store(name).artefact("saes", "x", "00000000") for name in ("one", "two"))
    assert not two.complete()
    with one.writing():
        an_sae(one, "first")
    with two.writing():
        assert two.complete()
        assert (two.fetched() / "weights").read_text() == "first"


def test_a_generation_published_since_a_process_began_is_the_one_that_it_goes_on_from(machines: Machines) -> None:
    one, two = (machines.store(name).artefact("tokens", "x", "00000000") for name in ("one", "two"))
    for index, target in enumerate((one, two)):
        with target.writing():
            target.create({})
            with target.new_part(index, {"n": 1}) as folder:
                (folder / "data").write_text("x")
            target.publish(target.parts().values())
    assert [part.index for part in two.published().parts] == [0, 1]


def test_an_sae_of_another_machine_is_never_overwritten(machines: Machines) -> None:
    one, two = (machines.store(name).artefact("saes", "x", "00000000") for name in ("one", "two"))

    def late() -> None:
        with two.writing():
            an_sae(one, "first")  # by a process that holds no lease any more
            an_sae(two, "second")

    with pytest.raises(UserError, match="has published saes/x-00000000 since"):
        late()
    assert machines.content("saes/x-00000000/weights") == b"first"
    assert (two.fetched() / "weights").read_text() == "first"

    class Overtaken(Bucket):
        def _put_new(self, path: Path, content: bytes) -> bool:
            """Another machine's record comes between the look and ours."""
            if path.name == "artefact.json":
                obstore.put(machines.objects.store, "saes/y-00000000/artefact.json", b"theirs")
            return super()._put_new(path, content)

    three = machines.store("three", Overtaken).artefact("saes", "y", "00000000")
    with pytest.raises(UserError, match="has published saes/y-00000000 since"), three.writing():
        an_sae(three, "third")
    assert machines.content("saes/y-00000000/artefact.json") == b"theirs"


def test_of_two_machines_that_send_an_sae_at_once_the_later_one_overwrites_nothing(machines: Machines) -> None:
    two = machines.store("two").artefact("saes", "x", "00000000")

    class Halted(Objects):
        """Another machine publishes the same SAE between this one's look and its first file."""

        halted = False

        def upload(self, path: Path, key: str) -> str:
            self.meanwhile(key)
            return super().upload(path, key)

        def put(self, key: str, content: bytes, tag: str | None) -> str | None:
            self.meanwhile(key)
            return super().put(key, content, tag)

        def meanwhile(self, key: str) -> None:
            if key.startswith("saes/") and not self.halted:
                self.halted = True
                an_sae(two, "second")

    objects = Halted("memory:///")
    objects.store = machines.objects.store
    one = Store.at(Bucket(objects, machines.folder / "one")).artefact("saes", "x", "00000000")
    with pytest.raises(UserError, match="has published saes/x-00000000 since"), one.writing():
        an_sae(one, "first")
    assert machines.content("saes/x-00000000/weights") == b"second"
    assert (machines.store("three").artefact("saes", "x", "00000000").fetched() / "weights").read_text() == "second"


def test_files_that_a_killed_run_has_sent_of_an_sae_are_replaced(machines: Machines) -> None:
    obstore.put(machines.objects.store, "saes/x-00000000/weights", b"half")
    target = machines.store("here").artefact("saes", "x", "00000000")
    with target.writing():
        an_sae(target, "whole")
    assert machines.content("saes/x-00000000/weights") == b"whole"


def test_a_look_at_the_store_leaves_alone_what_a_run_of_this_machine_has_not_sent_yet(machines: Machines) -> None:
    target = machines.store("here").artefact("features", "x", "00000000")
    target.create({})
    for again in ("once", "again"):
        (target.path / "similar.parquet").write_text(again)
        (target.path / ".manifest.json.new").write_text("being written")
        machines.store("here")
        assert (target.path / "similar.parquet").read_text() == again
        assert (target.path / ".manifest.json.new").read_text() == "being written"
        target.storage.send(target.path / "similar.parquet")


def test_what_was_sent_is_kept_while_the_store_has_it_and_dropped_once_it_has_not(machines: Machines) -> None:
    target = machines.store("here").artefact("features", "x", "00000000")
    target.create({})
    table = target.path / "similar.parquet"
    table.write_text("once")
    target.storage.send(table)
    machines.store("here")
    assert table.read_text() == "once"
    other = machines.store("there").artefact("features", "x", "00000000")
    other.own_file("similar.parquet").write_text("again")
    other.storage.send(other.path / "similar.parquet")
    machines.store("here")
    assert not table.exists()
    assert target.own_file("similar.parquet").read_text() == "again"
    other.remove(other.path)
    machines.store("here")
    assert not target.exists()
    assert not table.exists()


def test_a_file_that_a_power_cut_has_shortened_is_brought_again(machines: Machines) -> None:
    target = machines.store("here").artefact("features", "x", "00000000")
    with target.new_part(0, {"n": 1}) as folder:
        (folder / "values.parquet").write_text("whole")
    path = target.part_file(target.made[0], "values.parquet")
    path.write_text("")
    assert target.part_file(target.made[0], "values.parquet").read_text() == "whole"


def test_what_was_sent_a_moment_ago_is_that_old(machines: Machines) -> None:
    target = machines.store("here").artefact("features", "x", "00000000")
    target.look_again()
    assert target.part_folders() == set()
    with target.new_part(0, {"n": 1}) as folder:
        (folder / "values.parquet").write_text("whole")
    assert time.time() - target.storage.footprint(target.part_path(target.made[0]))[1] < 60


def test_a_record_that_another_machine_has_removed_is_refused_in_words(machines: Machines) -> None:
    here = machines.store("here").storage
    record = here.root / "tokens" / "x-00000000" / "manifest.json"
    here.put_if_unchanged(record, b"1", None)
    here.put_if_unchanged(record, b"2", here.tag(record))
    obstore.delete(machines.objects.store, "tokens/x-00000000/manifest.json")
    with pytest.raises(UserError, match="Another machine has published or removed x-00000000"):
        here.put_if_unchanged(record, b"3", here.tag(record))
    here.put_if_unchanged(record, b"4", here.tag(record))
    assert machines.content("tokens/x-00000000/manifest.json") == b"4"


def test_a_look_between_reading_and_writing_labels_or_forgotten_documents_changes_nothing(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machines.store("here")
    with_labels = labels.Sheet.with_labels

    def look_first(self: labels.Sheet, new: Any) -> labels.Sheet:
        store.storage.pull()  # as the thread of a page does
        return with_labels(self, new)

    monkeypatch.setattr(labels.Sheet, "with_labels", look_first)
    for number in range(3):
        assert labels.put(store, "demo-f0000001", "own", {number: labels.Label("one")}) == number + 1
    monkeypatch.setattr(forgotten, "checked_text", lambda data: store.storage.pull() or checked_text(data))
    for key in ("a", "b"):
        forgotten.add(store, [(key * 16, "")])
    assert forgotten.ForgottenHashes.read(store).keys == {"a" * 16, "b" * 16}


def test_a_manifest_that_a_thread_brings_while_another_publishes_is_not_overwritten(machines: Machines) -> None:
    def publish_one_more(target: Artefact, index: int) -> None:
        with target.new_part(index, {"n": 1}) as folder:
            (folder / "data").write_text("x")
        shown = target.generation()
        target.publish([*(shown.parts if shown else ()), target.made[index]])

    here, there = (machines.store(name).artefact("tokens", "x", "00000000") for name in ("here", "there"))
    with here.writing():
        here.create({})
        publish_one_more(here, 0)
    there.storage.pull()

    class Meanwhile(Bucket):
        def put_new(self, path: Path, content: bytes) -> bool:
            """Another machine publishes, and another thread of this process brings its manifest."""
            if not self.has_seen:
                self.has_seen = True
                publish_one_more(there, 1)
                self.pull()
            return super().put_new(path, content)

        has_seen = False

    with pytest.raises(UserError, match="Another machine has published"):
        publish_one_more(machines.store("here", Meanwhile).artefact("tokens", "x", "00000000"), 2)
    assert [part.index for part in there.published().parts] == [0, 1]


def test_what_a_killed_run_left_unsent_goes_when_the_next_one_takes_the_lease(machines: Machines) -> None:
    target = machines.store("here").artefact("features", "x", "00000000")
    target.create({})
    (target.path / "quality.json").write_text("never sent")
    with machines.store("here").artefact("features", "x", "00000000").writing():
        assert not (target.path / "quality.json").exists()
    (target.path / "quality.json").write_text("never sent")
    os.utime(target.path / "quality.json", (0, 0))
    machines.store("here")
    assert not (target.path / "quality.json").exists()


def test_an_open_object_may_be_shared_by_threads(server: Server, url: str, tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    server.client().put_object(Bucket="bucket", Key=f"{url.removeprefix('s3://bucket/')}/file", Body=content)
    files = BucketFiles(url, Bucket(Objects(url), tmp_path / "cache").pieces)
    dice = np.random.default_rng(1)
    wanted = [(int(start), int(size)) for start, size in dice.integers(0, [2_900_000, 600_000], (200, 2))]
    with files.open(f"{url}/file") as shared, ThreadPoolExecutor(8) as pool:

        def read(place: tuple[int, int]) -> bytes:
            shared.seek(place[0])
            return bytes(shared.read(place[1]))

        assert list(pool.map(read, wanted)) == [content[start : start + size] for start, size in wanted]


def test_values_are_encoded_from_an_object_store_as_from_a_disk(remote: str, recipe: Recipe, local: Store) -> None:
    ours, theirs = (Lineage(store, recipe).features.published() for store in (local, Store.open(remote)))
    assert ours.parts == theirs.parts


def test_labels_and_the_catalog_lie_in_the_bucket_too(server: Server, url: str, recipe: Recipe, tmp_path: Path) -> None:
    store = Store.create(url)
    stages.run(Lineage(store, recipe), quiet())
    sae = runs.pick_run(store, runs.runs(store), None).artefact.record.input("saes")
    assert sae is not None
    assert labels.put(store, sae, "own", {1: labels.Label("one", 0.5)}) == 1
    catalog.write_catalog(store)
    with another_machine(tmp_path):
        there_too = Store.open(url)
        assert catalog.write_catalog(there_too) is None
        labels.put(there_too, sae, "own", {2: labels.Label("two")})
        labels.put(there_too, sae, "gpt", {1: labels.Label("uno")})
        assert catalog.write_catalog(there_too)
    sql = "select feature_id, label, source, score from src_labels order by all"
    again = Store.open(url)
    with contextlib.closing(connect(again)) as connection:
        found = [tuple(row.values()) for row in query(connection, sql).to_pylist()]
    assert found == [(1, "one", "own", 0.5), (1, "uno", "gpt", None), (2, "two", "own", None)]
    text = server.files("bucket", url.removeprefix("s3://bucket/"))["catalog.sql"].decode()
    assert f"{url}/labels/" in text
    assert "httpfs" in text
    labels.put(again, sae, "gpt", {1: None})
    assert not [key for key in there(server, url) if key.endswith("gpt.csv")]
