"""Every view, macro and check of sql/: given these rows, expected those."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from saeflow import queries
from saeflow.queries import ask, check, connect
from tests.small_store import DOCUMENTS, VALUES, Document, Given, count_stats, token_rows

SQL = Path(__file__).parent.parent / "sql"


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    """Nothing here is about power cuts, and flushing is most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def answer(root: Path, given: Given, question: str, *arguments: object) -> list[dict[str, object]]:
    with connect(given.write(root), threads=1) as connection:
        return ask(connection, question, arguments).to_pylist()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Callable[..., list[dict[str, object]]]]:
    """Asks the store that is given unchanged."""
    with connect(Given().write(tmp_path_factory.mktemp("demo")), threads=1) as connection:
        yield lambda question, *arguments: ask(connection, question, arguments).to_pylist()


def column(rows: list[dict[str, object]], name: str) -> list[object]:
    return [row[name] for row in rows]


def test_tokens_where_gives_all_tokens_above_the_threshold_in_corpus_order(demo):
    rows = demo("tokens_where", 0, 1.0)
    assert rows == [
        {"token_id": 1, "value": 2.5, "piece": " loves", "key": "emma", "source": "novels", "position": 1},
        {"token_id": 5, "value": 3.0, "piece": "Love", "key": "psalm", "source": "bible", "position": 1},
        {"token_id": 7, "value": 2.0, "piece": " love", "key": "psalm", "source": "bible", "position": 3},
    ]


def test_tokens_where_without_a_threshold_gives_every_token_at_which_the_feature_fires(demo):
    assert column(demo("tokens_where", 0), "token_id") == [0, 1, 5, 7]


@pytest.mark.parametrize("feature", [3, 99, -1, 2**62])
def test_a_feature_that_never_fires_or_does_not_exist_has_no_tokens(demo, feature):
    assert demo("tokens_where", feature) == []


def test_tokens_where_reads_only_the_row_groups_of_its_feature(tmp_path, monkeypatch):
    from tests import small_store

    write = small_store.pq.write_table
    monkeypatch.setattr(small_store.pq, "write_table", lambda t, p: write(t, p, row_group_size=100))
    values = [(token, feature, 1.0) for feature in range(4) for token in range(500)]
    documents = [Document("long", "a", [b"x"] * 500)]
    with connect(Given(documents=documents, values=values).write(tmp_path)) as connection:
        plan = queries.query(connection, "explain analyze from tokens_where(2)").column(1)[0].as_py()
    scans = [tuple(map(int, found)) for found in re.findall(r"Row Groups Scanned: (\d+) / (\d+)", plan)]
    assert (5, 20) in scans


def test_top_tokens_come_strongest_first_with_the_token_marked_in_its_context(demo):
    rows = demo("top_tokens", 0, 2)
    assert column(rows, "value") == [3.0, 2.5]
    assert column(rows, "context") == ["«Love» thy love", "Emma« loves» no one."]
    assert column(rows, "key") == ["psalm", "emma"]


def test_equal_values_come_in_corpus_order(tmp_path):
    rows = answer(tmp_path, Given(values=[(6, 1, 2.0), (2, 1, 2.0), (4, 1, 2.0)]), "top_tokens", 1)
    assert column(rows, "token_id") == [2, 4, 6]


def test_a_context_crosses_sequences_but_never_documents(demo):
    (row,) = demo("context", 4)
    assert (row["text_before"], row["token_text"], row["text_after"]) == ("Emma loves no one", ".", "")
    assert row["position"] == 0


def test_a_context_is_as_wide_as_asked(demo):
    assert demo("context", 2, 1, 0)[0]["context"] == " loves« no»"
    assert demo("context", 0, 5, 1)[0]["context"] == "«Emma» loves"


def test_padding_and_unknown_tokens_have_no_context(tmp_path):
    documents = [Document("short", "a", [b"one"])]
    assert answer(tmp_path, Given(documents=documents, values=[]), "context", 1) == []
    assert answer(tmp_path / "b", Given(documents=documents, values=[]), "context", 999) == []


def split_bytes(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


@pytest.mark.parametrize("text", ["水", "ع", "🐘", "e\u0301"])
def test_a_letter_in_several_byte_pieces_is_shown_whole_whichever_piece_is_asked_about(tmp_path, text):
    pieces = [b"a ", *split_bytes(text), b" z"]
    given = Given(documents=[Document("bytes", "a", pieces)], values=[(2, 0, 1.0)])
    with connect(given.write(tmp_path)) as connection:
        for token in range(1, len(pieces) - 1):
            (row,) = ask(connection, "context", [token]).to_pylist()
            assert row["text_before"] + row["token_text"] + row["text_after"] == f"a {text} z"
            assert row["token_text"].strip("�") in text
            assert "�" not in row["context"]
        assert "�" not in ask(connection, "top_tokens", [0]).column("context")[0].as_py()


def test_half_letters_at_the_edges_of_a_context_are_dropped(tmp_path):
    pieces = [*split_bytes("水"), b"x", *split_bytes("🐘")]
    given = Given(documents=[Document("bytes", "a", pieces)], values=[])
    assert answer(tmp_path, given, "context", 3, 2, 3)[0]["context"] == "«x»"


def test_bytes_that_are_no_text_show_as_replacement_characters(tmp_path):
    given = Given(documents=[Document("bytes", "a", [b"a\xff", b"\xc0b", b"\x80c"])], values=[])
    assert answer(tmp_path, given, "context", 1)[0]["context"] == "a�«�b»�c"


def test_arabic_and_chinese_read_as_written(tmp_path):
    given = Given(documents=[Document("k", "a", ["قال".encode(), " الرجل".encode(), "，你好".encode()])], values=[])
    assert answer(tmp_path, given, "context", 1)[0]["context"] == "قال« الرجل»，你好"


def test_the_marks_are_never_mistaken_for_quotation_marks_of_the_text(tmp_path):
    given = Given(documents=[Document("k", "a", ["«Oui»".encode(), b" dit"])], values=[(1, 0, 1.0)])
    assert answer(tmp_path, given, "top_tokens", 0)[0]["context"] == "‹Oui›« dit»"


def test_token_features_come_strongest_first(demo):
    assert demo("token_features", 7) == [
        {"feature_id": 0, "value": 2.0},
        {"feature_id": 2, "value": 1.5},
    ]


def test_search_token_finds_pieces_whatever_their_case_and_counts_them(tmp_path):
    documents = [*DOCUMENTS, Document("again", "novels", [b" love", b" love"])]
    rows = answer(tmp_path, Given(documents=documents), "search_token", "LOVE")
    assert [(row["piece"], row["n_tokens"], row["first_token_id"]) for row in rows] == [
        ("Love", 1, 5),
        (" love", 3, 7),
        (" loves", 1, 1),
    ]


def test_search_token_takes_its_text_literally(demo):
    assert demo("search_token", "%") == []
    assert column(demo("search_token", "."), "piece") == ["."]


def test_compare_sources_has_every_feature_once_with_rates_by_each_source_s_own_tokens(demo):
    rows = {row["feature_id"]: row for row in demo("compare_sources", "novels", "bible")}
    assert sorted(rows) == [0, 1, 2, 3]
    row = rows[0]
    assert (row["n_tokens_a"], row["n_tokens_b"]) == (2, 2)
    assert (row["rate_a"], row["rate_b"]) == (2 / 5, 2 / 3)
    assert row["rate_difference"] == pytest.approx(2 / 5 - 2 / 3)
    assert row["log2_ratio"] == pytest.approx(math.log2((2.5 / 6) / (2.5 / 4)))
    assert (row["mean_value_a"], row["mean_value_b"], row["mean_value_difference"]) == (1.75, 2.5, -0.75)
    assert rows[1]["mean_value_b"] is None
    assert math.isfinite(rows[1]["log2_ratio"])
    assert rows[3]["rate_a"] == rows[3]["rate_b"] == 0
    assert rows[3]["log2_ratio"] is None


def test_a_source_compared_with_itself_does_not_differ(demo):
    rows = demo("compare_sources", "bible", "bible")
    assert set(column(rows, "rate_difference")) == {0.0}


def test_a_source_that_is_not_there_has_no_rates(demo):
    assert set(column(demo("compare_sources", "novels", "nowhere"), "rate_b")) == {None}


def test_a_table_may_lie_in_several_files_of_a_folder(tmp_path):
    with connect(Given(in_folders=True, n_parts=2).write(tmp_path)) as connection:
        assert ask(connection, "tokens_where", [0]).column("token_id").to_pylist() == [0, 1, 5, 7]
        assert not any(rows.num_rows for _, rows in check(connection))


@pytest.mark.parametrize("n_parts", [1, 3])
def test_feature_summary_has_dead_features_too_and_sums_over_parts(tmp_path, n_parts):
    rows = answer(tmp_path, Given(n_parts=n_parts), "feature_summary")
    assert column(rows, "feature_id") == [0, 1, 2, 3]
    assert column(rows, "n_tokens") == [4, 1, 2, 0]
    assert column(rows, "density") == [0.5, 0.125, 0.25, 0.0]
    assert column(rows, "mean_value") == [2.125, 4.0, 1.0, None]
    assert column(rows, "max_value") == [3.0, 4.0, 1.5, None]
    assert rows[2]["std_value"] == pytest.approx(0.5)


def test_density_is_a_share_of_real_tokens_only(tmp_path):
    given = Given(documents=[Document("short", "a", [b"one"])], values=[(0, 0, 1.0)])
    assert answer(tmp_path, given, "feature_summary")[0]["density"] == 1.0


def test_tokens_leave_out_padding(tmp_path):
    given = Given(documents=[Document("short", "a", [b"one"])], values=[])
    assert column(answer(tmp_path, given, "tokens"), "piece") == ["one"]


def test_documents_show_all_metadata_whatever_its_name(tmp_path):
    metadata = {"order": pa.array([1, 2, 3]), "Ünï code": ["a", "b", "c"], "tags": [["x"], [], None]}
    rows = answer(tmp_path, Given(metadata=metadata), "documents")
    assert "title" not in rows[0]
    assert (rows[0]["order"], rows[0]["Ünï code"], rows[0]["tags"]) == (1, "a", ["x"])
    assert column(rows, "key") == ["emma", "psalm", "empty"]


def test_runs_show_their_size_and_quality_as_far_as_known(tmp_path):
    Given(name="old", fp="f0000000").write(tmp_path)
    quality = {"l0": 1.5, "variance_unexplained": 0.2, "loss_recovered_zero": 0.9, "other": [1]}
    rows = answer(tmp_path, Given(quality=quality), "runs")
    new, old = rows
    assert (new["name"], new["is_current"], new["site"], new["n_features"]) == ("demo", True, "layers.1", 4)
    assert (new["n_tokens"], new["l0"], new["variance_unexplained"]) == (8, 1.5, 0.2)
    assert (new["architecture"], new["k"]) == (None, None)  # there is no SAE
    assert '"other"' in new["quality"]
    assert (old["name"], old["is_current"], old["l0"], old["problem"]) == ("old", False, None, None)


@pytest.mark.parametrize(("architecture", "k"), [("topk", 7), ("relu", None)])
def test_runs_show_what_their_sae_is(tmp_path, architecture, k):
    store = Given().write(tmp_path)
    store.artefact("saes", "demo", "f0000001").begin({"sae": {"architecture": architecture, "k": 7}})
    with connect(store) as connection:
        (row,) = ask(connection, "runs").to_pylist()
    assert (row["architecture"], row["k"]) == (architecture, k)


def test_a_healthy_run_passes_every_check(tmp_path):
    with connect(Given(n_parts=2).write(tmp_path)) as connection:
        results = check(connection)
    assert [name for name, _ in results] == sorted(path.stem for path in (SQL / "checks").glob("*.sql"))
    assert [name for name, rows in results if rows.num_rows] == []


def test_a_run_without_any_value_passes_every_check(tmp_path):
    with connect(Given(values=[]).write(tmp_path)) as connection:
        assert [name for name, rows in check(connection) if rows.num_rows] == []


def faulty_tokens(**change: object) -> list[dict[str, object]]:
    rows = token_rows(Given().every_token())
    rows[1] |= change
    return rows


def faulty_stats(feature: int, **change: float) -> list[dict[str, float]]:
    rows = count_stats(VALUES)
    rows[feature] |= change
    return rows


CAUGHT = {
    "orders_agree": [
        ("a row lost", Given(feature_major=VALUES[1:]), "feature_id", [0]),
        ("a value changed", Given(feature_major=[(0, 0, 1.5), *VALUES[1:]]), "feature_id", [0]),
        ("a token changed", Given(feature_major=[(2, 0, 1.0), *VALUES[1:]]), "feature_id", [0]),
        ("a feature changed", Given(feature_major=[(0, 3, 1.0), *VALUES[1:]]), "feature_id", [0, 3]),
    ],
    "stats_agree": [
        ("a count", Given(stats=faulty_stats(0, n_tokens=5)), "feature_id", [0]),
        ("a sum", Given(stats=faulty_stats(1, sum_value=4.001)), "feature_id", [1]),
        ("a sum of squares", Given(stats=faulty_stats(2, sum_squares=0.0)), "feature_id", [2]),
        ("a maximum", Given(stats=faulty_stats(2, max_value=1.25)), "feature_id", [2]),
        ("not a number", Given(stats=faulty_stats(2, sum_value=math.nan)), "feature_id", [2]),
        ("a dead feature revived", Given(stats=faulty_stats(3, n_tokens=1)), "feature_id", [3]),
    ],
    "feature_tokens_exist": [
        ("beyond the corpus", Given(values=[*VALUES, (8, 1, 1.0)]), "token_id", [8]),
        ("padding", Given(documents=[Document("s", "a", [b"x"])], values=[(0, 0, 1.0), (2, 0, 1.0)]), "token_id", [2]),
    ],
    "values_positive_finite": [
        (str(value), Given(values=[*VALUES, (2, 3, value)]), "token_id", [2])
        for value in (0.0, -1.0, math.inf, -math.inf, math.nan)
    ],
    "every_feature_once": [
        ("missing", Given(stats=count_stats(VALUES)[:3]), "feature_id", [3]),
        ("twice", Given(stats=[*count_stats(VALUES), count_stats(VALUES)[1]]), "feature_id", [1]),
        ("outside", Given(stats=[*count_stats(VALUES), faulty_stats(3, feature_id=4)[3]]), "feature_id", [4]),
    ],
    "no_duplicates": [("twice", Given(values=[*VALUES, (3, 1, 1.0)]), "token_id", [3])],
    "tokens_known": [
        ("no document", Given(tokens=faulty_tokens(document_id=99)), "token_id", [1]),
        ("document unsaid", Given(tokens=faulty_tokens(document_id=None)), "token_id", [1]),
        ("no vocabulary entry", Given(tokens=faulty_tokens(vocab_id=99)), "token_id", [1]),
        ("there twice", Given(tokens=faulty_tokens(token_id=2)), "token_id", [2]),
    ],
    "documents_agree": [
        ("a token lost", Given(tokens=faulty_tokens(mask=False)), "document_id", [0]),
        ("a token of another", Given(tokens=faulty_tokens(document_id=1)), "document_id", [0, 1]),
    ],
}


@pytest.mark.parametrize(
    ("name", "given", "column_name", "expected"),
    [pytest.param(name, *case[1:], id=f"{name}: {case[0]}") for name, cases in CAUGHT.items() for case in cases],
)
def test_each_check_catches_its_violation(tmp_path, name, given, column_name, expected):
    with connect(given.write(tmp_path), threads=1) as connection:
        found = dict(check(connection))[name]
    assert found.column(column_name).to_pylist() == expected


def test_every_check_is_shown_to_catch_something():
    assert set(CAUGHT) == {path.stem for path in (SQL / "checks").glob("*.sql")}


@pytest.mark.parametrize("path", sorted(SQL.rglob("*.sql")), ids=lambda path: path.stem)
def test_every_file_says_its_grain_and_holds_what_it_is_named_after(path):
    text = path.read_text("utf-8")
    for label in ("Grain:", "Reads:", "Units:", "Ask it:"):
        assert f"-- {label}" in text
    assert max(map(len, text.splitlines())) <= 120
    if path.parent.name in ("staging", "marts"):
        assert len(re.findall(r"^create or replace (?:view|macro) (\w+)", text, re.MULTILINE)) == 1
        assert re.search(rf"^create or replace (?:view|macro) {path.stem}\b", text, re.MULTILINE)


def test_only_sources_names_files_and_each_layer_reads_the_one_before():
    for path in SQL.glob("*/*.sql"):
        text = re.sub(r"--.*", "", path.read_text("utf-8"))
        assert "read_" not in text
        if path.parent.name == "marts":
            assert "src_" not in text


def test_the_script_runs_by_hand_in_plain_duckdb(tmp_path):
    store = Given().write(tmp_path / "it's a $store")
    with duckdb.connect() as connection:
        connection.execute(queries.script(store))
        assert connection.execute("select count(*) from tokens_where(0, 0)").fetchone() == (4,)
        assert connection.execute("select context from top_tokens(0, 1)").fetchone() == ("«Love» thy love",)
