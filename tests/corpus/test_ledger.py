"""Hashes of stored documents: read once, kept for the next append, and never believed when they may be wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.corpus import ledger as ledgers
from saeflow.corpus.ledger import Ledger, index_path, key_hash, stored_hashes
from saeflow.store.artefact import Artefact
from saeflow.store.garbage import collect_garbage
from saeflow.store.records import Hidden
from saeflow.store.store import Store

N = 20
"""Documents of a part."""


@pytest.fixture
def artefact(tmp_path, monkeypatch) -> Artefact:
    monkeypatch.setattr(ledgers, "KEPT_FROM", 2)
    made = Store.create(tmp_path / "store").artefact("tokens", "small", "0123abcd")
    made.create({"context_length": 4})
    append(made, 8)
    return made


def append(artefact: Artefact, n_parts: int) -> None:
    first = len(artefact.published().parts) if artefact.generation() else 0
    for index in range(first, first + n_parts):
        ids = np.arange(index * N, (index + 1) * N)
        table = pa.table({
            "document_id": ids,
            "key": [f"key {number}" for number in ids],
            "content_hash": [content_hash(number) for number in ids],
        })  # fmt: skip
        with artefact.new_part(index, {"first_document": index * N, "n_documents": N}) as folder:
            pq.write_table(table, folder / "documents.parquet")
    artefact.publish(artefact.parts().values())


def content_hash(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The parts whose documents are read from now on."""
    read: list[str] = []
    part_file = Artefact.part_file

    def noted(self, part, name):
        read.append(part.folder)
        return part_file(self, part, name)

    monkeypatch.setattr(Artefact, "part_file", noted)
    return read


def hashes(artefact: Artefact) -> list[tuple[int, ...]]:
    """As they are found, and as they are without the file."""
    parts = artefact.published().parts
    found = [column.tolist() for column in stored_hashes(artefact, parts).columns]
    kept = index_path(artefact).read_bytes() if index_path(artefact).exists() else None
    index_path(artefact).unlink(missing_ok=True)
    assert found == [column.tolist() for column in stored_hashes(artefact, parts).columns]
    if kept is not None:
        index_path(artefact).write_bytes(kept)
    return list(zip(*found, strict=True))


def test_hashes_are_those_of_every_document_in_the_order_of_their_keys(artefact):
    expected = []
    for number in range(8 * N):
        text = content_hash(number)
        expected.append((int(key_hash(f"key {number}"), 16), int(text[:16], 16), number, int(text[16:], 16)))
    assert hashes(artefact) == sorted(expected)


def test_an_append_reads_the_documents_of_new_parts_only(artefact, opened):
    hashes(artefact)
    append(artefact, 1)
    opened.clear()
    stored_hashes(artefact, artefact.published().parts)
    assert opened == [artefact.published().parts[-1].folder]
    assert len(hashes(artefact)) == 9 * N


def test_a_part_that_is_not_shown_any_more_is_not_known(artefact):
    hashes(artefact)
    artefact.publish(artefact.published().parts[:-1])
    assert max(row[2] for row in hashes(artefact)) == 7 * N - 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def change_a_name(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"000003-", b"000004-", 1))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def write_nonsense(path: Path) -> None:
    path.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"[" * 16)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


@pytest.mark.parametrize("spoil", [cut, change_a_byte, change_a_name, empty, write_nonsense, link, Path.unlink])
def test_a_file_that_is_missing_or_damaged_is_not_believed(artefact, spoil, opened):
    stored_hashes(artefact, artefact.published().parts)
    spoil(index_path(artefact))
    opened.clear()
    assert len(stored_hashes(artefact, artefact.published().parts).keys) == 8 * N
    assert len(opened) == 8
    opened.clear()
    stored_hashes(artefact, artefact.published().parts)
    assert not opened, "it is written again"


def test_a_hidden_document_is_not_known_though_its_hash_is_kept(artefact):
    hidden = {0: (Hidden(document_id=3, key_hash=key_hash("key 3"), reason="replaced"),)}
    for _ in range(2):
        artefact.publish(artefact.published().parts, hidden=hidden)
        ledger = Ledger.read(artefact, artefact.published())
        assert ledger.look_up("key 3", content_hash(3)) == "new"
        assert ledger.look_up("key 4", content_hash(4)) == "same"
        hidden = {}
        artefact.publish(artefact.published().parts, hidden=hidden)
        assert Ledger.read(artefact, artefact.published()).look_up("key 3", content_hash(3)) == "same"
        hidden = {0: (Hidden(document_id=3, key_hash=key_hash("key 3"), reason="replaced"),)}


def test_a_full_disk_does_not_end_an_append(artefact, monkeypatch):
    def full(*arguments: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledgers, "save", full)
    assert len(stored_hashes(artefact, artefact.published().parts).keys) == 8 * N
    assert not index_path(artefact).exists()


def test_hashes_of_documents_that_are_gone_are_removed_by_gc_and_others_stay(artefact):
    store = Store(artefact.storage)
    collect_garbage(store, 0, remove=True)  # the work folder of the fixture
    stored_hashes(artefact, artefact.published().parts)
    assert not collect_garbage(store, 0, remove=True).garbage
    assert index_path(artefact).exists()
    artefact.remove(artefact.path)
    assert [each.path for each in collect_garbage(store, 0, remove=True).garbage] == [index_path(artefact)]
    assert not index_path(artefact).exists()
