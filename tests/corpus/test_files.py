"""Files of a corpus: which are read, and which are refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.corpus.document import Document
from saeflow.corpus.files import folder_before_globs, matching_files
from saeflow.corpus.sources import open_corpus
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from tests.support.packed import zstd

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def read(*patterns: str | Path) -> list[Document]:
    return list(open_corpus(CorpusConfig(files=[str(each) for each in patterns])).documents)


def texts(documents: list[Document]) -> dict[str, str]:
    return {each.key: each.text for each in documents}


PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("upper", [False, True])
def test_packed_files_are_read_whole(tmp_path: Path, ending: str, upper: bool) -> None:
    rows = {
        "a.txt": b"words\r\n",
        "b.jsonl": b'{"key": "k", "text": "words\\r\\n"}',
        "c.csv": b'key,text\nk,"words\r\n"\n',
    }
    for name, content in rows.items():
        path = tmp_path / (f"{name}{ending}".upper() if upper else f"{name}{ending}")
        path.write_bytes(PACKED[ending](content))
        (document,) = read(path)
        assert document.text == "words\r\n"


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_packed_file_that_was_cut_is_refused_by_name(tmp_path: Path, ending: str, name: str) -> None:
    rows = os.urandom(200_000).hex()
    content = f"text\n{rows}\n" if name == "a.csv" else f'{{"text": "{rows}"}}\n'
    packed = PACKED[ending](content.encode() * 2 if name != "a.csv" else content.encode())
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=rf"{name}{ending} cannot be unpacked: .*\nIs it whole"):
        read(path)


def test_two_members_of_one_packed_file_are_both_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert len(read(tmp_path / "a.jsonl.gz")) == 2


def test_archives_of_several_files_are_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.txt", "one")
        archive.writestr("two.txt", "two")
    for name, mode in (("b.tar", "w"), ("c.tar.gz", "w:gz"), ("d.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as packed:  # type: ignore[call-overload]
            packed.addfile(tarfile.TarInfo("one.txt"), io.BytesIO())
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=rf"{path.name} is a (zip|tar) archive\. Unpack it"):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", POINTER, r"a\.txt is a pointer of git-lfs.*git lfs pull"),
        ("a.csv", POINTER, r"a\.csv is a pointer of git-lfs"),
        ("a.jsonl", POINTER, r"a\.jsonl is a pointer of git-lfs"),
        ("a.parquet", POINTER, r"a\.parquet is a pointer of git-lfs"),
        ("a.txt", gzip.compress(b"text", mtime=0), r"a\.txt is packed by gzip, and its name does not say so"),
        ("a.csv", zstd(b"text\na\n"), r"a\.csv is packed by Zstandard"),
        ("a.txt", b"%PDF-1.7 ...", r"a\.txt is a PDF"),
        ("a.jsonl", b"PAR1\x15\x04..PAR1", r"a\.jsonl is a Parquet file"),
        ("a.txt", b"0" * 257 + b"ustar", r"a\.txt is a tar archive"),
        ("a.parquet", b"PK\x03\x04", r"a\.parquet is a zip archive"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read(tmp_path / name)


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*", "/**/*.txt"])
def test_what_other_programs_leave_in_a_folder_is_passed_over(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "._a.txt", "_SUCCESS", "Thumbs.db", ".ipynb_checkpoints/a-checkpoint.txt"):
        (tmp_path / name).write_bytes(b"\0\1\xff")
    assert texts(read(f"{tmp_path}{pattern}")) == {"a.txt": "words"}


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".hidden.txt").write_text("words")
    assert texts(read(tmp_path / ".hidden.txt")) == {".hidden.txt": "words"}


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "[ab]"])
@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".parquet"])
def test_signs_of_patterns_in_names_mean_themselves(tmp_path: Path, name: str, ending: str) -> None:
    for stem in (name, "a1", "ab", "a"):
        path = tmp_path / f"{stem}{ending}"
        content = {".txt": stem, ".csv": f"text\n{stem}\n", ".jsonl": f'{{"text": "{stem}"}}'}.get(ending)
        if content is None:
            pq.write_table(pa.table({"text": [stem]}), path)
        else:
            path.write_text(content)
    assert [each.text for each in read(tmp_path / f"{name}{ending}")] == [name]
    assert sorted(each.text for each in read(f"{tmp_path}/*{ending}")) == sorted([name, "a1", "ab", "a"])


@pytest.mark.parametrize("folder", ["project [v2]", "a*b", "what?"])
@pytest.mark.parametrize("pattern", ["d*.txt", "**/*.txt", "d0.txt", "texts"])
def test_the_recipes_own_folder_is_no_pattern(tmp_path: Path, folder: str, pattern: str) -> None:
    (tmp_path / folder / "texts").mkdir(parents=True)
    for place in ("", "texts"):
        (tmp_path / folder / place / "d0.txt").write_text(f"of {place}")
    data = {"name": "r", "corpus": {"files": pattern}, "model": {"path": "m"}, "activations": {"sites": ["x"]}}
    recipe = parse_recipe(data, folder=tmp_path / folder)
    assert recipe.corpus is not None
    found = texts(list(open_corpus(recipe.corpus).documents))
    assert "d0.txt" in found
    assert not any(folder in key for key in found)


def test_a_loop_of_links_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    for name in ("loop", "again"):
        (tmp_path / "texts" / name).symlink_to(tmp_path / "texts")
    for pattern in (tmp_path / "texts", f"{tmp_path}/texts/**/*.txt", f"{tmp_path}/**"):
        assert [Path(path).name for path in matching_files(str(pattern))] == ["a.txt"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("words")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    assert texts(read(f"{tmp_path}/texts/**/*.txt")) == {"link/a.txt": "words"}


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [("/a/b*/c", "/a"), ("/a/b/*.txt", "/a/b"), ("/a [[]1]/x?", "/a [1]"), ("/a/**/b", "/a"), ("b.txt", "")],
)
def test_the_folder_before_the_first_glob(pattern: str, folder: str) -> None:
    assert folder_before_globs(pattern) == folder


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".parquet"])
def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path, ending: str) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9" + ending.encode())
    if ending == ".parquet":
        pq.write_table(pa.table({"text": ["words"]}), tmp_path / "plain")
        os.rename(tmp_path / "plain", path)
    else:
        content = {".txt": "words", ".csv": "text\nwords\n", ".jsonl": '{"text": "words"}'}[ending]
        with open(path, "w") as file:
            file.write(content)
    (document,) = read(f"{tmp_path}/*{ending}")
    assert document.text == "words"
    assert document.key.startswith(rf"caf\xe9{ending}")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path: Path, encoding: str) -> None:
    contents = {"a.txt": "ein Satz\r\n", "a.csv": 'text\n"ein Satz\r\n"\n', "a.jsonl": '{"text": "ein Satz\\r\\n"}'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        (document,) = read(tmp_path / name)
        assert document.text == "ein Satz\r\n"


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress, zstd])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_of_several_packed_streams_a_damaged_one_is_refused(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str
) -> None:
    ending = next(each for each, packs in PACKED.items() if packs is pack)
    one, two = pack(b'{"text": "a"}\n'), pack(b'{"text": "b"}\n')
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(one + two)
    assert "b" in read(path)[-1].text + read(path)[0].text
    damaged = bytearray(two)
    damaged[len(two) // 2] ^= 0xFF
    for rest in (two[: len(two) // 2] if pack is zstd else bytes(damaged), two[:-1], b"garbage"):  # no checksum in zstd
        path.write_bytes(one + rest)
        with pytest.raises(UserError, match=rf"{name}{ending} cannot be unpacked"):
            read(path)


def test_zeros_after_a_packed_stream_are_passed_over(tmp_path: Path) -> None:
    packed = lzma.compress(b"words ")
    (tmp_path / "a.txt.xz").write_bytes(packed + bytes(100_000) + packed + bytes(4))
    assert texts(read(tmp_path)) == {"a.txt.xz": "words words "}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_packed_file_of_no_bytes_is_refused(tmp_path: Path, ending: str, name: str) -> None:
    (tmp_path / f"{name}{ending}").touch()
    (tmp_path / f"b{Path(name).suffix}{ending}").write_bytes(PACKED[ending](b"text\nb\n"))
    with pytest.raises(UserError, match=rf"{name}{ending} cannot be unpacked: it is empty"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text", ["ORCHARDS bloom", "PAR1 is a gene", "BZhang wrote", "ARROW1 flies", "Object", "(text"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_text_that_begins_like_another_format_is_a_text(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text if name == "a.txt" else f"{text},text\n1,{text}\n")
    assert [each.text for each in read(tmp_path)] == [text]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x04\x95a", "a pickle"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"\xff\xff\xff\xff\x10", "an Arrow file"),
        (bz2.compress(b""), "packed by bzip2"),
        (bz2.compress(b"a"), "packed by bzip2"),
        (b"ORC\x0a\x06\x12", "an ORC file"),
    ],
)
def test_a_file_that_is_no_text_is_called_by_its_kind(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.bin is {says}"):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_mark_tells_utf_32_from_utf_16(tmp_path: Path, name: str, encoding: str) -> None:
    content = {"a.txt": "ein Säugling", "a.csv": "text\nein Säugling\n", "a.jsonl": '{"text": "ein Säugling"}'}[name]
    mark = b"\xff\xfe\0\0" if encoding == "utf-32-le" else b""
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    assert [each.text for each in read(tmp_path)] == ["ein Säugling"]


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*", "/b.txt", "/c.txt"])
def test_a_link_to_a_file_that_is_gone_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").symlink_to(".git/annex/objects/gone")
    (tmp_path / "c.txt").symlink_to("c.txt")
    with pytest.raises(UserError, match=r"[bc]\.txt is a link to a file that is not there"):
        read(f"{tmp_path}{pattern}")


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("v*/**/*.txt", ["v1/a.txt", "v2/a.txt"]),
        ("**/v2/*.txt", ["v2/a.txt"]),
        ("**/*.txt", ["v1/a.txt", "v2/a.txt"]),
        ("lat*/**/*.txt", ["latest/a.txt"]),
    ],
)
def test_a_link_to_a_folder_hides_no_file_behind_it(tmp_path: Path, pattern: str, keys: list[str]) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "latest").symlink_to("v2")
    assert list(texts(read(f"{tmp_path}/{pattern}"))) == keys


def test_two_stars_within_a_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"\*\*\.txt: \*\* stands for folders, as in texts/\*\*/\*\.txt"):
        read(f"{tmp_path}/**.txt")


@pytest.mark.parametrize("name", ["Desktop.ini", "thumbs.db", "ehthumbs.db", "Icon\r"])
def test_what_other_programs_leave_is_passed_over_in_any_case(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / name).touch()
    assert texts(read(tmp_path)) == texts(read(f"{tmp_path}/*")) == {"a.txt": "words"}


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*"])
def test_what_other_programs_leave_is_passed_over_behind_a_url(pattern: str) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a.txt", "_SUCCESS", ".hidden.txt", ".ipynb_checkpoints/a.txt"):
        store.pipe(f"/.corpus/{name}", b"words")
    try:
        assert [each.key.split("/")[-1] for each in read(f"memory:///.corpus{pattern}")] == ["a.txt"]
        assert len(read("memory:///.corpus/.hidden.txt")) == 1
    finally:
        store.rm("/.corpus", recursive=True)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_file_that_patterns_name_in_two_ways_is_read_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_text({"a.csv": "text\nb\n", "a.jsonl": '{"text": "b"}'}.get(name, "b"))
    ways = ("texts", "texts/*", f"texts/../texts/{name}", f"./texts//{name}")
    assert len(read(*(f"{tmp_path}/{way}" for way in ways))) == 1
