"""Artefacts on disk: what counts as finished, what is noticed, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from saeflow import artefact as artefact_module
from saeflow.artefact import Artefact
from saeflow.disk import read_json, write_json
from saeflow.fingerprints import FORMAT_VERSION
from saeflow.integrity import damage
from saeflow.records import KINDS, PartRecord
from saeflow.sections import UserError
from saeflow.store import Store


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    """Nothing here cuts the power, and flushing is most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture
def artefact(store) -> Artefact:
    made = store.artefact("tokens", "small", "0123abcd")
    made.begin({"context_length": 4})
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
    artefact.begin({})


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


def test_a_publication_reads_as_few_lists_as_it_needs(artefact, monkeypatch):
    parts = []
    for index in range(3):
        parts.append(write_part(artefact, index, bytes([index])))
        artefact.publish(parts)
    artefact.publish(parts[:2])
    read, listed_folders = [], artefact_module.listed_folders
    monkeypatch.setattr(artefact_module, "listed_folders", lambda path: read.append(path.stem) or listed_folders(path))
    assert artefact.unlisted_folders() == []
    assert read == ["000004", "000003"]  # that lists the last part that is there


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
    assert list(damage(artefact, full=True)) == []
    flipped = artefact.part_path(parts[1]) / "deeper" / "more.bin"
    content = bytearray(flipped.read_bytes())
    content[7] ^= 1
    flipped.write_bytes(content)
    assert list(damage(artefact, full=False)) == []
    (artefact.part_path(parts[2]) / "data.bin").unlink()
    found = list(damage(artefact, full=True))
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
    first, second = write_part(artefact, 0), write_part(artefact, 1)
    artefact.publish([first])
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
        artefact.begin({"x": 1})
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
    with pytest.raises(RuntimeError), sae.whole({}, [], {}) as folder:
        fail_half_way(folder)
    assert not sae.complete()
    assert not sae.path.exists()
    with sae.writing(), sae.whole({"k": 3}, ["tokens/a-1"], {}) as folder:
        (folder / "weights").write_bytes(b"x")
    assert sae.complete()
    assert (sae.record.facts, sae.record.inputs) == ({"k": 3}, ["tokens/a-1"])
    (sae.path / "weights").write_bytes(b"y")
    assert [each.problem.split()[-5:] for each in damage(sae, full=True)] == [
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
        artefact.begin({})
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
    assert list(damage(artefact, full=True)) == []


def test_records_are_plain_json_that_names_every_file(artefact):
    record = json.loads((artefact.part_path(write_part(artefact)) / "part.json").read_text())
    assert [file["name"] for file in record["files"]] == ["data.bin", "deeper/more.bin"]
    assert [file["n_bytes"] for file in record["files"]] == [10, 20]
