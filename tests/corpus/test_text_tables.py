"""CSV and JSON files: texts and keys as they are written, every row, or a refusal that names file and line."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.corpus.document import Document
from saeflow.corpus.sources import open_corpus
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError

LOOKS = ["2024-09-17T06:37:50Z", "2024-09-17", "1.50", "007", "1e5", "FALSE", "True", "null", "NaN", "12:30", "",
         "BBD05AE7-8F0B-4C2E-9E57-0D5B7C1A2F33", "0x1F", " padded ", "1,234", "a; b", "tab\there", "line\r\nend", 'q"q',
         "12345678901234567890", "{}", "[1]", "\u00e9\u0301", "\ufeff"]  # fmt: skip
"""Texts that other readers take for values, or change."""
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def read(path: Path, content: str | bytes, **settings: Any) -> list[Document]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(open_corpus(CorpusConfig(files=[str(path)], **settings)).documents)


def texts(documents: list[Document]) -> dict[str, str]:
    return {each.key: each.text for each in documents}


def as_csv(rows: list[list[str]], separator: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_texts_and_keys_of_csv_are_those_of_the_file(tmp_path: Path, separator: str) -> None:
    rows = [[text or "none", text] for text in LOOKS]
    found = texts(read(tmp_path / "a.csv", as_csv([["key", "text"], *rows], separator)))
    assert found == dict(rows)


def test_texts_and_keys_of_json_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [{"key": text or "none", "text": text} for text in LOOKS]
    lines = "\n".join(json.dumps(row) for row in rows)
    wanted = {row["key"]: row["text"] for row in rows}
    assert texts(read(tmp_path / "lines.jsonl", lines)) == wanted
    assert texts(read(tmp_path / "array.json", json.dumps(rows, indent=2))) == wanted
    assert texts(read(tmp_path / "pretty.json", "\n".join(json.dumps(row, indent=1) for row in rows))) == wanted


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(TEXTS, min_size=1, max_size=8))
def test_any_text_comes_back_out_of_csv_and_json(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    wanted = {str(place): text for place, text in enumerate(rows)}
    table = as_csv([["key", "text"], *map(list, wanted.items())])
    assert texts(read(folder / "a.csv", table)) == wanted
    lines = "\n".join(json.dumps({"key": key, "text": text}) for key, text in wanted.items())
    assert texts(read(folder / "a.jsonl", lines)) == wanted


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("1.50", "1.50"),
        ("1E5", "1E5"),
        (f"1.{'0' * 30}1", f"1.{'0' * 30}1"),
        ("true", "true"),
        ("null", ""),
        ("7", "7"),
        ("-0", "-0"),
        ("1e400", "1e400"),
    ],
)
def test_a_number_of_json_is_the_text_that_the_file_has(tmp_path: Path, written: str, text: str) -> None:
    (document,) = read(tmp_path / "a.jsonl", f'{{"key": {written if text else 1}, "text": {written}}}')
    assert (document.key, document.text) == (text or "1", text)


@pytest.mark.long
def test_values_and_columns_that_come_late_are_whole(tmp_path: Path) -> None:
    lines = [{"text": "x", "n": 1}] * 30_000 + [{"text": "y", "n": "unknown", "late": True}]
    documents = read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert sorted({(d.text, d.metadata["n"], d.metadata["late"]) for d in documents}, key=str) == [
        ("x", "1", None),
        ("y", "unknown", True),
    ]
    table = as_csv([["text", "n"], *[["x", "1"]] * 30_000, ["y", "0.12345678901234567890123"]])
    assert {d.metadata["n"] for d in read(tmp_path / "a.csv", table)} == {"1", "0.12345678901234567890123"}


def test_rows_before_what_looks_like_another_header_are_kept(tmp_path: Path) -> None:
    table = "key,text\na,one\nb,two\nkey,text\nc,three\n"
    assert texts(read(tmp_path / "a.csv", table)) == {"a": "one", "b": "two", "key": "text", "c": "three"}


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ("text\nthe hen\na cat; a dog\n", ["a cat; a dog", "the hen"]),
        ('text\n"cell with\nnewline"\n', ["cell with\nnewline"]),
        ("text,\none,\ntwo,\n", ["one", "two"]),
        ("text\none,\ntwo,\n", ["one", "two"]),
        ("text\n\none\n\n", ["one"]),
        ("text\r\none\r\ntwo\r\n", ["one", "two"]),
        ("\ufefftext\none\n", ["one"]),
        (",text\n0,one\n1,two\n", ["one", "two"]),
    ],
)
def test_a_table_of_one_column_keeps_its_header_and_rows(tmp_path: Path, table: str, wanted: list[str]) -> None:
    assert sorted(texts(read(tmp_path / "a.csv", table)).values()) == wanted


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "key,text\na,one\nb,two,three\n", r"a\.csv, line 3, has 3 cells, but the header has 2: key, text"),
        ("a.csv", "key,text\na\n", r"a\.csv, line 2, has 1 cells, but the header has 2"),
        ("a.csv", 'key,text\na,"open\nb,two\n', r"a\.csv, line 2, cannot be read as CSV: unexpected end.*\n.*read_csv"),
        ("a.csv", 'key,text\na,"one" two\n', r"a\.csv, line 2, cannot be read as CSV"),
        ("a.csv", "key,content\na,one\n", r"a\.csv, line 1, has no column 'text'; it has: key, content"),
        ("a.csv", "text,text\na,one\n", r"a\.csv has several columns called 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl, line 2, has no column 'text'; it has: body"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n{"text": 3}', r"a\.jsonl, line 3, cannot be read as JSON: Expecting"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', r"a\.jsonl, line 2, cannot be read as JSON: Unterminated string"),
        ("a.json", '[{"text": "a"}, {"text": "b"}', r"a\.json, line 1, cannot be read as JSON: the file ends"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: .* is no object"),
        ("a.jsonl", '{"text": ["a", "b"]}', r"a\.jsonl, line 1: corpus\.text is 'text', a list, but it must be text"),
        ("a.jsonl", '{"text": "\\ud800"}', r"a\.jsonl, line 1: a text has half of a character"),
        ("a.jsonl", '{"text": "x", "n": {"k": "\\ud800"}}', r"a\.jsonl, line 1: a text has half of a character"),
        ("a.jsonl", '{"text": ' + "[" * 200_000, r"a\.jsonl, line 1, cannot be read as JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"a\.jsonl, line 1, cannot be read as JSON"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", r"a\.csv is not UTF-8: line 3\.\n.*iconv"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused_by_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    with pytest.raises(UserError, match=rf"(?s){says}") as caught:
        read(tmp_path / name, content)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_file_without_the_text_column_is_named_although_others_have_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("key,text\na,one\n")
    (tmp_path / "b.csv").write_text("key,content\nb,two\n")
    with pytest.raises(UserError, match=r"b\.csv, line 1, has no column 'text'; it has: key, content"):
        list(open_corpus(CorpusConfig(files=[f"{tmp_path}/*.csv"])).documents)


def test_a_key_that_the_recipe_names_is_in_every_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.key is 'id', but .*a\.jsonl, line 2, has only: text"):
        read(tmp_path / "a.jsonl", '{"id": 1, "text": "a"}\n{"text": "b"}', key="id")


def test_rows_without_a_key_are_named_by_file_and_content(tmp_path: Path) -> None:
    documents = read(tmp_path / "a.jsonl", '{"text": "b"}\n{"key": "k", "text": "a"}')
    assert [document.key.split("#")[0] for document in documents] == ["k", "a.jsonl"]


def test_vocabulary_ids_come_out_of_json(tmp_path: Path) -> None:
    (document,) = read(tmp_path / "a.jsonl", '{"ids": [1, 2, 3]}', token_ids="ids")
    assert document.vocab_ids == (1, 2, 3)
    with pytest.raises(UserError, match=r"line 1: corpus\.token_ids is 'ids', but '\[1.5\]' is no list of integers"):
        read(tmp_path / "a.jsonl", '{"ids": [1.5]}', token_ids="ids")


def test_names_of_folders_give_columns(tmp_path: Path) -> None:
    folder = tmp_path / "year=2024"
    folder.mkdir()
    (document,) = read(folder / "a.csv", "key,text\na,one\n")
    assert document.metadata == {"year": 2024}


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("1e400", "1e400"),
        ("1e-99999999999999999999", "1e-99999999999999999999"),
        ("[0.12345678901234567890123]", ["0.12345678901234567890123"]),
        ("[99999999999999999999]", "[99999999999999999999]"),
        ('{"a": 1, "A": 2}', '{"a": 1, "A": 2}'),
        ("[" * 60 + "1" + "]" * 60, "[" * 60 + "1" + "]" * 60),
        ("[[[9007199254740993]]]", [[[9007199254740993]]]),
    ],
)  # fmt: skip
def test_metadata_that_a_column_would_change_is_kept_as_it_is_written(
    tmp_path: Path, written: str, stored: Any
) -> None:
    (document,) = read(tmp_path / "a.jsonl", f'{{"text": "x", "n": {written}}}')
    assert document.metadata == {"n": stored}


def test_long_integers_in_lists_are_not_rounded_by_fractions_in_others(tmp_path: Path) -> None:
    documents = read(tmp_path / "a.jsonl", '{"text": "x", "n": [9007199254740993]}\n{"text": "y", "n": [0.5]}')
    assert [each.metadata["n"] for each in documents] == ["[9007199254740993]", "[0.5]"]


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        ('{"ids": [99999999999999999999]}', {"token_ids": "ids"}, "line 1: corpus.token_ids is 'ids'.*no list"),
        ('{"key": ["a"], "text": "x"}', {}, "line 1: the key is .*but it must be a text or a number"),
        ('{"id": {"a": 1}, "text": "x"}', {"key": "id"}, "line 1: the key is .*but it must be a text or a number"),
        ('{"text": "x", "n": ' + "[" * 900 + "]" * 900 + "}", {}, "line 1"),
    ],
)  # fmt: skip
def test_a_value_that_no_column_holds_is_refused_by_line(
    tmp_path: Path, content: str, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl, {says}"):
        read(tmp_path / "a.jsonl", content, **settings)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [("a.tsv", 'key\ttext\n01\t"1.50" he said\n', '"1.50" he said'), ("a.csv", 'key,text\n01,"1 \\"x\\""\n', '1 "x"')],
)
def test_the_way_out_of_another_dialect_reads_the_file(tmp_path: Path, name: str, content: str, text: str) -> None:
    with pytest.raises(UserError, match=r"corpus\.sql can read it, e\.g\. sql = ") as caught:
        read(tmp_path / name, content)
    sql = tomllib.loads(str(caught.value).partition("e.g. ")[2].removesuffix("."))["sql"]
    (document,) = open_corpus(CorpusConfig(sql=sql, folder=str(tmp_path))).documents
    assert (document.key, document.text) == ("01", text)


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,*\na,1\n"), ("a.jsonl", '{"text": "a", "*": 1}')])
def test_a_column_called_by_a_star_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(UserError, match=r"has a column called \*.*Rename it"):
        read(tmp_path / name, content)
