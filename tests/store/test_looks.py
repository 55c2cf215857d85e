"""Very many parts are looked at by other means than a few: both must find the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saeflow.store import files, links
from saeflow.store.artefact import Artefact
from saeflow.store.storage import folder as folders
from saeflow.store.store import Store
from saeflow.store.verify import find_damage

N = 7


@pytest.fixture
def artefact(tmp_path) -> Artefact:
    made = Store.create(tmp_path / "ä store").artefact("tokens", "small", "0123abcd")
    made.create({"context_length": 4})
    for index in range(N):
        with made.new_part(index, {"n_tokens": index}) as folder:
            (folder / "data.bin").write_bytes(bytes(index))
            (folder / "deeper" / "ü").mkdir(parents=True)
            (folder / "deeper" / "ü" / "more.bin").write_bytes(b"x")
    made.publish(made.parts().values())
    return made


@pytest.fixture(params=[2, 3, 1000])
def many(request, monkeypatch) -> int:
    """From how many parts on the other means are taken."""
    for module in (files, folders):
        monkeypatch.setattr(module, "MANY", request.param)
    return int(request.param)


def remove_a_file(folder: Path) -> None:
    (folder / "deeper" / "ü" / "more.bin").unlink()


def cut_a_file(folder: Path) -> None:
    (folder / "data.bin").write_bytes(b"")


def make_a_file_longer(folder: Path) -> None:
    (folder / "data.bin").write_bytes(bytes(1 << 20))


def make_a_folder_of_a_file(folder: Path) -> None:
    (folder / "data.bin").unlink()
    (folder / "data.bin").mkdir()


def make_a_file_of_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "deeper")
    (folder / "deeper").write_bytes(b"x")


def link_a_file(folder: Path) -> None:
    (folder / "data.bin").rename(folder / "other")
    (folder / "data.bin").symlink_to(folder / "other")


def link_a_folder(folder: Path) -> None:
    (folder / "deeper").rename(folder / "other")
    (folder / "deeper").symlink_to(folder / "other")


def link_the_part(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def remove_the_record(folder: Path) -> None:
    (folder / "part.json").unlink()


def remove_the_part(folder: Path) -> None:
    shutil.rmtree(folder)


HARMS = [
    remove_a_file, cut_a_file, make_a_file_longer, make_a_folder_of_a_file, make_a_file_of_a_folder, link_a_file,
    link_a_folder, link_the_part, remove_the_record, remove_the_part,
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_part_that_is_not_as_recorded_counts_as_missing_however_many_are_looked_at(artefact, harm, many):
    harm(artefact.part_path(artefact.published().parts[4]))
    assert artefact.parts().keys() == set(range(N)) - {4}
    assert {found.part.index for found in find_damage(artefact, full=False) if found.part} == {4}


def test_parts_that_are_whole_are_all_found_however_many_are_looked_at(artefact, many):
    assert list(artefact.parts().values()) == list(artefact.published().parts)
    assert list(find_damage(artefact, full=False)) == []


def test_a_linked_folder_of_parts_holds_none_however_many_are_looked_at(artefact, many):
    parts = artefact.path / "parts"
    parts.rename(artefact.path / "other")
    parts.symlink_to(artefact.path / "other")
    links._look_once.cache_clear()  # as in another process
    assert {found.part.index for found in find_damage(artefact, full=False) if found.part} == set(range(N))


@pytest.mark.parametrize("harm", HARMS)
def test_a_look_at_many_confirms_only_what_is_as_recorded(artefact, harm: Callable[[Path], None], monkeypatch):
    monkeypatch.setattr(folders, "MANY", 1)
    parts, folder = artefact.published().parts, f"{artefact.path}/parts"
    assert artefact.storage.confirmed(folder, parts) == [True] * N
    harm(artefact.part_path(parts[4]))
    assert artefact.storage.confirmed(folder, parts) == [index != 4 for index in range(N)]
    assert artefact.storage.confirmed(folder, []) == []
