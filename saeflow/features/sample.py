"""The values of a sample of whole documents, stored apart: a question about all values first reads a 64th of them.

A document is in the sample or not by its key alone. So the sample is one for all features, runs and stores, a document
stays in it when the corpus grows, and compaction changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.sparse_values import SparseRows, SparseValues
from saeflow.corpus.selection import TokenSelection
from saeflow.features.files import ValuePieces, by_feature, column_encodings, write_table
from saeflow.features.schema import SAMPLE_TABLES
from saeflow.sae.exact import feature_major
from saeflow.store.files import ROW_GROUP

SAMPLED_BELOW = "04"
"""A key whose MD5 begins with less is in the sample: 4 of 256 beginnings, a 64th of all documents."""

SORTED_VALUES = 8_000_000
"""Values of the sample that are sorted by feature at once."""


def is_sampled(key: str) -> bool:
    return hashlib.md5(key.encode(), usedforsecurity=False).hexdigest() < SAMPLED_BELOW


@dataclass(frozen=True)
class SampledDocuments:
    """The documents of one part of the tokens that are in the sample, and which tokens belong to them."""

    document_ids: np.ndarray
    """(d,), ascending."""
    first_tokens: np.ndarray
    """(d,): the first token of each."""
    places: np.ndarray
    """int32 (n,): for each token of the part the place of its document in `document_ids`, or -1."""

    def table(self, mask: np.ndarray) -> pa.Table:
        """Return the documents with tokens under the mask (n,), and how many these are."""
        n_tokens = np.bincount(self.places[mask & (self.places >= 0)], minlength=len(self.document_ids))
        found = n_tokens > 0
        columns = [self.document_ids[found], self.first_tokens[found], n_tokens[found]]
        return pa.table(columns, schema=SAMPLE_TABLES["sample_documents"])


def read_sampled_documents(selection: TokenSelection, index: int, owners: np.ndarray) -> SampledDocuments:
    """Return the sampled documents of a part; `owners` (n,) is the document_id of each of its tokens, -1 for none."""
    path = selection.source.part_file(selection.parts[index], "documents.parquet")
    table = pq.read_table(path, columns=["document_id", "key", "first_token_id"])
    chosen = [is_sampled(key) for key in table.column("key").to_pylist()]
    table = table.filter(pa.array(chosen, pa.bool_())).sort_by("document_id")
    ids, firsts = table.column("document_id").to_numpy(), table.column("first_token_id").fill_null(-1).to_numpy()
    at = np.searchsorted(ids, owners)
    mine = np.append(ids, -2)[at] == owners
    return SampledDocuments(ids, firsts, np.where(mine, at, -1).astype(np.int32))


class SampleWriter:
    """Takes values of consecutive tokens, keeps those of sampled documents, and writes the two tables of a part.

    Values are sorted by feature, then token, in stretches of SORTED_VALUES: so memory does not grow with the part.
    """

    def __init__(self, folder: Path, n_features: int, sorted_values: int = SORTED_VALUES) -> None:
        self.folder, self.n_features = folder, n_features
        self._pieces = ValuePieces(sorted_values)
        self._documents = [SAMPLE_TABLES["sample_documents"].empty_table()]
        schema = SAMPLE_TABLES["sample"]
        self._writer = pq.ParquetWriter(folder / "sample.parquet", schema, **column_encodings(schema))

    def add(self, sampled: SampledDocuments, first_token: int, token_ids: np.ndarray, sparse: SparseValues) -> None:
        """Add values of some tokens (n,) of the part of the tokens that begins with `first_token`."""
        keep = sampled.places[token_ids - first_token] >= 0
        if keep.any():
            for piece in self._pieces.add(token_ids[keep], _kept_rows(sparse, keep)):
                self._write(*piece)

    def add_documents(self, sampled: SampledDocuments, mask: np.ndarray) -> None:
        """Add the sampled documents that have tokens under the mask of encoded tokens."""
        self._documents.append(sampled.table(mask))

    def close(self) -> None:
        self._write(*self._pieces.rest())
        self._writer.close()
        write_table(self.folder / "sample_documents.parquet", pa.concat_tables(self._documents))

    def _write(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        columns = by_feature(token_ids, feature_major(sparse, self.n_features))
        self._writer.write_table(pa.table(columns, SAMPLE_TABLES["sample"]), row_group_size=ROW_GROUP)


def _kept_rows(sparse: SparseValues, keep: np.ndarray) -> SparseValues:
    """Return the entries of the rows that `keep` (B,) marks."""
    lengths = np.diff(sparse.row_starts)
    entries = np.repeat(keep, lengths)
    starts = np.concatenate([[0], lengths[keep].cumsum()]).astype(np.int64)
    return SparseRows(starts, sparse.feature_ids[entries], sparse.values[entries])
