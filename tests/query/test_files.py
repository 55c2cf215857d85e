"""Which files a question reads, and what it looks up without SQL: never another answer than by reading them all."""

from __future__ import annotations

import itertools
import re
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import duckdb
import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.corpus.token_parts import VOCAB_IDS
from saeflow.query import connection as connections
from saeflow.query.ask import ask, query
from saeflow.query.catalog import OF_EVERY_RUN, sql_folder
from saeflow.query.connection import connect_to_run
from saeflow.query.files import far_ids
from saeflow.query.files.chosen import FEATURE_PARAMETERS, TOKEN, FileRanges, list_all, only_files_for
from saeflow.query.files.far_ids import FarIds
from saeflow.query.files.looked_up import looking_up
from saeflow.query.files.slices import SLICE_TOKENS, slices
from saeflow.query.files.token_index import Documents, TokenIndex, VocabIdFile
from saeflow.query.questions import questions
from saeflow.query.runs import runs
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.support.small_store import VALUES, Document, Given

ABOUT = {
    "feature": 2, "other": 0, "features": [0, 2], "thresholds": [0.0, 0.0], "token": 7, "distance": 3, "low": 0.1,
    "high": 9.0, "source": "bible",
}  # fmt: skip
"""Arguments of questions that must be given."""

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lists in variables": {},
    "blocks alone": {"has_vocab_ids": False},
    "hidden": {"hidden": [0]},
    "several parts": {"n_parts": 2, "n_token_parts": 2},
    "slices": {"n_parts": 2, "n_token_parts": 2, "names": {("token_major", 0): (0, SLICE_TOKENS)}},
}
"""Ways in which a connection reads a run's files."""


@pytest.fixture(params=WAYS)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Four files of features in each part."""
    if request.param == "lists in variables":
        monkeypatch.setattr(connections, "MANY_FILES", 0)
    return Given(n_buckets=4, **WAYS[request.param]).write(tmp_path / "store")


def asked() -> dict[str, dict[str, object]]:
    """The questions about features, or a token, of one run, with arguments."""
    found = {}
    for question in questions():
        needed = [each.name for each in question.parameters if each.default is None]
        names = {each.name for each in question.parameters}
        if names & {*FEATURE_PARAMETERS, TOKEN} and {*needed} <= ABOUT.keys() and question.name not in OF_EVERY_RUN:
            found[question.name] = {name: ABOUT[name] for name in needed}
    return found


def test_tokens_come_in_the_order_of_the_corpus_from_many_groups_of_rows_and_threads(tmp_path: Path) -> None:
    _made_run.make(Store.create(tmp_path), 1 << 21, part_tokens=[1 << 14, 3 << 14], n_features=64)
    run, connection = connect_to_run(Store(tmp_path), threads=4, names=["tokens_where", "stg_feature_stats"])
    with closing(connection):
        [feature, n_tokens] = query(
            connection, "select feature_id, n_tokens from stg_feature_stats order by n_tokens desc limit 1"
        ).to_pylist()[0].values()  # fmt: skip
        found = ask(connection, "tokens_where", {"feature": feature, "threshold": 0.0}, run=run)
    tokens = found["token_id"].to_numpy()
    assert len(tokens) == n_tokens > 20_000
    assert (np.diff(tokens) > 0).all()


@pytest.mark.long
def test_a_question_that_looks_only_at_its_files_answers_as_one_that_looks_at_all(store: Store) -> None:
    run, connection = connect_to_run(store, many_files=connections.MANY_FILES)
    assert len(asked()) > 20
    with closing(connection):
        for name, values in asked().items():
            few, every = (ask(connection, name, values, run=each).to_pylist() for each in (run, None))
            assert few == every, name


def test_what_is_looked_up_is_what_the_tables_say(store: Store) -> None:
    _, connection = connect_to_run(store, many_files=connections.MANY_FILES)
    with closing(connection):
        ask_all = partial(rows, connection)
        looked_up = dict(ask_all("select token_id, vocab_id_of(token_id) from range(-3, 40) as t(token_id)"))
        assert looked_up == dict.fromkeys(range(-3, 40)) | dict(ask_all("select token_id, vocab_id from src_tokens"))
        assert ask_all("select token_id, document_id from token_owners(range(-3, 40)) order by all") == ask_all(
            "select token_id, document_id from stg_tokens where mask order by all"
        )


def rows(connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, object] | None = None) -> list[Any]:
    return connection.execute(sql, parameters or None).fetchall()


def test_a_cursor_reads_the_lists_that_its_connection_keeps(tmp_path: Path) -> None:
    store = Given(n_buckets=4).write(tmp_path / "store")
    run, connection = connect_to_run(store, many_files=0)
    with closing(connection), closing(connection.cursor()) as cursor:
        list_all(cursor)
        assert rows(cursor, f"select count(*) from {run.schema}.stg_feature_major") == [(7,)]


def test_only_the_files_of_a_feature_are_opened(tmp_path: Path) -> None:
    """The other files are gone, so that to look at one would be an error."""
    store = Given(n_buckets=4).write(tmp_path / "store")
    run, connection = connect_to_run(store)
    with closing(connection):
        kept = run.value_files["feature_major"].holding([2])
        for path in {*run.files["feature_major"]} - {*kept}:
            Path(path).unlink()
        assert ask(connection, "tokens_where", [2], run=run).column("token_id").to_pylist() == [1, 7]
        with pytest.raises(Exception, match=r"No such file|Cannot access file"):
            ask(connection, "tokens_where", [2])


def test_after_a_question_all_files_are_read_again_even_if_it_fails(tmp_path: Path) -> None:
    run, connection = connect_to_run(Given(n_buckets=4).write(tmp_path / "store"))
    count = "select count(*) from stg_feature_major"
    with closing(connection):
        with suppress(ZeroDivisionError), only_files_for(connection, run.value_files, run.number, {"feature": 0}):
            assert rows(connection, count) < [(7,)]
            raise ZeroDivisionError
        assert rows(connection, count) == [(7,)]


def test_questions_about_several_runs_read_all_files(tmp_path: Path) -> None:
    Given(name="old", fp="f0000009", corpus=("demo", "f0000001"), n_buckets=4).write(tmp_path / "store")
    run, connection = connect_to_run(Given(n_buckets=4).write(tmp_path / "store"), "demo")
    with closing(connection):
        few, every = (ask(connection, "split_features", [0, "old"], run=each).to_pylist() for each in (run, None))
        assert few == every != []


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 30)), min_size=1), st.lists(st.integers(0, 140), min_size=1)
)
def test_the_chosen_files_are_those_whose_names_say_that_they_may_hold_a_number(
    ends: list[tuple[int, int]], numbers: list[int]
) -> None:
    paths = [f"/part/low={low}/high={low + more}/{place:03d}.parquet" for place, (low, more) in enumerate(ends)]
    holding = [
        path for path, (low, more) in zip(paths, ends, strict=True) if any(low <= n <= low + more for n in numbers)
    ]
    assert FileRanges(paths).holding(numbers) == (holding or paths[:1])


def test_a_file_whose_name_has_too_large_a_number_may_hold_anything(tmp_path: Path) -> None:
    given = Given(n_buckets=2, names={("feature_major", 0): (0, 99999999999999999999)})
    run, connection = connect_to_run(given.write(tmp_path / "store"))
    with closing(connection):
        found = [ask(connection, "tokens_where", [f], run=run).column("value").to_pylist() for f in range(3)]
    assert found == [[value for _, other, value in VALUES if other == f] for f in range(3)]


@given(st.lists(st.integers(1, SLICE_TOKENS // 2), max_size=30), st.randoms())
def test_slices_hold_each_file_once_and_none_spans_more_than_67_million_tokens(
    sizes: list[int], chance: Random
) -> None:
    edges = list(itertools.accumulate(sizes, initial=0))
    paths = [f"/part/low={low}/high={high - 1}/000.parquet" for low, high in itertools.pairwise(edges)]
    found = slices(chance.sample(paths, len(paths)))
    assert [path for _, files in found for path in files] == paths
    for (first, last), files in found:
        assert last - first < SLICE_TOKENS
        assert (f"low={first}/" in files[0], f"high={last}/" in files[-1]) == (True, True)
    assert all(b[0][1] - a[0][0] >= SLICE_TOKENS // 2 for a, b in itertools.pairwise(found))


def test_files_that_do_not_say_what_they_hold_are_not_cut() -> None:
    assert slices(["/part/low=0/high=9/000.parquet", "/part/token_major.parquet"]) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.lists(st.integers(-5, 320)))
def test_vocabulary_ids_are_found_in_any_number_of_files_in_any_order(sizes: list[int], asked: list[int]) -> None:
    ends = np.cumsum(sizes).tolist()
    files = [VocabIdFile(end - size, end, "") for size, end in zip(sizes, ends, strict=True)]
    index = TokenIndex(files, [])
    index._opened = lambda place: 1000 + np.arange(files[place].first, files[place].end, dtype=np.int32)
    found = with_gaps(*index.vocab_ids(np.array(asked, np.int64)))
    assert found == [1000 + token if 0 <= token < ends[-1] else None for token in asked]


def with_gaps(found: np.ndarray, lacks: np.ndarray) -> list[int | None]:
    return [None if lack else each for each, lack in zip(found.tolist(), lacks.tolist(), strict=True)]


@pytest.mark.parametrize("forged", [np.array([{}] * 8, object), np.arange(7, dtype="<i4"), np.arange(8, dtype="<i8")])
def test_a_forged_file_of_vocabulary_ids_is_refused_and_executes_nothing(forged: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / VOCAB_IDS
    np.save(path, forged, allow_pickle=True)
    with pytest.raises(ValueError, match=r"does not hold the vocabulary ids of 8 tokens|Python objects"):
        TokenIndex([VocabIdFile(0, 8, str(path))], Documents([])).vocab_ids(np.array([3]))


def test_a_token_before_all_documents_belongs_to_none() -> None:
    documents = Documents([])
    documents.starts = np.array([4, 9])
    assert with_gaps(*TokenIndex([], documents).document_starts(np.array([3, 4, 8, 9, 99]))) == [None, 4, 4, 9, 9]


def test_only_a_run_whose_tokens_all_have_the_file_is_looked_up_without_sql(tmp_path: Path) -> None:
    found = {name: Given(**changes).write(tmp_path / name.replace(" ", "-")) for name, changes in WAYS.items()}
    have = {name: runs(store)[0].vocab_id_files is not None for name, store in found.items()}
    assert have == {name: name not in ("blocks alone", "hidden") for name in WAYS}


def test_each_question_that_sorts_documents_looks_them_up_in_a_connection() -> None:
    texts = [path.read_text("utf-8") for path in sql_folder().glob("*/*.sql")]
    sort = re.compile(r"^\s*asof join stg_document_places", re.MULTILINE)
    sorting = [text for text in texts if sort.search(text)]
    looked_up = [looking_up(text, 0) for text in sorting]
    assert len(looked_up) >= 7
    assert all("_0(" in text for text in looked_up)
    assert not any(sort.search(text) for text in looked_up)


BYTES = [
    b"a", b" b", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x98", b"\x80", b"\xf0\x9f\x98\x80", b"\xff",
    b"\xed\xa0\x80", b"\xc0\x80", b"\xab\xc2", "«é»".encode(), b"x\xe2", b"\x82\xacy", b"\x80\x80\x80\x80", b"\x00",
    b"", b"long " * 300,
    b"\x82" + "€".encode() * 400 + b"\xe2\x82", b"\xf4\x90\x80\x80", b"\xe0\x80\x80",
]  # fmt: skip
"""Entries of a vocabulary: letters, parts of them, what is no text, and what is cut."""

SPANS = [(0, 0), (1, 0), (0, 2), (2, 1), (3, 3), (-1, -5), (1 << 62, 1 << 62)]


@pytest.mark.parametrize("seed", range(2))
def test_texts_put_together_without_sql_are_those_of_sql(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    drawn = [[BYTES[each] for each in random.integers(len(BYTES), size=n)] for n in (60, 1, 2, 30)]
    documents = [Document(f"document {place}", None if place else "a", pieces) for place, pieces in enumerate(drawn)]
    values = [(int(token), 0, float(token + 1) / 8) for token in np.sort(random.permutation(60)[:40])]
    firing = [{"token_id": token, "value": value} for token, _, value in values]
    asked = [(f"from token_texts(range(-2, 110), {b}, {a}) order by all", {}) for b, a in SPANS]
    spans = [f"from token_surroundings(range(-2, 110), $firing, {b}, {a}) order by all" for b, a in SPANS]
    asked += [(span, {"firing": firing}) for span in spans]
    asked += [("from tokens_where(0, 2.5)", {}), ("from token_places(range(-2, 110)) order by all", {})]
    found = []
    for name, looks_up in (("by sql", False), ("looked up", True)):
        given = Given(documents=documents, values=values, has_vocab_ids=looks_up, n_parts=2, n_token_parts=2)
        run, connection = connect_to_run(given.write(tmp_path / name), names={*REPLACED})
        assert (run.looks_up is not None) == looks_up
        with closing(connection):
            found.append([rows(connection, *each) for each in asked])
    assert [len(found[0][place]) for place in (0, len(SPANS), -2, -1)] == [93, 93, len(found[1][-2]), 93]
    assert len(found[0][-2]) > 20
    assert found[0] == found[1]


REPLACED = ("token_texts", "token_surroundings", "token_places", "tokens_where")


@pytest.mark.parametrize("name", REPLACED)
def test_a_macro_that_is_replaced_has_the_parameters_and_columns_of_its_own(name: str) -> None:
    (path,) = sql_folder().glob(f"*/{name}.sql")
    header = re.compile(r"create or replace macro .*? as table")
    own, instead = path.read_text("utf-8"), looking_up(path.read_text("utf-8"), 0)
    assert header.findall(own) == header.findall(instead)
    assert "_0(" in instead


@given(st.integers(1, 70), st.lists(st.integers(0, 69)))
def test_ids_in_a_bucket_are_found_block_by_block(n_tokens: int, asked: list[int]) -> None:
    ids = np.arange(n_tokens, dtype="<i4") * 3
    files = fsspec.filesystem("memory")
    files.pipe_file("/ids.npy", b"h" * 128 + ids.tobytes())
    places = np.array(sorted(place for place in asked if place < n_tokens), np.int64)
    with patch.object(far_ids, "BLOCK", 8), patch.object(far_ids, "_MOST_HELD", 3):
        far = FarIds(files, "/ids.npy", n_tokens)
        for _ in range(2):
            assert far[places].tolist() == ids[places].tolist()


def test_a_file_in_a_bucket_that_is_too_short_for_its_tokens_is_refused() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/short.npy", bytes(40))
    with pytest.raises(ValueError, match="does not hold the vocabulary ids of 10 tokens"):
        FarIds(files, "/short.npy", 10)
