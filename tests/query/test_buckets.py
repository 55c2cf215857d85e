"""Questions to a store in a bucket: the local store's answers, few requests, and nothing believed of the cache."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import saeflow as package
from saeflow.browser.connections import Connections
from saeflow.features.schema import EXPLANATION_SCORES
from saeflow.meaning.beside_labels import path_beside, replace_rows
from saeflow.query import labels
from saeflow.query.ask import ask, names_read
from saeflow.query.catalog import OF_EVERY_RUN
from saeflow.query.connection import connect_to_run
from saeflow.query.files.cost import count_files
from saeflow.query.questions import find_question, parse_arguments, questions
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.store.storage import pieces
from saeflow.store.storage.piece_cache import LIMIT
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.query.test_files import ABOUT
from tests.support.command import Command
from tests.support.s3_server import Request, Server, s3_server
from tests.support.small_store import Given

GIVEN = ABOUT | {
    "tokens": [1, 5], "text": "love", "vocab": 1, "document_key": "emma", "first_char": 0, "end_char": 4, "window": 3,
    "a": "novels", "b": "bible", "other_run": "demo", "matches": [2, 0], "annotation": "none", "class": "none",
}  # fmt: skip
SAE = "demo-f0000001"
numbers = itertools.count()


@dataclass
class Bucket:
    """A store in a bucket, its original on disk, and a cache that stands for a machine."""

    server: Server
    local: Store
    cache: Path
    url: str

    def ask(self, name: str, *arguments: object) -> Answered:
        """Ask over a new connection, as a command does."""
        question = find_question(name)
        values = parse_arguments(question, arguments)
        self.server.requests()
        run, connection = connect_to_run(Store.open(self.url), names=names_read(question, values))
        with closing(connection):
            connecting = self.server.requests()
            rows = ask(connection, name, values, run=run).to_pylist()
            return Answered(run, rows, connecting, self.server.requests())

    def harm(self, url: str) -> None:
        """Change an object, but not its size."""
        size = (self.local.root / url.removeprefix(f"{self.url}/")).stat().st_size
        self.put(url, b"x" * size)

    def put(self, url: str, content: bytes) -> None:
        self.server.client().put_object(Bucket="bucket", Key=url.removeprefix("s3://bucket/"), Body=content)

    def remove(self, url: str) -> None:
        self.server.client().delete_object(Bucket="bucket", Key=url.removeprefix("s3://bucket/"))


@dataclass
class Answered:
    """Rows, and what the server was asked for to connect and to ask."""

    run: Run
    rows: list[Any]
    connecting: list[Request]
    asking: list[Request]

    @property
    def kinds(self) -> Counter[str]:
        return kinds(self.connecting + self.asking)


def kinds(requests: list[Request]) -> Counter[str]:
    return Counter(each.kind for each in requests)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as started:
        started.bucket("bucket")
        yield started


@pytest.fixture(params=[True])
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """Four files of features in each of two parts; with `vocab_ids.npy`, or with blocks alone."""
    for name, value in (server.environment | {"SAEFLOW_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    local = Given(n_buckets=4, n_parts=2, n_token_parts=2, has_vocab_ids=request.param).write(tmp_path / "store")
    local.artefacts("tokens")[0].add_files(["vocab.parquet"])
    name = f"store-{next(numbers)}"
    server.upload(local.root, "bucket", name)
    return Bucket(server, local, tmp_path / "cache", f"s3://bucket/{name}")


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two parts of 200,000 values each, in the bucket as well."""
    store = Store.create(tmp_path_factory.mktemp("made"))
    _made_run.make(store, 400_000, part_tokens=6_400)
    server.upload(store.root, "bucket", "made")
    return store


@pytest.fixture
def large(bucket: Bucket, made: Store, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket whose files of values are not read whole."""
    monkeypatch.setattr(pieces, "WHOLE_BYTES", 450 << 10)
    monkeypatch.setattr(pieces, "LEAST_TAIL", 32 << 10)
    return replace(bucket, local=made, url="s3://bucket/made")


def answers(store: Store) -> dict[str, list[str]]:
    """What every question answers that needs no model and no SAE, in any order of rows."""
    found = {}
    run, connection = connect_to_run(store)
    with closing(connection):
        for question in questions():
            names = [each.name for each in question.parameters if each.default is None or each.name == "tokens"]
            known = GIVEN | (dict.fromkeys(("a", "b"), "demo") if question.name in OF_EVERY_RUN else {})
            if not question.runs_model and not question.compares_directions:
                rows = ask(connection, question.name, {name: known[name] for name in names}, run=run).to_pylist()
                found[question.name] = sorted(map(repr, rows))
    return found


@pytest.mark.parametrize(
    "bucket", [True, pytest.param(False, marks=pytest.mark.long)], ids=["vocab_ids.npy", "blocks"], indirect=True
)
def test_every_question_answers_as_of_a_local_store_and_no_size_is_asked_for(bucket: Bucket) -> None:
    bucket.server.requests()
    found = answers(Store.open(bucket.url))
    assert found == answers(bucket.local)
    assert len(found) > 75
    assert kinds(bucket.server.requests()).keys() == {"LIST", "GET"}


@pytest.mark.long
def test_the_second_time_small_tables_and_records_come_from_this_machine(bucket: Bucket) -> None:
    bucket.server.requests()
    found = [answers(Store.open(bucket.url))]
    cold = kinds(bucket.server.requests())
    found.append(answers(Store.open(bucket.url)))
    warm = kinds(bucket.server.requests())
    assert found[0] == found[1]
    assert warm == {"LIST": warm["LIST"]}
    assert warm["LIST"] <= 1 + 2 + 2 * len(bucket.local.artefacts()) + 1  # the bucket, kinds, artefacts, labels
    assert warm["LIST"] < cold["LIST"]


OF_VALUES = [
    ("tokens_where", 7), ("top_tokens", 7), ("contexts", 7), ("feature_values", 7), ("feature_pair", 7, 9),
    ("token_features", 5_000), ("document_features", "document 3"),
]  # fmt: skip
"""Questions about few features, or a few tokens."""


@pytest.mark.long
@pytest.mark.parametrize("question", OF_VALUES, ids=str)
def test_a_question_about_few_values_reads_at_most_two_ranges_of_a_file(large: Bucket, question: list[Any]) -> None:
    expected = asked_locally(large.local, *question)
    assert large.ask(*question).rows == expected
    found = large.ask(*question)
    assert found.rows == expected != []
    of_values = Counter(each.key for each in found.asking if "_major/" in each.key)
    assert 1 <= max(of_values.values()) <= 2 * (1 + (question[0] == "feature_pair"))
    assert len(of_values) <= 2
    assert kinds(found.asking).keys() == {"GET"}
    assert kinds(found.connecting).keys() == {"LIST"}


def test_the_text_around_a_token_costs_one_range_of_vocabulary_ids(
    large: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "WHOLE_BYTES", 16 << 10)
    monkeypatch.setattr(pieces, "LEAST_TAIL", 8 << 10)
    found = large.ask("context", 5_000)
    assert found.rows == asked_locally(large.local, "context", 5_000)
    assert [each.n_bytes for each in found.asking if "vocab_ids" in each.key] == [6_400 * 4]
    assert not [each for each in found.asking if "vocab_blocks" in each.key]


def test_a_question_about_all_values_reads_each_file_once(large: Bucket) -> None:
    large.ask("coactivation", 7)
    found = large.ask("coactivation", 7)
    assert found.rows == asked_locally(large.local, "coactivation", 7)
    n_bytes = sum(Path(path).stat().st_size for path in large.local.root.rglob("*_major/*/*/*.parquet"))
    assert sum(each.n_bytes for each in found.asking) <= n_bytes


@pytest.mark.parametrize("question", [("feature_histogram", 7), ("feature_summary",), ("runs",)], ids=str)
def test_a_question_about_statistics_reads_no_values(large: Bucket, question: list[Any]) -> None:
    found = large.ask(*question)
    assert not [each for each in found.connecting + found.asking if "_major/" in each.key]


def asked_locally(store: Store, name: str, *arguments: object) -> list[Any]:
    run, connection = connect_to_run(store)
    with closing(connection):
        return ask(connection, name, list(arguments), run=run).to_pylist()


def test_a_question_reads_records_and_tables_that_it_needs_and_no_others(bucket: Bucket) -> None:
    found = bucket.ask("feature_histogram", 2)
    read = {each.key.rpartition("/")[2] for each in found.connecting + found.asking if each.key.endswith(".parquet")}
    assert read == {"000001.parquet", "feature_stats.parquet", "feature_histogram.parquet"}


def test_explain_counts_what_the_server_counts(bucket: Bucket) -> None:
    bucket.server.requests()
    with package.open(bucket.url) as run:
        table, cost = run.explain("tokens_where", feature=2)
        counted = bucket.server.requests()
        assert kinds(counted) == Counter(cost.connecting.traffic.requests) + Counter(cost.asking.traffic.requests)
        n_bytes = sum(each.n_bytes for each in counted if each.kind == "GET")
        assert cost.connecting.traffic.n_bytes + cost.asking.traffic.n_bytes == n_bytes
        assert (cost.n_rows, cost.answer_bytes) == (table.num_rows, table.nbytes)
        again = run.explain("tokens_where", feature=2)[1].asking.traffic
        assert (again.requests, again.n_bytes, again.cached_bytes) == ({}, 0, 0)


def test_the_command_says_what_an_answer_cost(bucket: Bucket, saeflow: Command) -> None:
    for store in (bucket.url, bucket.local.root):
        said = saeflow("ask", "tokens_where", "2", "-n", "1", "--store", store, "--explain")
        assert re.search(r"files: +\d+ of \d+ may hold the answer\nanswer: +1 rows", said.err)
        assert len(re.findall(r"(?:connecting|asking): +\d+\.\d\d s; .* read", said.err)) == 2
    said = saeflow("ask", "tokens_where", "2", "--store", bucket.url, "--explain", "-f", "json")
    cost = json.loads(said.err.splitlines()[-1])
    assert cost["rows"] == len(json.loads(said.out)) > 0
    assert cost["connecting"]["requests"].keys() == {"LIST"}
    assert cost["asking"]["bytes_read"] == 0 < cost["asking"]["bytes_from_cache"]


def test_no_cost_is_told_where_no_question_is_asked(bucket: Bucket, saeflow: Command) -> None:
    said = saeflow("ask", "tokens_where", "2", "--store", bucket.local.root, "--explain", "--sql")
    assert (said.code, said.out) == (2, "")
    assert "Leave one of them out" in said.err


def test_only_the_files_of_a_feature_count_as_those_that_may_hold_its_values(bucket: Bucket) -> None:
    run, connection = connect_to_run(bucket.local)
    connection.close()
    every = sum(len(paths) for table, paths in run.files.items() if table != "unmarked_tokens")
    few, many = (count_files(run, "tokens_of_feature", values) for values in ({"feature": 2}, {}))
    assert few[1] == many[1] == every
    assert many[0] - few[0] == len(run.files["feature_major"]) - len(run.value_files["feature_major"].holding([2])) > 0


@pytest.mark.parametrize("harm", ["damaged", "cut short", "deleted"])
def test_a_cache_that_was_harmed_is_read_again_from_the_bucket(bucket: Bucket, harm: str) -> None:
    expected = bucket.ask("tokens_where", 2)
    kept = [path for path in (bucket.cache / "pieces").glob("*/*") if path.stat().st_size > 16]
    for path in kept:
        content = path.read_bytes()
        if harm == "deleted":
            path.unlink()
        else:
            path.write_bytes(content[:-1] + b"?" if harm == "damaged" else content[:-1])
    found = bucket.ask("tokens_where", 2)
    assert found.rows == expected.rows != []
    assert found.kinds["GET"] == len(kept) > 5


def test_nothing_is_kept_where_the_limit_is_zero(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    first, second = bucket.ask("tokens_where", 2), bucket.ask("tokens_where", 2)
    assert first.rows == second.rows
    assert not list(bucket.cache.glob("pieces/*/*"))
    assert kinds(second.asking) == kinds(first.asking)


def test_a_published_file_that_is_not_as_recorded_is_named_and_not_read(bucket: Bucket) -> None:
    found = bucket.ask("tokens_where", 2)
    (path,) = found.run.value_files["feature_major"].holding([2])[:1]
    bucket.harm(path)
    shutil.rmtree(bucket.cache / "pieces")
    with pytest.raises(UserError, match=f"{re.escape(path)} is missing or damaged") as raised:
        bucket.ask("tokens_where", 2)
    assert "saeflow verify --full --repair" in str(raised.value)


def test_a_file_that_went_since_a_machine_looked_is_named_without_a_traceback(bucket: Bucket) -> None:
    found = bucket.ask("feature_histogram", 2)
    (path,) = found.run.value_files["feature_major"].holding([2])[:1]
    bucket.remove(path)
    with pytest.raises(UserError) as raised:
        bucket.ask("tokens_where", 2)
    assert "Traceback" not in str(raised.value)
    assert path.rpartition("/parts/")[2] in str(raised.value)


@pytest.mark.long
def test_another_list_of_parts_is_looked_at_although_one_was_before(bucket: Bucket) -> None:
    bucket.ask("runs")
    store = Store.open(bucket.local.root)
    (features,) = store.artefacts("features")
    with features.writing():
        features.publish(features.published().parts[:1])
    prefix = bucket.url.removeprefix("s3://bucket/")
    bucket.server.upload(store.root, "bucket", prefix)
    listed = [each.key for each in bucket.ask("runs").connecting if each.kind == "LIST"]
    assert listed.count(f"{prefix}/{features.id}/") == 2


SHOWN = "select feature_id, label, source from stg_labels where source in ('own', 'second') order by all"


def put_labels(store: Store, source: str, *words: str) -> None:
    labels.put(store, SAE, source, {number: labels.Label(word) for number, word in enumerate(words)})


@pytest.mark.parametrize("is_here", [True, False], ids=["by the pages themselves", "by another machine"])
def test_pages_show_a_label_and_a_score_that_was_saved_since_they_were_opened(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    pages = Connections(Store.open(bucket.url))
    writer = pages.store
    if not is_here:
        monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path / "another machine"))
        writer = Store.open(bucket.url)

    def shown(sql: str = SHOWN) -> list[tuple[Any, ...]]:
        with pages.opened() as opened:
            return opened.cursor.execute(sql).fetchall()

    with closing(pages):
        for words in ([], ["old"], ["new"], ["new", "more"]):  # old and new have one length
            put_labels(writer, "own", *words)
            assert shown() == [(number, word, "own") for number, word in enumerate(words)]
        put_labels(writer, "second", "another source")
        assert (0, "another source", "second") in shown()
        for score in (0.25, 0.75):
            write_score(writer, score)
            assert shown("select score from explanation_scores") == [(score,)]
        put_labels(writer, "own", "newest", "more")
        assert (0, "newest", "own") in shown()


def write_score(store: Store, score: float) -> None:
    path = path_beside(store, SAE, "own", "scores")
    row = {"feature_id": 0, "tokens": store.artefacts("tokens")[0].id, "model": "judge", "method": "detection"}
    replace_rows(store, path, EXPLANATION_SCORES, [0], {"model": "judge"}, [row | {"score": score}])


def test_a_connection_reads_a_replaced_file_anew_after_the_next_look(bucket: Bucket) -> None:
    store = Store.open(bucket.url)
    url = f"{bucket.url}/labels/{SAE}/own.parquet"
    with closing(duckdb.connect()) as connection:
        store.storage.register(connection)
        for number in range(3):
            content = io.BytesIO()
            pq.write_table(pa.table({"number": [number]}), content)
            bucket.put(url, content.getvalue())
            store.storage.pull()
            assert connection.execute(f"from read_parquet('{url}')").fetchall() == [(number,)]


def test_pages_that_show_the_same_labels_again_ask_for_listings_alone(bucket: Bucket) -> None:
    put_labels(Store.open(bucket.url), "own", "one")
    pages = Connections(Store.open(bucket.url))
    with closing(pages):
        for _ in range(2):
            bucket.server.requests()
            with pages.opened() as opened:
                opened.cursor.execute(SHOWN).fetchall()
        found = kinds(bucket.server.requests())
    assert found == {"LIST": found["LIST"]}
    assert found["LIST"] <= 1 + 3 + 2 * len(bucket.local.artefacts()) + 2
