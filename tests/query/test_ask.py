"""Runs, arguments, safety and rendering of queries."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.cli.answers.render import write_answer
from saeflow.cli.answers.screen import render_table
from saeflow.query.ask import ask, names_read, query, resolve_names
from saeflow.query.catalog import sql_folder
from saeflow.query.connection import check, connect
from saeflow.query.questions import find_question, parse_arguments, questions
from saeflow.query.runs import runs
from saeflow.query.text_formats import as_csv, as_json, as_json_lines
from saeflow.runtime.errors import UserError
from saeflow.runtime.terminal import Terminal
from saeflow.runtime.text import sanitise
from saeflow.store.store import Store
from tests.support.small_store import Document, Given


def written(text, table: pa.Table) -> str:
    return "".join(text(table))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Given().write(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def connection(store):
    with connect(store, threads=1) as connection:
        yield connection


@pytest.mark.long
@pytest.mark.parametrize(
    "folder", ["two words", "qu'o\"te", "$tokens ${x} $$", "a[b]c", "st*r?", "{a,b}", "back\\slash", "100%", "日本"]
)
def test_a_store_may_lie_anywhere(tmp_path, folder):
    for decoy in ("abc", "star1"):  # what a[b]c and st*r? would match as globs
        Given(values=[]).write(tmp_path / decoy)
    with connect(Given().write(tmp_path / folder)) as connection:
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        assert not any(rows.num_rows for _, rows in check(connection))


NAMED_LIKE_COLUMNS = [
    "source=web", "value=9", "low=3", "low=3/high=2", "feature_id=1", "token_id=5", "vocab_id=1",
    "n_tokens=5", "label=x", "year=2024",
]  # fmt: skip


def _answers_from(root: Path) -> list[list[dict[str, Any]]]:
    """Ask views and macros of a store there, with labels, whose files hold one range of features each."""
    views = ("documents", "tokens", "feature_summary", "feature_labels", "feature_kind", "src_feature_stats")
    questions = [
        *(f"from {view}" for view in views),
        "select feature_id, token_id, value, low, high from src_feature_major",
    ]
    questions += ["from tokens_where(0)", "from token_features(7)", "from source_contrast('novels', 'bible')"]
    store = Given(n_buckets=4).write(root)
    labels = root / "labels" / "demo-f0000001" / "own.csv"
    labels.parent.mkdir(parents=True)
    labels.write_text("feature_id,label\n2,love\n")
    with connect(store, threads=1) as connection:
        found = [query(connection, sql) for sql in questions]
        plan = query(connection, "explain analyze from tokens_where(2)").column(1)[0].as_py()
        assert not any(rows.num_rows for _, rows in check(connection))
    assert "1/4" in plan.replace(" ", "")
    return [table.drop_columns({"filename"} & set(table.column_names)).to_pylist() for table in found]


@pytest.fixture(scope="module")
def plain_answers(tmp_path_factory) -> list[list[dict[str, Any]]]:
    return _answers_from(tmp_path_factory.mktemp("plain") / "store")


@pytest.mark.long
@pytest.mark.parametrize("folder", NAMED_LIKE_COLUMNS)
def test_folders_above_the_store_never_stand_for_a_column_of_its_files(tmp_path, folder, plain_answers):
    assert _answers_from(tmp_path / folder / "store") == plain_answers


def test_the_newest_run_is_asked_unless_another_is_named(tmp_path):
    Given(name="old", fp="f0000001", values=[]).write(tmp_path)
    store = Given(name="new", fp="f0000002").write(tmp_path)
    for name, n_rows in [(None, 4), ("new", 4), ("old", 0), ("old_f0000001", 0), ("features/old-f0000001", 0)]:
        with connect(store, name) as connection:
            assert ask(connection, "tokens_where", [0]).num_rows == n_rows


def test_of_two_runs_of_one_name_the_newest_has_it_and_each_answers_from_its_own_files(tmp_path):
    Given(fp="f0000001", values=[(2, 3, 9.0)], documents=[Document("k", "other", [b"a", b"b", b"c"])]).write(tmp_path)
    store = Given(fp="f0000002").write(tmp_path)
    with connect(store) as connection:
        assert query(connection, "from demo.tokens_where(3)").num_rows == 0
        for sql in ("demo_f0000001.tokens_where(3)", "demo_f0000001.top_tokens(3)", "demo_f0000001.context(2)"):
            assert query(connection, f"from {sql}").column("piece").to_pylist() == ["c"]
        assert query(connection, "from demo_f0000001.search_token('b')").num_rows == 1
        assert query(connection, "select max(n_tokens) from demo_f0000001.feature_summary").to_pylist() == [
            {"max(n_tokens)": 1}
        ]
        assert query(connection, "from demo_f0000001.compare_sources('other', 'x')").num_rows == 4
    with connect(store, "demo_f0000001") as connection:
        assert ask(connection, "tokens_where", [3]).num_rows == 1


@pytest.mark.long
@pytest.mark.parametrize(("older", "newer"), [("Demo", "demo"), ("demo", "DEMO"), ("demo_f0000001", "Demo_F0000001")])
def test_of_two_runs_whose_names_differ_in_case_each_answers_from_its_own_files(tmp_path, older, newer):
    Given(name=older, fp="f0000001", values=[(2, 3, 9.0)]).write(tmp_path)
    store = Given(name=newer, fp="f0000002").write(tmp_path)
    for name, n_tokens in ((older, [0, 0, 0, 1]), (newer, [4, 1, 2, 0]), (f"features/{older}-f0000001", [0, 0, 0, 1])):
        with connect(store, name) as connection:
            assert ask(connection, "feature_summary").column("n_tokens").to_pylist() == n_tokens


@pytest.mark.long
def test_a_run_may_be_called_as_an_older_run_of_another_name_is_in_full(tmp_path):
    Given(name="demo", fp="f0000001", values=[(2, 3, 9.0)]).write(tmp_path)
    Given(name="demo", fp="f0000002", values=[(2, 3, 9.0), (3, 3, 9.0)]).write(tmp_path)
    store = Given(name="demo_f0000001", fp="f0000003").write(tmp_path)
    assert [run.schema for run in runs(store)] == ["demo_f0000001", "demo", "demo_f0000001_2"]
    for name, n_tokens in (("demo_f0000001", 0), ("demo", 2), ("demo_f0000001_2", 1), ("demo-f0000001", 1)):
        with connect(store, name) as connection:
            assert ask(connection, "feature_summary").column("n_tokens").to_pylist()[3] == n_tokens


@pytest.mark.long
@pytest.mark.parametrize("name", ["main", "Main", "temp", "pg_catalog", "Every_Run", "1st", "select"])
def test_a_run_may_have_any_name_a_recipe_may(tmp_path, name):
    with connect(Given(name=name).write(tmp_path)) as connection:
        assert ask(connection, "top_tokens", [0]).num_rows == 4


def cut_file(store: Store) -> None:
    path = next(store.root.glob("features/bad-*/parts/*/feature_major.parquet"))
    path.write_bytes(path.read_bytes()[:-9])


def lose_tokens(store: Store) -> None:
    next(store.root.glob("tokens/bad-*/parts/*/tokens.parquet")).unlink()


def lose_vocabulary(store: Store) -> None:
    next(store.root.glob("tokens/bad-*/vocab.parquet")).unlink()


def unpublish(store: Store) -> None:
    next(store.root.glob("features/bad-*/manifest.json")).unlink()


def scribble(store: Store) -> None:
    next(store.root.glob("features/bad-*/artefact.json")).write_text("{")


def scribble_quality(store: Store) -> None:
    next(store.root.glob("features/bad-*")).joinpath("quality.json").write_text("nonsense")


@pytest.mark.parametrize("damage", [cut_file, lose_tokens, lose_vocabulary, unpublish, scribble, scribble_quality])
def test_a_damaged_run_is_left_out_with_a_note_and_breaks_no_other(tmp_path, damage, caplog):
    Given(name="good").write(tmp_path)
    store = Given(name="bad").write(tmp_path)
    damage(store)
    with connect(store) as connection:
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        noted = {row["name"]: row["problem"] for row in ask(connection, "runs").to_pylist()}
    assert noted["good"] is None
    assert noted["bad"]
    assert "features/bad-f0000001 is left out" in caplog.text
    with pytest.raises(UserError, match="bad cannot be read"):
        connect(store, "bad")


def test_a_note_about_a_damaged_run_is_not_obeyed_by_a_terminal(tmp_path, caplog):
    root = tmp_path / "it's \u202e; -- \x1b[2J"
    Given(name="good").write(root)
    store = Given(name="bad").write(root)
    lose_tokens(store)
    with connect(store):
        assert "features/bad-f0000001 is left out" in caplog.text
        assert "tokens.parquet" in caplog.text
    assert not {"\x1b", "\u202e"} & set(caplog.text)


def test_an_unfinished_run_does_not_take_the_name_of_a_finished_one(tmp_path):
    Given(fp="f0000001").write(tmp_path)
    store = Given(fp="f0000002").write(tmp_path)
    (tmp_path / "features/demo-f0000002/manifest.json").unlink()
    assert [(run.schema, run.problem is None) for run in runs(store)] == [("demo_f0000002", False), ("demo", True)]
    with connect(store, "demo") as connection:
        assert ask(connection, "tokens_where", [0]).num_rows == 4


def test_a_page_damaged_inside_a_file_is_reported_not_answered(tmp_path):
    store = Given().write(tmp_path)
    path = next(tmp_path.glob("features/*/parts/*/token_major.parquet"))
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with connect(store) as connection, pytest.raises(UserError, match="token_features failed"):
        ask(connection, "token_features", [1])


def test_an_unknown_run_names_the_nearest(store):
    with pytest.raises(UserError, match=r"no run 'dmo'.*Did you mean demo"):
        connect(store, "dmo")


def test_an_empty_store_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="saeflow run"):
        connect(Store.create(tmp_path))


def test_the_sql_is_found_in_a_clone():
    assert (sql_folder() / "marts" / "tokens_where.sql").is_file()


def test_every_question_says_what_it_answers_and_what_it_needs():
    known = {question.name: question for question in questions()}
    assert set(known) >= {
        "tokens_where", "top_tokens", "token_features", "context", "search_token", "compare_sources",
        "feature_summary", "tokens", "documents", "runs",
    }  # fmt: skip
    assert all(question.answers and question.example for question in known.values())
    feature, threshold = known["tokens_where"].parameters
    assert (feature.name, feature.type, feature.default) == ("feature", "bigint", None)
    assert (threshold.name, threshold.type, threshold.default) == ("threshold", "double", "0")
    assert known["runs"].parameters == ()


@pytest.mark.parametrize(
    "arguments", [[0, 1.0], ["0", "1"], {"feature": "0", "threshold": 1}, {"threshold": "1e0", "feature": 0}]
)
def test_arguments_come_by_position_or_name_as_values_or_words(connection, arguments):
    assert ask(connection, "tokens_where", arguments).column("token_id").to_pylist() == [1, 5, 7]


def test_an_answer_may_be_cut_short(connection):
    assert ask(connection, "tokens_where", [0], limit=2).num_rows == 2
    assert query(connection, "from tokens", limit=3).num_rows == 3
    assert query(connection, "from tokens", limit=0).num_rows == 0


@pytest.mark.parametrize(
    ("question", "arguments", "message"),
    [
        ("token_where", [1], "no question 'token_where'. Did you mean tokens_where"),
        ("tokens_where; drop view tokens", [1], "no question"),
        ("xyzzy", [], "There are: .*coactivation, coactivation_within, coactive_features"),
        ("tokens_where", [], "tokens_where needs feature bigint.*<feature bigint> .threshold double = 0."),
        ("tokens_where", ["one"], "feature is 'one', but it must be a whole number"),
        ("tokens_where", ["1.5"], "whole number"),
        ("tokens_where", [2**63], "whole number"),
        ("tokens_where", [1, "much"], "threshold is 'much', but it must be a number"),
        ("tokens_where", [1, "nan"], "must be a number"),
        ("tokens_where", [1, 2, 3], "takes 2 arguments, not 3"),
        ("tokens_where", {"featur": 1}, "no parameter 'featur'"),
        ("top_tokens", [1, -1], "n is -1, but it counts rows: it must be 0 or more"),
        ("near_misses", [1, "-3"], "n is -3, but it counts rows"),
        ("features_on", {"text": "the", "n": -1}, "n is -1, but it counts rows"),
    ],
)
def test_a_question_asked_wrongly_says_how_to_ask_it(connection, question, arguments, message):
    with pytest.raises(UserError, match=message):
        ask(connection, question, arguments)


@pytest.mark.parametrize("text", ["'; drop view tokens; --", "' or 1=1 --", '"', "$1", "\x00", "\u202e"])
def test_text_is_a_value_and_never_sql(connection, text):
    assert ask(connection, "search_token", [text]).num_rows == 0
    assert set(ask(connection, "compare_sources", [text, text]).column("rate_a").to_pylist()) == {None}
    assert ask(connection, "tokens").num_rows == 8


def published_file(store: Store) -> Path:
    return next(store.root.glob("features/*/parts/*/feature_major.parquet"))


HARMFUL = [
    "copy (select 1) to '{tmp}/x.csv'",
    "copy (select 1) to '{store}/x.csv'",
    "copy (select 1 as feature_id) to '{file}' (format parquet)",
    "with x as (copy (select 1) to '{tmp}/x.csv') select 1",
    "attach '{tmp}/x.db'",
    "attach '{store}/x.db'",
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('{store}/store.json')",
    "select * from glob('/etc/*')",
    "export database '{tmp}/x'",
    "install httpfs",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "reset allowed_paths",
    "pragma enable_profiling",
    "call enable_logging(storage = 'file', storage_path = '{tmp}/log')",
]


@pytest.mark.parametrize("sql", HARMFUL)
def test_the_connection_itself_touches_nothing_but_the_published_files(store, connection, tmp_path, sql):
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    sql = sql.format(tmp=tmp_path, store=store.root, file=published_file(store))
    with pytest.raises(duckdb.Error):
        connection.execute(sql).fetchall()
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before
    assert ask(connection, "tokens_where", [0]).num_rows == 4


@pytest.mark.parametrize(
    "sql",
    [
        *HARMFUL,
        "copy (select 1 as x) to '{file}' (format parquet, use_tmp_file false)",
        "with x as (copy (select 1 as x) to '{file}' (format parquet, use_tmp_file false)) select 1",
        "explain analyze with x as (copy (select 1 as x) to '{file}' (format parquet, use_tmp_file false)) select 1",
        "explain analyze copy (select 1 as x) to '{file}' (format parquet, use_tmp_file false)",
        "/* explain */ explain analyze copy (select 1) to '{file}' (use_tmp_file false)",
        "create table mine as select 1",
        "create or replace view tokens as select 1",
        "drop view tokens",
        "use main",
        "select 1; drop view tokens",
        "",
        "selec 1",
    ],
)
def test_a_query_that_does_more_than_read_is_refused(store, connection, tmp_path, sql):
    before = published_file(store).read_bytes()
    with pytest.raises(UserError):
        query(connection, sql.format(tmp=tmp_path, store=store.root, file=published_file(store)))
    assert published_file(store).read_bytes() == before
    assert list(tmp_path.iterdir()) == []
    assert ask(connection, "tokens").num_rows == 8


@pytest.mark.parametrize(
    "sql",
    [
        "select 'COPY_TO_FILE' as x",
        "from tokens where piece = ' love'",
        "with x as (select 1) select * from x",
        "values (1)",
        "describe tokens",
        "show tables",
        "summarize documents",
        "explain from tokens_where(1)",
        "explain analyze from tokens_where(1)",
        "-- a remark\nselect 1;",
    ],
)
def test_a_query_that_reads_is_answered(connection, sql):
    assert query(connection, sql).num_rows


def test_a_query_takes_parameters_and_sees_no_python_variables(connection):
    secret = pa.table({"x": [1]})
    assert query(connection, "select ? + 1 as x", [secret.num_rows]).to_pylist() == [{"x": 2}]
    with pytest.raises(UserError, match="secret"):
        query(connection, "from secret")


HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp\u2066\u200f\r\nnext\tcell\x00\x7f[bold]x[/bold]"


def rendered(table: pa.Table, width: int = 100, **kwargs: int) -> str:
    out = io.StringIO()
    render_table(table, Terminal(file=out, width=width, force_terminal=False), **kwargs)
    return out.getvalue()


def test_hostile_text_is_shown_and_not_obeyed():
    shown = sanitise(HOSTILE)
    assert shown == "a␛[31mred␛]0;title␇⟨U+009B⟩2J⟨U+202E⟩gnp⟨U+2066⟩⟨U+200F⟩↵next⇥cell␀␡[bold]x[/bold]"


@pytest.mark.parametrize("name", ["piece", "context", "[red]column\x1b[0m"])
def test_a_rendered_table_holds_no_control_characters_and_no_markup_is_taken(name):
    out = rendered(pa.table({name: [HOSTILE], "nested": [[HOSTILE]]}), width=300)
    assert not [
        letter for letter in out if (ord(letter) < 32 and letter != "\n") or letter in "\u202e\u2066\u200f\x9b\x7f"
    ]
    assert "[bold]x[/bold]" in out
    if name.startswith("[red]"):
        assert "[red]column" in out


def test_honest_letters_stay_as_they_are():
    for text in ("قال الرجل", "日本語", "👩‍👩‍👧 é", "नमस्ते", "می‌خواهم"):
        assert sanitise(text) == text


@pytest.mark.parametrize("width", [50, 80, 100, 160])
def test_the_token_stays_in_sight_and_the_table_in_its_width(width):
    context = "before " * 30 + "«token»" + " after" * 30
    table = pa.table({"token_id": [1234567], "value": [0.5], "context": [context], "key": ["a document"]})
    out = rendered(table, width)
    assert "«token»" in out
    assert max(map(len, out.splitlines())) <= width


def test_the_token_is_highlighted_in_its_context():
    out = io.StringIO()
    table = pa.table({"context": ["a «b» c"]})
    render_table(table, Terminal(file=out, width=80, force_terminal=True, color_system="standard", no_color=False))
    assert "\x1b[1;33m«b»\x1b[0m" in out.getvalue()


def test_numbers_are_readable_and_identifiers_stay_copyable():
    table = pa.table(
        {"token_id": [1234567], "n_tokens": [1234567], "rate": [0.000123456], "value": [3.14159], "none": [None]}
    )
    out = rendered(table)
    for expected in (" 1234567 ", "1,234,567", "0.0001235", "3.142", "–"):
        assert expected in out


def test_spaces_at_the_ends_of_a_piece_are_visible():
    assert "␣love" in rendered(pa.table({"piece": [" love"]}))


def test_a_table_too_wide_is_shown_record_by_record_and_loses_no_column():
    table = pa.table({f"a_long_column_name_{i}": [i, i] for i in range(12)})
    out = rendered(table, 60)
    assert all(out.count(f"{name} ") == 2 for name in table.column_names)


def test_rows_left_out_are_said():
    assert "2 of 1,000 rows shown" in rendered(pa.table({"x": range(1000)}), max_rows=2)
    assert "No rows" in rendered(pa.table({"x": pa.array([], pa.int64())}))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_text_cell_of_a_csv_starts_a_formula(start):
    table = pa.table({f"{start}name": [f"{start}cmd|' /C calc'!A0"], "n": [-1], "x": [-0.5], "plain": ["a=b"]})
    header, row = csv.reader(io.StringIO(written(as_csv, table), newline=""))
    assert header[0] == f"'{start}name"
    assert row == [f"'{start}cmd|' /C calc'!A0", "-1", "-0.5", "a=b"]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "sql", ["select 1 as a, 2 as a", "select 3 as x, * from (select 1 as x, 2 as y)", 'select 1 as b, 2 as "b", 3']
)
def test_two_columns_of_one_name_are_refused_where_one_would_be_lost(connection, tmp_path, sql, ending):
    table = query(connection, sql)
    with pytest.raises(UserError, match=r"2 columns called .[abx].; .*select x as name"):
        write_answer(table, ending, tmp_path / f"answer.{ending}")
    assert list(tmp_path.iterdir()) == []
    write_answer(table, "table", tmp_path / "answer.txt")
    assert "2" in (tmp_path / "answer.txt").read_text()


def test_columns_whose_names_differ_in_case_are_both_written(connection, tmp_path):
    write_answer(query(connection, 'select 1 as a, 2 as "A"'), "json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == [{"a": 1, "A": 2}]


def test_json_is_valid_whatever_is_in_it():
    table = pa.table({"text": [HOSTILE, None], "x": [math.nan, -math.inf], "raw": [b"\xff", b""], "many": [[1], []]})
    for rows in (
        json.loads(written(as_json, table)),
        list(map(json.loads, written(as_json_lines, table).splitlines())),
    ):
        assert rows[0] == {"text": HOSTILE, "x": None, "raw": "ff", "many": [1]}
        assert rows[1]["x"] is None
    assert not set(written(as_json, table)) & set("\x1b\x9b\u202e\x7f")
    assert json.loads(written(as_json, table.slice(0, 0))) == []


NOT_FOR_PYTHON = {
    "date '99999-01-01'": "99999-01-01",
    "'infinity'::date": "infinity",
    "date '0044-01-01 (BC)'": "0044-01-01 (BC)",
    "timestamp '290000-01-01'": "290000-01-01 00:00:00",
    "timestamp_ns '2020-01-01 00:00:00.123456789'": "2020-01-01 00:00:00.123456789",
    "interval '1 month'": "1 month",
    "[date '99999-01-01']": "[99999-01-01]",
    "union_value(a := date '99999-01-01')": "99999-01-01",
}


@pytest.mark.parametrize("format", ["table", "csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("value", NOT_FOR_PYTHON)
def test_values_that_python_or_parquet_cannot_hold_are_shown_as_text(connection, tmp_path, value, format):
    write_answer(query(connection, f"select {value} as x, 7 as n"), format, tmp_path / "answer")
    if format == "parquet":
        with duckdb.connect() as reader:
            (found,) = reader.read_parquet(str(tmp_path / "answer")).project("x::varchar").fetchall()[0]
        assert found == NOT_FOR_PYTHON[value]
    else:
        assert NOT_FOR_PYTHON[value] in (tmp_path / "answer").read_text()


def test_honest_dates_stay_as_they_are(connection):
    table = query(connection, "select date '2020-02-03' as d, [timestamp '2020-02-03 04:05:06'] as t")
    assert json.loads(written(as_json, table)) == [{"d": "2020-02-03", "t": ["2020-02-03T04:05:06"]}]


@pytest.mark.parametrize("n_rows", [0, 1, 2, 3, 4])
def test_an_answer_written_some_rows_at_a_time_is_the_whole_answer(tmp_path, n_rows):
    table = pa.table({"x": pa.array(range(n_rows), pa.int64())})
    for form, text in (("csv", as_csv), ("json", as_json), ("jsonl", as_json_lines)):
        write_answer(table, form, tmp_path / form)
        assert (tmp_path / form).read_text() == written(text, table) == "".join(text(table, rows_at_once=2))
    assert json.loads(written(as_json, table)) == table.to_pylist()


@pytest.mark.parametrize("format", ["table", "csv", "json", "jsonl", "parquet"])
def test_every_format_goes_to_a_file_or_to_standard_output(connection, tmp_path, capfdbinary, format):
    table = ask(connection, "top_tokens", [0])
    write_answer(table, format, tmp_path / "answer")
    console = Terminal(width=160) if format == "table" else None
    write_answer(table, format, console=console)
    assert (tmp_path / "answer").read_bytes() == capfdbinary.readouterr().out
    if format == "parquet":
        assert pq.read_table(tmp_path / "answer").equals(table)


@pytest.mark.parametrize(
    ("question", "arguments"),
    [("similar_features", {"feature": 1}), ("compare_sources", {"a": "novels", "b": "bible"}),
     ("compare_runs", {"a": "demo", "b": "demo"}), ("feature_numbers", {"feature": 1, "document_key": "emma"}),
     ("feature_numbers", {"feature": 1, "source": "bible", "with_feature": 2})],
)  # fmt: skip
def test_names_are_resolved_where_only_the_views_for_that_are_made(tmp_path, question, arguments):
    chosen = find_question(question)
    values = parse_arguments(chosen, arguments)
    with contextlib.closing(connect(Given().write(tmp_path), names=names_read(chosen, values))) as connection:
        assert resolve_names(connection, chosen, values) == values
