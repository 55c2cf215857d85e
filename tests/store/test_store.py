"""Artefacts on disk: what counts as finished, what is noticed, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.cli.store import state_in_words
from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json, write_json
from saeflow.store.lists import generation_table, read_generation, read_part_folders
from saeflow.store.records import (
    KINDS,
    WHOLE_KINDS,
    ArtefactRecord,
    Damaged,
    FileRecord,
    Generation,
    Hidden,
    PartRecord,
    read_record,
    write_record,
)
from saeflow.store.storage.bucket import Bucket
from saeflow.store.storage.folder import Folder
from saeflow.store.storage.objects import Objects
from saeflow.store.store import Store
from saeflow.store.verify import find_damage, next_share, note_share, repair_all, verify


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture
def artefact(store) -> Artefact:
    made = store.artefact("tokens", "small", "0123abcd")
    made.create({"context_length": 4})
    return made


def write_part(artefact: Artefact, index: int = 0, content: bytes = b"some bytes", **counts: int) -> PartRecord:
    with artefact.new_part(index, {"n_tokens": 3, **counts}) as folder:
        (folder / "data.bin").write_bytes(content)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "more.bin").write_bytes(content * 2)
    return artefact.parts()[index]


def fail_half_way(folder: Path) -> None:
    (folder / "data.bin").write_bytes(b"x")
    raise RuntimeError


def use(root: Path, id: str) -> None:
    """Read and write as later stages do."""
    artefact = Store.open(root).by_id(id)
    artefact.parts()
    artefact.published()
    artefact.create({})


def raise_newer(path: Path) -> None:
    write_json(path, read_json(path) | {"format_version": FORMAT_VERSION + 1})


def test_a_part_appears_only_when_it_is_finished(artefact):
    with artefact.new_part(0, {}) as folder:
        (folder / "data.bin").write_bytes(b"x")
        assert artefact.parts() == {}
    assert list(artefact.parts()) == [0]


def test_a_part_whose_work_fails_never_appears_and_the_next_writer_clears_it_away(artefact):
    with pytest.raises(RuntimeError), artefact.new_part(0, {}) as folder:
        fail_half_way(folder)
    assert artefact.parts() == {}
    assert artefact.work.exists()
    with artefact.writing():
        assert not artefact.work.exists()


def lose_the_folder(folder: Path, known: dict[str, str]) -> None:
    (folder / "zarr.json").write_text("x")
    shutil.rmtree(folder)
    folder.mkdir()  # as a writer of shards does
    (folder / "shard").write_text("y")


def lose_a_file(folder: Path, known: dict[str, str]) -> None:
    (folder / "other").write_text("x")
    known["shard"] = "0" * 32


@pytest.mark.parametrize("lose", [lose_the_folder, lose_a_file])
def test_a_part_whose_work_folder_was_removed_or_emptied_meanwhile_is_refused(artefact, lose):
    known: dict[str, str] = {}
    with pytest.raises(UserError, match=r"work folder .* was removed"), artefact.new_part(0, {}, None, known) as folder:
        lose(folder, known)
    assert artefact.parts() == {}


def test_a_publication_reads_as_few_lists_as_it_needs(artefact):
    parts = []
    for index in range(3):
        parts.append(write_part(artefact, index, bytes([index])))
        artefact.publish(parts)
    artefact.publish(parts[:2])
    for number in (1, 2):
        artefact.list_path(number).write_bytes(b"?")
    assert artefact.unlisted_folders() == []
    artefact.list_path(3).write_bytes(b"?")  # that lists the last part that is there
    with pytest.raises(Damaged, match="000003"):
        artefact.unlisted_folders()


def test_a_folder_without_a_record_is_not_a_part(artefact):
    (artefact.path / "parts" / "000000-11111111").mkdir()
    (artefact.path / "parts" / "000000-11111111" / "data.bin").write_bytes(b"x")
    assert artefact.parts() == {}


@pytest.mark.parametrize("file", ["data.bin", "deeper/more.bin"])
@pytest.mark.parametrize("how", ["missing", "truncated", "grown"])
def test_a_missing_or_resized_file_makes_the_part_count_as_missing(artefact, file, how):
    path = artefact.part_path(write_part(artefact)) / file
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "grown":
            path.write_bytes(path.read_bytes() + b"!")
    assert artefact.parts() == {}


@pytest.mark.parametrize("content", ["", '{"index": 0, "cou', '{"index": 0}'])
def test_a_damaged_record_makes_the_part_count_as_missing(artefact, content):
    kept, spoilt = write_part(artefact, 1), write_part(artefact, 0)
    (artefact.part_path(spoilt) / "part.json").write_text(content)
    assert artefact.parts() == {1: kept}


def test_a_damaged_part_is_replaced_by_making_it_again(artefact):
    part = write_part(artefact)
    (artefact.part_path(part) / "data.bin").unlink()
    assert write_part(artefact) == part
    assert len(list((artefact.path / "parts").iterdir())) == 1


def test_equal_content_has_an_equal_name_and_other_content_another(artefact):
    for changes in ({}, {"content": b"other byte"}, {"n_documents": 1}):
        write_part(artefact, **changes)
    assert len(artefact.part_folders()) == 3
    write_part(artefact)
    assert len(artefact.part_folders()) == 3


def test_damage_finds_what_is_missing_and_with_full_every_flipped_byte(artefact):
    parts = [write_part(artefact, index) for index in range(3)]
    artefact.publish(parts)
    assert list(find_damage(artefact, full=True)) == []
    flipped = artefact.part_path(parts[1]) / "deeper" / "more.bin"
    content = bytearray(flipped.read_bytes())
    content[7] ^= 1
    flipped.write_bytes(content)
    assert list(find_damage(artefact, full=False)) == []
    (artefact.part_path(parts[2]) / "data.bin").unlink()
    found = list(find_damage(artefact, full=True))
    assert [each.part for each in found] == parts[1:]
    assert "more.bin has changed" in str(found[0])
    assert "data.bin is missing" in str(found[1])
    assert str(found[1]).startswith("tokens/small-0123abcd, part 2: ")


def test_nothing_is_published_before_publish_and_the_message_says_what_to_do(artefact):
    write_part(artefact)
    assert artefact.generation() is None
    with pytest.raises(UserError, match=r"tokens/small-0123abcd is not finished.*saeflow run"):
        artefact.published()


def test_readers_see_the_parts_of_the_newest_generation_in_order(artefact):
    first = write_part(artefact, 0)
    artefact.publish([first])
    second = write_part(artefact, 1)
    artefact.publish([second, first])
    assert artefact.published().number == 2
    assert artefact.published().parts == (first, second)
    assert artefact.published().total("n_tokens") == 6


def test_publishing_the_same_list_twice_changes_nothing(artefact):
    part = write_part(artefact)
    artefact.publish([part])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in artefact.path.rglob("*") if path.is_file()}
    assert artefact.publish([part]).number == 1
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in artefact.path.rglob("*") if path.is_file()}
    assert after == before


def test_two_stores_made_alike_are_equal_byte_for_byte(tmp_path):
    trees = []
    for name in "ab":
        artefact = Store.create(tmp_path / name).artefact("tokens", "small", "0123abcd")
        artefact.create({"x": 1})
        artefact.publish([write_part(artefact)])
        files = [path for path in artefact.path.rglob("*") if path.is_file() and path.name != "provenance.json"]
        trees.append({path.relative_to(artefact.path): path.read_bytes() for path in files})
    assert trees[0] == trees[1]


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", 1)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json") == 1


def test_a_folder_without_parts_appears_whole_or_not_at_all(store):
    sae = store.artefact("saes", "small", "0123abcd")
    with pytest.raises(RuntimeError), sae.publish_folder({}, [], {}) as folder:
        fail_half_way(folder)
    assert not sae.complete()
    assert not sae.path.exists()
    with sae.writing(), sae.publish_folder({"k": 3}, ["tokens/a-1"], {}) as folder:
        (folder / "weights").write_bytes(b"x")
    assert sae.complete()
    assert (sae.record.facts, sae.record.inputs) == ({"k": 3}, ["tokens/a-1"])
    (sae.path / "weights").write_bytes(b"y")
    assert [each.problem.split()[-5:] for each in find_damage(sae, full=True)] == [
        ["changed", "since", "it", "was", "written"]
    ]
    (sae.path / "weights").unlink()
    assert not sae.complete()


@pytest.mark.parametrize("file", ["artefact.json", "manifest.json", "part.json", "store.json"])
def test_what_a_newer_version_wrote_is_refused_by_name(store, artefact, file):
    artefact.publish([write_part(artefact)])
    part = write_part(artefact, 1)
    folder = {"part.json": artefact.part_path(part), "store.json": store.root}.get(file, artefact.path)
    raise_newer(folder / file)
    with pytest.raises(UserError, match=rf"{file} has format version {FORMAT_VERSION + 1}; .*\n.*upgrade"):
        use(store.root, artefact.id)


def test_a_folder_that_is_no_store_is_said_plainly(tmp_path):
    with pytest.raises(UserError, match=r"--store or SAEFLOW_STORE"):
        Store.open(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_that_cannot_be_written_is_said_with_the_reason_and_the_way_out(tmp_path, place):
    (tmp_path / "file").write_text("I am a file")
    with pytest.raises(UserError, match=r"store .*file.* cannot be written: .+\.\nChoose another folder with --store"):
        Store.create(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_without_permission_is_said_plainly(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot be written: Permission denied"):
        Store.create(tmp_path / "locked" / "store")


def test_a_second_writer_is_refused_and_may_write_afterwards(artefact):
    complaints = []

    def write() -> None:
        try:
            with artefact.writing():
                pass
        except UserError as error:
            complaints.append(str(error))

    with artefact.writing():
        (artefact.work / "precious").mkdir(parents=True)
        other = threading.Thread(target=write)
        other.start()
        other.join()
        assert (artefact.work / "precious").exists()
    assert len(complaints) == 1
    assert "Another run is writing tokens/small-0123abcd" in complaints[0]
    write()
    assert len(complaints) == 1


def test_two_artefacts_may_be_written_at_once(store, artefact):
    other = store.artefact("tokens", "small", "ffffffff")
    with artefact.writing(), other.writing():
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_leads_back_to_its_artefact(store, kind):
    artefact = store.artefact(kind, "a_b_2", "0123abcd")
    assert store.by_id(artefact.id) == artefact
    assert artefact.path == store.root / kind / "a_b_2-0123abcd"


def test_artefacts_are_listed_by_kind_the_newest_last_and_unfinished_folders_left_out(store):
    for i, (kind, fp) in enumerate([("features", "bbbbbbbb"), ("tokens", "cccccccc"), ("features", "aaaaaaaa")]):
        artefact = store.artefact(kind, "small", fp)
        artefact.create({})
        os.utime(artefact.path / "artefact.json", ns=(i * 10**9, i * 10**9))
    (store.root / "tokens" / "small-dddddddd").mkdir()
    assert [a.fp for a in store.artefacts()] == ["cccccccc", "bbbbbbbb", "aaaaaaaa"]
    assert [a.fp for a in store.artefacts("features")] == ["bbbbbbbb", "aaaaaaaa"]


def test_work_that_the_disk_cannot_hold_is_refused_with_both_numbers(store):
    store.require_free(1, "A small thing")
    with pytest.raises(
        UserError, match=r"A large thing needs about 1024\.0 TiB, but .* has [\d.]+ [KMGT]iB free\.\n.*--store"
    ):
        store.require_free(1 << 50, "A large thing")


def test_a_full_disk_leaves_the_store_as_it_was(artefact, monkeypatch):
    artefact.publish([write_part(artefact)])

    def no_space(self: Path, *_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, contextlib.suppress(OSError), artefact.new_part(1, {}) as folder:
        patch.setattr(Path, "write_bytes", no_space)
        (folder / "data.bin").write_bytes(b"x")
    assert list(artefact.parts()) == [0]
    assert list(find_damage(artefact, full=True)) == []


def test_records_are_plain_json_that_names_every_file(artefact):
    record = json.loads((artefact.part_path(write_part(artefact)) / "part.json").read_text())
    assert [file["name"] for file in record["files"]] == ["data.bin", "deeper/more.bin"]
    assert [file["n_bytes"] for file in record["files"]] == [10, 20]


def damaged_store(artefact: Artefact) -> PartRecord:
    part = write_part(artefact)
    artefact.publish([part])
    return part


def only_moved(said: Iterator[str]) -> Path:
    """What repair has moved, if it has done nothing else; it is still there, elsewhere."""
    [line] = said
    path, target = line.removeprefix("moved ").split(" to ")
    assert not Path(path).exists()
    assert "/damaged/" in target
    assert "://" in target or Path(target).exists()
    return Path(path)


def test_of_a_part_with_a_stray_file_only_the_stray_file_goes(artefact):
    part = damaged_store(artefact)
    stray = artefact.part_path(part) / "deeper" / ".DS_Store"
    stray.write_bytes(b"x")
    assert only_moved(repair_all(find_damage(artefact, full=True))) == stray
    assert list(find_damage(artefact, full=True)) == []
    assert artefact.parts() == {0: part}


@pytest.mark.parametrize("name", ["/home/u/.ssh/id", "../../../precious", "deeper/..", "", ".", "a//b"])
def test_a_file_name_that_leads_out_of_its_folder_is_no_record(artefact, name):
    part = damaged_store(artefact)
    changed = PartRecord(part.index, part.counts, [FileRecord(name, 5, "0" * 32)])
    write_record(artefact.part_path(part) / "part.json", changed)
    with pytest.raises(Damaged, match=r"part\.json is missing or damaged"):
        read_record(artefact.part_path(part) / "part.json", PartRecord)
    pq.write_table(generation_table(Generation(1, (changed,))), artefact.list_path(1))
    with pytest.raises(Damaged, match=r"000001\.parquet is missing or damaged"):
        _ = [part.files for part in read_generation(artefact.list_path(1), 1).parts]


@pytest.mark.parametrize(
    "folder", ["/home/u/Documents", "../../..", "000000-0123456", "000000-0123456g", "x\n000000-01234567", None]
)
def test_a_folder_that_no_part_is_called_is_no_list(artefact, folder):
    part = damaged_store(artefact)
    table = generation_table(Generation(1, (part,)))
    pq.write_table(table.set_column(1, "folder", pa.array([folder], pa.string())), artefact.list_path(1))
    for read in (lambda path: read_generation(path, 1), read_part_folders):
        with pytest.raises(Damaged):
            read(artefact.list_path(1))


class Unchecked(Folder):
    """A folder in which anything may be published, as a stranger may."""

    has_locks = False


def test_repairing_a_strangers_store_touches_nothing_outside_of_it(store, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("!")
    stranger = Store(Unchecked(store.root)).artefact("tokens", "x", "00000000")
    record = ArtefactRecord(
        kind="tokens", name="x", fp="00000000", facts={}, files=[FileRecord(str(victim / "precious"), 5, "0" * 32)]
    )
    write_record(stranger.path / "artefact.json", record)
    part = PartRecord(index=0, counts={}, files=[FileRecord("data", 5, "0" * 32)])
    part.__dict__["folder"] = str(victim)
    with contextlib.suppress(Damaged):
        stranger.publish([part])
    with contextlib.suppress(UserError):
        list(repair_all(verify(store, full=True)))
    assert [path.name for path in victim.rglob("*")] == ["precious"]


def test_a_link_in_an_artefact_leads_no_removal_out_of_it(artefact, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("!")
    (artefact.path / "link").symlink_to(tmp_path / "victim")
    for path in (artefact.path / "link" / "precious", artefact.path / "parts" / ".." / "..", artefact.path / ".."):
        with pytest.raises(UserError, match="lies outside of"):
            artefact.remove(path)
    assert (tmp_path / "victim" / "precious").exists()


@pytest.mark.parametrize("id", ["tokens/../../home/u-x", "../home/u-x", "labels/x-00000000", "tokens/x", "tokens"])
def test_the_name_of_an_artefact_leads_nowhere_else(store, id):
    with pytest.raises(UserError, match="names no artefact"):
        store.by_id(id)


def test_repair_goes_on_where_one_artefact_is_past_mending_and_says_what_is_left(store, artefact):
    """A list that hides documents follows from no record of a part."""
    part = damaged_store(artefact)
    artefact.publish([part], hidden={0: (Hidden(document_id=0, key_hash="aa", reason="forgotten"),)})
    artefact.list_path(2).write_bytes(b"x")
    other = store.artefact("tokens", "x", "00000000")
    other.create({})
    broken = damaged_store(other)
    (other.part_path(broken) / "data.bin").unlink()
    said = repair_all(list(verify(store, full=True)))
    assert next(said).startswith(f"moved {other.part_path(broken)} to {store.root}/damaged/")
    with pytest.raises(UserError) as left:
        next(said)
    assert f"{artefact.list_path(2)} is damaged" in str(left.value)
    assert f"Bring it back from a backup. Or remove {artefact.path}: " in str(left.value)
    assert "verify --full --repair" not in str(left.value)


def test_a_damaged_part_is_mended_once_however_much_is_wrong_with_it(artefact):
    part = damaged_store(artefact)
    for name in ("data.bin", "deeper/more.bin"):
        (artefact.part_path(part) / name).unlink()
    found = list(find_damage(artefact, full=True))
    assert len(found) == 2
    assert only_moved(repair_all(found)) == artefact.part_path(part)


def test_two_machines_whose_processes_have_one_number_may_open_a_store_at_once(store, monkeypatch):
    """In containers every process is number 1: the other's test of the disk may come and go at any time."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    opening = Path.touch

    def touch(self: Path, *rest: object) -> None:
        opening(self)
        self.unlink()

    monkeypatch.setattr(Path, "touch", touch)
    assert Store.create(store.root).root == store.root
    assert [path.name for path in (store.root / "tmp").iterdir() if path.name != "locks"] == []


def test_a_store_whose_marker_is_gone_is_opened_with_the_way_to_mend_it(store, artefact):
    (store.root / "store.json").unlink()
    with pytest.raises(UserError, match=r"store\.json is missing or damaged\. Mend it with `saeflow verify"):
        Store.open(store.root)


def test_the_shares_of_a_store_follow_one_another_whenever_they_are_read(store):
    seen = []
    for _ in range(7):
        share = next_share(Store.open(store.root), 3)
        seen.append(share)
        assert next_share(store, 3) == share, "one that was not read to its end is read again"
        note_share(store, share)
        note_share(store, next_share(store, 5))
    assert seen == [(i % 3, 3) for i in range(7)]
    (store.root / "tmp" / "verified.json").write_text("?")
    assert next_share(store, 3) == (0, 3)


def test_a_stray_object_is_found_and_removed(tmp_path):
    artefact = Store(Bucket(Objects("memory:///"), tmp_path / "cache")).artefact("tokens", "small", "0123abcd")
    with artefact.writing():
        artefact.create({})
        parts = [write_part(artefact, index) for index in range(3)]
        artefact.publish(parts)
    stray = artefact.part_path(parts[1]) / "deeper" / "stray"
    stray.write_bytes(b"x")
    artefact.storage.send(stray)
    found = list(find_damage(artefact, full=True))
    assert [(each.part, each.problem) for each in found] == [(parts[1], f"{stray} does not belong there")]
    assert only_moved(repair_all(found)) == stray
    assert list(find_damage(artefact, full=True)) == []


def test_a_damaged_list_of_an_earlier_generation_keeps_nobody_from_publishing(artefact):
    part = damaged_store(artefact)
    artefact.publish([part], hidden={0: (Hidden(document_id=0, key_hash="aa", reason="forgotten"),)})
    artefact.list_path(1).write_bytes(b"x")
    with artefact.writing():
        assert artefact.publish([part], hidden={}).number == 3
    assert artefact.part_path(part).is_dir()


def test_repair_reads_the_parts_that_a_lost_manifest_had_hidden_from_it(artefact):
    parts = [write_part(artefact, index) for index in (0, 1)]
    artefact.publish(parts)
    flipped = artefact.part_path(parts[1]) / "data.bin"
    flipped.write_bytes(b"!" + flipped.read_bytes()[1:])
    (artefact.path / "manifest.json").unlink()
    found = list(find_damage(artefact, full=True))
    assert [each.part for each in found] == [None]
    said = list(repair_all(found))
    assert said[0] == f"{artefact.path} is whole by now"
    assert said[1].startswith(f"moved {artefact.part_path(parts[1])} to ")
    assert list(artefact.parts()) == [0]


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_an_artefact_without_parts_is_moved_aside_whole_if_a_byte_changed(store, kind):
    made = store.artefact(kind, "x", "00000000")
    with made.writing(), made.publish_folder({}, [], {}) as folder:
        (folder / "table").write_bytes(b"table")
    assert state_in_words(made)[:3] == ("whole", "-", "-")
    assert list(verify(store, full=True)) == []
    (made.path / "table").write_bytes(b"tabla")
    assert not list(verify(store, full=False))
    said = list(repair_all(verify(store, full=True)))
    assert [each.split(" to ")[0] for each in said] == [f"moved {made.path}"]
    assert not made.path.exists()
    assert list(verify(store, full=True)) == []


def test_repair_looks_again_before_it_moves_anything(store):
    sae = store.artefact("saes", "x", "00000000")
    with sae.writing(), sae.publish_folder({}, [], {}) as folder:
        (folder / "sae_weights.safetensors").write_bytes(b"weights")
    weights = sae.path / "sae_weights.safetensors"
    weights.rename(weights.with_suffix(".away"))
    found = list(find_damage(sae, full=True))
    weights.with_suffix(".away").rename(weights)  # the disk is there again
    assert list(repair_all(found)) == [f"{sae.path} is whole by now"]
    assert weights.read_bytes() == b"weights"
