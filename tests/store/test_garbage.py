"""gc removes what nobody can reach any more: nothing that somebody reads, writes, or may still go on with."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

import pytest

from saeflow.runtime.errors import UserError
from saeflow.store import garbage
from saeflow.store import verify as integrity
from saeflow.store.artefact import Artefact
from saeflow.store.garbage import ABANDONED_SECONDS, collect_garbage
from saeflow.store.lease_slot import FileSlot
from saeflow.store.records import BESIDE, Hidden, PartRecord
from saeflow.store.storage.bucket import Bucket
from saeflow.store.storage.folder import Folder
from saeflow.store.storage.objects import Objects
from saeflow.store.store import Store

DAY = 86_400.0


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture
def artefact(store) -> Artefact:
    made = store.artefact("tokens", "small", "0123abcd")
    made.create({})
    return made


def part(artefact: Artefact, index: int, content: str = "a") -> PartRecord:
    alone = contextlib.nullcontext() if artefact.holds else artefact.writing()
    with alone, artefact.new_part(index, {"n": 1}) as folder:
        (folder / "data").write_text(content)
    return artefact.made[index]


def age(path: Path, seconds: float) -> None:
    """Written so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def published(artefact: Artefact, n_generations: int, seconds: float = 0) -> list[PartRecord]:
    """Generations of one part each, the first list written so many seconds ago, the others now."""
    parts = []
    for number in range(n_generations):
        parts.append(part(artefact, 0, f"version {number}"))
        artefact.publish(parts[-1:])
        age(artefact.part_path(parts[-1]), seconds + 1)
    age(artefact.list_path(1), seconds)
    return parts


def names(done: garbage.Collected) -> set[str]:
    return {each.path.name for each in done.garbage}


def test_a_list_published_while_gc_looks_is_never_taken_for_an_old_one(store, artefact):
    published(artefact, 1, 2 * DAY)
    fresh = Hidden(document_id=0, key_hash="aa", reason="forgotten")
    waiting = [Store.open(store.root).by_id(artefact.id)]

    class Late(FileSlot):
        def watch(self):
            """Another run publishes, and ends, just before gc has the lease."""
            for other in [waiting.pop()] if waiting else []:
                with other.writing():
                    other.publish(other.published().parts, hidden={0: (fresh,)})
            return super().watch()

    class Overtaken(Folder):
        def new_slot(self, path):
            return Late(path)

    assert collect_garbage(Store(Overtaken(store.root)), DAY, remove=True).garbage == []
    assert not waiting
    assert store.by_id(artefact.id).published().hidden == {0: (fresh,)}


def test_a_list_newer_than_the_one_that_readers_see_is_left_alone(store, artefact):
    published(artefact, 2)
    age(artefact.list_path(1), DAY)
    artefact.show(1)
    assert names(collect_garbage(store, 0, remove=True)) == set()
    assert artefact.numbers() == [1, 2]


def test_no_run_writes_an_artefact_while_gc_removes_from_it(store, artefact):
    published(artefact, 2, DAY)
    refused = []

    class Watched(Folder):
        def remove(self, path):
            with pytest.raises(UserError, match="Another run is writing"), store.by_id(artefact.id).writing():
                pass
            refused.append(path.name)

    assert names(collect_garbage(Store(Watched(store.root)), 0, remove=True)) == set(refused) != set()


def test_work_that_began_after_a_killed_run_is_not_taken_for_its_leftovers(store, artefact):
    (artefact.work / "dead").mkdir(parents=True)
    assert names(collect_garbage(store, 0, remove=False)) == {artefact.work.name}
    with artefact.writing(), artefact.new_part(0, {}) as folder:
        (folder / "first").write_text("a")
        done = collect_garbage(store, 0, remove=True)
        assert (done.garbage, len(done.left_alone)) == ([], 1)
        (folder / "second").write_text("b")
    assert [file.name for file in artefact.parts()[0].files] == ["first", "second"]


def test_finished_parts_of_an_append_that_was_killed_are_kept_for_the_next_run(store, artefact):
    published(artefact, 1, 9 * DAY)
    unlisted = part(artefact, 1)
    age(artefact.part_path(unlisted), 8 * DAY)
    assert collect_garbage(store, DAY, remove=True).garbage == []
    assert set(artefact.parts()) == {0, 1}
    age(artefact.part_path(unlisted), 10 * DAY)  # nobody went on with it before the list was written
    assert names(collect_garbage(store, DAY, remove=True)) == {unlisted.folder}


def test_the_grace_of_a_part_begins_when_the_last_list_that_names_it_is_replaced(store, artefact):
    old, new = published(artefact, 2, 3 * DAY)
    done = collect_garbage(store, DAY, remove=True)
    assert done.garbage == []
    assert done.n_bytes_kept == sum(
        artefact.storage.footprint(path)[0] for path in (artefact.part_path(old), artefact.list_path(1))
    )
    age(artefact.list_path(2), 2 * DAY)
    assert names(collect_garbage(store, DAY, remove=True)) == {"000001.parquet", old.folder}
    assert artefact.parts() == {0: new}


def test_each_list_is_looked_at_once_however_many_there_are(store, artefact):
    published(artefact, 6)
    looked = []

    class Watched(Folder):
        def footprint(self, path):
            looked.append(path.name)
            return super().footprint(path)

    collect_garbage(Store(Watched(store.root)), 0, remove=False)
    assert sorted(name for name in looked if name.endswith(".parquet")) == [
        *(f"{number:06d}.parquet" for number in range(1, 6)), *["000006.parquet"] * 2
    ]  # fmt: skip


def test_listing_writes_nothing(store, artefact):
    published(artefact, 2, DAY)
    before = sorted(path for path in store.root.rglob("*"))
    assert collect_garbage(store, 0, remove=False).garbage
    assert sorted(path for path in store.root.rglob("*")) == before


def test_what_cannot_be_read_is_named_and_the_rest_is_collected(store, artefact):
    published(artefact, 2, DAY)
    other = store.artefact("tokens", "other", "0123abcd")
    other.create({})
    published(other, 2, DAY)
    artefact.list_path(2).write_bytes(b"x")
    done = collect_garbage(store, 0, remove=True)
    assert {each.path.is_relative_to(other.path) for each in done.garbage} == {True}
    assert [f"{artefact.list_path(2)} is missing or damaged" in why for why in done.left_alone] == [True]


@pytest.mark.parametrize(("days", "goes"), [(1, False), (ABANDONED_SECONDS / DAY + 1, True)])
def test_a_checkpoint_goes_once_nobody_has_gone_on_with_it_for_a_month(store, days, goes):
    folder = store.root / "tmp" / "saes-small-0123abcd.checkpoint" / "restart-0"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    for path in (folder / "state.json", folder, folder.parent):
        age(path, days * DAY)
    assert names(collect_garbage(store, 0, remove=True)) == ({folder.parent.name} if goes else set())
    assert folder.exists() is not goes


def test_files_by_which_killed_runs_tried_the_store_are_swept(store):
    for name in ("cluster-0a1b", ".writable-7", "cluster-live"):
        (store.root / "tmp" / name).write_text(name)
        age(store.root / "tmp" / name, 10 if name == "cluster-live" else 2 * 3_600)
    assert names(collect_garbage(store, 0, remove=True)) == {"cluster-0a1b", ".writable-7"}
    assert [path.name for path in (store.root / "tmp").glob("cluster-*")] == ["cluster-live"]


def test_a_link_in_a_store_leads_gc_to_nothing_outside_of_it(store, artefact, tmp_path):
    published(artefact, 1)
    victim = tmp_path / "victim"
    (artefact.path / "parts").rename(victim)
    (victim / "precious").mkdir()
    age(victim / "precious", 9 * DAY)
    (artefact.path / "parts").symlink_to(victim)
    done = collect_garbage(store, 0, remove=True)
    assert (victim / "precious").exists()
    assert len(done.left_alone) == 1


def in_memory(tmp_path: Path, objects: Objects) -> Store:
    """As another machine sees it, each time."""
    return Store(Bucket(objects, Path(tempfile.mkdtemp(dir=tmp_path))))


def test_an_object_store_is_collected_by_what_it_holds_now(tmp_path):
    objects = Objects("memory:///")
    here, there = in_memory(tmp_path, objects), in_memory(tmp_path, objects)
    artefact = here.artefact("tokens", "small", "0123abcd")
    with artefact.writing():
        artefact.create({})
        old = part(artefact, 0, "old")
        artefact.publish([old])
    there.storage.pull()
    late = part(artefact, 1)
    with artefact.writing():
        artefact.publish([part(artefact, 0, "new")])
    unlisted = part(artefact, 2)
    gone = names(collect_garbage(there, 0, remove=True))
    assert gone == {"000001.parquet", old.folder, late.folder}
    here.storage.list_again()
    assert unlisted.folder in artefact.part_folders()
    assert list(integrity.verify(here, full=True)) == []


def test_what_was_left_in_the_tmp_of_an_object_store_is_swept(tmp_path, monkeypatch):
    objects = Objects("memory:///")
    store = in_memory(tmp_path, objects)
    for name in ("cluster-0a1b", "saes-small-0123abcd.checkpoint/restart-0/000000001/state.json"):
        path = store.root / "tmp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        store.storage.send(path)
        path.unlink()
    monkeypatch.setattr("time.time", lambda now=time.time(): now + 40 * DAY)
    assert names(collect_garbage(store, 0, remove=True)) == {"cluster-0a1b", "saes-small-0123abcd.checkpoint"}
    assert not [meta["path"] for meta in objects.list("tmp") if "locks" not in meta["path"]]


def whole(store: Store, kind: str, fp: str, owner: Artefact, written: float) -> Artefact:
    """An artefact without parts that belongs to another, and when it was written, in seconds before now."""
    made = store.artefact(kind, "quotes", fp)
    with made.writing(), made.publish_folder({}, [owner.id], {}) as folder:
        (folder / "table.parquet").write_text(fp)
    age(made.path / "artefact.json", written)
    return made


@pytest.mark.parametrize("kind", BESIDE)
def test_gc_keeps_what_was_written_last_of_a_name_and_an_owner(store, artefact, kind):
    other = store.artefact("tokens", "other", "89abcdef")
    other.create({})
    old, recent, newest = (whole(store, kind, f"0000000{n}", artefact, (3 - n) * DAY) for n in range(3))
    theirs = whole(store, kind, "0000000a", other, 9 * DAY)
    assert names(collect_garbage(store, 1.5 * DAY, remove=False)) == set()  # readers may still have them open
    assert collect_garbage(store, 1.5 * DAY, remove=False).n_bytes_kept > 0
    old.renew()
    assert store.artefacts(kind)[-1] == old
    assert names(collect_garbage(store, 0, remove=True)) == {recent.path.name, newest.path.name}
    assert store.artefacts(kind) == [theirs, old]
    assert store.newest_of(kind, artefact.id) == {"quotes": old}
    assert store.newest_of(kind, other.id) == {"quotes": theirs}
    assert not list(integrity.verify(store, full=True))


@pytest.mark.parametrize("kind", BESIDE)
def test_gc_removes_what_belongs_to_tokens_or_a_run_that_is_gone(store, artefact, kind):
    run = store.artefact("features", "small", "0123abcd")
    run.create({}, [artefact.id])
    made = whole(store, kind, "00000000", run, 0)
    assert names(collect_garbage(store, DAY, remove=True)) == set()
    run.remove(run.path)
    assert names(collect_garbage(store, DAY, remove=True)) == {made.path.name}
    assert store.artefacts(kind) == []


def test_gc_looks_again_before_it_removes_a_replaced_artefact(store, artefact):
    old, newest = (whole(store, "annotations", f"0000000{n}", artefact, (3 - n) * DAY) for n in range(2))
    assert store.newest_of("annotations", artefact.id) == {"quotes": newest}
    waiting = [old]

    class Late(FileSlot):
        def watch(self):
            """The older one becomes the newest again just before gc has its lease."""
            for each in waiting[:]:
                waiting.remove(each)
                each.renew()
            return super().watch()

    class Overtaken(Folder):
        def new_slot(self, path):
            return Late(path)

    collect_garbage(Store(Overtaken(store.root)), 0, remove=True)
    assert old in store.artefacts("annotations")
