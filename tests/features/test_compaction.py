"""Compaction and what is counted while encoding: brute force over the same values gives the same, before and after."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saeflow.features.compaction import USUAL_MERGE, MergeSettings, plan_merges
from saeflow.features.files import feature_buckets, files_of
from saeflow.features.schema import PART_TABLES, TOP, TOP_VOCAB, covered
from saeflow.features.statistics import bands_of
from saeflow.pipeline import compact, encode, stages
from saeflow.pipeline.lifecycle.forget import forget
from saeflow.pipeline.lineage import Lineage, last_log_row
from saeflow.query.ask import query
from saeflow.query.connection import check, connect
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.small_pipeline import quiet, recipe_data, tree

Row = tuple[int, int, float]


def run_of(finished: Finished) -> Artefact:
    return Lineage(finished.store, finished.recipe).features


def compacted(finished: Finished, settings: MergeSettings = USUAL_MERGE) -> Artefact:
    run = run_of(finished)
    if settings is USUAL_MERGE:
        compact.run(Lineage(finished.store, finished.recipe), quiet(), enough=2)
    else:
        compact.merge_parts(finished.store, run, finished.recipe, quiet(), enough=2, sizes=settings)
    return run


def rows_of(run: Artefact, order: str = "token_major") -> list[Row]:
    found: list[Row] = []
    for part in run.published().parts:
        for name in files_of(part, order):
            table = pq.read_table(run.part_path(part) / name, partitioning=None)
            found += zip(*(table.column(c).to_pylist() for c in ("token_id", "feature_id", "value")), strict=True)
    return sorted(found)


def totals(run: Artefact, name: str) -> list[dict[str, Any]]:
    """Rows of a table of all parts, those with the same key added up."""
    keys = [c for c in PART_TABLES[name].names if c not in ("n_tokens", "sum_value", "sum_squares", "max_value")]
    tables = [pq.read_table(run.part_path(part) / f"{name}.parquet") for part in run.published().parts]
    sums = [c for c in PART_TABLES[name].names if c not in (*keys, "max_value")]
    found = (
        pa.concat_tables(tables)
        .group_by(keys)
        .aggregate([(c, "sum") for c in sums])
        .sort_by([(k, "ascending") for k in keys])
    )
    return [{key.removesuffix("_sum"): value for key, value in row.items()} for row in found.to_pylist()]


@pytest.fixture(scope="module", params=["parts", "compacted"])
def run(
    request: pytest.FixtureRequest, finished: Finished, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Finished, Artefact]:
    if request.param == "parts":
        return finished, run_of(finished)
    store = Store(tmp_path_factory.mktemp("compacted") / "store")
    shutil.copytree(finished.store.root, store.root)
    copy = Finished(store, finished.recipe, finished.summary)
    return copy, compacted(copy)


def about_tokens(finished: Finished) -> dict[int, dict[str, Any]]:
    with contextlib.closing(connect(finished.store)) as connection:
        sql = (
            "select token_id, vocab_id, position, source from stg_tokens join stg_documents using (document_id) "
            "where mask"
        )
        return {row["token_id"]: row for row in query(connection, sql).to_pylist()}


def test_counts_by_source_position_and_strength_are_those_of_the_values(run):
    finished, artefact = run
    rows, tokens = rows_of(artefact), about_tokens(finished)
    wanted = {
        "feature_sources": Counter((f, tokens[t]["source"]) for t, f, _ in rows),
        "feature_positions": Counter((f, int(bands_of(np.array([tokens[t]["position"]]))[0])) for t, f, _ in rows),
        "feature_histogram": Counter((f, _bin(v)) for _, f, v in rows),
    }
    for (name, counted), key in zip(wanted.items(), ("source", "band", "bin"), strict=True):
        assert {(row["feature_id"], row[key]): row["n_tokens"] for row in totals(artefact, name)} == counted
    seen = Counter((about["source"], int(bands_of(np.array([about["position"]]))[0])) for about in tokens.values())
    assert {(r["source"], r["band"]): r["n_tokens"] for r in totals(artefact, "encoded_tokens")} == seen


def _bin(value: float) -> int:
    exponent = int(np.floor(np.log2(value)))
    return 4 * exponent + int(np.floor(4 * (value / 2.0**exponent - 1)))


def test_sums_by_source_are_those_of_the_values(run):
    finished, artefact = run
    tokens = about_tokens(finished)
    wanted: dict[tuple[int, str], list[float]] = {}
    for t, f, v in rows_of(artefact):
        wanted.setdefault((f, tokens[t]["source"]), []).append(v)
    for row in totals(artefact, "feature_sources"):
        values = np.array(wanted[row["feature_id"], row["source"]])
        assert row["sum_value"] == pytest.approx(values.sum(), rel=1e-12)
        assert row["sum_squares"] == pytest.approx((values**2).sum(), rel=1e-12)


def test_each_part_knows_its_most_frequent_words_and_which_features_fire_together(run):
    finished, artefact = run
    tokens, n_features = about_tokens(finished), finished.recipe.sae.n_features
    for part in artefact.published().parts:
        one = [row for name in files_of(part, "token_major") for row in _read(artefact.part_path(part) / name)]
        words = Counter((f, tokens[t]["vocab_id"]) for t, f, _ in one)
        best: dict[tuple[int, int], int] = {}
        for f in range(n_features):
            mine = sorted(((g, w) for (g, w) in words if g == f), key=lambda pair: (-words[pair], pair[1]))
            best |= {pair: words[pair] for pair in mine[:TOP_VOCAB]}
        found = pq.read_table(artefact.part_path(part) / "feature_vocab.parquet").to_pylist()
        assert {(row["feature_id"], row["vocab_id"]): row["n_tokens"] for row in found} == best
        fires = np.zeros((max(tokens) + 1, n_features), np.int64)
        for t, f, _ in one:
            fires[t, f] = 1
        both, n = fires.T @ fires, fires.sum(0)
        together = pq.read_table(artefact.part_path(part) / "coactivation.parquet").to_pylist()
        assert all(both[row["feature_id"], row["other_id"]] == row["n_both"] for row in together)
        for f in range(n_features):
            index = both[f] / np.maximum(n[f] + n - both[f], 1)
            index[f] = 0
            others = [row["other_id"] for row in together if row["feature_id"] == f]
            assert others == sorted(np.flatnonzero(index), key=lambda g: (-index[g], g))[:TOP]


def _read(path: Path) -> list[Row]:
    table = pq.read_table(path, partitioning=None)
    return list(zip(*(table.column(c).to_pylist() for c in ("token_id", "feature_id", "value")), strict=True))


def test_a_compacted_run_holds_the_same_rows_in_files_by_feature_range(copied):
    before = rows_of(run_of(copied))
    stats = totals(run_of(copied), "feature_stats")
    artefact = compacted(copied, MergeSettings(bucket_values=500, piece_values=300))
    [part] = artefact.published().parts
    assert rows_of(artefact) == rows_of(artefact, "feature_major") == before
    ends = [
        tuple(map(int, (name.split("low=")[1].split("/")[0], name.split("high=")[1].split("/")[0])))
        for name in files_of(part, "feature_major")
    ]
    assert len(ends) > 3
    assert [f for a, b in ends for f in range(a, b + 1)] == list(range(copied.recipe.sae.n_features))
    for row, other in zip(totals(artefact, "feature_stats"), stats, strict=True):
        assert row["n_tokens"] == other["n_tokens"]
        assert row["sum_value"] == pytest.approx(other["sum_value"], rel=1e-12)
    assert len(files_of(part, "token_major")) > 1
    with contextlib.closing(connect(copied.store)) as connection:
        assert [name for name, found in check(connection) if len(found)] == []


def test_features_that_fire_together_are_the_same_however_much_memory_counting_has(copied):
    target = run_of(copied)
    shutil.copytree(copied.store.root, copied.store.root.with_name("other"))
    other = Finished(Store(copied.store.root.with_name("other")), copied.recipe, copied.summary)
    compacted(other, MergeSettings(table_features=0, pair_bytes=4 * 64 * 10))
    compacted(copied)
    assert tree(run_of(other).path / "parts") == tree(target.path / "parts")


@pytest.mark.long
def test_a_run_in_which_no_feature_fires_answers_before_and_after_its_parts_are_merged(copied, ingredients, tmp_path):
    sae = shutil.copytree(Lineage(copied.store, copied.recipe).sae.path, tmp_path / "sae")
    tensors = load_file(sae / "sae_weights.safetensors")
    tensors["threshold"].fill_(1e9)
    save_file(tensors, sae / "sae_weights.safetensors")
    recipe = parse_recipe(recipe_data(ingredients, name="silent", data="small", sae={"source": str(sae)}, train=None))
    lineage = Lineage(copied.store, recipe)
    stages.run(lineage, quiet())
    for _ in range(2):
        with connect(copied.store, "silent") as connection:
            assert query(connection, "select * from tokens_where(0, 0)").num_rows == 0
            assert set(query(connection, "select n_tokens from feature_summary").column(0).to_pylist()) == {0}
            assert not [name for name, rows in check(connection) if len(rows)]
        compact.run(lineage.anew(), quiet(), enough=2)
    assert len(lineage.anew().features.published().parts) == 1


def test_a_compacted_run_is_not_encoded_again_and_compacting_twice_changes_nothing(copied):
    artefact = compacted(copied)
    before = tree(artefact.path)
    summary = stages.run(Lineage(copied.store, copied.recipe), quiet())
    compacted(copied)
    assert tree(artefact.path) == before
    assert summary["n_values"] == copied.summary["n_values"]


def test_a_document_forgotten_leaves_a_compacted_run_as_it_leaves_one_in_parts(copied, tmp_path):
    other = Finished(Store(tmp_path / "other"), copied.recipe, copied.summary)
    shutil.copytree(copied.store.root, other.store.root)
    compacted(copied)
    key = "letters/003"
    for each in (copied, other):
        forget(each.store, [key], quiet())
    assert rows_of(run_of(copied)) == rows_of(run_of(other))
    n_parts = len(run_of(copied).published().parts)
    assert n_parts == 2  # the compacted one without that part, and that part
    assert compacted(copied).published().total("n_values") == run_of(other).published().total("n_values")
    with contextlib.closing(connect(copied.store)) as connection:
        assert [name for name, found in check(connection) if len(found)] == []


def key_of(finished: Finished, index: int) -> str:
    """A document of a token part."""
    source = Lineage(finished.store, finished.recipe).tokens
    table = pq.read_table(source.part_file(source.published().parts[index], "documents.parquet"))
    return str(table.column("key")[1].as_py())


@pytest.mark.long
def test_parts_encoded_anew_between_others_of_a_compacted_one_are_merged_in_order(copied, tmp_path):
    other = Finished(Store(tmp_path / "other"), copied.recipe, copied.summary)
    shutil.copytree(copied.store.root, other.store.root)
    compacted(copied)
    for key in (key_of(copied, 2), key_of(copied, 0)):
        for each in (copied, other):
            forget(each.store, [key], quiet())
        [part] = compacted(copied).published().parts
        for order, columns in (
            ("token_major", ["token_id", "feature_id"]),
            ("feature_major", ["feature_id", "token_id"]),
        ):
            folder = run_of(copied).part_path(part)
            found = [pq.read_table(folder / name, partitioning=None) for name in files_of(part, order)]
            rows = list(zip(*(pa.concat_tables(found).column(name).to_pylist() for name in columns), strict=True))
            assert rows == sorted(rows)
        assert rows_of(run_of(copied)) == rows_of(run_of(copied), "feature_major") == rows_of(run_of(other))
        with contextlib.closing(connect(copied.store)) as connection:
            assert [name for name, found in check(connection) if len(found)] == []


def test_statistics_that_do_not_fit_the_values_end_a_compaction_and_nothing_is_written_out_of_bounds(copied):
    run = run_of(copied)
    path = run.part_path(run.published().parts[0]) / "feature_stats.parquet"
    table = pq.read_table(path)
    one_less = np.maximum(table.column("n_tokens").to_numpy() - 1, 0)
    pq.write_table(table.set_column(1, table.schema.field(1), pa.array(one_less)), path)
    with pytest.raises(UserError, match="missing or damaged"):
        compacted(copied)


def test_the_disk_must_hold_all_that_is_merged_and_what_of_the_corpus_is_not_encoded_yet(copied, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(Store, "require_free", lambda self, n_bytes, purpose: asked.append(n_bytes))
    run = run_of(copied)
    parts = run.published().parts
    shutil.rmtree(run.part_path(parts[-1]))
    encode.run(Lineage(copied.store, copied.recipe), quiet())
    l0 = last_log_row(Lineage(copied.store, copied.recipe).sae)["l0"]
    assert asked == [pytest.approx(8 * l0 * parts[-1].counts["n_tokens"], abs=1)]
    compacted(copied)
    assert asked[1:] == [sum(part.n_bytes for part in parts)]


def test_forgetting_leaves_torch_its_threads(copied):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        forget(copied.store, [key_of(copied, 1)], quiet())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def forget_beside_a_writer(copied, keys: list[str]) -> None:
    """Forget documents while the run is being written, so that it cannot follow yet."""
    with run_of(copied).writing():
        assert forget(copied.store, keys, quiet()).waiting


def test_what_a_compacted_run_still_holds_of_a_forgotten_document_is_not_shown(copied):
    compacted(copied)
    with contextlib.closing(connect(copied.store)) as connection:
        sql = "select distinct token_id from stg_token_major join tokens using (token_id) where key = 'letters/003'"
        secret = query(connection, sql).column(0).to_pylist()
        every = len(query(connection, "from stg_token_major"))
    forget_beside_a_writer(copied, ["letters/003"])
    with contextlib.closing(connect(copied.store)) as connection:
        shown = set(query(connection, "select distinct token_id from stg_token_major").column(0).to_pylist())
        kept = len(query(connection, "from stg_token_major"))
    assert secret
    assert not shown & set(secret)
    assert every / 2 < kept < every


def test_entries_and_sources_that_only_a_forgotten_document_has_are_not_shown(copied):
    compacted(copied)
    found = (
        "select any_value(key) as key, vocab_id, any_value(source) as source from tokens "
        "join (select distinct vocab_id, source from stg_feature_vocab, stg_feature_sources) using (vocab_id, source) "
        "group by vocab_id having count(distinct key) = 1 order by key"
    )
    with contextlib.closing(connect(copied.store)) as connection:
        secret = query(connection, found).to_pylist()[0]
        sql = "select key from documents where source = ?"
        keys = query(connection, sql, [secret["source"]]).column(0).to_pylist()
    forget_beside_a_writer(copied, keys)
    with contextlib.closing(connect(copied.store)) as connection:
        for view, column in {
            "stg_feature_vocab": "vocab_id", "feature_kind": "vocab_id",
            "stg_feature_sources": "source", "stg_encoded_tokens": "source",
        }.items():  # fmt: skip
            shown = query(connection, f"select distinct {column} from {view}").column(0).to_pylist()
            assert shown
            assert secret[column] not in shown


@pytest.mark.long
def test_several_saes_encoded_in_one_reading_are_those_of_their_own_runs(finished, tmp_path):
    names = {"one": {}, "two": {"sae": {"k": 2}}, "three": {"sae": {"architecture": "topk"}}}
    stores = [Store(tmp_path / name) for name in ("together", "apart")]
    recipes = [_changed(finished, name, change) for name, change in names.items()]
    for store in stores:
        shutil.copytree(finished.store.root, store.root)
        for recipe in recipes:
            stages.stages_of(recipe)["train"](Lineage(store, recipe), quiet())
    encode.run_together([Lineage(stores[0], recipe) for recipe in recipes], quiet())
    for recipe in recipes:
        encode.run(Lineage(stores[1], recipe), quiet())
        one, other = (Lineage(store, recipe).features.path for store in stores)
        assert tree(one) == tree(other)
        assert any(one.glob("parts/*"))


def _changed(finished: Finished, name: str, change: dict[str, Any]) -> Any:
    data = finished.recipe.model_dump()
    for section, settings in change.items():
        data[section] |= settings
    return type(finished.recipe).model_validate(data | {"name": name, "data": finished.recipe.data_name})


def a_part(index: int, n_values: int) -> PartRecord:
    return PartRecord(index=index, counts={"n_values": n_values}, files=[])


@given(
    sizes=st.lists(st.integers(0, 100), max_size=30), most=st.integers(1, 200), places=st.integers(1, 50),
    most_places=st.integers(1, 500),
)  # fmt: skip
def test_groups_are_neighbours_within_the_limits_and_take_every_part_that_has_a_partner(
    sizes, most, places, most_places
):
    parts = [a_part(i, n) for i, n in enumerate(sizes)]
    spans = {i: (places * i, places * (i + 1) - 1) for i in range(len(sizes))}
    settings = MergeSettings(most_values=most, most_tokens=most_places)
    groups = plan_merges(parts, spans, settings=settings)
    grouped = [part.index for group in groups for part in group]
    assert grouped == sorted(set(grouped))
    for group in groups:
        indices = [part.index for part in group]
        assert indices == list(range(indices[0], indices[-1] + 1))
        assert len(group) >= 2
        assert sum(part.counts["n_values"] for part in group) <= most
        assert len(group) * places <= most_places
    if groups == [] and len(parts) > 1:
        limits = [(a.counts["n_values"] + b.counts["n_values"], 2 * places) for a, b in itertools.pairwise(parts)]
        assert all(n > most or n_places > most_places for n, n_places in limits)


def test_parts_say_which_activation_parts_they_hold(copied):
    before = [covered(part) for part in run_of(copied).published().parts]
    [part] = compacted(copied).published().parts
    assert covered(part) == {index: digest for each in before for index, digest in each.items()}


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=60), wanted=st.integers(1, 100))
def test_buckets_take_every_feature_once_in_order_and_none_is_much_fuller_than_wanted(counts, wanted):
    found = feature_buckets(np.array(counts), wanted)
    assert [f for a, b in found for f in range(a, b + 1)] == list(range(len(counts)))
    share = sum(counts) / max(1, round(sum(counts) / wanted))
    assert all(sum(counts[a : b + 1]) <= share + max(counts) for a, b in found)
