"""Labels of features: written by a command, by hand or by a spreadsheet, brought from elsewhere, read in SQL."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saeflow.query import catalog
from saeflow.query.ask import ask, query
from saeflow.query.connection import connect
from saeflow.query.label_import import read
from saeflow.query.labels import Label, Sheet, put
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.command import Command
from tests.support.small_store import Given
from tests.support.work_done import growth

SAE = "saes/demo-f0000001"
LABELS = "select feature_id, label, source, score from src_labels order by all"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Given().write(tmp_path / "store")


def by_hand(store: Store, content: bytes, name: str = "own.csv") -> Path:
    path = store.root / "labels" / "demo-f0000001" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def labels(store: Store) -> list[tuple[Any, ...]]:
    with connect(store, threads=1) as connection:
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        return [tuple(row.values()) for row in query(connection, LABELS).to_pylist()]


def test_a_label_is_set_changed_shown_and_taken_away(saeflow: Command, store: Store) -> None:
    at = ["--store", store.root]
    assert saeflow("label", 2, "the comma before speech", "--score", 0.8, *at).code == 0
    assert saeflow("label", 0, "love", *at).code == 0
    assert labels(store) == [(0, "love", "own", None), (2, "the comma before speech", "own", 0.8)]
    assert saeflow("label", 2, "commas", *at).err.endswith("labels/demo-f0000001/own.csv: 2 labels\n")
    shown = saeflow("label", 2, *at)
    assert (shown.code, shown.out.split()) == (0, ["label", "source", "score", "commas", "own"])
    assert saeflow("label", 2, "", *at).code == 0
    assert "Feature 2 has no label" in saeflow("label", 2, *at).out
    assert saeflow("label", 0, "", *at).code == 0
    assert list(store.root.glob("labels/*/*")) == []
    assert labels(store) == []


def test_a_score_keeps_all_its_digits(store: Store) -> None:
    put(store, SAE, "own", {1: Label("a", 0.123456789), 2: Label("b", 1e-9)})
    assert labels(store) == [(1, "a", "own", 0.123456789), (2, "b", "own", 1e-9)]


def test_a_feature_that_is_not_there_has_no_label_to_show(saeflow: Command, store: Store) -> None:
    said = saeflow("label", 77, "--store", store.root)
    assert (said.code, said.out) == (2, "")
    assert "There is no feature 77; features go from 0 to 3." in said.err


def test_a_new_file_of_labels_is_in_the_catalog_at_once(saeflow: Command, store: Store) -> None:
    assert saeflow("label", 2, "x", "--store", store.root).code == 0
    assert "labels/demo-f0000001/own.csv" in (store.root / "catalog.sql").read_text()
    assert catalog.write_catalog(store) is None


def test_labels_belong_to_the_sae_and_not_to_another_run(saeflow: Command, store: Store) -> None:
    Given(name="other", fp="f0000002").write(store.root)
    assert saeflow("label", 1, "of demo", "--run", "demo", "--store", store.root).code == 0
    with connect(store, "demo") as connection:
        assert query(connection, "from src_labels").num_rows == 1
        assert query(connection, "from other.src_labels").num_rows == 0


def test_a_person_s_other_columns_order_and_lines_are_kept(store: Store) -> None:
    content = "\ufefffeature_id;note;label;score\n3;mine;c;\n\nx;what?;d\n1;;a;0.5\n3;again;e;\n".encode()
    path = by_hand(store, content)
    put(store, SAE, "own", {3: Label("new", 0.25), 0: Label("z")})
    wanted = "\ufefffeature_id;note;label;score\n3;mine;new;0.25\nx;what?;d\n1;;a;0.5\n0;;z;\n"
    assert path.read_bytes().decode() == wanted
    assert labels(store) == [(0, "z", "own", None), (1, "a", "own", 0.5), (3, "new", "own", 0.25)]


def test_a_file_without_scores_gets_them_when_one_is_set(store: Store) -> None:
    path = by_hand(store, b"index,description\n1,a\n")
    put(store, SAE, "own", {2: Label("b", 1.0)})
    assert path.read_text() == "index,description,score\n1,a\n2,b,1\n"
    assert labels(store) == [(1, "a", "own", None), (2, "b", "own", 1.0)]


@pytest.mark.parametrize(
    "text", ["=1+1", "-ing", "'-ing", "''=x", "'tis", "@cmd|' /C calc'!A0", 'a "b", c;d', "水 ع 🐘"]
)
def test_a_label_comes_back_as_it_was_and_is_no_formula_in_a_spreadsheet(text: str, store: Store) -> None:
    put(store, SAE, "own", {1: Label(text)})
    assert labels(store) == [(1, text, "own", None)]
    path = store.root / "labels/demo-f0000001/own.csv"
    (row,) = csv.DictReader(io.StringIO(path.read_text("utf-8"), newline=""))
    assert not row["label"].startswith(("=", "+", "-", "@"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("content", "found", "warned"),
    [
        (
            b"feature_id,label,score\n1,a,\nseven,b,\n2,c,0.5\n",
            [(1, "a", None), (2, "c", 0.5)], "own.csv, line 3: left out, as 'seven'",
        ),
        (b"feature_id,label,score\n1,a,high\n", [(1, "a", None)], "line 2: its score is left out, as 'high'"),
        (b"feature_id,label,score\n1,a,nan\n2,b,inf\n", [(1, "a", None), (2, "b", None)], "as 'inf' is not a number"),
        (b"feature_id;label;score\n1;a, b;0,8\n", [(1, "a, b", None)], "as '0,8' is not a number"),
        (b"Feature_ID\tLabel\n1\ta\n", [(1, "a", None)], ""),
        (
            b"feature_id,label,score\n1\t,\ta\t,\t0.5\n\xc2\xa02,\xc2\xa0b\xc2\xa0,\n",
            [(1, "a", 0.5), (2, "b", None)], "",
        ),
        (b"feature_id,label,score\n1,a,0_5\n", [(1, "a", None)], "as '0_5' is not a number"),
        (b"feature_id,label\n00000000001,a\n2,b\n", [(2, "b", None)], "as '00000000001' is not the number"),
        (b"label,feature_id\r\na,1\r\n\r\nb,2\r\n", [(1, "a", None), (2, "b", None)], ""),
        (b"feature_id,label,score\n1\n2,b\n3,c,0.5,more\n", [(2, "b", None), (3, "c", 0.5)], ""),
        (b"feature_id,label,score\n1,\"two\nlines\",\n", [(1, "two\nlines", None)], ""),
        (
            b"feature_id,label,score\n-1,a,\n1.0,b,\n99999999999,c,\n1e3,d,\n2,e,\n",
            [(2, "e", None)], "1 more lines like these",
        ),
        (b"feature_id,label,score\n1,\"open,\n2,b,\n", [], "own.csv is left out: line 3: unexpected end"),
        (b"feature_id,label\n1,Gr\xfc\xdfe\n", [], "left out: line 2: it is not UTF-8"),
        ("feature_id,label\n1,a\n".encode("utf-16"), [], "not UTF-8"),
        (b"1,a,0.5\n", [], "must name the columns feature_id, label, score"),
        (b"feature_id,label,label\n1,a,b\n", [(1, "a", None)], ""),
        (b"", [], "must name the columns"),
        (b"feature_id,label\n1,a\x00b\n", [], "zero bytes"),
        (b"feature_id,label\n1," + b"x" * 200_000 + b"\n", [], "line 2: field larger"),
        (b"feature_id,label\n1,\x1b[2Ja\n\x1b[2J,b\n", [(1, "\x1b[2Ja", None)], r"as '\x1b[2J' is not"),
    ],
    ids=["word", "score", "nan", "semicolons", "tabs", "blanks", "underscore", "many zeros", "other order", "ragged",
         "two lines", "numbers", "open quote", "latin-1", "utf-16", "no header", "twice", "empty", "zero byte", "long",
         "escape codes"],
)  # fmt: skip
def test_what_people_and_spreadsheets_do_to_a_file_breaks_no_question(
    content: bytes, found: list[tuple[Any, ...]], warned: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    by_hand(store, content)
    by_hand(store, b"feature_id,label\n0,good\n", "gpt-4 o'clock.csv")
    read_back = labels(store)
    assert (0, "good", "gpt-4 o'clock", None) in read_back
    assert [(row[0], row[1], row[3]) for row in read_back if row[2] == "own"] == found
    assert warned in caplog.text
    assert warned or not caplog.text
    assert "\x1b" not in caplog.text


def test_a_command_that_was_halted_while_it_wrote_labels_does_not_hold_up_the_next_for_ever(store: Store) -> None:
    halted = FileLock(store.root / "tmp" / "locks" / "labels-demo-f0000001.lock")
    with halted, pytest.raises(UserError, match="some process was halted"):
        put(store, SAE, "own", {0: Label("love")}, wait_seconds=0.05)
    assert put(store, SAE, "own", {0: Label("love")}) == 1


def test_a_file_that_cannot_be_read_is_not_overwritten(saeflow: Command, store: Store) -> None:
    path = by_hand(store, b'feature_id,label\n1,"open\n')
    said = saeflow("label", 1, "x", "--store", store.root)
    assert said.code == 2
    assert "own.csv cannot be read: line 2" in said.err
    assert path.read_bytes() == b'feature_id,label\n1,"open\n'


def test_files_that_are_none_of_ours_are_not_read(store: Store) -> None:
    for name in (".own.csv", ".~lock.own.csv#", "own.csv.bak", "notes.txt"):
        by_hand(store, b"feature_id,label\n1,a\n", name)
    (store.root / "labels/demo-f0000001/folder.csv").mkdir()
    assert labels(store) == []


def test_a_file_that_goes_while_it_is_asked_is_a_message(store: Store) -> None:
    path = by_hand(store, b"feature_id,label\n1,a\n")
    with connect(store) as connection:
        path.write_bytes(b'\xff\xfe"broken\n1')
        assert query(connection, "from src_labels").num_rows == 0
        path.unlink()
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        with pytest.raises(UserError, match="cannot be run"):
            query(connection, "from src_labels")


line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.dictionaries(st.integers(0, 3), line, min_size=1))
def test_any_text_comes_back_on_one_line(texts: dict[int, str], store: Store) -> None:
    from saeflow.query.labels import clean_label

    wanted = {feature: clean_label(text, None, "here") for feature, text in texts.items()}
    put(store, SAE, "own", dict.fromkeys(range(4)) | wanted)
    assert labels(store) == [(f, label.text, "own", None) for f, label in sorted(wanted.items()) if label]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=60), place=st.integers(0, 60))
def test_no_bytes_in_a_file_stop_a_question(noise: bytes, place: int, store: Store) -> None:
    content = b'feature_id,label,score\n1,"a, b",0.5\n2,c,\n'
    by_hand(store, content[:place] + noise + content[place:])
    labels(store)


ROWS = [{"feature_id": 2, "label": "two", "score": 0.5}, {"feature_id": 0, "label": "none", "score": None}]


def as_csv(path: Path) -> None:
    path.write_text("feature_id,label,score\n2,two,0.5\n0,none,\n")


def as_lines(path: Path) -> None:
    """As Neuronpedia exports them."""
    path.write_text("".join(json.dumps({"modelId": "m", "index": str(row["feature_id"]), "description": row["label"],
                                        "score": row["score"]}) + "\n" for row in ROWS))  # fmt: skip


def as_array(path: Path) -> None:
    path.write_text(
        json.dumps([{"feature": r["feature_id"], "explanation": r["label"], "score": r["score"]} for r in ROWS])
    )


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row | {"more": 1} for row in ROWS]), path)


@pytest.mark.parametrize(
    ("name", "written"), [("a.csv", as_csv), ("a.jsonl", as_lines), ("a.json", as_array), ("a.parquet", as_parquet)]
)
def test_labels_are_brought_from_a_file_under_the_name_of_their_source(
    name: str, written: Any, saeflow: Command, store: Store, tmp_path: Path
) -> None:
    written(tmp_path / name)
    put(store, SAE, "gpt-4", {2: Label("before"), 3: Label("stays")})
    said = saeflow("label", "--import", tmp_path / name, "--source", "gpt-4", "--store", store.root)
    assert said.code == 0, said.err
    assert labels(store) == [
        (0, "none", "gpt-4", None), (2, "two", "gpt-4", 0.5), (3, "stays", "gpt-4", None),
    ]  # fmt: skip


def test_of_several_labels_of_a_feature_the_best_is_brought_and_an_empty_one_removes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("feature,description,score\n1,a,0.2\n1,b,0.9\n1,c,0.9\n2,,\n")
    assert read(tmp_path / "a.csv", 4) == {1: Label("b", 0.9), 2: None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"feature_id,label\n1,a\n4,b\n", "a.csv, line 3: There is no feature 4; features go from 0 to 3."),
        ("a.csv", b"feature_id,label\n-1,a\n", "no feature -1"),
        ("a.csv", b"feature_id,label\nx,a\n", "a.csv, line 2: 'x' is not the number of a feature"),
        (
            "a.csv",
            b"feature_id,label,score\n1,a,87\n",
            "line 2: the score is '87', but it must be a number from 0 to 1",
        ),
        ("a.csv", b"feature_id,label,score\n1,a,nan\n", "the score is 'nan'"),
        ("a.csv", b"a,b\n1,2\n", "must name the columns"),
        ("a.csv", b"feature_id,label\n", "holds no labels"),
        ("a.csv", b"feature_id,label\n1," + b"x" * 10_001 + b"\n", "the label has 10,001 characters"),
        ("a.jsonl", b'{"feature_id": 1, "label": "a"}\n{"feature_id": 1,\n', "cannot be read: line 2"),
        ("a.jsonl", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b"3\n", "line 1: it is not an object"),
        ("a.json", b'[{"id": 1}]', "there is no column feature_id; it has id"),
        ("a.json", b'[{"index": true, "label": "a"}]', "'True' is not the number"),
        ("a.json", b'[{"index": 1, "label": "\\ud800"}]', "the label is not text"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_file_with_something_wrong_is_refused_whole(
    name: str, content: bytes, message: str, saeflow: Command, store: Store, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    said = saeflow("label", "--import", tmp_path / name, "--source", "x", "--store", store.root)
    assert said.code == 2
    assert message in said.err
    assert len(said.err) < 800
    assert not list(store.root.glob("labels/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["4", "x"], "There is no feature 4; features go from 0 to 3."),
        (["1", "x", "--score", "2"], "must be a number from 0 to 1"),
        (["1", "x", "--score", "nan"], "must be a number from 0 to 1"),
        (["1", "x", "--source", "../../x"], "The source is '../../x'"),
        (["1", "x", "--source", ".hidden"], "The source is '.hidden'"),
        ([], "Which feature?"),
        (["1", "--import", "x.csv"], "leave out the number"),
        (["--import", "x.csv"], "There is no file x.csv"),
        (["1", "x", "--run", "dmo"], "Did you mean demo"),
    ],
)
def test_a_label_that_cannot_be_set_is_one_message(
    arguments: list[str], message: str, saeflow: Command, store: Store
) -> None:
    said = saeflow("label", *arguments, "--store", store.root)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert not list(store.root.glob("labels/*/*"))


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_label_is_not_obeyed_by_a_terminal(form: str, saeflow: Command, store: Store) -> None:
    put(store, SAE, "own", {1: Label("\x1b[31m\u202e[bold]x")})
    for command in (["sql", LABELS, "-f", form], ["label", 1]):
        said = saeflow(*command, "--store", store.root)
        assert "[bold]x" in said.out
        assert not {"\x1b", "\u202e"} & set(said.out + said.err)


def test_an_sae_s_name_is_no_way_out_of_the_store(store: Store) -> None:
    for name in ("saes/..", "saes/../../x", "saes/"):
        with pytest.raises(UserError, match="not the name of an SAE"):
            put(store, name, "own", {1: Label("x")})


def test_a_large_file_is_read_and_changed_in_time_in_proportion_to_it(store: Store) -> None:
    def change(n: int) -> None:
        rows = "".join(f"{i},label number {i},0.5\n" for i in range(n))
        by_hand(store, f"feature_id,label,score\n{rows}".encode())
        put(store, SAE, "own", {feature: Label("x") for feature in range(0, n, 2)})
        assert len(labels(store)) == n
        assert len(Sheet.of((store.root / "labels/demo-f0000001/own.csv").read_bytes()).rows) == n

    assert growth(change, 1_000, times=8) < 10
