"""Parameters of questions, what `saeflow ask` says of them, the Python API, and input that means harm."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import saeflow as package
from saeflow.query.ask import as_statement, ask, query, resolve_names
from saeflow.query.connection import connect
from saeflow.query.outside import approximation
from saeflow.query.questions import (
    MOST_LISTED,
    Parameter,
    Question,
    find_question,
    parse_arguments,
    questions,
    read_question,
)
from saeflow.query.text_formats import as_json
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.query.test_approximation import sampled_world
from tests.support.command import SAEFLOW, Command, Connected, one_connection
from tests.support.small_store import Document, Given

HOSTILE = "a'; drop view tokens; --\x1b[31m\x1b]0;title\x07\u202e\u2066\"\\"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("ask") / "store"
    Given(name="old", fp="f0000009").write(root)
    return Given().write(root)


@pytest.fixture(scope="module")
def run(store: Store) -> Iterator[package.api.OpenRun]:
    with package.open(store.root, threads=1) as opened:
        yield opened


def a_question(header: str, name: str = "q") -> Question:
    sql = f"-- What is asked.\n--\n-- Grain: one row.\n{header}\ncreate or replace macro {name}() as table select 1;"
    return read_question(name, sql)


def test_a_header_s_parameters_may_be_lists_have_defaults_with_commas_and_go_on_on_the_next_line() -> None:
    asked = a_question(
        "-- Parameters: features bigint[], thresholds double[] = [0, 0.5], text text = 'a, [b', n bigint = 5,\n"
        "--          window bigint = 8, sources text[] = [], other bigint = null\n"
        "-- Ask it:  which?  from q([3, 7], n := 2)"
    )
    assert [(p.name, p.type, p.default) for p in asked.parameters] == [
        ("features", "bigint[]", None),
        ("thresholds", "double[]", "[0, 0.5]"),
        ("text", "text", "'a, [b'"),
        ("n", "bigint", "5"),
        ("window", "bigint", "8"),
        ("sources", "text[]", "[]"),
        ("other", "bigint", "null"),
    ]
    assert parse_arguments(asked, ["1"]) == {
        "features": [1], "thresholds": [0.0, 0.5], "text": "a, [b", "n": 5, "window": 8, "sources": [], "other": None,
    }  # fmt: skip
    assert asked.command == "saeflow ask q 3,7 --n 2"


def test_a_header_that_says_parameters_otherwise_is_our_mistake() -> None:
    for wrong in ("features bigint [ ]", "n int", "n"):
        with pytest.raises(AssertionError, match=r"q\.sql"):
            a_question(f"-- Parameters: {wrong}\n-- Ask it: which?")


@pytest.mark.parametrize(
    "given", ["3,7,12", " 3, 7 ,12", "[3, 7, 12]", [3, 7, 12], ("3", 7, 12), np.array([3, 7, 12]), pa.array([3, 7, 12])]
)
def test_a_list_is_written_with_commas_as_json_or_given_as_a_list(given: object) -> None:
    assert Parameter("features", "bigint[]").parse(given) == [3, 7, 12]


def test_one_value_is_a_list_of_one() -> None:
    assert Parameter("features", "bigint[]").parse("3") == Parameter("features", "bigint[]").parse(3) == [3]
    assert Parameter("thresholds", "double[]").parse("-inf,1e3") == [-math.inf, 1000.0]


@pytest.mark.parametrize(
    ("type", "given", "message"),
    [
        ("bigint[]", "", "features is an empty list"),
        ("bigint[]", "[]", "features is an empty list"),
        ("bigint[]", [], "features is an empty list"),
        ("bigint[]", "3,,7", "whole numbers such as 3,7,12"),
        ("bigint[]", "3,x", r"features is '3,x'"),
        ("bigint[]", "[3, [7]]", "whole numbers"),
        ("bigint[]", "[" * 90_000, "whole numbers"),
        ("bigint[]", [2**63], "whole numbers"),
        ("bigint[]", {"a": 1}, "whole numbers"),
        ("bigint[]", b"37", "whole numbers"),
        ("double[]", "0.5,nan", "must be numbers"),
        ("double[]", "[NaN]", "must be numbers"),
        ("bigint[]", [0] * (MOST_LISTED + 1), "has 1,001 values; at most 1,000"),
        ("bigint", "9" * 5_000, "whole number"),
        ("bigint", True, "whole number"),
        ("text", "\udcff", "must be text"),
        ("text", "x" * 10_000_000, "has 10,000,000 characters; at most 100,000 are read"),
    ],
)
def test_a_value_that_does_not_fit_is_one_short_message(type: str, given: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Parameter("text" if type == "text" else "features", type).parse(given)
    assert len(str(refused.value)) < 250


def test_a_feature_a_source_or_a_run_that_is_not_there_is_named_with_the_nearest(store: Store) -> None:
    many = a_question("-- Parameters: features bigint[]\n-- Ask it: which?")
    runs = a_question("-- Parameters: a text, b text, n bigint = 5\n-- Ask it: which?", "compare_runs")
    contrast = a_question("-- Parameters: a text, b text\n-- Ask it: which?", "source_contrast")
    with connect(store) as connection:
        for features in ([0, 4], [-1], [2**62]):
            with pytest.raises(UserError, match=r"There is no feature -?\d+; features go from 0 to 3\."):
                resolve_names(connection, many, parse_arguments(many, [features]))
        with pytest.raises(UserError, match=r"no source 'novel'\. Did you mean novels\?"):
            resolve_names(connection, contrast, parse_arguments(contrast, ["bible", "novel"]))
        with pytest.raises(UserError, match=r"no run 'dmo'\. Did you mean demo\?"):
            resolve_names(connection, runs, parse_arguments(runs, ["old", "dmo"]))
        for called in ("old", "old-f0000009", "old_f0000009", "features/old-f0000009"):
            assert resolve_names(connection, runs, parse_arguments(runs, ["demo", called])) == {
                "a": "demo",
                "b": "old",
                "n": 5,
            }


def test_the_list_of_questions_is_grouped_and_fits_80_columns(saeflow: Command) -> None:
    said = saeflow("ask")
    assert said.code == 0
    assert max(map(len, said.out.splitlines())) <= 80
    for question in questions():
        assert f"\n  {question.brief}\n" in said.out
        assert question.group in said.out.splitlines()


def test_a_question_without_its_arguments_is_explained(saeflow: Command, store: Store) -> None:
    said = saeflow("ask", "tokens_where", "--store", store.root)
    assert (said.code, said.out) == (2, "")
    for phrase in (
        "tokens_where needs feature bigint",
        "beyond a threshold",
        "threshold  double, 0 where not given",
        "Example: saeflow ask tokens_where 12 0.5",
    ):
        assert phrase in said.err


@pytest.mark.parametrize("threshold", ["-0.2", "-2e-1", "-.2"])
def test_a_threshold_below_zero_asks_a_signed_run_for_the_other_side(
    saeflow: Command, tmp_path: Path, threshold: str
) -> None:
    values = [(0, 1, -0.5), (1, 1, 0.75), (2, 1, -0.125), (3, 2, -1.0)]
    for signed, beyond in ((True, [0]), (False, [1, 2])):
        root = tmp_path / str(signed)
        Given(values=values, signed=signed).write(root)
        said = saeflow("ask", "tokens_where", "1", threshold, "--store", root, "-f", "json")
        assert said.code == 0, said.err
        assert [row["token_id"] for row in json.loads(said.out)] == beyond
        said = saeflow("ask", "tokens_where_all", "1,2", f"{threshold},-0.5", "--store", root, "-f", "json")
        assert (said.code, json.loads(said.out)) == (0, []), said.err


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
def test_the_example_of_a_question_is_one(question: Question) -> None:
    assert list(parse_arguments(question, shlex.split(question.command)[3:])) == [
        each.name for each in question.parameters
    ]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["tokens_where", "0", "1"], 'select * from "demo".tokens_where(0, 1.0::double);'),
        (["tokens_where", "0", "inf", "--run", "old"], "select * from \"old\".tokens_where(0, 'inf'::double);"),
        (["runs", "-n", "2"], 'select * from "demo".runs limit 2;'),
        (["search_token", "it's"], "select * from \"demo\".search_token('it''s');"),
        (["search_token", "\x1b[2J\u202e\n"], r"""select * from "demo".search_token(E'\x1b[2J\xe2\x80\xae\x0a');"""),
    ],
)
def test_the_sql_of_a_question_answers_it_in_a_shell(
    words: list[str], wanted: str, saeflow: Command, store: Store
) -> None:
    said = saeflow("ask", *words, "--sql", "--store", store.root)
    assert said.out == wanted + "\n"
    answered = json.loads(saeflow("ask", *words, "-f", "json", "--store", store.root).out)
    with connect(store) as connection:
        assert json.loads("".join(as_json(query(connection, said.out)))) == answered


def completed(words: str, store: Store) -> str:
    environment = os.environ | {
        "_SAEFLOW_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "SAEFLOW_STORE": str(store.root),
    }
    done = subprocess.run(SAEFLOW, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    return done.stdout


def test_a_shell_completes_questions_and_runs(store: Store, tmp_path: Path) -> None:
    found = completed("saeflow ask to", store).split()
    assert found == [question.name for question in questions() if question.name.startswith("to")]
    assert completed("saeflow sql --run o", store).split() == ["old"]
    assert completed("saeflow sql --run o", Store(tmp_path / "nowhere")).split() == []


def test_the_api_answers_as_arrow(run: package.api.OpenRun, store: Store) -> None:
    assert run.ask("top_tokens", feature=0, n=2).column("token_id").to_pylist() == [5, 1]
    assert run.ask("tokens_where", 0, threshold=1.0, limit=1).column("token_id").to_pylist() == [1]
    assert run.sql("select ? + 1 as x", [41]).to_pylist() == [{"x": 42}]
    assert {question.name for question in run.questions()} >= {"top_tokens", "runs"}
    assert repr(run) == f"<saeflow run 'demo' of '{store.root}': 4 features, 8 tokens>"
    with package.open(str(store.root), run="old") as old:
        assert old.name == "old"
    with pytest.raises(duckdb.Error):
        old._connection.execute("select 1")


def test_the_api_takes_its_store_from_the_environment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFLOW_STORE", str(store.root))
    with package.open() as opened:
        assert opened.n_tokens == 8


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((9,), {}, "There is no feature 9"),
        ((1, 2, 3), {}, "takes 2 arguments, not 3"),
        ((1,), {"feature": 1}, "is given feature twice"),
        ((), {"n": 3}, "tokens_where has no parameter 'n'"),
        ((), {}, "tokens_where needs feature"),
        ((1, math.nan), {}, "must be a number"),
    ],
)
def test_what_the_api_cannot_answer_is_a_user_s_error(
    run: package.api.OpenRun, arguments: tuple[object, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(package.UserError, match=message):
        run.ask("tokens_where", *arguments, **options)


def test_an_answer_is_duckdb_s_own_memory_and_no_python_rows(run: package.api.OpenRun) -> None:
    """8 MB of numbers: neither Arrow nor Python takes memory for them, so nothing was copied."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    table = run.sql("select i::bigint as i from range(1_000_000) t(i)")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.nbytes >= 8_000_000
    assert pa.total_allocated_bytes() - before < 100_000
    assert peak < 1_000_000
    numbers = [chunk.to_numpy(zero_copy_only=True) for chunk in table.column("i").chunks]
    assert sum(map(len, numbers)) == 1_000_000


def test_importing_the_package_loads_next_to_nothing() -> None:
    large = {"duckdb", "pyarrow", "numpy", "pydantic", "typer"}
    code = f"import sys, saeflow; print(sorted({{m.split('.')[0] for m in sys.modules}} & {large}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "x" * 10_000_000,
        "select '" + "x" * 10_000_000 + "'",
        "x" * 90_000,
        "select " + "(" * 90_000 + "1",
        "select " + "(" * 40_000 + "1" + ")" * 40_000,
        "select * from (" * 5_000 + "select 1" + ")" * 5_000,
        "select '\udcff'",
        "select 1" + " union all select" * 20,
    ],
    ids=["nonsense", "text", "short nonsense", "open", "nested", "subqueries", "surrogate", "unions"],
)
def test_a_long_or_broken_statement_is_refused_without_an_echo(run: package.api.OpenRun, statement: str) -> None:
    with pytest.raises(UserError) as refused:
        run.sql(statement)
    assert len(str(refused.value)) < 1000


def test_a_long_text_is_refused_on_standard_input(
    saeflow: Command, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("select '" + "x" * 10_000_000 + "'"))
    said = saeflow("sql", "--store", store.root)
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[1:] == ["The query has 100,001 characters; at most 100,000 are read."]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"select '\xff'"), "utf-8"))
    assert "not text in UTF-8" in saeflow("sql", "--store", store.root).err


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every text that a corpus brings says something to a terminal."""
    root = tmp_path_factory.mktemp("hostile") / "it's \u202e; -- \x1b[2J"
    pieces = [HOSTILE.encode(), b"=cmd|' /C calc'!A0", b"\x1b]0;x\x07"]
    columns = {"title": pa.array([HOSTILE])}
    return Given(
        documents=[Document(HOSTILE, HOSTILE, pieces)], values=[(0, 0, 1.0), (1, 0, 2.0)], metadata=columns
    ).write(root)


@pytest.fixture(scope="module")
def to_hostile(hostile: Store) -> Iterator[Connected]:
    with one_connection(hostile) as found:
        yield found


@pytest.mark.parametrize("form", ["table", "csv", "json", "jsonl"])
@pytest.mark.parametrize(
    "words", [["ask", "tokens"], ["ask", "top_tokens", "0"], ["ask", "documents"], ["ask", "search_token", "cmd"],
              ["ask", "compare_sources", HOSTILE, HOSTILE], ["ask", "runs"], ["ask", "search_token", "cmd", "--sql"]],
    ids=lambda words: words[1],
)  # fmt: skip
def test_nothing_of_a_corpus_is_obeyed_by_a_terminal(
    words: list[str],
    form: str,
    saeflow: Command,
    hostile: Store,
    to_hostile: Connected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("saeflow.query.connection.connect_to_run", lambda *_, **__: to_hostile)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    said = saeflow(*words, "-f", form, "--store", hostile.root)
    assert said.code == 0, said.err
    assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(said.out + said.err)


@pytest.mark.parametrize(
    "words", [["ls"], ["show", "evil"], ["verify"], ["gc", "--grace", "0"]], ids=lambda words: words[0]
)
def test_nothing_of_a_foreign_store_is_obeyed_by_a_terminal(words: list[str], saeflow: Command, tmp_path: Path) -> None:
    root = tmp_path / "it's \u202e; -- \x1b[2J"
    store = Given(name="evil", fp="f\x1b]0;x\x07\u202e").write(root)
    store.artefact("features", "[bold]e\x1b[31m", "f0000001").create(
        {"a\x1b[2J": "\x1b[2J"}, ["tokens/\x1b[2J-f0000001"]
    )
    next(root.glob("tokens/*/parts/*/tokens.parquet")).unlink()
    said = saeflow(*words, "--store", root)
    assert said.out
    assert not {"\x1b", "\x07", "\u202e"} & set(said.out + said.err)


@pytest.mark.parametrize(
    "words",
    [
        ["count_where_all", "0,1", "0,0"],
        ["coactivation", "0"],
        ["features_on", "x"],
        ["features_of_selection", "--sql", "select token_id from tokens where token_id % 3 = 0"],
        ["features_of_selection", "--tokens", "1,2,40,80,81"],
        ["features_by_role", "user", "assistant"],
        ["contrast_within", "s", "t", "--until", "1850"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_an_estimate_is_shown_before_the_exact_answer_unless_only_that_is_wanted(
    saeflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    world = sampled_world(roles={token: ("user", "assistant")[token % 2] for token in range(320)})
    world.metadata = {"published": pa.array([str(1800 + i) for i in range(80)])}
    for i, document in enumerate(world.documents):
        document.source = "st"[i // 2 % 2]
    root = world.write(tmp_path / "store").root
    words = ["ask", *words, "--store", root]
    quick = saeflow(*words)
    assert "Approximate" not in quick.err
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 0)
    piped = saeflow(*words)
    assert ("Approximate" in piped.err, piped.out) == (False, quick.out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = saeflow(*words)
    assert "Approximate, from a sample of a 64th of the documents" in said.err
    assert "low" in said.out.removesuffix(quick.out)
    assert said.out.endswith(quick.out)
    for only in (["--exact"], ["-f", "csv"], ["-o", tmp_path / "answer.csv"]):
        alone = saeflow(*words, *only)
        assert (alone.code, alone.err.count("Approximate"), alone.out.count("low")) == (0, 0, 0)


def test_an_estimate_has_as_many_rows_as_the_answer_and_is_no_part_of_its_cost(
    saeflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [(token, feature, 1.0) for token in range(320) for feature in range(25)]
    root = sampled_world(values=values).write(tmp_path / "store").root
    monkeypatch.setattr(approximation, "CHEAP_VALUES", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for options, n_rows, is_cut in (([], 20, True), (["-n", "22"], 22, True), (["-n", "30"], 24, False)):
        said = saeflow("ask", "coactivation", "0", *options, "--store", root, "--explain")
        assert said.code == 0
        assert said.err.count(f"The first {n_rows} rows.") == (2 if is_cut else 0)
        assert said.err.count("asking:") == 1
        assert [len(re.findall(row, said.out, re.MULTILINE)) for row in (r"^other_id +\d+$", r"^ +\d+ ")] == [
            n_rows
        ] * 2


def test_minus_infinity_is_asked_for_behind_two_dashes(saeflow: Command, store: Store) -> None:
    said = saeflow("ask", "tokens_where", 0, "-inf", "--store", store.root)
    assert (said.code, "Write -- before it" in said.err) == (2, True)
    said = saeflow("ask", "tokens_where", "--store", store.root, "-f", "jsonl", "--", 0, "-inf")
    assert (said.code, len(said.out.splitlines())) == (0, 4)
    assert saeflow("ask", "tokens_where", 0, -1.5, "--store", store.root).code == 0


@pytest.mark.parametrize("threshold", [0.0999755859, 0.0999755860])
def test_a_threshold_means_the_same_in_sql_and_as_an_argument(tmp_path: Path, threshold: float) -> None:
    value = 0.0999755859375
    with connect(Given(values=[(0, 0, value)]).write(tmp_path), threads=1) as connection:
        asked = ask(connection, "tokens_where", [0, threshold]).num_rows
        assert query(connection, f"from tokens_where(0, {threshold:.10f})").num_rows == asked == (value > threshold)


def test_a_file_holds_the_text_as_it_is(saeflow: Command, hostile: Store, tmp_path: Path) -> None:
    assert saeflow("ask", "documents", "--store", hostile.root, "-o", tmp_path / "a.csv").code == 0
    (row,) = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_bytes().decode(), newline=""))
    assert row["key"] == HOSTILE
    piped = saeflow("ask", "documents", "--store", hostile.root, "-f", "csv").out
    assert HOSTILE.replace('"', '""') in piped
    assert saeflow("ask", "tokens", "--store", hostile.root, "-o", tmp_path / "b.csv").code == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "b.csv").read_bytes().decode(), newline="")))
    assert rows[1]["piece"] == "'=cmd|' /C calc'!A0"
    assert rows[1]["token_id"] == "1"


@pytest.mark.parametrize("name", ["it's; drop schema demo; --", 'quo"te', "a\x1b[2Jb", "a\nb", "\u202egnp", "memory"])
def test_a_run_of_a_hostile_name_is_asked_or_left_out_and_says_nothing(name: str, tmp_path: Path) -> None:
    store = Given(name=name).write(tmp_path)
    Given(name="good", fp="f0000007").write(tmp_path)
    with connect(store) as connection:
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        problems = {row["name"]: row["problem"] for row in ask(connection, "runs").to_pylist()}
    assert (problems[name] is None) == name.isprintable()
    if name.isprintable():
        with connect(store, name) as connection:
            assert ask(connection, "tokens_where", [0]).num_rows == 4
            asked = find_question("tokens_where")
            text = as_statement(connection, asked, parse_arguments(asked, [0]))
            assert query(connection, text).num_rows == 4


def test_a_store_whose_path_reads_like_sql_is_read(tmp_path: Path) -> None:
    for folder in ("from tokens where", "context(1)", "x\ny", "join stg_tokens"):
        with connect(Given().write(tmp_path / folder)) as connection:
            assert ask(connection, "top_tokens", [0]).num_rows == 4


@pytest.mark.long
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "txt", "sql"])
def test_a_file_of_an_answer_stays_as_it_was_if_the_new_one_finds_no_room(saeflow, store, tmp_path, ending):
    path, folder = tmp_path / f"answer.{ending}", set(tmp_path.iterdir())
    path.write_text("the old answer")
    path.chmod(0o640)
    words = ("sql", "--script") if ending == "sql" else ("sql", "select range, repeat('x', 100) from range(900)")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        said = saeflow(*words, "--store", store.root, "-o", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.code == 2, said.err
    assert path.read_text() == "the old answer"
    assert set(tmp_path.iterdir()) == {*folder, path}, "nothing half written is left"
    assert saeflow(*words, "--store", store.root, "-o", path).code == 0
    assert path.stat().st_size > 300
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_answer_may_go_to_a_device_or_through_a_link(saeflow, store, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "answer.csv")
    assert saeflow("sql", "select 1 as a", "--store", store.root, "-o", tmp_path / "link.csv").code == 0
    assert (tmp_path / "answer.csv").read_text() == "a\n1\n"
    assert (tmp_path / "link.csv").is_symlink()
    assert saeflow("sql", "select 1 as a", "--store", store.root, "-f", "csv", "-o", "/dev/null").code == 0
    assert not Path("/dev/null").is_file()
