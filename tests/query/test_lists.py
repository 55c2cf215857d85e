"""Lists of features, and pictures of all of them, against an answer found by looking at each token in turn."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saeflow.query.ask import ask
from saeflow.query.connection import connect, connect_to_run
from saeflow.runtime.errors import UserError
from tests.query.test_first_answers import Ask, Slow, worlds
from tests.support.part_tables import bin_of, peak
from tests.support.small_store import Document, Given

SORTS = ("interesting", "density", "rare", "max", "mean", "id")


def line(slow: Slow, feature: int) -> dict[str, Any]:
    values = list(slow.firing(feature).values())
    counts = Counter(slow.by_id[token].vocab_id for token in slow.firing(feature))
    entries = sorted(counts, key=lambda vocab_id: (-counts[vocab_id], vocab_id))[:3]
    bins = Counter(bin_of(abs(value)) for value in values)
    return {
        "n_tokens": len(values),
        "density": len(values) / len(slow.encoded),
        "max_value": peak(values),
        "shares": [counts[vocab_id] / len(values) for vocab_id in entries],
        "pieces": [slow.given.vocab[vocab_id].decode("utf-8", "replace") for vocab_id in entries],
        "histogram": [bins[each] for each in range(min(bins), max(bins) + 1)] if bins else [],
    }


def lists(slow: Slow, ask: Ask) -> None:
    """Every order has every feature once, a page at a time."""
    kinds = {row["feature_id"]: row["kind"] for row in ask("feature_kind")}
    for sort in SORTS:
        whole, last = [], {}
        while rows := ask("find_features", {"sort": sort, "n": 2, **last}):
            whole += rows
            last = {"after_sort": rows[-1]["sort_key"], "after_id": rows[-1]["feature_id"]}
        order = [(-row["sort_key"], row["feature_id"]) for row in whole]
        assert order == sorted(order)
        assert sorted(row["feature_id"] for row in whole) == list(range(slow.given.n_features))
        for row in whole:
            expected = line(slow, row["feature_id"])
            assert {name: row[name] for name in expected} == expected
            assert row["kind"] == kinds[row["feature_id"]]
    assert {row["kind"]: row["n_features"] for row in ask("count_features", {})} == Counter(kinds.values())


def sources(slow: Slow, ask: Ask) -> None:
    """Each feature belongs to the source with most of its tokens; those of a source are found and counted."""
    mains: dict[int, tuple[str, float]] = {}
    for feature in range(slow.given.n_features):
        tokens = [slow.by_id[token].source for token in slow.firing(feature)]
        counts = Counter(source for source in tokens if source is not None)
        if counts:
            source = min(counts, key=lambda each: (-counts[each], each))
            mains[feature] = (source, counts[source] / len(tokens))
    for row in ask("find_features", {"n": 1000}):
        assert (row["main_source"], row["source_share"]) == mains.get(row["feature_id"], (None, None))
    sizes: dict[str | None, list[int]] = {}
    for document in filter(lambda each: each.pieces, slow.given.documents):
        sizes.setdefault(document.source, []).append(len(document.pieces))
    for row in ask("sources"):
        own = sorted(feature for feature, (source, _) in mains.items() if source == row["source"])
        assert row["n_features"] == len(own)
        assert (row["n_documents"], row["n_tokens"]) == (len(sizes[row["source"]]), sum(sizes[row["source"]]))
        if row["source"] is not None:
            found = ask("find_features", {"source": row["source"], "sort": "id"})
            assert [each["feature_id"] for each in found] == own
            counted = ask("count_features", {"source": row["source"]})
            assert sum(each["n_features"] for each in counted) == len(own)


def conditions(slow: Slow, ask: Ask) -> None:
    lines = {feature: line(slow, feature) for feature in range(slow.given.n_features)}
    top = {feature: abs(lines[feature]["max_value"] or 0) for feature in lines}
    entry = slow.by_id[next(iter(slow.firing(slow.features[0])))].vocab_id if slow.firing(slow.features[0]) else 0
    for arguments, holds in (
        ({"text": "A"}, lambda feature: any("a" in piece.lower() for piece in words(slow, feature))),
        ({"entry": entry}, lambda feature: entry in [slow.by_id[t].vocab_id for t in slow.firing(feature)]),
        ({"min_density": 0.1, "min_peak": 0.25}, lambda f: lines[f]["density"] >= 0.1 and top[f] >= 0.25),
        ({"max_density": 0.2, "max_peak": 1}, lambda f: lines[f]["density"] <= 0.2 and 0 < top[f] <= 1),
        ({"kind": "dead"}, lambda feature: not lines[feature]["n_tokens"]),
    ):
        found = [row["feature_id"] for row in ask("find_features", arguments | {"sort": "id"})]
        assert found == [feature for feature in lines if holds(feature)]
        assert sum(row["n_features"] for row in ask("count_features", arguments)) == len(found)


def words(slow: Slow, feature: int) -> list[str]:
    return [slow.given.vocab[slow.by_id[t].vocab_id].decode("utf-8", "replace") for t in slow.firing(feature)]


def pictures(slow: Slow, ask: Ask) -> None:
    lines = {feature: line(slow, feature) for feature in range(slow.given.n_features)}
    firing = [feature for feature in lines if lines[feature]["n_tokens"]]
    firing.sort(key=lambda feature: hashlib.md5(f"0:{feature}".encode()).hexdigest())
    assert [(row["feature_id"], row["density"], row["max_value"]) for row in ask("density_and_max", {"n": 3})] == [
        (feature, lines[feature]["density"], lines[feature]["max_value"]) for feature in firing[:3]
    ]
    rows = ask("density_histogram", {})
    assert sum(row["n_features"] for row in rows) == len(lines)
    for row in rows:
        low, high = row["from_density"] * (1 - 1e-9), row["to_density"] * (1 + 1e-9)
        assert row["n_features"] <= sum(low <= each["density"] <= high for each in lines.values())
        assert high == 0 or math.log10(high / low) == pytest.approx(0.25, abs=1e-6)


@settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("signed", [pytest.param(False, marks=pytest.mark.long), True], ids=["positive", "signed"])
def test_a_list_of_features_has_what_looking_at_each_token_finds(signed, data):
    world = data.draw(worlds(signed).filter(lambda world: Slow(world).encoded and not world.hidden))
    slow = Slow(world)
    with tempfile.TemporaryDirectory() as folder, connect(world.write(Path(folder)), threads=1) as connection:
        for question in (lists, conditions, pictures, sources):
            question(slow, lambda name, *arguments: ask(connection, name, *arguments).to_pylist())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A dense feature, two peaked ones of which the second is a word, a rare one and a dead one."""
    root = tmp_path_factory.mktemp("many") / "store"
    (root / "labels" / "demo-f0000001").mkdir(parents=True)
    (root / "labels" / "demo-f0000001" / "own.csv").write_text("feature_id,label\n1,Sea shanties\n")
    values = [
        *((token, 0, 9.0) for token in range(900)),
        *((token, 1, 8.0 if token == 0 else 1.0) for token in range(20)),
        *((token, 2, 4.0 if token == 3 else 1.0) for token in range(3, 160, 4)),
        *((token, 3, 99.0) for token in range(3)),
    ]
    documents = [Document("k", "a", [b" the", b" sea", b" is", b" Calm"] * 250)]
    given = Given(documents=documents, values=values, tables={})
    given.stats = None
    connection = connect_to_run(given.write(root), threads=1, for_pages=True)[1]
    yield connection
    connection.close()


def found(connection: Any, **arguments: object) -> list[int]:
    return ask(connection, "find_features", arguments).column("feature_id").to_pylist()


def test_dense_rare_and_dead_features_come_last_in_the_order_that_nobody_chose(many):
    assert found(many) == [1, 2, 0, 3]
    assert found(many, n=2) == [1, 2]
    assert found(many, sort="density")[0] == 0
    assert found(many, sort="max")[0] == 3


def test_a_text_is_looked_for_in_labels_and_in_the_commonest_pieces_whatever_the_case(many):
    assert found(many, text="SHANTIES") == [1]
    assert found(many, text="calm") == [1, 2, 0]
    assert found(many, text="%") == []
    (row,) = ask(many, "find_features", {"text": "calm", "kind": "single-token"}).to_pylist()
    assert (row["feature_id"], row["label"], row["pieces"], row["from_value"]) == (2, None, [" Calm"], 1.0)
    assert row["histogram"] == [39, 0, 0, 0, 0, 0, 0, 0, 1]


def test_a_piece_that_was_looked_for_is_shown_with_its_share_though_three_are_commoner(many):
    (row,) = ask(many, "find_features", {"text": "THE", "kind": "dense"}).to_pylist()
    assert dict(zip(row["pieces"], row["shares"], strict=True)) == dict.fromkeys([" the", " sea", " is", " Calm"], 0.25)
    (row,) = ask(many, "find_features", {"kind": "dense"}).to_pylist()
    assert len(row["pieces"]) == 3


def test_an_order_that_does_not_exist_is_named(many):
    with pytest.raises(UserError, match="sort is 'size', but it must be interesting, density, rare, max, mean or id"):
        found(many, sort="size")
