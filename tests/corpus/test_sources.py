"""Documents out of whatever people have: formats, order, keys, and what is said about bad ones."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import tempfile
import unicodedata

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.corpus.document import Document, is_held_out
from saeflow.corpus.sources import _files_by_key, corpus_signature, open_corpus
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.recipe.fingerprint import settings_that_count
from saeflow.runtime.errors import UserError
from tests.support.small_pipeline import SCRIPTS

TEXTS = {key: text for key, text in SCRIPTS.items() if text}


def read(**settings) -> list[Document]:
    return list(open_corpus(CorpusConfig(**settings)).documents)


def texts(documents) -> dict[str, str]:
    return {document.key: document.text for document in documents}


def rows(items=TEXTS) -> list[dict[str, str]]:
    return [{"key": key, "text": text, "source": "scripts"} for key, text in items.items()]


def write_table(path, items=TEXTS) -> None:
    """In the format and compression that the name asks for."""
    plain = path.with_name("plain")
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows(items)), path)
        return
    if kind in ("jsonl", "ndjson", "json"):
        plain.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(items)), "utf-8")
    else:
        relation = duckdb.from_arrow(pa.Table.from_pylist(rows(items)))
        relation.write_csv(str(plain), sep="\t" if kind == "tsv" else ",", header=True)
    content = plain.read_bytes()
    plain.unlink()
    match path.suffix:
        case ".gz":
            content = gzip.compress(content)
        case ".bz2":
            content = bz2.compress(content)
        case ".xz":
            content = lzma.compress(content)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "a.parquet",
        "a.csv",
        "a.tsv",
        "a.jsonl",
        "a.ndjson",
        "a.json",
        "a.csv.gz",
        "a.jsonl.gz",
        "a.csv.bz2",
        "a.jsonl.xz",
    ],
)
def test_tables_of_every_format_give_their_texts_unharmed(tmp_path, name):
    write_table(tmp_path / name)
    documents = read(files=[str(tmp_path / name)])
    assert texts(documents) == TEXTS
    assert {document.source for document in documents} == {"scripts"}


def test_zstandard_json_lines_are_read(tmp_path):
    lines = tmp_path / "a.jsonl.zst"
    with duckdb.connect() as connection:
        connection.register("given", pa.Table.from_pylist(rows()))
        connection.execute(f"copy given to '{lines}' (format json, compression zstd)")
    assert texts(read(files=[str(lines)])) == TEXTS


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_text_files_are_documents_named_by_their_path(tmp_path, ending, compress):
    for key, text in TEXTS.items():
        (tmp_path / key).mkdir()
        (tmp_path / key / f"one.txt{ending}").write_bytes(compress(text.encode()))
    documents = read(files=[f"{tmp_path}/**/*.txt{ending}"])
    assert texts(documents) == {f"{key}/one.txt{ending}": text for key, text in sorted(TEXTS.items())}
    assert [document.source for document in documents] == sorted(TEXTS)
    assert texts(read(files=[str(tmp_path)])) == texts(documents)


def test_texts_are_not_normalised(tmp_path):
    (tmp_path / "a.txt").write_text("e\u0301\r\n", "utf-8", newline="")
    (document,) = read(files=[str(tmp_path / "a.txt")])
    assert document.text == "e\u0301\r\n" != unicodedata.normalize("NFC", document.text)


def test_documents_come_in_key_order_whatever_the_order_of_files_and_rows(tmp_path):
    one, other = dict(list(TEXTS.items())[:2]), dict(list(TEXTS.items())[2:])
    write_table(tmp_path / "z.parquet", one)
    write_table(tmp_path / "a.parquet", other)
    forth = read(files=[str(tmp_path / "z.parquet"), str(tmp_path / "a.parquet")])
    back = read(files=[str(tmp_path / "a.parquet"), str(tmp_path / "z.parquet")])
    assert forth == back == read(files=[f"{tmp_path}/*.parquet"])
    assert [document.key for document in forth] == sorted(TEXTS)


def test_without_a_key_column_documents_are_named_by_file_and_content(tmp_path):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["two", "one"]}), tmp_path / "b.parquet")
    documents = read(files=[f"{tmp_path}/*.parquet"])
    assert len({document.key for document in documents}) == 4
    assert {document.key.split("#")[0] for document in documents} == {"a.parquet", "b.parquet"}
    assert {document.source for document in documents} == {"a.parquet", "b.parquet"}


def test_other_names_for_text_and_key_may_be_given(tmp_path):
    pq.write_table(pa.table({"id": [7, 5], "content": ["x", "y"]}), tmp_path / "a.parquet")
    assert texts(read(files=[str(tmp_path / "a.parquet")], text="content", key="id")) == {"5": "y", "7": "x"}


def test_other_columns_are_kept_as_metadata_with_their_types(tmp_path):
    table = pa.table({"key": ["a"], "text": ["x"], "year": pa.array([1851], pa.int16()), "tags": [["sea", "whale"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = open_corpus(CorpusConfig(files=[str(tmp_path / "a.parquet")]))
    assert [next(corpus.documents).metadata] == [{"year": 1851, "tags": ["sea", "whale"]}]
    assert corpus.metadata.field("year").type == pa.int16()


def test_a_select_gives_text_and_metadata_in_key_order_or_in_its_own(tmp_path):
    write_table(tmp_path / "a.parquet")
    select = f"select key, text, length(text) as n from '{tmp_path}/a.parquet'"
    ordered = read(sql=select)
    assert [document.key for document in ordered] == sorted(TEXTS)
    assert ordered[0].metadata == {"n": len(ordered[0].text)}
    own = read(sql=f"{select} order by n desc, key")
    assert [document.metadata["n"] for document in own] == sorted((len(text) for text in TEXTS.values()), reverse=True)


def test_repeated_texts_are_kept_unless_dedup(tmp_path):
    pq.write_table(pa.table({"key": ["b", "a", "c"], "text": ["same", "same", "other"]}), tmp_path / "a.parquet")
    assert list(texts(read(files=[str(tmp_path / "a.parquet")]))) == ["a", "b", "c"]
    assert list(texts(read(files=[str(tmp_path / "a.parquet")], dedup=True))) == ["a", "c"]


def test_a_missing_text_is_an_empty_one(tmp_path):
    pq.write_table(pa.table({"key": ["a", "b"], "text": ["x", None]}), tmp_path / "a.parquet")
    assert texts(read(files=[str(tmp_path / "a.parquet")])) == {"a": "x", "b": ""}


def test_a_file_without_the_text_column_names_the_columns_it_has(tmp_path):
    pq.write_table(pa.table({"key": ["a"], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text'; it has: key, body\.\n.*text = "):
        read(files=[str(tmp_path / "a.parquet")])
    with pytest.raises(UserError, match=r"corpus\.key is 'id', but the corpus has only: key, body"):
        read(files=[str(tmp_path / "a.parquet")], text="body", key="id")


def test_a_text_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8: byte 3 is 0xe9\.\n.*iconv"):
        read(files=[f"{tmp_path}/*.txt"])


@pytest.mark.parametrize("name", ["bad.csv", "bad.jsonl", "bad.parquet"])
def test_a_table_that_cannot_be_read_is_one_clear_message(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\ntext\n"caf\xe9\n')
    with pytest.raises(UserError, match=r"(?s)bad\..* (cannot be read|is not UTF-8)") as caught:
        read(files=[str(tmp_path / name)])
    assert len(str(caught.value).splitlines()) <= 2


def test_an_empty_corpus_and_a_pattern_without_files_are_refused(tmp_path):
    pq.write_table(
        pa.table({"key": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"The corpus is empty: .*a\.parquet"):
        read(files=[str(tmp_path / "a.parquet")])
    with pytest.raises(UserError, match=r"nothing matches .*none\*\.txt.*Globs"):
        read(files=[f"{tmp_path}/none*.txt"])


def test_formats_are_not_mixed(tmp_path):
    for name in ("a.csv", "b.parquet"):
        write_table(tmp_path / name)
    with pytest.raises(UserError, match=r"mixes formats \(csv, parquet\)"):
        read(files=[f"{tmp_path}/*"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "either files"),
        ({"files": ["a"], "sql": "select 1"}, "not both"),
        ({"sql": "select 1 as x"}, "no column 'text'; it has: x"),
        ({"sql": "create table t (x int)"}, "one select"),
        ({"sql": "select 1; select 2"}, "one select"),
        ({"sql": "selec"}, "cannot be run"),
        ({"sql": "select 'x' as text where false"}, "corpus is empty"),
    ],
)
def test_a_corpus_setting_that_cannot_work_is_said_plainly(settings, says):
    with pytest.raises(UserError, match=says):
        read(**settings)


def test_a_share_of_the_documents_is_part_of_every_larger_share(tmp_path):
    rows = [{"key": str(n), "text": f"text {n}"} for n in range(400)]
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    read = {
        share: {d.key for d in open_corpus(CorpusConfig(files=[str(path)], share=share)).documents}
        for share in (0.1, 0.5, 1.0)
    }
    assert read[0.1] < read[0.5] < read[1.0] == {row["key"] for row in rows}
    assert 20 < len(read[0.1]) < 70
    assert 160 < len(read[0.5]) < 240


def test_raising_the_share_reads_the_corpus_again_and_keeps_its_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    few, more = (CorpusConfig(files=[str(path)], share=share) for share in (0.1, 0.5))
    assert corpus_signature(few) != corpus_signature(more)
    assert settings_that_count(few) == settings_that_count(more)


def test_the_held_out_share_is_about_right_and_grows_with_the_share():
    keys = [f"document {i}" for i in range(20_000)]
    small, large = ({key for key in keys if is_held_out(key, 0, share)} for share in (0.05, 0.2))
    assert abs(len(small) / len(keys) - 0.05) < 0.006
    assert small < large
    assert small != {key for key in keys if is_held_out(key, 1, 0.05)}


@given(key=st.text(), seed=st.integers(0, 9))
def test_nothing_is_held_out_at_share_zero(key, seed):
    assert not is_held_out(key, seed, 0.0)


def test_which_documents_are_held_out_is_the_same_on_every_machine():
    assert [i for i in range(32) if is_held_out(f"{i}", 0, 0.1)] == [3, 7, 18, 23, 24, 31]


def test_files_of_the_same_name_in_two_folders_are_both_read(tmp_path):
    for folder in ("a", "b", "c/b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text(f"of {folder}")
    patterns = [f"{tmp_path}/a/*.txt", f"{tmp_path}/b/*.txt", f"{tmp_path}/c/b/x.txt", f"{tmp_path}/a/x*"]
    found = texts(read(files=patterns))
    assert sorted(found.values()) == ["of a", "of b", "of c/b"]
    assert found["x.txt"] == "of a"
    assert found["b/x.txt"] == "of b"


@pytest.mark.long
def test_texts_larger_together_than_the_memory_for_sorting_come_in_order(tmp_path):
    letters = np.random.default_rng(0)
    keys = [f"{i * 7919 % 4000:05d}" for i in range(4000)]
    schema = pa.schema([("key", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as file:
        for start in range(0, len(keys), 500):
            rows = [letters.integers(97, 123, 100_000, np.uint8).tobytes().decode() for _ in keys[start : start + 500]]
            file.write_table(pa.table({"key": keys[start : start + 500], "text": rows}, schema), 500)
    config = CorpusConfig(files=[str(tmp_path / "a.parquet")])
    found = [(document.key, len(document.text)) for document in open_corpus(config, 256 << 20).documents]
    assert found == [(key, 100_000) for key in sorted(keys)]


def test_a_table_that_turns_out_to_be_broken_late_is_one_clear_message(tmp_path):
    lines = ['{"text": "x", "n": 1}'] * 60_000
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "cut o']))
    with pytest.raises(UserError, match=r"a\.jsonl, line 60001, cannot be read as JSON: ") as caught:
        read(files=[str(tmp_path / "a.jsonl")])
    assert len(str(caught.value).splitlines()) <= 2


ROWS = "select i % 300 as key, hash(i)::varchar as text from range(3000) t(i)"


@pytest.mark.parametrize(
    "sql",
    [
        f"from ({ROWS}) qualify row_number() over (partition by key order by text) = 1",
        f"select key, max(text) as text from ({ROWS} order by i) group by key",
        f"select key, text from ({ROWS}) order by key",
    ],
)
def test_a_select_gives_the_same_order_every_time(sql):
    first = read(sql=sql)
    assert all(read(sql=sql) == first for _ in range(3))
    assert len(first) >= 300


def test_an_order_is_that_of_the_outermost_select(tmp_path):
    inner = read(sql="select key, text from (select 'b' as key, 'x' as text union all select 'a', 'y' order by 1 desc)")
    assert [document.key for document in inner] == ["a", "b"]
    outer = read(sql="select 'a' as key, 'x' as text union all select 'b', 'y' order\n by key desc")
    assert [document.key for document in outer] == ["b", "a"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["x", "ü"]).cast(pa.binary()), ["x", "ü"]),
        (pa.array([12, 7]), ["12", "7"]),
        (pa.array([datetime.date(1851, 1, 2), None]), ["1851-01-02", ""]),
    ],
    ids=["binary", "numbers", "dates"],
)
def test_a_column_of_another_type_is_read_as_its_text(tmp_path, column, expected):
    pq.write_table(pa.table({"key": ["a", "b"], "text": column}), tmp_path / "a.parquet")
    assert list(texts(read(files=[str(tmp_path / "a.parquet")])).values()) == expected


@pytest.mark.parametrize("column", [[["a", "b"]], [{"role": "user"}], [[1, 2]]], ids=["list", "struct", "ids"])
def test_a_column_that_holds_no_text_is_refused_with_the_way_out(tmp_path, column):
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"corpus\.text is 'messages', a column of type .*\n.*corpus\.sql"):
        read(files=[str(tmp_path / "a.parquet")], text="messages")


def test_metadata_that_python_cannot_hold_is_kept_as_text(tmp_path):
    odd = (
        "select 'k' as key, 'x' as text, 170141183460469231731687303715884105727::hugeint as huge, "
        "interval 3 months as span, timestamp_ns '2024-01-01 00:00:00.123456789' as nanoseconds"
    )
    (document,) = read(sql=odd)
    assert document.metadata == {
        "huge": "170141183460469231731687303715884105727",
        "span": "3 months",
        "nanoseconds": "2024-01-01 00:00:00.123456789",
    }


def test_a_column_called_filename_is_refused_with_the_way_out(tmp_path):
    pq.write_table(pa.table({"filename": ["a"], "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"filename.*\n.*corpus\.sql can rename"):
        read(files=[str(tmp_path / "a.parquet")])


def test_paths_of_a_select_count_from_the_recipes_folder(tmp_path):
    write_table(tmp_path / "texts.parquet")
    assert len(read(sql="select key, text from 'texts.parquet'", folder=str(tmp_path))) == len(TEXTS)
    assert settings_that_count(CorpusConfig(sql="select 1", folder="/a")) == settings_that_count(
        CorpusConfig(sql="select 1", folder="/b")
    )


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_column_that_is_called_as_one_of_the_store_is_said_to_be_left_out(tmp_path, caplog, suffix):
    columns = "'a text' as text, 'k' as key, 7 as n_tokens, true as held_out, 'x' as author"
    duckdb.sql(f"copy (select {columns}) to '{tmp_path}/a.{'json' if suffix == 'jsonl' else suffix}'")
    (document,) = read(files=[f"{tmp_path}/a.*"])
    assert (document.key, document.metadata) == ("k", {"author": "x"})
    assert [record.message for record in caplog.records] == [
        "corpus: left out: held_out, n_tokens. Rename a column to keep it."
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "sql", "txt"])
def test_a_share_that_is_too_small_for_any_document_reads_the_one_nearest_to_it(tmp_path, suffix):
    if suffix == "txt":
        for i in range(20):
            (tmp_path / f"{i}.txt").write_text(f"text {i}")
    else:
        write_table(tmp_path / "a.parquet")
        duckdb.sql(f"copy (from '{tmp_path}/a.parquet') to '{tmp_path}/a.jsonl' (format json)")
    files = {"files": [str(tmp_path / f"*.{suffix}")]}
    corpus = {"sql": f"from '{tmp_path}/a.parquet' order by key"} if suffix == "sql" else files
    (one,) = read(**corpus, share=1e-9)
    for share in (1e-6, 0.1, 0.5):
        assert one in read(**corpus, share=share)


def test_of_a_text_that_is_there_many_times_a_share_too_small_reads_one(tmp_path):
    pq.write_table(pa.table({"text": ["again and again"] * 5000}), tmp_path / "a.parquet")
    assert len(read(files=[str(tmp_path / "a.parquet")], share=1e-9)) == 1


def test_nothing_of_a_corpus_stays_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    write_table(tmp_path / "a.parquet")
    read(files=[str(tmp_path / "a.parquet")])
    read(sql=f"select key, text from '{tmp_path}/a.parquet'")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_columns_that_differ_only_in_case_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"several columns called 'text' but for case"):
        read(sql="select 'a' as text, 'c' as \"TEXT\"")


def test_the_commit_of_a_hub_data_set_is_no_part_of_a_documents_name():
    found = {}
    for commit in ("0" * 40, "1" * 40):
        patterns = [f"hf://datasets/o/{name}@{commit}/*.txt" for name in "nmk"]
        found[commit] = list(_files_by_key(patterns, lambda pattern: [pattern.replace("*", "README")]))
    assert found["0" * 40] == found["1" * 40] == ["README.txt", "m/README.txt", "k/README.txt"]


def test_where_memory_is_short_the_way_out_is_said(tmp_path):
    letters = np.random.default_rng(0)
    long = [letters.integers(97, 123, 50_000, np.uint8).tobytes().decode() for _ in range(2000)]
    pq.write_table(
        pa.table({"key": [str(i) for i in range(2000)], "text": ["x"] * 2000, "html": long}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"Out of Memory.*\nLeave out long columns"):
        list(open_corpus(CorpusConfig(files=[str(tmp_path / "a.parquet")]), 24 << 20).documents)
