"""Every view, macro and check of sql/: given these rows, expected those."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from saeflow.query.ask import ask, query
from saeflow.query.catalog import (
    MANY_FILES,
    at_last,
    names_in,
    runs_read,
    script_of_run,
    sources,
    upon_sources,
    with_what_they_read,
)
from saeflow.query.connection import check, connect, open_duckdb
from saeflow.query.questions import questions
from saeflow.query.runs import Run, pick_run, runs
from saeflow.runtime.errors import UserError
from saeflow.store.records import Hidden
from tests.support import part_tables
from tests.support.small_store import DOCUMENTS, N_FEATURES, VALUES, Document, Given, count_stats, token_rows

SQL = Path(__file__).resolve().parents[2] / "sql"


def answer(root: Path, given: Given, question: str, *arguments: object) -> list[dict[str, object]]:
    with connect(given.write(root), threads=1, names=[question]) as connection:
        return ask(connection, question, arguments).to_pylist()


@pytest.fixture(scope="module")
def connected(tmp_path_factory) -> Iterator[duckdb.DuckDBPyConnection]:
    """The store that is given unchanged."""
    with connect(Given().write(tmp_path_factory.mktemp("demo")), threads=1) as connection:
        yield connection


@pytest.fixture(scope="module")
def demo(connected) -> Callable[..., list[dict[str, object]]]:
    return lambda question, *arguments: ask(connected, question, arguments).to_pylist()


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


OF_A_FEATURE = [
    "tokens_where", "top_tokens", "contexts", "top_documents", "feature_histogram", "feature_quantile_examples",
    "near_misses", "coactivation", "coactive_features", "similar_features", "feature_logits",
]  # fmt: skip


@pytest.mark.parametrize("feature", [3, 99, -1, 2**62, -(2**63)])
@pytest.mark.parametrize("question", OF_A_FEATURE)
def test_a_feature_that_never_fires_or_does_not_exist_has_no_rows(demo, question, feature):
    assert demo(question, feature) == []


@pytest.mark.parametrize("token", [-1, 8, 2**62, 2**63 - 1, -(2**63)])
def test_a_token_that_does_not_exist_has_no_context_and_no_features(demo, token):
    assert demo("context", token, 2**63 - 1, 2**63 - 1) == demo("token_features", token) == []


def test_windows_as_wide_as_numbers_go_show_the_whole_document(demo):
    assert demo("context", 6, 2**63 - 1, 2**63 - 1)[0]["context"] == "Love« thy» love"
    assert demo("contexts", 1, 1, 2**63 - 1, -(2**63))[0]["pieces"] == ["Emma", " loves", " no", " one"]


@pytest.mark.parametrize(
    "call",
    ["tokens_where(0, 'nan')", "tokens_where(0, null)", "tokens_where(null)", "tokens_where_all([0], ['nan'::double])",
     "tokens_where_all([0, null], [0, 0])"],
)  # fmt: skip
def test_a_threshold_that_is_no_number_or_null_has_no_tokens(connected, call):
    assert query(connected, f"from {call}").num_rows == 0


@pytest.mark.parametrize("lists", ["[0], [0, 1]", "[0, 1], [0]", "null, [0]", "[0], null", "[], []"])
@pytest.mark.parametrize("question", ["tokens_where_all({})", "tokens_where_within({}, 3)"])
def test_lists_that_do_not_fit_are_refused(connected, question, lists):
    with pytest.raises(UserError, match="lists of one length"):
        query(connected, f"from {question.format(lists)}")


def test_tokens_where_all_gives_the_tokens_at_which_every_feature_is_above_its_threshold(demo):
    rows = demo("tokens_where_all", [0, 2], [0, 0.5])
    assert rows == [
        {
            "token_id": 7,
            "feature_values": [2.0, 1.5],
            "piece": " love",
            "key": "psalm",
            "source": "bible",
            "position": 3,
        }
    ]
    assert demo("tokens_where_all", "0,2", "0,0")[0]["token_id"] == 1


@pytest.mark.parametrize(("window", "expected"), [(0, []), (1, []), (2, [([1, 3], 3)]), (9, [([1, 3], 3)]), (-1, [])])
def test_tokens_where_within_finds_features_at_most_so_many_tokens_apart_in_one_document(demo, window, expected):
    rows = demo("tokens_where_within", [0, 1], [0, 0], window)
    assert [(row["token_ids"], row["token_id"]) for row in rows] == expected


def test_top_documents_come_with_the_largest_sum_first(demo):
    first, second = demo("top_documents", 0)
    assert (first["key"], first["n_tokens"], first["rate"], first["sum_value"], first["max_value"]) == (
        "psalm", 2, 2 / 3, 5.0, 3.0,
    )  # fmt: skip
    assert (second["key"], second["sum_value"], second["top_token_id"]) == ("emma", 3.5, 1)
    assert column(demo("top_documents", 0, 1), "key") == ["psalm"]


def test_contexts_show_the_value_at_every_token_of_the_window(demo):
    row = demo("contexts", 2, 1, 2, 0)[0]
    assert (row["token_id"], row["value"], row["place"]) == (7, 1.5, 3)
    assert row["pieces"] == ["Love", " thy", " love"]
    assert row["feature_values"] == [0.0, 0.0, 1.5]


def test_contexts_give_a_letter_in_several_pieces_to_the_one_that_begins_it(tmp_path):
    pieces = [b"a ", *split_bytes("🐘"), b" z"]
    given = Given(documents=[Document("bytes", "a", pieces)], values=[(2, 0, 1.0)])
    with connect(given.write(tmp_path)) as connection:
        (whole,) = ask(connection, "contexts", [0]).to_pylist()
        (cut,) = ask(connection, "contexts", [0, 1, 0, 2]).to_pylist()
    assert whole["pieces"] == ["a ", "🐘", "", "", "", " z"]
    assert cut["pieces"] == ["", "", ""]


def test_feature_histogram_has_bins_of_a_quarter_octave(tmp_path):
    values = [(0, 0, 1.0), (1, 0, 1.2), (2, 0, 1.25), (3, 0, 2.0), (4, 0, 0.3)]
    rows = answer(tmp_path, Given(values=values, n_parts=2), "feature_histogram", 0)
    assert [(row["from_value"], row["to_value"], row["n_tokens"]) for row in rows] == [
        (0.25, 0.3125, 1),
        (1.0, 1.25, 2),
        (1.25, 1.5, 1),
        (2.0, 2.5, 1),
    ]
    assert column(rows, "share") == [0.2, 0.4, 0.2, 0.2]


def test_quantile_examples_come_from_bands_of_equal_counts_the_strongest_first(demo):
    rows = demo("feature_quantile_examples", 0, 2, 1)
    assert [(row["band"], row["n_tokens"], row["low_value"], row["high_value"]) for row in rows] == [
        (1, 2, 2.5, 3.0),
        (2, 2, 1.0, 2.0),
    ]
    assert column(demo("feature_quantile_examples", 0, 9, 9), "value") == [3.0, 2.5, 2.0, 1.0]
    with pytest.raises(UserError, match="at least 1"):
        demo("feature_quantile_examples", 0, 0)


def test_near_misses_are_where_the_commonest_entry_of_a_feature_leaves_it_silent(tmp_path):
    documents = [Document("k", "a", [b" love", b" it", b" love", b" me", b" love"])]
    rows = answer(
        tmp_path, Given(documents=documents, values=[(0, 1, 1.0), (2, 1, 2.0), (3, 1, 9.0)]), "near_misses", 1
    )
    assert [(row["context"], row["n_silent"], row["n_fired"]) for row in rows] == [(" love it love me« love»", 1, 2)]


def test_coactivation_counts_tokens_at_which_both_fire(demo):
    assert demo("coactivation", 0) == [
        {"other_id": 2, "n_both": 2, "n_feature": 4, "n_other": 2, "jaccard": 0.5, "pmi": 1.0}
    ]
    (stored,) = demo("coactive_features", 0)
    assert (stored["other_id"], stored["n_both"], stored["jaccard"], stored["pmi"]) == (2, 2, 0.5, 1.0)


def test_coactivation_with_a_shift_stays_in_the_sequence_and_the_document(demo):
    assert [(row["other_id"], row["n_both"]) for row in demo("coactivation", 0, 1)] == [(2, 1), (0, 1)]
    assert [(row["other_id"], row["n_both"]) for row in demo("coactivation", 0, -1)] == [(0, 1)]
    assert demo("coactivation", 1, 1) == []  # token 4 is in the next sequence
    assert demo("coactivation", 0, 2**63 - 1) == []


def test_features_on_a_text_come_with_their_lift(demo):
    (first, row) = demo("features_on", "LOVE")
    assert (row["feature_id"], row["n_tokens"], row["share"], row["density"], row["lift"]) == (0, 2, 1.0, 0.5, 2.0)
    assert (first["feature_id"], first["share"], first["lift"]) == (2, 0.5, 2.0)
    assert (first["strength"], first["score"]) == ((0 + 1.5) / 2 / 1.0, 1.5)
    assert row["strength"] == row["score"] == pytest.approx((3 + 2) / 2 / (8.5 / 4))


def test_a_feature_that_fires_everywhere_comes_last_for_a_text(tmp_path):
    values = [*((token, 0, 3.0) for token in range(8)), (1, 1, 2.0), (4, 1, 2.0), (1, 2, 0.5), (7, 2, 1.5)]
    rows = answer(tmp_path, Given(values=values), "features_on", "loves")
    assert [(row["feature_id"], row["score"]) for row in rows] == [(1, 2.0), (2, 1.0), (0, 0.0)]


@pytest.mark.parametrize("n", [1, 8, 9, 40, 300])
def test_a_text_of_any_length_is_found(tmp_path, n):
    pieces = [f" w{i}".encode() for i in range(n)]
    given = Given(documents=[Document("k", "a", [b"x", *pieces, b" x"])], values=[(n, 2, 1.0), (0, 3, 1.0)])
    (row,) = answer(tmp_path, given, "features_on", b"".join(pieces).decode().upper())
    assert (row["feature_id"], row["n_tokens"], row["share"]) == (2, 1, pytest.approx(1 / n))


def test_examples_of_a_band_are_drawn_from_all_of_it(tmp_path):
    values = [(token, 0, 1.0 + token % 97 / 128) for token in range(400)]
    documents = [Document("k", "a", [b"a"] * 400)]
    with connect(Given(documents=documents, values=values).write(tmp_path)) as connection:
        draws = [ask(connection, "feature_quantile_examples", [0, 4, 10, seed]).to_pylist() for seed in range(5)]
    for rows in draws:
        for band in range(1, 5):
            inside = [row for row in rows if row["band"] == band]
            places = [(row["value"] - row["low_value"]) / (row["high_value"] - row["low_value"]) for row in inside]
            assert 0.2 < sum(places) / 10 < 0.8
            assert max(places) - min(places) > 0.4
    assert len({tuple(column(rows, "token_id")) for rows in draws}) == 5


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("no one.", [2, 3, 4]), (" ONE ", [3]), ("love thy", [5, 6]), (". love", []), ("ove", []), ("%", []), ("", [])],
)
def test_a_text_is_spelt_by_tokens_that_follow_one_another_in_one_document(tmp_path, text, tokens):
    with connect(Given().write(tmp_path)) as connection:
        found = connection.execute("select token_id from demo.tokens_of_text(?) order by 1", [text]).fetchall()
    assert [token for (token,) in found] == tokens


def test_a_text_of_letters_in_several_pieces_is_found(tmp_path):
    given = Given(documents=[Document("k", "a", [b" \xe6", b"\xb0", b"\xb4x", b"\xb0"])], values=[(1, 0, 1.0)])
    (row,) = answer(tmp_path, given, "features_on", "水X")
    assert (row["n_tokens"], row["share"]) == (1, pytest.approx(1 / 3))


def test_source_contrast_compares_rates_of_stored_counts(demo):
    rows = {row["feature_id"]: row for row in demo("source_contrast", "novels", "bible")}
    assert sorted(rows) == [0, 1, 2, 3]
    exact = {row["feature_id"]: row for row in demo("compare_sources", "novels", "bible")}
    for feature, row in rows.items():
        for name in ("n_tokens_a", "n_tokens_b", "rate_a", "rate_b", "log2_ratio", "mean_value_a", "mean_value_b"):
            assert row[name] == exact[feature][name]
        h = 2 * math.asin(math.sqrt(row["rate_a"])) - 2 * math.asin(math.sqrt(row["rate_b"]))
        assert row["cohens_h"] == pytest.approx(h)
    assert set(column(demo("source_contrast", "novels", "nowhere"), "cohens_h")) == {None}


def test_position_profile_has_bands_that_double(demo):
    rows = demo("position_profile", 0)
    assert [(row["first_position"], row["last_position"], row["n_encoded"], row["n_tokens"]) for row in rows] == [
        (0, 0, 2, 1),
        (1, 1, 2, 2),
        (2, 3, 4, 1),
    ]
    assert column(rows, "mean_value") == [1.0, 2.75, 2.0]
    assert {row["n_tokens"] for row in demo("position_profile", 3)} == {0}
    assert demo("position_profile", 99) == demo("position_profile", -1) == []


def test_similar_features_and_logits_come_strongest_first(tmp_path):
    similar = [{"feature_id": 1, "other_id": other, "cosine": cosine} for other, cosine in ((2, 0.25), (0, 0.5))]
    logits = [{"feature_id": 1, "vocab_id": entry, "logit": logit} for entry, logit in ((0, -1.0), (3, 2.0))]
    with connect(Given(tables={"similar": similar, "logits": logits}).write(tmp_path)) as connection:
        rows = ask(connection, "similar_features", [1]).to_pylist()
        assert [(row["other_id"], row["cosine"], row["n_tokens"]) for row in rows] == [(0, 0.5, 4), (2, 0.25, 2)]
        rows = ask(connection, "feature_logits", [1]).to_pylist()
        vocab = Given().vocab
        assert [(row["piece"].encode(), row["logit"]) for row in rows] == [(vocab[3], 2.0), (vocab[0], -1.0)]


def test_labels_name_a_feature_our_own_first(tmp_path):
    folder = tmp_path / "store" / "labels" / "demo-f0000001"
    folder.mkdir(parents=True)
    (folder / "auto.csv").write_text("feature_id,label,score\n0,guess,0.9\n2,b,0.5\n2,a,0.1\n")
    (folder / "own.csv").write_text("feature_id,label\n0,love\n")
    with connect(Given().write(tmp_path / "store")) as connection:
        assert ask(connection, "feature_labels").column("label").to_pylist() == ["love", "guess", "b", "a"]
        assert ask(connection, "feature_summary").column("label").to_pylist() == ["love", None, "b", None]
        assert ask(connection, "coactive_features", [0]).column("label").to_pylist() == ["b"]
        assert [tuple(row.values()) for row in ask(connection, "labels_of_feature", [0]).to_pylist()] == [
            ("love", "own", None, None, None, True),
            ("guess", "auto", 0.9, None, None, False),
        ]
        assert [tuple(row.values()) for row in ask(connection, "labels_of_feature", [2]).to_pylist()] == [
            ("b", "auto", 0.5, None, None, True),
            ("a", "auto", 0.1, None, None, False),
        ]
        for feature in range(4):  # the first is the one that other questions call the feature by
            named = ask(connection, "labels_of_feature", [feature]).column("label").to_pylist()[:1]
            summary = query(connection, "from feature_names where feature_id = ?", [feature])
            assert named == summary.column("label").to_pylist()


def test_chosen_tokens_stand_in_their_text_once_and_in_corpus_order(demo):
    rows = demo("tokens_in_text", [7, 1, 7, 99], 1, 2)
    assert rows == [
        {"token_id": 1, "place": 2, "pieces": ["Emma", " loves", " no", " one"], "key": "emma", "source": "novels",
         "position": 1},
        {"token_id": 7, "place": 2, "pieces": [" thy", " love"], "key": "psalm", "source": "bible", "position": 3},
    ]  # fmt: skip


def test_each_kind_of_feature_is_told_by_where_it_fires(tmp_path):
    documents = [Document("k", "a", [b"x", b"y", b"z", b"y", b"x", b"w", b"z", b"y"] * 150)]
    values = [
        *((token, 0, 1.0) for token in range(9)),
        *((token, 1, 1.0) for token in range(600)),
        *((token, 2, 1.0) for token in range(2, 160, 4)),
        *((token, 3, 1.0) for token in range(1, 160, 4)),
        *((token, 4, 1.0) for token in range(40)),
    ]
    rows = answer(tmp_path, Given(documents=documents, values=values), "feature_kind")
    assert column(rows, "kind") == ["rare", "dense", "single-token", "position", "other"]
    assert rows[2]["vocab_share"] == rows[3]["band_share"] == 1.0
    assert answer(tmp_path / "b", Given(), "feature_kind")[3]["kind"] == "dead"


def test_compare_runs_finds_the_feature_that_fires_on_the_same_tokens(tmp_path):
    other = [(token, {0: 3, 1: 0, 2: 1}[feature], value) for token, feature, value in VALUES if token != 5]
    Given(name="old", fp="f0000000", values=other, corpus=("demo", "f0000001")).write(tmp_path)
    with connect(Given().write(tmp_path)) as connection:
        rows = {row["feature_id"]: row for row in ask(connection, "compare_runs", ["demo", "old", 1]).to_pylist()}
        rare = ask(connection, "compare_runs", ["demo", "old"]).to_pylist()
        with pytest.raises(UserError, match="schema names"):
            ask(connection, "compare_runs", ["demo", "nowhere"])
    assert {feature: (row["match_id"], row["jaccard"]) for feature, row in rows.items()} == {
        0: (3, 0.75), 1: (0, 1.0), 2: (1, 1.0), 3: (None, None),
    }  # fmt: skip
    assert set(column(rare, "match_id")) == {None}  # fewer than ten tokens are no evidence
    assert (rows[0]["rate_a"], rows[0]["rate_b"], rows[0]["rate_difference"]) == (0.5, 0.375, 0.125)


def test_runs_on_the_same_tokens_are_listed_and_this_one_is_marked(tmp_path):
    Given(name="other", fp="f0000000", corpus=("text", "f0000009"), quality={"l0": 3.0}).write(tmp_path)
    Given(name="elsewhere", fp="f0000002").write(tmp_path)
    with connect(Given(corpus=("text", "f0000009"), quality={"l0": 1.5}).write(tmp_path), "demo") as connection:
        rows = ask(connection, "runs_on_same_tokens").to_pylist()
    assert [(row["schema_name"], row["is_current"], row["l0"]) for row in rows] == [
        ("demo", True, 1.5),
        ("other", False, 3.0),
    ]


def test_the_last_bin_of_cosines_holds_one(tmp_path):
    similar = [{"feature_id": f, "other_id": 9, "cosine": c} for f, c in enumerate([1.0, 0.97, -0.02, -1.0])]
    rows = answer(tmp_path, Given(tables={"similar": similar}), "decoder_cosines")
    assert [(row["from_cosine"], row["to_cosine"], row["n_features"]) for row in rows] == [
        (-1.0, -0.95, 1),
        (-0.05, 0.0, 1),
        (0.95, 1.0, 2),
    ]


def test_runs_of_different_tokens_are_not_compared(tmp_path):
    Given(name="old", fp="f0000000").write(tmp_path)
    with connect(Given().write(tmp_path)) as connection, pytest.raises(UserError, match="runs of different tokens"):
        ask(connection, "compare_runs", ["demo", "old"])


def test_a_run_of_an_earlier_saeflow_answers_what_its_values_answer(tmp_path):
    with connect(Given(is_early=True).write(tmp_path)) as connection:
        assert ask(connection, "top_tokens", [0, 1]).column("context").to_pylist() == ["«Love» thy love"]
        assert ask(connection, "coactivation", [0]).num_rows == 1
        for question in ("feature_histogram", "coactive_features"):
            assert ask(connection, question, [0]).num_rows == 0
        for question, arguments in (("position_profile", [0]), ("source_contrast", ["novels", "bible"])):
            with pytest.raises(UserError, match="saeflow compact counts it"):
                ask(connection, question, arguments)
        assert not any(rows.num_rows for _, rows in check(connection))


def test_where_one_part_of_two_is_of_an_earlier_saeflow_rates_are_shares_of_every_token(tmp_path):
    answers = []
    for name, early in (("whole", []), ("mixed", [0])):
        with connect(Given(n_parts=2, early_parts=early).write(tmp_path / name)) as connection:
            summary = ask(connection, "feature_summary").column("density").to_pylist()
            kind = ask(connection, "feature_kind").column("density").to_pylist()
            on = ask(connection, "features_on", ["love"]).column("lift").to_pylist()
            answers.append((summary, kind, on, ask(connection, "coactivation", [0]).column("pmi").to_pylist()))
            if early:
                for question, arguments in (("position_profile", [0]), ("source_contrast", ["novels", "bible"])):
                    with pytest.raises(UserError, match="saeflow compact counts it"):
                        ask(connection, question, arguments)
    assert answers[0] == answers[1]


TWO_PARTS = [Document("first", "a", [b"x", b"y", b"x", b"y"]), Document("second", "a", [b"x", b"x", b"y", b"z"])]
"""A sequence each."""

COUNTED = [
    ("feature_summary", []),
    ("feature_kind", []),
    ("near_misses", [0]),
    ("features_on", ["x"]),
    ("compare_sources", ["a", "a"]),
    ("source_contrast", ["a", "a"]),
    ("coactivation", [0]),
    ("position_profile", [0]),
    ("tokens_where", [0]),
]


def test_tokens_that_are_not_encoded_yet_change_no_answer(tmp_path):
    values = [(0, 0, 1.0), (1, 1, 2.0)]
    before = Given(documents=TWO_PARTS[:1], values=values).write(tmp_path / "before")
    during = Given(documents=TWO_PARTS, values=values, n_parts=2, n_token_parts=2).write(tmp_path / "during")
    features = during.artefact("features", "demo", "f0000001")
    features.publish([part for part in features.parts().values() if part.index == 0])
    with connect(before) as one, connect(during) as other:
        assert ask(other, "tokens").num_rows == 8
        for question, arguments in COUNTED:
            expected, found = (ask(each, question, arguments).to_pylist() for each in (one, other))
            assert found == expected, question
        assert ask(one, "near_misses", [0]).column("n_silent").to_pylist() == [1]


def test_values_that_are_not_to_be_seen_are_no_misses(tmp_path):
    store = Given(documents=TWO_PARTS, values=[(0, 0, 1.0), (4, 0, 1.0)], n_parts=2, n_token_parts=2).write(tmp_path)
    tokens = store.artefact("tokens", "demo", "f0000001")
    gone = {1: (Hidden(document_id=77, key_hash="77", reason="replaced"),)}
    tokens.publish(tokens.published().parts, hidden=gone)
    with connect(store) as connection:
        assert ask(connection, "tokens_where", [0]).column("token_id").to_pylist() == [0]
        assert ask(connection, "near_misses", [0]).column("token_id").to_pylist() == [2]


@pytest.mark.parametrize(
    "left_out",
    [
        {"skipped": [0, 2]},
        {"skipped": [1]},
        {"skips_special": [b"<s>"]},
        {"long": [1, 6]},
        {"long": [3], "skipped": [1]},
    ],
)
def test_what_a_setting_leaves_out_is_no_miss_and_no_part_of_a_share(tmp_path, left_out):
    documents = [Document("k", "a", [b"<s>", b"x", b"x", b"x"] * 3), Document("l", "b", [b"x", b"x", b"<s>", b"x"])]
    given = Given(documents=documents, values=[], **left_out)
    pieces = {token.token_id: given.vocab[token.vocab_id] for token in given.every_token()}
    usable = [
        token
        for token, piece in pieces.items()
        if token % 4 not in given.skipped and piece not in given.skips_special and token not in given.long
    ]
    x = [token for token in usable if pieces[token] == b"x"]
    values = [(token, 0, 1.0) for token in x[::2]] + [(token, 1, 1.0) for token in usable]
    with connect(Given(documents=documents, values=values, **left_out).write(tmp_path)) as connection:
        assert not any(rows.num_rows for _, rows in check(connection))
        assert ask(connection, "near_misses", [0]).column("token_id").to_pylist() == x[1::2]
        (row, _) = sorted(ask(connection, "features_on", ["x"]).to_pylist(), key=lambda row: row["feature_id"])
        assert row["share"] == len(x[::2]) / len(x)
        assert row["lift"] == pytest.approx(row["share"] * len(usable) / len(x[::2]))
        assert ask(connection, "feature_summary").column("density").to_pylist()[1] == 1.0
        rates = ask(connection, "compare_sources", ["a", "b"]).to_pylist()
        assert [(row["rate_a"], row["rate_b"]) for row in rates if row["feature_id"] == 1] == [(1.0, 1.0)]
        every = query(connection, "select token_id from stg_tokens_encoded order by token_id").column("token_id")
        assert every.to_pylist() == usable


def test_what_is_left_out_is_counted_by_the_first_reason_and_by_entry(tmp_path):
    documents = [Document("k", "a", [b"<s>", b".", b"x", b"."]), Document("l", "b", [b".", b"x", b"<s>", b"."])]
    given = Given(documents=documents, values=[(2, 0, 1.0)], skipped=[0], skips_special=[b"<s>"], long=[3, 7, 1])
    rows = answer(tmp_path, given, "left_out")
    found = [(row["reason"], row["piece"], row["n_tokens"], row["max_length"]) for row in rows]
    assert found == [
        ("length", ".", 3, 107.0), ("position", ".", 1, None), ("position", "<s>", 1, None), ("special", "<s>", 1, None)
    ]  # fmt: skip
    assert answer(tmp_path / "other", Given(), "left_out") == []


def test_a_source_that_was_not_counted_apart_is_an_error_that_names_the_question_to_ask(tmp_path):
    documents = [Document(f"d{i}", f"s{i:02d}", [b"x"] * (2 if i < 66 else 1)) for i in range(70)]
    given = Given(documents=documents, values=[(i, 0, 1.0) for i in range(136)])
    with connect(given.write(tmp_path), threads=1) as connection:
        assert ask(connection, "source_contrast", ["s00", "s01"]).to_pylist()[0]["rate_a"] == 1.0
        with pytest.raises(UserError, match="ask compare_sources"):
            ask(connection, "source_contrast", ["s69", "s00"])
        assert ask(connection, "compare_sources", ["s69", "s00"]).to_pylist()[0]["rate_a"] == 1.0


@pytest.mark.parametrize(
    "question", ["tokens_where(2)", "tokens_where_all([2], [0.0])", "tokens_where_within([2], [0.0], 3)"]
)
def test_a_question_about_one_feature_opens_only_the_file_that_may_hold_it(tmp_path, question):
    with connect(Given(n_buckets=4).write(tmp_path)) as connection:
        assert ask(connection, "tokens_where", [0]).column("token_id").to_pylist() == [0, 1, 5, 7]
        plan = query(connection, f"explain analyze from {question}").column(1)[0].as_py()
        assert not any(rows.num_rows for _, rows in check(connection))
    assert "Scanning Files: 1/4" in plan


def test_a_forgotten_document_is_nowhere(tmp_path):
    values = [row for row in VALUES if row[0] >= 5]
    with connect(Given(hidden=[0], values=values).write(tmp_path)) as connection:
        assert ask(connection, "context", [1]).num_rows == 0
        assert ask(connection, "features_on", ["no"]).num_rows == 0
        assert ask(connection, "feature_summary").column("density").to_pylist()[0] == 2 / 3
        assert not any(rows.num_rows for _, rows in check(connection))


@pytest.mark.parametrize("given", [Given(), Given(n_token_parts=2, n_parts=2), Given(is_early=True)])
def test_every_view_hides_a_forgotten_document_at_once_also_those_of_the_files(tmp_path, given):
    padding = 3 if given.n_token_parts > 1 else 0  # the first part ends where a sequence ends
    given.hidden, given.values = [0], [(token + padding, *rest) for token, *rest in VALUES if token >= 5]
    with connect(given.write(tmp_path)) as connection:
        views = query(connection, "select table_name from information_schema.tables where table_schema = 'demo'")
        for name in views.column(0).to_pylist():
            rows = query(connection, f"from {name}").to_pylist()
            assert not any(row.get("key") == "emma" for row in rows), name
            if name != "src_hidden":
                assert not any(row.get("document_id") == 0 for row in rows), name
        shown = query(connection, "select token_id, vocab_id, mask from src_tokens order by token_id").to_pylist()
        assert [row["token_id"] for row in shown] == list(range(len(shown))), "no number changes"
        assert [(row["vocab_id"], row["mask"]) for row in shown[:5]] == [(0, False)] * 5
        blocks = query(connection, "from src_vocab_blocks order by block_id").to_pylist()
        ids = b"".join(block["vocab_ids"] for block in blocks)
        assert [int.from_bytes(ids[i : i + 4], "big") for i in range(0, len(ids), 4)][:5] == [0] * 5
        starts = query(connection, "select first_token_id from src_documents where first_token_id is not null")
        assert ask(connection, "context", starts.column(0).to_pylist()).num_rows == 1
        assert not any(rows.num_rows for _, rows in check(connection))


def test_contexts_are_right_where_blocks_and_parts_end(tmp_path):
    documents = [Document(f"d{i}", "a", [b"%d," % (7 * i + j) for j in range(n)]) for i, n in enumerate((601, 3, 1100))]
    given = Given(documents=documents, n_token_parts=2, values=[])
    places = [t for t in given.every_token() if t.document_id is not None and t.token_id % 512 in (0, 1, 90, 511)]
    with connect(given.write(tmp_path)) as connection:
        assert not any(rows.num_rows for _, rows in check(connection))
        for token in places:
            (row,) = ask(connection, "context", [token.token_id, 2, 2]).to_pylist()
            assert row["token_text"].encode() == given.vocab[token.vocab_id]


def test_tokens_where_reads_only_the_row_groups_of_its_feature(tmp_path):
    values = [(token, feature, 1.0) for feature in range(4) for token in range(500)]
    documents = [Document("long", "a", [b"x"] * 500)]
    with connect(Given(documents=documents, values=values, row_group_size=100).write(tmp_path)) as connection:
        plan = query(connection, "explain analyze from tokens_where(2)").column(1)[0].as_py()
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


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2), (-5, -5)])
def test_a_letter_in_several_pieces_is_whole_however_narrow_the_window(tmp_path, before, after):
    pieces = [b"a", *split_bytes("🐘"), b"b", *split_bytes("é"), b"z"]
    with connect(Given(documents=[Document("bytes", "s", pieces)], values=[]).write(tmp_path)) as connection:
        rows = [ask(connection, "context", [token, before, after]).to_pylist()[0] for token in range(len(pieces))]
    assert column(rows, "token_text") == ["a", *"🐘🐘🐘🐘", "b", *"éé", "z"]
    assert rows[1]["text_before"] == ("a" if before > 0 else "")
    assert rows[4]["text_after"] == ("b" if after > 0 else "")
    assert rows[2]["text_before"] == ("a" if before > 1 else "")
    assert "�" not in "".join(column(rows, "context"))


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
    assert column(rows, "std_value") == [pytest.approx(math.sqrt(0.546875)), 0.0, pytest.approx(0.5), None]


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


NAMES_OF_COLUMNS = [
    ["position", "mask", "token_id", "vocab_id", "piece", "value", "feature_id", "feature", "text", "a"],
    ["written", "Position", "end_token_id", "band", "n_real", "filename", "Source", "Key", "N_Tokens"],
    ["First_Token_Id"],
]  # fmt: skip


@pytest.mark.parametrize("names", NAMES_OF_COLUMNS, ids=lambda names: names[0])
def test_metadata_may_be_called_as_any_column_is(tmp_path, names):
    metadata = {name: pa.array(["1", "2", "3"]) for name in names}
    with connect(Given(metadata=metadata).write(tmp_path), threads=1) as connection:
        assert not any(rows.num_rows for _, rows in check(connection))
        assert len(ask(connection, "documents")) == 3
        assert sorted(ask(connection, "tokens").column("source").to_pylist()) == ["bible"] * 3 + ["novels"] * 5
        for question, arguments in (("compare_sources", ["novels", "bible"]), ("tokens_where", [0])):
            assert len(ask(connection, question, arguments)) == 4
        assert len(ask(connection, "context", [1])) == len(ask(connection, "top_documents", [0])) - 1 == 1


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
    store.artefact("saes", "demo", "f0000001").create({"sae": {"architecture": architecture, "k": 7}})
    with connect(store) as connection:
        (row,) = ask(connection, "runs").to_pylist()
    assert (row["architecture"], row["k"]) == (architecture, k)


@pytest.mark.parametrize(
    ("architecture", "l0", "missed"),
    [
        ("jumprelu", 100, None),
        ("jumprelu", 104.9, None),
        ("jumprelu", 95.1, None),
        ("jumprelu", 131, "31% above k"),
        ("jumprelu", 60, "40% below k"),
        ("batchtopk", 94, "6% below k"),
        ("relu", 400, None),
    ],
)
def test_runs_say_if_l0_is_more_than_a_twentieth_off_k(tmp_path, architecture, l0, missed):
    store = Given(quality={"l0": l0}).write(tmp_path)
    store.artefact("saes", "demo", "f0000001").create({"sae": {"architecture": architecture, "k": 100}})
    with connect(store) as connection:
        (row,) = ask(connection, "runs").to_pylist()
    assert row["l0_missed"] == missed


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


def faulty(table: str, row: int, **change: object) -> Given:
    """One row of a table of the part, written wrongly; `drop` takes it out."""
    given = Given()
    rows = part_tables.part_tables(VALUES, given.every_token(), N_FEATURES)[table]
    if change == {"drop": True}:
        del rows[row]
    else:
        rows[row] |= change
    return Given(tables={table: rows})


def faulty_blocks(**change: object) -> Given:
    (block,) = part_tables.blocks(Given().every_token())
    return Given(vocab_blocks=[block | change])


def misnamed(order: str, file: int, low: int, high: int) -> Given:
    """One of the files (features 0 and 1, 2 and 3; all tokens) says that it may hold something else."""
    return Given(n_buckets=2, names={(order, file): (low, high)})


GOOD_BLOCK = part_tables.blocks(Given().every_token())[0]["vocab_ids"]

IN_SAMPLE = [{"feature_id": 0, "token_id": 1, "value": 1.0}]
SAMPLED = [{"document_id": 0, "first_token_id": 0, "n_tokens": 2}]


def sampled(**tables: list[dict[str, object]]) -> Given:
    """A document that is in the sample, because of its key, and one that is not."""
    documents = [Document("text 51", "a", [b"x", b"y"]), Document("text 52", "a", [b"x", b"y"])]
    return Given(documents=documents, values=[(1, 0, 1.0), (2, 0, 1.0)], tables=tables)


CAUGHT = {
    "sample_agrees": [
        ("a value lost", sampled(sample=[]), "document_id", [0]),
        ("a value changed", sampled(sample=[IN_SAMPLE[0] | {"value": 2.0}]), "document_id", [0]),
        ("a value of another", sampled(sample=[*IN_SAMPLE, IN_SAMPLE[0] | {"token_id": 2}]), "document_id", [None]),
        ("the document lost", sampled(sample_documents=[]), "document_id", [0]),
        ("too many tokens", sampled(sample_documents=[SAMPLED[0] | {"n_tokens": 3}]), "document_id", [0]),
        ("another document", sampled(sample_documents=[*SAMPLED, SAMPLED[0] | {"document_id": 1}]), "document_id", [1]),
        ("another place", sampled(sample_documents=[SAMPLED[0] | {"first_token_id": 1}]), "document_id", [0]),
    ],
    "histogram_agrees": [
        ("a count", faulty("feature_histogram", 0, n_tokens=9), "feature_id", [0]),
        ("a bin lost", faulty("feature_histogram", 0, drop=True), "feature_id", [0]),
        ("a bin wrong", faulty("feature_histogram", 0, bin=77), "bin", [0, 77]),
    ],
    "positions_agree": [
        ("a count", faulty("feature_positions", 0, n_tokens=9), "feature_id", [0]),
        ("a sum", faulty("feature_positions", 0, sum_value=1.0 + 1e-9), "feature_id", [0]),
        ("a band lost", faulty("feature_positions", 0, drop=True), "feature_id", [0]),
    ],
    "sources_agree": [
        ("a count", faulty("feature_sources", 0, n_tokens=9), "feature_id", [0, 0]),
        ("a sum", faulty("feature_sources", 0, sum_value=3.5 + 1e-9), "feature_id", [0, 0]),
        ("a source", faulty("feature_sources", 0, source="letters"), "source", ["letters", "novels"]),
    ],
    "encoded_agree": [
        ("too many", faulty("encoded_tokens", 0, n_tokens=9), "source", ["novels", None]),
        ("fewer than fire", faulty("encoded_tokens", 1, n_tokens=0), "source", [None]),
    ],
    "left_out_silent": [
        ("one fires", Given(long=[1, 2]), "token_id", [1]),
        ("there is none", Given(long=[99]), "token_id", [99]),
    ],
    "coactivation_agrees": [
        ("too many", faulty("coactivation", 0, n_both=3), "other_id", [2]),
        ("too few", faulty("coactivation", 0, n_both=1), "other_id", [2]),
        ("another", faulty("coactivation", 0, other_id=3), "other_id", [3]),
    ],
    "buckets_cover": [
        ("overlap", misnamed("feature_major", 1, 1, 3), "feature_id", [1]),
        ("a gap", misnamed("feature_major", 0, 1, 1), "feature_id", [0]),
    ],
    "files_as_named": [
        ("a feature outside", misnamed("feature_major", 0, 1, 1), "n_outside", [4]),
        ("a token outside", misnamed("token_major", 0, 1, 5), "n_outside", [3]),
    ],
    "blocks_agree": [
        ("an entry", faulty_blocks(vocab_ids=b"\0\0\0\x63" + GOOD_BLOCK[4:]), "token_id", [0]),
        ("short", faulty_blocks(vocab_ids=GOOD_BLOCK[:-4]), "token_id", list(range(8))),
        ("shifted", faulty_blocks(first_token_id=1), "token_id", list(range(9))),
        ("another block", faulty_blocks(block_id=1), "token_id", list(range(8))),
        ("lost", Given(vocab_blocks=[]), "token_id", list(range(8))),
    ],
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
    text = (SQL / "checks" / f"{name}.sql").read_text("utf-8")
    with connect(given.write(tmp_path), threads=1, names=names_in([text])) as connection:
        found = connection.sql(text).to_arrow_table()
    assert found.column(column_name).to_pylist() == expected


def test_every_check_is_shown_to_catch_something():
    assert set(CAUGHT) == {path.stem for path in (SQL / "checks").glob("*.sql")}


@pytest.mark.parametrize("path", sorted(SQL.rglob("*.sql")), ids=lambda path: path.stem)
def test_every_file_says_its_grain_and_holds_what_it_is_named_after(path):
    text = path.read_text("utf-8")
    for label in ("Grain:", "Reads:", "Units:", "Ask it:"):
        assert f"-- {label}" in text
    assert max(map(len, text.splitlines())) <= 120
    if path.parent.name in ("functions", "staging", "marts"):
        assert len(re.findall(r"^create or replace (?:view|macro) (\w+)", text, re.MULTILINE)) == 1
        assert re.search(rf"^create or replace (?:view|macro) {path.stem}\b", text, re.MULTILINE)


@pytest.mark.parametrize("of_so_many", [10, pytest.param(1, marks=pytest.mark.long)])
def test_every_example_in_a_header_runs_also_where_only_what_it_reads_is_made(tmp_path, of_so_many):
    Given(name="small", fp="f0000000", corpus=("large", "f0000001")).write(tmp_path)
    store = Given(name="large").write(tmp_path)
    every = runs(store)
    current = pick_run(store, every, "large")
    with connect(store, threads=1) as connection, open_duckdb(store, threads=1) as alone:
        for statement in sources(every, every, MANY_FILES):
            alone.execute(statement)
        for question in questions()[::of_so_many]:
            found = re.search(r"\?  (from .*)$", question.example)
            assert bool(found) == question.is_macro, question.name
            asked = found[1] if found else f"from {question.name}"
            with pytest.raises(UserError, match="runs the model") if question.runs_model else nullcontext():
                whole = query(connection, asked)
                with made_for_a_moment(alone, every, current, question.name):
                    assert query(alone, asked).equals(whole), question.name


@contextmanager
def made_for_a_moment(
    connection: duckdb.DuckDBPyConnection, every: list[Run], current: Run, name: str
) -> Iterator[None]:
    """What a connection for this one name makes upon the views of files, until the block ends."""
    names = with_what_they_read([name])
    read = runs_read(every, current, names)
    connection.execute("begin")
    for statement in (*upon_sources(read, names), *at_last(every, current, read, MANY_FILES, names)):
        connection.execute(statement)
    yield
    connection.execute("rollback")


def test_only_sources_names_files_and_each_layer_reads_the_one_before():
    for path in SQL.glob("*/*.sql"):
        text = re.sub(r"--.*", "", path.read_text("utf-8"))
        assert "read_" not in text
        if path.parent.name == "marts":
            assert "src_" not in text


def test_the_script_runs_by_hand_in_plain_duckdb(tmp_path):
    store = Given().write(tmp_path / "it's a $store")
    with duckdb.connect() as connection:
        connection.execute(script_of_run(store))
        assert connection.execute("select count(*) from tokens_where(0, 0)").fetchone() == (4,)
        assert connection.execute("select context from top_tokens(0, 1)").fetchone() == ("«Love» thy love",)


def test_copies_are_found_also_in_parts_that_share_a_block_of_tokens(tmp_path):
    pieces = [b"no", b" one", b" loves", b" no", b" one", b"."]
    documents = [Document("first", "s", pieces), Document("other", "t", [b"x"]), Document("copy", "s", pieces)]
    store = Given(documents=documents, values=[(0, 0, 1.0)], n_parts=3, n_token_parts=2).write(tmp_path)
    with connect(store, names=["token_windows", "stg_tokens"]) as connection:
        windows = "from token_windows((select list(token_id) from stg_tokens where mask), 2, 2)"
        rows = query(
            connection, f"select list(token_id order by token_id) as ids {windows} group by text_key order by ids"
        )
    assert sorted(len(row["ids"]) for row in rows.to_pylist()) == [1, 2, 2, 2, 2, 2, 2]
