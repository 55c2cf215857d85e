"""The cache of pieces: bounded, shared by processes, and never believed."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saeflow.runtime.errors import UserError
from saeflow.store.records import Damaged, FileRecord
from saeflow.store.storage import pieces
from saeflow.store.storage.local_copy import Listings
from saeflow.store.storage.objects import Objects
from saeflow.store.storage.piece_cache import LIMIT, PieceCache, cache_limit
from saeflow.store.storage.pieces import Pieces, kept_range, piece_name

NAMES = [piece_name(number) for number in range(100)]


def n_bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_piece_is_found_as_it_was_put(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, 1_000)
    for piece in (b"", b"some bytes"):
        cache.put(NAMES[0], piece)
        assert (cache.get(NAMES[0]), cache.get(NAMES[1])) == (piece, None)


@pytest.mark.parametrize("content", [b"", b"short", b"0123456789abcdef", b"0123456789abcdefsome bytes"])
def test_a_damaged_piece_is_none_and_goes(tmp_path: Path, content: bytes) -> None:
    cache = PieceCache(tmp_path, 1_000)
    cache.put(NAMES[0], b"some bytes")
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(content)
    assert cache.get(NAMES[0]) is None
    assert not path.exists()


def test_the_cache_stays_below_its_limit_and_drops_what_was_unused_for_longest(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, 2_000)
    for number, name in enumerate(NAMES):
        cache.put(name, bytes(100))
        os.utime(cache.folder / name[:2] / name, (number, number))
        assert cache.get(NAMES[0]) is not None
        assert n_bytes_in(tmp_path) <= 2_000
    assert [name in {path.name for path in tmp_path.glob("*/*")} for name in NAMES[1:80]] == [False] * 79
    cache.put(NAMES[1], bytes(2_000))
    assert cache.get(NAMES[1]) is None


def test_what_a_killed_process_left_half_written_is_no_piece_and_goes_when_room_is_made(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, 500)
    left = tmp_path / NAMES[0][:2] / f".{NAMES[0]}.123.456"
    left.parent.mkdir()
    left.write_bytes(bytes(400))
    os.utime(left, (0, 0))
    assert cache.get(NAMES[0]) is None
    for name in NAMES[:10]:
        cache.put(name, bytes(100))
    assert not left.exists()


def test_a_folder_that_is_deleted_or_cannot_be_written_keeps_nothing_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = PieceCache(tmp_path / "file", 1_000)
    cache.put(NAMES[0], b"some bytes")
    assert cache.get(NAMES[0]) is None


def test_several_processes_may_use_the_cache_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from saeflow.store.storage.piece_cache import PieceCache\n"
        "cache = PieceCache(Path(sys.argv[1]), 20_000)\n"
        "for turn in range(300):\n"
        "    name = f'{turn % 40:032x}'\n"
        "    found = cache.get(name)\n"
        "    assert found in (None, name.encode() * 30), found\n"
        "    cache.put(name, name.encode() * 30)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(3)))
    assert [each.stderr for each in done if each.returncode] == []
    assert n_bytes_in(tmp_path) <= 20_000 * (1 + 3 / 16)


def test_the_limit_is_a_size_and_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, n_bytes in (("2MiB", 2 << 20), ("0", 0), ("", 1 << 30)):
        monkeypatch.setenv(LIMIT, said)
        assert cache_limit() == n_bytes
    monkeypatch.setenv(LIMIT, "plenty")
    with pytest.raises(UserError, match="SAEFLOW_CACHE_BYTES is 'plenty', but it must be a size"):
        cache_limit()


def test_small_files_are_kept_whole_and_of_large_ones_the_end() -> None:
    assert kept_range(pieces.WHOLE_BYTES) == (0, pieces.WHOLE_BYTES)
    for n_bytes in (pieces.WHOLE_BYTES + 1, 100 << 20, 10 << 30):
        start, stop = kept_range(n_bytes)
        assert stop == n_bytes
        assert 64 << 10 <= stop - start <= 1 << 20


@pytest.fixture
def some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """A store in memory with a file of 10,000 bytes, whose last 1,000 are kept."""
    import obstore
    import xxhash

    monkeypatch.setattr(pieces, "WHOLE_BYTES", 5_000)
    monkeypatch.setattr(pieces, "LEAST_TAIL", 1_000)
    objects = Objects("memory:///")
    found = Pieces(objects, Listings(objects), PieceCache(tmp_path, 1 << 20))
    for name, n_bytes in (("large", 10_000), ("small", 3_000)):
        content = bytes(place % 251 for place in range(n_bytes))
        obstore.put(found.objects.store, name, content)
        found.recorded[name] = FileRecord(name, n_bytes, xxhash.xxh3_128_hexdigest(content))
    return found


@pytest.mark.parametrize("name", ["large", "small"])
def test_any_range_has_the_bytes_of_the_file(some: Pieces, name: str) -> None:
    size = some.version(name).n_bytes
    for start in (0, 1, 2_990, 8_999, 9_000, 9_001, 9_999):
        for n_bytes in (0, 1, 1_000, 20_000):
            expected = bytes(place % 251 for place in range(start, min(start + n_bytes, size)))
            assert some.read(some.version(name), start, n_bytes) == expected


def test_threads_that_want_one_piece_ask_once(some: Pieces) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(lambda _: some.read(some.version("small"), 0, 3_000), range(64))}) == 1
    assert some.objects.meter.traffic.requests == {"GET": 1}


def test_a_file_that_is_not_as_recorded_is_damaged_and_not_kept(some: Pieces, tmp_path: Path) -> None:
    for wrong in (FileRecord("small", 3_000, "0" * 32), FileRecord("small", 2_999, some.recorded["small"].checksum)):
        some.recorded["small"] = wrong
        with pytest.raises(Damaged, match=r"memory:/+small is missing or damaged"):
            some.read(some.version("small"), 0, 10)
    assert not list(tmp_path.rglob("*/*"))


def test_a_piece_of_another_version_of_a_file_is_not_taken(some: Pieces) -> None:
    some.read(some.version("large"), 9_500, 100)
    some.recorded["large"] = FileRecord("large", 10_000, "0" * 32)
    some.read(some.version("large"), 9_500, 100)
    assert some.objects.meter.traffic.requests == {"GET": 2}
