"""Classes of tokens, spans and documents: read from tables, matched with tokens, published, asked, forgotten."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.classes.annotations import Source, annotate
from saeflow.classes.listing import annotations_of
from saeflow.classes.places import find_places, islands
from saeflow.classes.tables import store_rows
from saeflow.features.beside import newest_annotations
from saeflow.pipeline.lifecycle.forget import forget
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.query.ask import ask, query
from saeflow.query.connection import connect
from saeflow.runtime.errors import UserError
from saeflow.store import garbage
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.small_pipeline import quiet
from tests.support.small_store import Document, Given

TOKENS = "tokens/demo-f0000001"
WORDS = [
    Document("one", "a", [b"Em", b"ma \xf0\x9f", b"\x90\x88", b"!"]),
    Document("two", "b", [b"Em", b" no"]),
    Document("empty", "b", []),
]
"""Tokens 0 to 3 stand for `Emma 🐈!`, tokens 4 and 5 for `Em no`; 6 and 7 are padding."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Given(documents=WORDS, values=[(0, 0, 1.0)]).write(tmp_path / "store")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store to which tests only add annotations named x."""
    return Given(documents=WORDS, values=[(0, 0, 1.0)]).write(tmp_path_factory.mktemp("shared") / "store")


def table(folder: Path, text: str, name: str = "table.csv") -> Source:
    (folder / name).write_text(text)
    return Source(folder / name)


def spans_of(store: Store, name: str = "x") -> list[tuple[Any, ...]]:
    """The rows of the published file."""
    found = newest_annotations(store, TOKENS)[name]
    return [tuple(row.values()) for row in pq.read_table(found.path / "spans.parquet").to_pylist()]


def asked(store: Store, name: str = "x") -> dict[str, list[int]]:
    with connect(store, threads=1) as connection:
        rows = ask(connection, "annotated_tokens", [name]).to_pylist()
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row["class"], []).append(row["token_id"])
    return found


CASES: dict[str, tuple[str, dict[str, list[int]]]] = {
    "characters, the end not included": ("class,document,start,end\nname,one,0,4\n", {"name": [0, 1]}),
    "a letter of several tokens": ("class,document,start,end\ncat,one,5,6\n", {"cat": [1, 2]}),
    "several classes at one place": (
        "class,document,start,end\na,one,0,2\nb,one,0,7\nb,two,0,2\n", {"a": [0], "b": [0, 1, 2, 3, 4]},
    ),
    "spans that overlap and repeat": (
        "class,document,start,end\na,one,0,3\na,one,1,6\na,one,0,3\n", {"a": [0, 1, 2]},
    ),
    "a row without start and end means the document": (
        "class,document,start,end\na,two,,\nb,one,6,7\n", {"a": [4, 5], "b": [3]},
    ),
    "tokens one by one, without a class": ("token_id\n1\n2\n5\n", {"x": [1, 2, 5]}),
    "ranges that include the last": ("class,token_id,last_token_id\na,1,3\nb,3,\n", {"a": [1, 2, 3], "b": [3]}),
    "ranges that do not include the end, over two documents": (
        "class,token_id,end_token_id\na,2,6\n", {"a": [2, 3, 4, 5]},
    ),
    "whole documents": ("document,class\none,first\ntwo,second\ntwo,both\none,both\n",
        {"both": [0, 1, 2, 3, 4, 5], "first": [0, 1, 2, 3], "second": [4, 5]}),
    "capital letters and other columns": ("Note,CLASS,Token_ID\nwell,a,4\n", {"a": [4]}),
    "token_id goes before a document": ("document,token_id\none,4\n", {"x": [4]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_table_gives_the_classes_that_it_says(tmp_path: Path, shared: Store, case: str) -> None:
    text, expected = CASES[case]
    done = annotate(shared, None, "x", table(tmp_path, text), quiet())
    found: dict[str, list[int]] = {}
    for name, _, first, last in spans_of(shared):
        found.setdefault(name, []).extend(range(first, last + 1))
    assert found == expected
    assert {row["class"]: row["n_tokens"] for row in done.classes} == {name: len(ids) for name, ids in expected.items()}
    assert done.unmatched.n_matched == done.unmatched.n_rows
    assert spans_of(shared) == sorted(spans_of(shared), key=lambda row: (row[0], row[2]))


def test_spans_are_merged_inside_a_document_and_never_across_documents(tmp_path: Path, store: Store) -> None:
    annotate(store, None, "x", table(tmp_path, "class,token_id,last_token_id\na,0,1\na,2,2\na,3,4\nb,0,7\n"), quiet())
    assert spans_of(store) == [("a", 0, 0, 3), ("a", 1, 4, 4), ("b", 0, 0, 3), ("b", 1, 4, 5)]
    classes = pq.read_table(newest_annotations(store, TOKENS)["x"].path / "classes.parquet").to_pylist()
    assert classes == [
        {"class": "a", "n_spans": 2, "n_tokens": 5, "n_documents": 2},
        {"class": "b", "n_spans": 2, "n_tokens": 6, "n_documents": 2},
    ]


def test_every_row_that_does_not_match_is_counted_once_and_kept_in_the_facts(tmp_path: Path, store: Store) -> None:
    rows = [
        "one,0,2",
        "one,6,99",
        "nobody,0,2",
        "one,two,3",
        "one,,3",
        "one,3,3",
        "one,4,2",
        "one,7,99",
        "empty,,",
        "two,-3,-1",
    ]
    done = annotate(store, None, "x", table(tmp_path, "\n".join(["document,start,end", *rows])), quiet())
    expected = {
        "n_rows": 10, "n_unknown_documents": 1, "n_unreadable": 2, "n_empty": 3, "n_outside": 2, "n_cut": 1,
    }  # fmt: skip
    assert done.unmatched.as_facts() == expected
    assert done.unmatched.n_matched == 2
    facts = newest_annotations(store, TOKENS)["x"].record.facts
    assert {name: facts[name] for name in expected} == expected
    text = "token_id,last_token_id\n0,1\n5,9\n6,7\n99,\nthree,\n3,2\n-4,-1\n1.5,\n"
    done = annotate(store, None, "x", table(tmp_path, text), quiet())
    assert done.unmatched.as_facts() == {
        "n_rows": 8, "n_unknown_tokens": 3, "n_unreadable": 2, "n_empty": 1, "n_cut": 1,
    }  # fmt: skip
    assert asked(store) == {"x": [0, 1, 5]}


@pytest.mark.parametrize(
    "text",
    [
        "token_id\n1.5\n", "token_id,last_token_id\n1,two\n", "token_id,end_token_id\n1,2.5\n",
        "document,start,end\none,a,b\n", "document,start,end\none,0,1.5\n",
    ],
)  # fmt: skip
def test_a_number_that_is_not_whole_is_neither_rounded_nor_taken_for_an_empty_cell(
    tmp_path: Path, shared: Store, text: str
) -> None:
    with pytest.raises(UserError, match=r"None of the 1 rows matched a token\..* unreadable: 1"):
        annotate(shared, None, "x", table(tmp_path, text), quiet())
    annotate(shared, None, "x", table(tmp_path, "token_id,last_token_id\n1.0,+2\n"), quiet())
    assert asked(shared) == {"x": [1, 2]}


def test_characters_that_the_tokenizer_drops_and_tokens_that_a_run_skips_are_said(tmp_path: Path) -> None:
    given = Given(documents=WORDS, values=[(1, 0, 1.0)], skipped=[0], skips_special=[b" no"])
    store = given.write(tmp_path / "store")
    done = annotate(store, None, "x", table(tmp_path, "document,class\none,a\ntwo,b\none,b\n"), quiet())
    assert done.unmatched.n_tokens_left_out == 3  # the tokens 0 and 4 by their position, 5 because it is special


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("start,end\n0,2\n", "no column document, but: start, end.\nName the place in one of three ways"),
        ("document,start\none,2\n", "The table has no column end"),
        ("token_id,last_token_id,end_token_id\n1,2,3\n", "Leave one of them out"),
        ("piece\nEm\n", r"The table has no column document, but: piece\."),
        ("document,start,end\n", "no rows"),
        ("document,start,end\nnobody,0,1\n", r"None of the 1 rows matched a token. Counts: unknown documents: 1"),
    ],
)
def test_a_table_that_names_no_place_is_refused_with_the_ways_to_name_one(
    tmp_path: Path, shared: Store, text: str, why: str
) -> None:
    before = shared.artefacts("annotations")
    with pytest.raises(UserError, match=why):
        annotate(shared, None, "x", table(tmp_path, text), quiet())
    assert shared.artefacts("annotations") == before


def test_tokens_without_characters_are_refused_with_the_way_to_get_them(tmp_path: Path) -> None:
    store = Given(is_early=True).write(tmp_path / "store")
    with pytest.raises(UserError, match=r"have no characters: an earlier saeflow wrote them(.|\n)*--set name=NEW"):
        annotate(store, None, "x", table(tmp_path, "document,start,end\nemma,0,1\n"), quiet())
    annotate(store, None, "x", table(tmp_path, "document\nemma\n"), quiet())
    assert asked(store) == {"x": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "parquet", "sql"])
def test_a_table_may_be_csv_parquet_or_a_select_in_a_file(tmp_path: Path, shared: Store, ending: str) -> None:
    rows = {"class": ["a", None], "document": ["one", "two"], "start": [0, 1], "end": [2, 2]}
    path = tmp_path / f"[glob]*.{ending}"
    (tmp_path / f"g.{ending}").write_text("a table that a glob would find")
    if ending == "sql":
        path.write_text(
            "-- a comment\nselect 'a' as class, key as document, 0 as start, 2 as \"end\" from documents;\n"
        )
        expected = {"a": [0, 4]}
    elif ending == "parquet":
        pq.write_table(pa.table(rows), path)
        expected = {"a": [0], "x": [4]}
    else:
        text, expected = "class,document,start,end\na,one,0,2\n,two,1,2\n", {"a": [0], "x": [4]}
        content = text.replace(",", "\t" if ending == "tsv" else ",").encode()
        path.write_bytes(gzip.compress(content) if ending == "csv.gz" else content)
    annotate(shared, None, "x", Source(path), quiet())
    assert asked(shared) == expected


@pytest.mark.parametrize(
    "sql",
    ["create table t as select 1 as token_id", "copy (select 1) to 'x.csv'", "select 1; select 2", "drop view tokens"],
)
def test_a_select_that_does_more_than_read_is_refused(shared: Store, sql: str) -> None:
    with pytest.raises(UserError, match="Only one statement that reads"):
        annotate(shared, None, "x", Source(sql=sql), quiet())


def test_a_select_reads_the_store_and_no_other_file(tmp_path: Path, shared: Store) -> None:
    (tmp_path / "secret.csv").write_text("token_id\n1\n")
    with pytest.raises(UserError, match="Permission Error: Cannot access file"):
        annotate(shared, None, "x", Source(sql=f"from read_csv('{tmp_path}/secret.csv')"), quiet())


def test_whole_numbers_of_any_type_are_read_and_no_others(shared: Store) -> None:
    sql = "select unnest([0.0, 1.5, 4.0, 'nan'::double, 'inf'::double, null]) as token_id"
    done = annotate(shared, None, "x", Source(sql=sql), quiet())
    assert done.unmatched.as_facts() == {"n_rows": 6, "n_unreadable": 4}
    assert asked(shared) == {"x": [0, 4]}


def test_a_file_of_the_user_that_is_no_table_is_no_damage_of_the_store(tmp_path: Path, shared: Store) -> None:
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"Reading .*x\.parquet failed") as refused:
        annotate(shared, None, "x", Source(tmp_path / "x.parquet"), quiet())
    assert "verify" not in str(refused.value)


numbers = st.integers(-2, 14)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from("ab"), numbers, numbers), min_size=1, max_size=6))
def test_ranges_of_tokens_are_matched_and_merged_as_sets_of_tokens_are(rows: list[tuple[str, int, int]]) -> None:
    """Three documents with tokens and one without; 4 and 9 to 11 are padding."""
    owners = {**dict.fromkeys(range(4), 5), **dict.fromkeys(range(5, 9), 3), 12: 7}
    expected = {(name, owners[t], t) for name, a, b in rows for t in range(a, b + 1) if t in owners}
    with duckdb.connect() as connection:
        connection.execute(
            "create table stg_documents as from (values (5, 'x', 0, 4), (3, 'y', 5, 4), (7, 'z', 12, 1), "
            "(1, 'no', null, 0)) as t(document_id, key, first_token_id, n_tokens)"
        )
        values = ", ".join(f"('{name}', {first}, {last})" for name, first, last in rows)
        given = connection.sql(f"from (values {values}) as t(class, token_id, last_token_id)")
        found = find_places(connection, store_rows(connection, given, "x"))
        sql = islands("annotate_found", ["class_id", "document_id"], ["first_token_id", "last_token_id"])
        spans = connection.sql(
            f"select * exclude (class_id) from ({sql}) join annotate_classes using (class_id)"
        ).fetchall()
    tokens = [(name, document, t) for document, first, last, name in spans for t in range(first, last + 1)]
    assert len(tokens) == len({*tokens})
    assert {*tokens} == expected
    ends = {(name, document, last) for document, _, last, name in spans}
    assert not {(name, document, first - 1) for document, first, _, name in spans} & ends  # unbroken
    assert found.n_empty == sum(a > b for _, a, b in rows)
    assert found.n_matched == sum(any(t in owners for t in range(a, b + 1)) for _, a, b in rows)


def test_the_newest_of_a_name_is_asked_and_an_equal_table_is_published_once(tmp_path: Path, store: Store) -> None:
    first = annotate(store, None, "x", table(tmp_path, "token_id\n1\n"), quiet())
    second = annotate(store, None, "x", table(tmp_path, "token_id\n2\n"), quiet())
    assert first.is_new
    assert second.is_new
    assert asked(store) == {"x": [2]}
    before = (store.by_id(first.id).path / "spans.parquet").stat().st_mtime_ns
    again = annotate(store, None, "x", table(tmp_path, "token_id\n1\n", "other.csv"), quiet())
    assert (again.id, again.is_new) == (first.id, False)
    assert asked(store) == {"x": [1]}
    assert (store.by_id(first.id).path / "spans.parquet").stat().st_mtime_ns == before
    removed = {each.path for each in garbage.collect_garbage(store, 0, remove=True).garbage}
    assert removed & {store.by_id(each.id).path for each in (first, second)} == {store.by_id(second.id).path}
    assert asked(store) == {"x": [1]}
    assert list(verify(store, full=True)) == []


def test_spans_of_a_hidden_document_are_in_no_answer(tmp_path: Path) -> None:
    store = Given(documents=WORDS, values=[(0, 0, 1.0)]).write(tmp_path / "store")
    annotate(store, None, "x", table(tmp_path, "document,class\none,a\ntwo,secret\ntwo,a\n"), quiet())
    assert asked(store) == {"a": [0, 1, 2, 3, 4, 5], "secret": [4, 5]}
    shutil.rmtree(store.root / "tokens")
    shutil.rmtree(store.root / "features")
    Given(documents=WORDS, values=[(0, 0, 1.0)], hidden=[1]).write(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert asked(store) == {"a": [0, 1, 2, 3]}
    with connect(store, threads=1) as connection:
        rows = ask(connection, "annotations").to_pylist()
        assert [(row["class"], row["n_tokens"], row["n_documents"]) for row in rows] == [("a", 4, 1)]
        for view in ("stg_spans", "stg_annotations"):
            assert "secret" not in str(query(connection, f"from {view}").to_pylist())


def test_annotations_of_a_damaged_file_are_left_out_and_the_run_still_answers(tmp_path: Path, store: Store) -> None:
    done = annotate(store, None, "x", table(tmp_path, "token_id\n1\n"), quiet())
    (store.by_id(done.id).path / "spans.parquet").write_bytes(b"short")
    assert asked(store) == {}
    assert [each.artefact.id for each in verify(store, full=False)] == [done.id]


def test_the_command_says_what_matched_and_lists_and_removes(tmp_path: Path, store: Store, saeflow: Command) -> None:
    (tmp_path / "places.csv").write_text("class,document,start,end,by\n\x1b[2Jred,one,0,2,me\nname,nobody,0,1,me\n")
    at = ["--store", store.root]
    dry = saeflow("annotate", "places", "places.csv", "--dry-run", *at)
    assert (dry.code, "nothing was written" in dry.out) == (0, True)
    assert not (store.root / "annotations").exists()
    said = saeflow("annotate", "places", "places.csv", *at)
    assert said.code == 0
    assert "\x1b" not in said.out + said.err
    assert said.err.splitlines()[-3:] == [
        "Columns read: class, document, start, end; not read: by",
        "1 of 2 rows matched",
        "rows that name a document which the store does not show: 1",
    ]
    assert "published" in said.out
    assert "places" in saeflow("annotate", *at).out
    assert "places" in saeflow("ask", "annotations", *at).out
    assert saeflow("annotate", "places", "places.csv", "--sql", "select 1", *at).code != 0
    assert "no annotations 'place'" in saeflow("annotate", "place", "--remove", *at).err
    assert saeflow("annotate", "places", "--remove", *at).out.startswith("removed annotations/places-")
    assert annotations_of(store, None) == []


def test_the_catalog_shows_annotations_to_duckdb_alone(tmp_path: Path, store: Store) -> None:
    annotate(store, None, "x", table(tmp_path, "token_id,class\n1,it's\n"), quiet())
    path = catalog.write_catalog(store)
    assert path is not None
    with duckdb.connect() as connection:
        connection.execute(path.read_text())
        assert connection.sql("select class, token_id from annotated_tokens('x', 'it''s')").fetchall() == [("it's", 1)]


def test_a_mistyped_annotation_or_class_is_an_error_that_names_the_nearest(
    tmp_path: Path, store: Store, saeflow: Command
) -> None:
    annotate(store, None, "words", table(tmp_path, "token_id,class\n1,verb\n"), quiet())
    at = ["--store", store.root]
    assert "no annotation 'word'. Did you mean words?" in saeflow("ask", "annotated_tokens", "word", *at).err
    assert "no class 'verbs'. Did you mean verb?" in saeflow("ask", "annotated_tokens", "words", "verbs", *at).err


@pytest.fixture
def real(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of the finished store, whose tokens know their characters, to be changed."""
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    return Finished(store, finished.recipe, finished.summary)


def _words(connection: Any) -> Sequence[dict[str, Any]]:
    """A few spans in each document, some of which cut letters and tokens in two."""
    sql = """
        select key as document, char_start + (token_id % 2) as start, char_end + token_id % 5 as "end"
        from tokens where token_id % 11 = 0 and char_start is not null order by token_id
    """
    return query(connection, sql).to_pylist()


@pytest.mark.long
def test_spans_of_a_real_corpus_have_the_tokens_that_tokens_of_span_gives(real: Finished, tmp_path: Path) -> None:
    expected: dict[str, set[int]] = {}
    with connect(real.store, threads=1) as connection:
        rows = [{**row, "class": f"c{n % 3}"} for n, row in enumerate(_words(connection))]
        for row in rows:
            found = ask(connection, "tokens_of_span", [row["document"], row["start"], row["end"]])
            expected.setdefault(row["class"], set()).update(found.column("token_id").to_pylist())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    annotate(real.store, None, "x", Source(tmp_path / "t.parquet"), quiet())
    assert {name: {*ids} for name, ids in asked(real.store).items()} == expected
    assert len(rows) > 20
    assert all(expected.values())


def test_compaction_takes_the_spans_of_forgotten_documents_off_the_disk(real: Finished, tmp_path: Path) -> None:
    with connect(real.store, threads=1) as connection:
        keys = query(connection, "select key from documents where n_tokens > 3 order by key").column("key").to_pylist()
    gone, kept = keys[0], keys[1]
    text = f'document,class\n"{gone}",secret\n"{gone}",a\n"{kept}",a\n'
    done = annotate(real.store, None, "x", table(tmp_path, text), quiet())
    assert asked(real.store).keys() == {"a", "secret"}
    forget(real.store, [gone], quiet())
    hidden = asked(Store.open(real.store.root))
    assert hidden.keys() == {"a"}
    compact_store(Lineage(real.store, real.recipe), quiet())
    store = Store.open(real.store.root)
    assert asked(store) == hidden
    garbage.collect_garbage(store, 0, remove=True)
    assert not store.by_id(done.id).exists()
    files = [path for path in (store.root / "annotations").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"secret" in path.read_bytes()]
    (left,) = store.artefacts("annotations")
    assert left.record.facts["n_spans_removed"] == 2
    assert json.loads((left.path / "provenance.json").read_text())["source"].startswith(done.id)
    assert list(verify(store, full=True)) == []
