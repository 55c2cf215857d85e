"""Questions about a source, dates or a range of parts: each answer is that of the values, which are seldom read."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saeflow.features.schema import ORDERS
from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.query.test_first_answers import Rows, Slow, a_document, values_of
from tests.support.part_tables import bin_of, peak
from tests.support.small_store import Document, Given

DATES = ["1811", "1812-06", "1813-01-28", "1815", None]


@st.composite
def dated_worlds(draw: st.DrawFn) -> Given:
    """Some parts of a few documents each, with sources and dates, one document perhaps forgotten."""
    documents = [draw(a_document(f"d{i}")) for i in range(draw(st.integers(2, 7)))]
    world = Given(
        documents=documents,
        hidden=sorted(draw(st.sets(st.integers(0, len(documents) - 1), max_size=1))),
        skipped=draw(st.sampled_from([(), (0,)])),
    )
    world.n_parts = world.n_token_parts = draw(st.integers(1, 3))
    dates = [draw(st.sampled_from(DATES)) for _ in documents]
    world.metadata = {"published": pa.array(dates, pa.string())}
    world.values = draw(values_of(world, world.skipped))
    return world


@dataclass
class Range:
    """What a question asks of, applied to one token at a time."""

    slow: Slow
    arguments: dict[str, Any]

    def holds(self, token_id: int) -> bool:
        given, asked = self.slow.given, self.arguments
        assert isinstance(given, Given)
        owner = self.slow.owner(token_id)
        date, part = given.metadata["published"][owner].as_py(), given.parts_of([token_id])[0]
        return (
            asked.get("source") in (None, given.documents[owner].source)
            and ("since" not in asked or (date is not None and date >= asked["since"]))
            and ("until" not in asked or (date is not None and date < asked["until"]))
            and asked.get("from_part", 0) <= part <= asked.get("to_part", math.inf)
        )

    def firing(self, feature: int) -> list[float]:
        return [value for token, value in self.slow.firing(feature).items() if self.holds(token)]

    @property
    def n_encoded(self) -> int:
        return sum(self.holds(token.token_id) for token in self.slow.encoded)


RANGES = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(["s", "t"]),
        "since": st.sampled_from(["1812", "1813-02"]),
        "until": st.sampled_from(["1813", "1814"]),
        "from_part": st.integers(0, 2),
        "to_part": st.integers(0, 2),
        "features": st.lists(st.integers(0, 3), min_size=1, max_size=3),
    },
)


@contextlib.contextmanager
def asked(world: Given) -> Iterator[duckdb.DuckDBPyConnection]:
    with tempfile.TemporaryDirectory() as folder, connect(world.write(Path(folder)), threads=1) as connection:
        yield connection


@pytest.mark.long
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=dated_worlds(), data=st.data())
def test_a_range_is_answered_as_looking_at_each_of_its_tokens_answers(world, data):
    slow = Slow(world)
    with asked(world) as connection:
        for _ in range(3):
            within = Range(slow, data.draw(RANGES))
            summary_is_right(within, ask(connection, "summary_within", within.arguments).to_pylist())
            for feature in slow.features[:2]:
                bins = Counter(map(bin_of, within.firing(feature)))
                about = {name: value for name, value in within.arguments.items() if name != "features"}
                rows = ask(connection, "histogram_within", {"feature": feature} | about).to_pylist()
                assert [row["n_tokens"] for row in rows] == [bins[each] for each in sorted(bins)]
                assert [row["share"] for row in rows] == [bins[each] / bins.total() for each in sorted(bins)]
                coactivation_is_right(
                    within, feature, ask(connection, "coactivation_within", {"feature": feature} | about)
                )
            contrast_is_right(within, connection)


def summary_is_right(within: Range, rows: Rows) -> None:
    listed = within.arguments.get("features", range(within.slow.given.n_features))
    assert [row["feature_id"] for row in rows] == sorted({*listed})
    n_encoded = within.n_encoded
    for row in rows:
        values = within.firing(row["feature_id"])
        density = len(values) / n_encoded if n_encoded else None
        assert (row["n_tokens"], row["density"]) == (len(values), density)
        mean = math.fsum(values) / len(values) if values else None
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) if values else None
        assert (row["mean_value"], row["std_value"]) == pytest.approx((mean, spread), abs=1e-6)
        assert row["max_value"] == (None if "source" in within.arguments else peak(values))


def contrast_is_right(within: Range, connection: duckdb.DuckDBPyConnection) -> None:
    about = {name: value for name, value in within.arguments.items() if name != "source"}
    rows = ask(connection, "contrast_within", {"a": "s", "b": "t"} | about).to_pylist()
    assert {row["feature_id"] for row in rows} == {*about.get("features", range(within.slow.given.n_features))}
    for row in rows:
        for source, side in (("s", "a"), ("t", "b")):
            part = Range(within.slow, about | {"source": source})
            values, n = part.firing(row["feature_id"]), part.n_encoded
            assert row[f"n_tokens_{side}"] == len(values)
            assert row[f"rate_{side}"] == (len(values) / n if n else None)
            mean = math.fsum(values) / len(values) if values else None
            assert row[f"mean_value_{side}"] == pytest.approx(mean)


def coactivation_is_right(within: Range, feature: int, answer: pa.Table) -> None:
    every = range(within.slow.given.n_features)
    tokens = {f: {t for t in within.slow.firing(f) if within.holds(t)} for f in every}
    mine, n = tokens.pop(feature), within.n_encoded
    both = {other: (len(mine & its), len(mine), len(its)) for other, its in tokens.items() if mine & its}
    rows = answer.to_pylist()
    assert {row["other_id"]: (row["n_both"], row["n_feature"], row["n_other"]) for row in rows} == both
    assert rows == sorted(rows, key=lambda row: (-row["jaccard"], -row["n_both"], row["other_id"]))
    for row in rows:
        n_both, n_feature, n_other = both[row["other_id"]]
        assert row["jaccard"] == n_both / (n_feature + n_other - n_both)
        assert row["pmi"] == pytest.approx(math.log2(n_both * n / (n_feature * n_other)))


PIECES = [b"a", b"b", b"c", b"d"]
IN_PARTS = Given(
    documents=[
        Document(f"d{i}", source, PIECES) for i, source in enumerate(["s", "t", "s", "s", "t", "t"])
    ],
    values=[(token, feature, 1.0 + token / 8) for token in range(24) for feature in range(30) if (token + feature) % 3],
    metadata={"published": pa.array(["1811", "1811", "1813", "1813", "1815", "1811"])},
    n_parts=3,
    n_token_parts=3,
    n_buckets=1,
)  # fmt: skip
"""Two documents a part. Part 0 is of 1811, part 1 of 1813, and part 2 of both 1815 and 1811."""


def without_values(store: Store, orders: Sequence[str] = ORDERS, part: str = "") -> None:
    """Overwrite the values in each file, or each of a part, but not the footer, which says what a file holds."""
    for path in (path for path in files(store, orders) if part in str(path)):
        content = bytearray(path.read_bytes())
        footer = pq.read_metadata(path).serialized_size + 8
        content[4:-footer] = bytes(len(content) - footer - 4)
        path.write_bytes(content)


def without_row_groups(store: Store, places: Sequence[int]) -> None:
    """Overwrite these row groups in the files by token."""
    for path in files(store, ["token_major"]):
        content, about = bytearray(path.read_bytes()), pq.read_metadata(path)
        for place in places:
            columns = [about.row_group(place).column(i) for i in range(about.num_columns)]
            start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
            size = sum(column.total_compressed_size for column in columns)
            content[start : start + size] = bytes(size)
        path.write_bytes(content)


def files(store: Store, orders: Sequence[str]) -> list[Path]:
    return [path for order in orders for path in store.root.glob(f"features/*/parts/*/{order}/**/*.parquet")]


@pytest.mark.parametrize(
    ("question", "arguments"),
    [
        ("summary_within", {}),
        ("summary_within", {"from_part": 1, "to_part": 2}),
        ("summary_within", {"since": "1812", "until": "1814"}),
        ("summary_within", {"source": "s"}),
        ("summary_within", {"source": "s", "since": "1812"}),
        ("histogram_within", {"feature": 1, "to_part": 0}),
        ("histogram_within", {"feature": 1, "since": "1812", "until": "1814"}),
        ("contrast_within", {"a": "s", "b": "t", "to_part": 1}),
        ("summary_within", {"to_part": 1, "features": [2, 29]}),
        ("contrast_within", {"a": "s", "b": "t", "from_part": 1, "features": [2]}),
    ],
)
def test_whole_parts_and_sources_of_parts_are_answered_from_stored_counts(tmp_path, question, arguments):
    store = IN_PARTS.write(tmp_path)
    with connect(store) as connection:
        wanted = ask(connection, question, arguments)
    without_values(store)
    with connect(store) as connection:
        assert ask(connection, question, arguments) == wanted


@pytest.mark.parametrize(
    ("question", "arguments"),
    [
        ("summary_within", {"until": "1812"}),
        ("histogram_within", {"feature": 1, "source": "s"}),
        ("contrast_within", {"a": "s", "b": "t", "until": "1812"}),
        ("summary_within", {"until": "1812", "features": [2]}),
    ],
)
def test_values_are_read_where_a_part_has_documents_in_and_out_of_the_range(tmp_path, question, arguments):
    store = IN_PARTS.write(tmp_path)
    without_values(store)
    with connect(store) as connection, pytest.raises(UserError, match="failed"):
        ask(connection, question, arguments)


def test_listed_features_are_read_by_feature_and_all_features_by_token(tmp_path):
    store, about = IN_PARTS.write(tmp_path), {"until": "1812"}
    with connect(store) as connection:
        every = ask(connection, "summary_within", about).to_pylist()
    without_values(store, ["token_major"])
    with connect(store) as connection:
        assert ask(connection, "summary_within", about | {"features": [7, 3]}).to_pylist() == [every[3], every[7]]
        with pytest.raises(UserError, match="failed"):
            ask(connection, "summary_within", about)


ONE_PART = replace(
    IN_PARTS, documents=[Document(f"d{i}", "s", PIECES) for i in range(6)], n_parts=1, n_token_parts=1,
    metadata={"published": pa.array(["1811", "1812", "1812", "1813", "1811", "1815"])}, row_group_size=80,
)  # fmt: skip
"""A row group has the values of one document: each has four tokens, and 20 values a token."""


@pytest.mark.parametrize(
    ("about", "unread"),
    [
        ({"since": "1812", "until": "1813"}, [3, 4, 5]),
        ({"since": "1815"}, [1, 2, 3, 4]),
        ({"since": "1812", "until": "1814"}, [4, 5]),
    ],
)
def test_of_documents_that_follow_on_one_another_only_their_row_groups_are_read(tmp_path, about, unread):
    """DuckDB looks into the first row group before it knows which tokens are wanted."""
    store = ONE_PART.write(tmp_path)
    assert [pq.read_metadata(path).num_row_groups for path in files(store, ["token_major"])] == [6]
    with connect(store) as connection:
        wanted = ask(connection, "summary_within", about).to_pylist()
    summary_is_right(Range(Slow(ONE_PART), about), wanted)
    without_row_groups(store, unread)
    with connect(store, threads=1) as connection:
        assert ask(connection, "summary_within", about).to_pylist() == wanted
        with pytest.raises(UserError, match="failed"):
            ask(connection, "summary_within", {"until": "1815"})


def test_documents_between_those_of_a_range_do_not_count_whichever_part_holds_them(tmp_path):
    """Part 0 of the run is said to hold the first and the last part of the tokens."""
    world = replace(IN_PARTS, metadata={"published": pa.array(["1811", "1813", "1811", "1811", "1813", "1815"])})
    within = Range(Slow(world), {"since": "1813", "until": "1815"})
    with connect(world.write(tmp_path)) as connection:
        connection.execute(
            "create or replace table moved as select * replace (case when part = 2 then "
            "(select folder from src_parts where part = 0) else folder end as folder) from src_parts"
        )
        connection.execute("create or replace view src_parts as from moved")
        summary_is_right(within, ask(connection, "summary_within", within.arguments).to_pylist())


def test_pairs_of_a_range_of_parts_are_counted_from_the_values_of_these_parts_alone(tmp_path):
    store, about = IN_PARTS.write(tmp_path), {"feature": 1, "to_part": 1}
    with connect(store) as connection:
        wanted = ask(connection, "coactivation_within", about)
    coactivation_is_right(Range(Slow(IN_PARTS), {"to_part": 1}), 1, wanted)
    without_values(store, ["token_major"], part="/000002-")
    with connect(store, threads=1) as connection:
        assert ask(connection, "coactivation_within", about) == wanted


def test_a_source_that_a_part_counts_with_others_is_counted_from_the_values(tmp_path):
    documents = [Document(f"d{i}", f"s{i:02}", [b"x"] * (1 + (i < 64))) for i in range(70)]
    world = Given(documents=documents, values=[(token, 0, 1.0) for token in range(134)])
    with connect(world.write(tmp_path)) as connection:
        for source, n in (("s00", 2), ("s69", 1)):
            row = ask(connection, "summary_within", [source]).to_pylist()[0]
            assert (row["n_tokens"], row["density"]) == (n, 1.0)


@pytest.mark.parametrize(
    ("question", "arguments"),
    [("summary_within", {}), ("histogram_within", {"feature": 1}), ("contrast_within", {"a": "s", "b": "t"})],
)
def test_what_is_no_date_is_refused_in_one_plain_sentence(tmp_path, question, arguments):
    with connect(IN_PARTS.write(tmp_path)) as connection, pytest.raises(UserError) as refused:
        ask(connection, question, arguments | {"since": "yesterday"})
    assert str(refused.value) == "since is 'yesterday', but it must be a date such as 1813-01-28"
