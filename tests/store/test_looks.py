"""Very many parts are looked at by other means than a few: both must find the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.store import files, links, looks
from saeflow.store.artefact import Artefact
from saeflow.store.lists import with_files
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


STEP = st.text("aé", min_size=1, max_size=2)
PATHS = st.lists(st.lists(STEP, min_size=1, max_size=4).map("/".join), max_size=6, unique=True)


def files_and_folders(names: list[str]) -> list[str]:
    """Return those names that can be files beside one another: none is a folder of another."""
    return [name for name in names if not any(other.startswith(f"{name}/") for other in names)]


def harmed(at: Path, elsewhere: Path, harm: str) -> None:
    at.rename(elsewhere)
    if harm == "link":
        at.symlink_to(elsewhere)
    elif harm == "file":
        at.write_bytes(b"longer than any file of the part")
    elif harm == "folder":
        at.mkdir()


@given(names=PATHS.map(files_and_folders), data=st.data())
def test_a_look_at_many_finds_what_a_look_at_one_finds(names, data, tmp_path_factory):
    """Also if names share folders, or come in an order in which others lie between them."""
    root = tmp_path_factory.mktemp("looks")
    made = Store.create(root / "store").artefact("tokens", "small", "0123abcd")
    made.create({})
    for index in range(2):
        with made.new_part(index, {}) as folder:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(name.encode())
    made.publish(made.parts().values())
    parts = [part for _, part in sorted(made.parts().items())]
    shuffled = [replace(with_files(part), files=data.draw(st.permutations(part.files))) for part in parts]
    for part, old in zip(shuffled, parts, strict=True):
        part.__dict__["folder"] = old.folder
    inside = [*names, *links.folders_of(tuple(names)), "part.json"]
    at, harm = (
        data.draw(st.sampled_from(inside)),
        data.draw(st.sampled_from(["none", "gone", "link", "file", "folder"])),
    )
    if harm != "none":
        harmed(made.part_path(parts[1]) / at, root / "elsewhere", harm)
    for some in (parts, shuffled, [*parts, *shuffled]):
        expected = [made._is_whole(part) for part in some]
        assert looks.confirmed(f"{made.path}/parts", some) == expected
    assert looks.written(f"{made.path}/parts", parts) == [True, at != "part.json" or harm == "none"]


def test_records_too_long_for_the_room_are_left_to_whoever_wants_to_know(artefact, monkeypatch):
    folder, parts = f"{artefact.path}/parts", artefact.published().parts
    assert looks.written(folder, parts) == [True] * N
    monkeypatch.setattr(looks, "_CONTENT_BYTES", 2 * len(parts[0].text) + 10)
    assert looks.written(folder, parts) == [True, True] + [False] * (N - 2)
    assert list(find_damage(artefact, full=False)) == []
    assert looks.written(folder, []) == []
