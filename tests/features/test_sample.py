"""The sample of documents in each part: which documents it has, and that it is one however parts are cut and merged."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.activations.sparse_values import SparseRows, SparseValues
from saeflow.features import sample
from saeflow.features.compaction import MergeSettings, merge_whole_parts
from saeflow.features.files import ValuePieces
from saeflow.features.sample import SampledDocuments, SampleWriter, is_sampled
from saeflow.features.schema import SAMPLE_TABLES, has_sample
from saeflow.pipeline.lineage import Lineage
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.features.test_compaction import rows_of
from tests.support.small_pipeline import quiet


def test_a_64th_of_all_keys_is_in_the_sample_whatever_they_are():
    for keys in ([f"d{i}" for i in range(20_000)], [f"https://a.example/{i * i}" for i in range(20_000)]):
        assert sum(map(is_sampled, keys)) / len(keys) == pytest.approx(1 / 64, rel=0.15)


def some_values(n_tokens: int, n_features: int = 5) -> tuple[np.ndarray, SparseValues]:
    """Values of every third or so cell, no two alike."""
    drawn = np.random.default_rng(0).random((n_tokens, n_features)) < 0.3
    rows, ids = np.nonzero(drawn)
    starts = np.concatenate([[0], drawn.sum(1).cumsum()]).astype(np.int64)
    values = np.arange(1, len(rows) + 1, dtype=np.float32)
    return np.arange(n_tokens) + 100, SparseRows(starts, ids.astype(np.int32), values)


def cut(token_ids: np.ndarray, values: SparseValues, places: list[int]) -> list[tuple[np.ndarray, SparseValues]]:
    ends = [0, *sorted(places), len(token_ids)]
    found = []
    for a, b in itertools.pairwise(ends):
        first, last = values.row_starts[a], values.row_starts[b]
        starts = values.row_starts[a : b + 1] - first
        piece = SparseRows(starts, values.feature_ids[first:last], values.values[first:last])
        found.append((token_ids[a:b], piece))
    return found


@given(cuts=st.lists(st.integers(0, 40), max_size=6), size=st.integers(1, 80))
def test_pieces_of_values_do_not_depend_on_how_the_values_come(cuts, size):
    token_ids, values = some_values(40)

    def pieces(places: list[int]) -> list[tuple[list[int], list[float]]]:
        gathered = ValuePieces(size)
        found = [each for part in cut(token_ids, values, places) for each in gathered.add(*part)]
        return [(ids.tolist(), sparse.values.tolist()) for ids, sparse in [*found, gathered.rest()]]

    found = pieces(cuts)
    assert found == pieces([])
    assert [token for ids, _ in found for token in ids] == token_ids.tolist()
    assert [value for _, several in found for value in several] == values.values.tolist()
    assert all(len(several) >= size for _, several in found[:-1])


@pytest.mark.parametrize("sorted_values", [7, 10**6])
def test_the_table_has_the_values_of_sampled_documents_alone_sorted_by_feature(tmp_path, sorted_values):
    token_ids, values = some_values(40)
    places = np.repeat([0, -1, 1, -1], 10).astype(np.int32)
    documents = SampledDocuments(np.array([3, 9]), np.array([100, 120]), places)
    mask = np.arange(40) % 2 == 0
    files = []
    for folder, cuts in ((tmp_path / "whole", []), (tmp_path / "cut", [3, 11, 29])):
        folder.mkdir()
        writer = SampleWriter(folder, 5, sorted_values)
        for part in cut(token_ids, values, cuts):
            writer.add(documents, 100, *part)
        writer.add_documents(documents, mask)
        writer.close()
        files.append([(folder / f"{name}.parquet").read_bytes() for name in SAMPLE_TABLES])
    assert files[0] == files[1]
    rows = pq.read_table(tmp_path / "whole" / "sample.parquet").to_pylist()
    cells = [(token_ids[row], int(f), float(v)) for row, f, v in zip(values.rows, *values[1:], strict=True)]
    wanted = {cell for cell in cells if places[cell[0] - 100] >= 0}
    assert {(row["token_id"], row["feature_id"], row["value"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    if sorted_values > len(rows):
        assert rows == sorted(rows, key=lambda row: (row["feature_id"], row["token_id"]))
    known = pq.read_table(tmp_path / "whole" / "sample_documents.parquet").to_pylist()
    assert known == [
        {"document_id": 3, "first_token_id": 100, "n_tokens": 5},
        {"document_id": 9, "first_token_id": 120, "n_tokens": 5},
    ]


def copy_of(finished: Finished, root: Path) -> tuple[Artefact, Lineage]:
    shutil.copytree(finished.store.root, root)
    lineage = Lineage(Store(root), finished.recipe)
    return lineage.features, lineage


def merged(run: Artefact, lineage: Lineage, parts: list[PartRecord], settings: MergeSettings) -> PartRecord:
    with run.writing(), quiet().bar("merge", 1, "values") as bar:
        return merge_whole_parts(run, lineage.selection(), parts, bar, settings)


def table_of(run: Artefact, part: PartRecord, name: str) -> list[dict[str, object]]:
    return pq.read_table(run.part_path(part) / f"{name}.parquet").to_pylist()


def test_encoded_parts_have_the_sample_and_a_merge_keeps_it(finished, tmp_path, monkeypatch):
    """A larger share than a 64th, so that the small corpus has documents in and out of the sample."""
    run, lineage = copy_of(finished, tmp_path / "store")
    parts = list(run.published().parts)
    assert len(parts) > 1
    assert all(map(has_sample, parts))
    monkeypatch.setattr(sample, "SAMPLED_BELOW", "60")
    one = merged(run, lineage, parts, MergeSettings())
    owners = [pq.read_table(lineage.tokens.part_file(part, "documents.parquet")).to_pylist()
              for part in lineage.tokens.published().parts]  # fmt: skip
    documents = {row["document_id"]: row for rows in owners for row in rows}
    chosen = {number for number, row in documents.items() if is_sampled(row["key"])}
    assert 0 < len(chosen) < len(documents)
    tokens = [pq.read_table(lineage.tokens.part_file(part, "tokens.parquet")).to_pylist()
              for part in lineage.tokens.published().parts]  # fmt: skip
    mine = {row["token_id"] for rows in tokens for row in rows if row["document_id"] in chosen}
    wanted = sorted((f, t, v) for t, f, v in rows_of(run) if t in mine)
    found = [(r["feature_id"], r["token_id"], r["value"]) for r in table_of(run, one, "sample")]
    assert found == wanted
    known = table_of(run, one, "sample_documents")
    assert {row["document_id"] for row in known} == chosen
    assert all(row["first_token_id"] == documents[row["document_id"]]["first_token_id"] for row in known)
