"""Twelve formats by what befalls files: the stored texts and keys are the file's, or a refusal names file and line."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.corpus.sources import open_corpus
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError
from tests.support.packed import zstd

Rows = list[dict[str, str]]


def read(*patterns: Path | str) -> dict[str, str]:
    found = open_corpus(CorpusConfig(files=[str(each) for each in patterns])).documents
    return {each.key: each.text for each in found}


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def separated(separator: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]), delimiter=separator, quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)
        return out.getvalue().encode()

    return write


def json_lines(rows: Rows) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def json_list(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def parquet(rows: Rows) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=7)
    return out.getvalue()


class Format(NamedTuple):
    ending: str
    write: Callable[[Rows], bytes]
    pack: Callable[[bytes], bytes] = bytes


FORMATS = [
    Format(".csv", separated(",")),
    Format(".csv.gz", separated(";"), gzipped),
    Format(".csv.zst", separated("|"), zstd),
    Format(".tsv", separated("\t")),
    Format(".json", json_list),
    Format(".json.bz2", json_list, bz2.compress),
    Format(".jsonl", json_lines),
    Format(".jsonl.zst", json_lines, zstd),
    Format(".ndjson.xz", json_lines, lzma.compress),
    Format(".JSONL.GZ", json_lines, gzipped),
    Format(".parquet", parquet),
    Format(".parquet.gz", parquet, gzipped),
]
every_format = pytest.mark.parametrize("kind", FORMATS, ids=[each.ending for each in FORMATS])
of_text = pytest.mark.parametrize("kind", FORMATS[:10], ids=[each.ending for each in FORMATS[:10]])

TEXTS = ["2024-09-17T06:37:50Z", "1.50", "007", "1e5", "FALSE", "null", "NaN", "12:30", " padded ", "a;b,c|d\te",
         "line\r\nend\rof\nit", 'q"q', "{}", "[1, 2]", "é\u0301 שלום 🙂", "\u2028 \u0085 \x1b[31m", "text",
         "key,text", "\\N \\n \\u0041", "'single'", "#no comment", "=1+1", "\ufeffmark"]  # fmt: skip
"""Texts that readers take for values, dialects or headers."""
KEYS = ["00123", "1e5", "BBD05AE7-8F0B-4C2E-9E57-0D5B7C1A2F33", "TRUE", "2024-09-17", "0x1F", "1.0", "-0", "Ünï", "a/b"]


@every_format
def test_texts_that_look_like_something_else_are_kept(tmp_path: Path, kind: Format) -> None:
    wanted = {f"k{place:02}": text for place, text in enumerate(TEXTS)}
    path = tmp_path / f"a{kind.ending}"
    path.write_bytes(kind.pack(kind.write([{"key": key, "text": text} for key, text in wanted.items()])))
    assert read(path) == wanted


@every_format
def test_keys_that_look_like_something_else_are_kept(tmp_path: Path, kind: Format) -> None:
    path = tmp_path / f"a{kind.ending}"
    path.write_bytes(kind.pack(kind.write([{"text": f"of {key}", "key": key} for key in KEYS])))
    assert read(path) == {key: f"of {key}" for key in KEYS}


@every_format
def test_the_last_of_many_rows_counts_as_the_first(tmp_path: Path, kind: Format) -> None:
    rows = [{"key": f"{place:05}", "text": "1"} for place in range(4000)]
    path = tmp_path / f"a{kind.ending}"
    path.write_bytes(kind.pack(kind.write([*rows, {"key": "last", "text": "1.50"}])))
    found = read(path)
    assert (len(found), found["last"], found["00000"]) == (4001, "1.50", "1")


@every_format
def test_columns_that_only_a_later_file_has_are_kept(tmp_path: Path, kind: Format) -> None:
    for name, rows in {
        "a": [{"key": "a", "text": "one"}],
        "b": [{"late": "x1", "text": "two", "key": "b"}],
    }.items():
        (tmp_path / f"{name}{kind.ending}").write_bytes(kind.pack(kind.write(rows)))
    corpus = open_corpus(CorpusConfig(files=[f"{tmp_path}/*"]))
    found = {each.key: (each.text, each.metadata["late"]) for each in corpus.documents}
    assert found == {"a": ("one", None), "b": ("two", "x1")}


@every_format
@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_file_that_was_cut_is_refused_by_name_or_gives_whole_rows(tmp_path: Path, kind: Format, share: float) -> None:
    """Nothing tells that a file of lines was cut where a line ends."""
    rows = [{"key": f"{place}", "text": f"words, and {place}"} for place in range(3000)]
    whole, path = kind.pack(kind.write(rows)), tmp_path / f"a{kind.ending}"
    path.write_bytes(whole[: int(len(whole) * share)])
    said, found = "", {}
    try:
        found = read(path)
    except UserError as error:
        said = str(error)
    assert path.name in said or (kind.pack is bytes and not said)
    assert len(said.splitlines()) <= 2
    assert found.items() <= {row["key"]: row["text"] for row in rows}.items()


@every_format
def test_a_file_without_the_texts_is_refused_by_name(tmp_path: Path, kind: Format) -> None:
    (tmp_path / f"a{kind.ending}").write_bytes(kind.pack(kind.write([{"key": "a", "text": "one"}])))
    (tmp_path / f"b{kind.ending}").write_bytes(kind.pack(kind.write([{"key": "b", "content": "two"}])))
    with pytest.raises(UserError, match=rf"b{kind.ending}.* has no column 'text'; it has: key, content"):
        read(f"{tmp_path}/*")


@every_format
def test_what_another_program_left_beside_the_files_is_no_document(tmp_path: Path, kind: Format) -> None:
    content = kind.pack(kind.write([{"key": "a", "text": "one"}]))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a", ".b", "._a", ".ipynb_checkpoints/a"):
        (tmp_path / f"{name}{kind.ending}").write_bytes(content)
    for name in ("_SUCCESS", ".DS_Store", "_metadata", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\1\2")
    for pattern in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**/*"):
        assert read(pattern) == {"a": "one"}


@every_format
def test_a_file_with_any_name_is_read_once(tmp_path: Path, kind: Format) -> None:
    names = ["a [1]", "what?", "a*b", "a 1", "ab", "ümlaut", "'quoted'", "-x", "a\nb"]
    for name in names:
        content = kind.pack(kind.write([{"key": name, "text": f"of {name}"}]))
        (tmp_path / f"{name}{kind.ending}").write_bytes(content)
    assert read(tmp_path) == {name: f"of {name}" for name in names}
    for name in names[:3]:
        assert read(tmp_path / f"{name}{kind.ending}") == {name: f"of {name}"}


@every_format
def test_a_file_of_another_format_than_its_name_says_is_refused(tmp_path: Path, kind: Format) -> None:
    path = tmp_path / f"a{kind.ending}"
    for other in (b"%PDF-1.7 words", zstd(zstd(b"twice packed")), b"version https://git-lfs.github.com/spec/v1\noid"):
        path.write_bytes(kind.pack(other))
        with pytest.raises(UserError, match=rf"a{kind.ending}"):
            read(path)


@of_text
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-sig"])
def test_a_mark_tells_the_encoding(tmp_path: Path, kind: Format, encoding: str) -> None:
    text = kind.write([{"key": "a", "text": "Ünï 🙂"}]).decode()
    content = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-sig" else text.encode(encoding)
    path = tmp_path / f"a{kind.ending}"
    path.write_bytes(kind.pack(content))
    assert read(path) == {"a": "Ünï 🙂"}


@of_text
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_bytes_that_are_no_text_are_refused_by_line(tmp_path: Path, kind: Format, encoding: str) -> None:
    rows = [{"key": str(place), "text": "words"} for place in range(60)]
    lines = kind.write(rows).decode().splitlines(keepends=True)
    bad = 40
    odd = "é".encode("latin-1") if encoding == "latin-1" else b"\x00\xd8"
    encoded = [line.encode("utf-8" if encoding == "latin-1" else "utf-16-le") for line in lines]
    place = encoded[bad - 1].index("w".encode("utf-8" if encoding == "latin-1" else "utf-16-le")) if (
        b"w" in encoded[bad - 1]
    ) else 0  # fmt: skip
    encoded[bad - 1] = encoded[bad - 1][:place] + odd + encoded[bad - 1][place:]
    path = tmp_path / f"a{kind.ending}"
    path.write_bytes(kind.pack((b"" if encoding == "latin-1" else b"\xff\xfe") + b"".join(encoded)))
    name = "UTF-8" if encoding == "latin-1" else "UTF-16"
    with pytest.raises(UserError, match=rf"a{kind.ending} is not {name}: line {bad}\."):
        read(path)


@of_text
def test_a_file_of_another_encoding_without_a_mark_is_refused(tmp_path: Path, kind: Format) -> None:
    path = tmp_path / f"a{kind.ending}"
    path.write_bytes(kind.pack(kind.write([{"key": "a", "text": "words"}]).decode().encode("utf-16-le")))
    with pytest.raises(UserError, match=rf"a{kind.ending} is no text: byte 1 is 0\..*iconv -f utf-16le"):
        read(path)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("key", pa.array([1]), pa.array([2.5])),
        ("key", pa.array([True]), pa.array([7])),
        ("text", pa.array([1]), pa.array([0.5])),
        ("n", pa.array([(1 << 53) + 1]), pa.array([0.5])),
        ("n", pa.array([1]), pa.array([b"one"])),
    ],
)
def test_parquet_files_whose_types_would_change_values_are_refused_by_name(
    tmp_path: Path, name: str, one: pa.Array, other: pa.Array
) -> None:
    for stem, values in {"a": one, "b": other}.items():
        columns = {"text": pa.array(["words"]), "key": pa.array([stem])} | {name: values}
        pq.write_table(pa.table(columns), tmp_path / f"{stem}.parquet")
    with pytest.raises(UserError, match=rf"column '{name}' is .* in .*a\.parquet.*b\.parquet|{name}.*b\.parquet"):
        read(tmp_path)


def test_parquet_files_whose_types_fit_are_joined_exactly(tmp_path: Path) -> None:
    """A program writes whole numbers as fractions where one is missing."""
    pq.write_table(pa.table({"text": ["a"], "key": ["1"], "n": [1], "m": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "key": [2], "n": [0.5], "m": [None]}), tmp_path / "b.parquet")
    found = open_corpus(CorpusConfig(files=[str(tmp_path)])).documents
    assert {each.key: (each.text, each.metadata) for each in found} == {
        "1": ("a", {"n": 1.0, "m": "x"}),
        "2": ("b", {"n": 0.5, "m": None}),
    }


def test_a_damaged_parquet_file_is_named_among_others(tmp_path: Path) -> None:
    rows = [{"key": str(place), "text": f"words {place}" * 20} for place in range(200)]
    for name in "abc":
        (tmp_path / f"{name}.parquet").write_bytes(parquet(rows))
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[4:60] = bytes(each ^ 0x5A for each in content[4:60])
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.parquet cannot be read: .*\nIs it whole\? Fetch it again"):
        read(tmp_path)


def test_text_of_bytes_that_is_not_utf8_is_refused_by_key(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a", "b"], "text": [b"fine", b"caf\xe9"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"The text of document b is not UTF-8: byte 3 is 0xe9"):
        read(tmp_path)


def test_a_name_that_an_object_gives_twice_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2, cannot be read as JSON: an object has two values called"):
        read(tmp_path)


@every_format
def test_a_column_named_as_those_of_our_own_is_refused(tmp_path: Path, kind: Format) -> None:
    for name in ("_saeflow_key", "_SAEFLOW_content"):
        path = tmp_path / f"a{kind.ending}"
        path.write_bytes(kind.pack(kind.write([{"key": "a", "text": "one", name: "two"}])))
        with pytest.raises(UserError, match=rf"has a column called '{name}'.*Rename it"):
            read(path)


def test_names_of_folders_give_columns_in_every_format(tmp_path: Path) -> None:
    for kind in (FORMATS[0], FORMATS[6], FORMATS[10], FORMATS[11]):
        for folder in ("lang=en/year=2024", "lang=007", "plain"):
            path = tmp_path / f"of{kind.ending}" / folder / f"a{kind.ending}"
            path.parent.mkdir(parents=True)
            path.write_bytes(kind.pack(kind.write([{"key": folder, "text": "words"}])))
        found = open_corpus(CorpusConfig(files=[f"{tmp_path}/of{kind.ending}/**/*"])).documents
        assert {each.key: (each.metadata.get("lang"), str(each.metadata.get("year"))) for each in found} == {
            "lang=en/year=2024": ("en", "2024"),
            "lang=007": ("007", "None"),
            "plain": (None, "None"),
        }


@pytest.mark.parametrize("kind", [FORMATS[0], FORMATS[6], FORMATS[10]], ids=["csv", "jsonl", "parquet"])
def test_a_column_of_a_file_goes_before_a_folder_of_its_name(tmp_path: Path, kind: Format) -> None:
    path = tmp_path / "text=no" / "source=007" / f"a{kind.ending}"
    path.parent.mkdir(parents=True)
    path.write_bytes(kind.write([{"key": "a", "text": "yes"}]))
    (document,) = open_corpus(CorpusConfig(files=[str(path)])).documents
    assert (document.text, document.source, document.metadata) == ("yes", "007", {})


DAY = datetime.date(2024, 9, 17)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("key", pa.array([DAY]), pa.array([datetime.datetime(2024, 9, 17, 1)])),
        ("text", pa.array([0.1], pa.float32()), pa.array([0.1])),
        ("n", pa.array([[(1 << 53) + 1]]), pa.array([[0.5]])),
        ("n", pa.array([{"a": (1 << 53) + 1}]), pa.array([{"a": 0.5}])),
        ("n", pa.array([[{"a": (1 << 53) + 1}]]), pa.array([[{"a": 0.5}]])),
    ],
)
def test_parquet_files_whose_texts_or_nested_values_would_change_are_refused_by_name(
    tmp_path: Path, name: str, one: pa.Array, other: pa.Array
) -> None:
    for stem, values in {"a": one, "b": other}.items():
        columns = {"text": pa.array(["words"]), "key": pa.array([stem]), "s": pa.array([{"n": 1, "a": 1}])}
        pq.write_table(pa.table(columns | {name: values}), tmp_path / f"{stem}.parquet")
    with pytest.raises(UserError, match=rf"column '{name}(\.a)?' is .* in .*a\.parquet.*b\.parquet"):
        read(tmp_path)


def test_nested_whole_numbers_beside_fractions_are_joined_where_a_float_holds_them(tmp_path: Path) -> None:
    for stem, value in {"a": 3, "b": 0.5}.items():
        table = pa.table({"text": [stem], "key": [stem], "s": [{"n": 1 << 60}], "n": [[value]]})
        pq.write_table(table, tmp_path / f"{stem}.parquet")
    found = open_corpus(CorpusConfig(files=[str(tmp_path)])).documents
    assert [each.metadata["n"] for each in found] == [[3.0], [0.5]]


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("timestamp_ns '2024-01-01 00:00:00.123456789'", "2024-01-01 00:00:00.123456789"),
        ("interval 3 months", "3 months"),
        ("'101'::bit", "101"),
        ("3::bignum", "3"),
        ("timetz '12:00:01+01'", "12:00:01+01"),
        ("170141183460469231731687303715884105727::hugeint", "170141183460469231731687303715884105727"),
        ("1.50::decimal(5, 2)", "1.50"),
        ("chr(0)", "\0"),
    ],
)
def test_a_key_of_any_type_is_its_text(key: str, stored: str) -> None:
    (document,) = open_corpus(CorpusConfig(sql=f"select 'words' as text, {key} as key")).documents
    assert document.key == stored


@pytest.mark.parametrize("key", ["['a']", "{'a': 1}", "map {'a': 1}"])
def test_a_key_of_several_values_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=r"The key of the corpus is 'key', a column of type .* must be single values"):
        open_corpus(CorpusConfig(sql=f"select 'words' as text, {key} as key"))
