"""What lies in the user's cache is believed, so nobody else may have written it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import checksum
from saeflow.store.records import write_record
from saeflow.store.storage.bucket import Bucket
from saeflow.store.storage.objects import Objects
from saeflow.store.storage.piece_cache import PieceCache
from saeflow.store.storage.pieces import piece_name
from saeflow.store.store import Store
from saeflow.store.user_cache import is_foreign, trusted_folder

STRANGER = 54_321
NAME = piece_name("a piece")
Give = Callable[[Path], None]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Give a path to somebody else. Only root can; another user becomes somebody else."""
    if os.geteuid() == 0:
        return lambda path: os.chown(path, STRANGER, -1)
    return lambda path: monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as an earlier saeflow has made it, with a folder and a record in it."""
    folder = tmp_path / "cache"
    record = folder / "store" / "tokens" / "x-00000000" / "artefact.json"
    record.parent.mkdir(parents=True)
    record.write_text("a record")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def opened(cache: Path) -> Store:
    return Store.at(Bucket(Objects("memory:///"), cache / "store"))


def test_a_cache_that_others_can_only_read_is_used(cache: Path) -> None:
    assert opened(cache).root == cache / "store"


PLACES = [".", "store", "store/tokens/x-00000000", "store/tokens/x-00000000/artefact.json"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("right", [0o020, 0o002], ids=["group", "all"])
def test_a_place_of_the_cache_that_others_may_write_is_named_before_anything_is_read(
    cache: Path, place: str, right: int
) -> None:
    path = cache / place
    path.chmod(path.stat().st_mode | right)
    expected = (
        f"SAEFLOW_CACHE is {cache}, but others may write {path}: run `chmod -R go-w {cache}` if you trust them, or"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)} set SAEFLOW_CACHE to a folder of your own.$"):
        opened(cache)


@pytest.mark.parametrize("place", PLACES)
def test_a_place_of_the_cache_that_belongs_to_somebody_else_is_named_before_anything_is_read(
    cache: Path, place: str, give: Give
) -> None:
    give(cache / place)
    with pytest.raises(UserError, match=f"^SAEFLOW_CACHE is {cache}, but .* belongs to user .*: remove it, or set"):
        opened(cache)


def test_a_record_that_somebody_else_has_changed_with_its_note_is_not_believed(tmp_path: Path, give: Give) -> None:
    objects = Objects("memory:///")

    def artefact() -> Artefact:
        return Store.at(Bucket(objects, tmp_path / "cache" / "store")).artefact("tokens", "x", "00000000")

    artefact().create({"context_length": 128})
    changed = artefact()
    record = changed.path / "artefact.json"
    write_record(record, changed.record.model_copy(update={"facts": {"context_length": 1}}))
    tag = obstore.head(objects.store, "tokens/x-00000000/artefact.json")["e_tag"]
    note = tmp_path / "cache/store/tmp/known/tokens/x-00000000/artefact.json"
    note.write_text(f"{checksum(record)} {tag}")
    assert artefact().fact("context_length") == 1
    give(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(UserError, match="SAEFLOW_CACHE"):
        artefact()


def test_a_cache_of_root_that_a_service_can_only_read_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = PieceCache(cache / "pieces", 1 << 20)
    piece.put(NAME, b"some bytes")
    for path in (cache / "pieces", *(cache / "pieces").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    for name in ("utime", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert trusted_folder(cache / "store") == cache / "store"
    assert piece.get(NAME) == b"some bytes"


def test_folders_and_pieces_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = opened(tmp_path / "cache")
        store.storage.look_once("something", lambda: None)
        opened(tmp_path / "cache")
    finally:
        os.umask(before)
    found = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert len(found) == 5
    assert not [path for path in found if path.stat().st_mode & 0o077]


@pytest.mark.parametrize("place", [".", "pieces", f"pieces/{NAME[:2]}", f"pieces/{NAME[:2]}/{NAME}"])
def test_a_piece_that_others_may_have_written_is_not_there(tmp_path: Path, place: str) -> None:
    cache = PieceCache(tmp_path / "cache" / "pieces", 1 << 20)
    cache.put(NAME, b"some bytes")
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert cache.get(NAME) == b"some bytes"
    path = tmp_path / "cache" / place
    path.chmod(path.stat().st_mode | 0o022)
    assert cache.get(NAME) is None
    assert is_foreign(tmp_path / "cache" / "pieces" / NAME[:2] / NAME, tmp_path / "cache")
