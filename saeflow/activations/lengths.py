"""Vectors that are too long to count: lengths as stored, the median they are compared with, and the longest allowed.

Attention sinks (Xiao et al. 2023, arXiv 2309.17453) have vectors a hundred times as long as others. They lie at the
first position and at delimiters, so no position names them all; their length does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.activations.shards import open_site, stored_sites
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.runtime.devices import to_processor
from saeflow.runtime.errors import UserError
from saeflow.runtime.threads import ranges
from saeflow.store.artefact import Artefact
from saeflow.store.files import ROW_GROUP
from saeflow.store.records import PartRecord

LENGTHS_FILE = "lengths.parquet"
_SAMPLE_TOKENS = 1024
"""Tokens whose median length stands for that of all."""
_KEPT_PARTS = 4096


def lengths_of(values: Tensor) -> np.ndarray:
    """Return the lengths float32 (...) of vectors (..., D)."""
    return to_processor(torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)).numpy()


class PartLengths:
    """The lengths of a part's vectors: one column a site, one row a token, in the order of tokens."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._columns: dict[str, list[np.ndarray]] = {site.name: [np.empty(0, np.float32)] for site in sites}

    def add(self, lengths: Sequence[np.ndarray]) -> None:
        """Add the lengths (s, T) at each site of the sequences that come next."""
        for column, each in zip(self._columns.values(), lengths, strict=True):
            column.append(each.reshape(-1))

    def write(self, path: Path) -> None:
        table = pa.table({name: np.concatenate(column) for name, column in self._columns.items()})
        packed = dict.fromkeys(table.column_names, "BYTE_STREAM_SPLIT")
        pq.write_table(
            table, path, compression="zstd", use_dictionary=False, column_encoding=packed, row_group_size=ROW_GROUP
        )


def median_of(lengths: np.ndarray) -> float:
    """Return the median of those that are finite; 0 of none."""
    finite = lengths[np.isfinite(lengths)]
    return float(np.median(finite)) if len(finite) else 0.0


def median_length(source: Artefact, stored: Artefact, site: Site) -> float:
    """Return the median length at a site. It is chosen once for all activations, and then stands in their record.

    An earlier saeflow did not record it, nor does a table: then the first vectors are read.
    """
    known = stored.record.facts.get("median_lengths") or {}
    if site.name not in known:
        part = stored.published().parts[0]
        tokens = {each.index: each for each in source.published().parts}
        mask = first_tokens(token_parts.read_part(source, tokens[part.index])[1])
        rows = slice(0, len(mask))
        known = {
            each.name: median_of(first_tokens(lengths_of(open_site(stored, part, each).read(rows)))[mask])
            for each in stored_sites(stored)
        }
        stored.add_facts({"median_lengths": known})
    return float(known[site.name])


def first_tokens(values: np.ndarray) -> np.ndarray:
    """Return the first sequences of (S, T), about `_SAMPLE_TOKENS` tokens."""
    return values[: max(1, _SAMPLE_TOKENS // values.shape[1]), :_SAMPLE_TOKENS]


def longest_allowed(used: TokenSelection, stored: Artefact, site: Site) -> float | None:
    """Return the length above which vectors at a site do not count; None if all count."""
    if used.skip_norms_above is None or not stored.published().parts:
        return None
    return times_median(used.skip_norms_above, median_length(used.source, stored, site), site)


def times_median(skip_norms_above: float, median: float, site: Site) -> float:
    """Return the longest allowed length. Raises UserError if the median is zero."""
    if not median > 0:
        raise UserError(
            f"activations.skip_norms_above is {skip_norms_above:g}, but the median length at {site.name} is 0: "
            "half of the vectors or more are zero. Leave the setting out."
        )
    return skip_norms_above * median


def too_long(values: Tensor, limit: float | None) -> np.ndarray:
    """Return bool (...): which vectors (..., D), given as they are stored, do not count."""
    return np.zeros(values.shape[:-1], bool) if limit is None else lengths_of(values) > limit


def without_long(values: Sequence[Tensor], limit: float | None) -> list[Tensor]:
    """Return the rows (n, D) of several sites, without those whose vectors are too long at the first."""
    if limit is None or not (long := too_long(values[0], limit)).any():
        return list(values)
    short = torch.from_numpy(~long)
    return [each[short.to(each.device)] for each in values]


class LongVectors:
    """Where a site's stored vectors are longer than allowed. Only their places are kept in memory."""

    def __init__(self, stored: Artefact, parts: Sequence[PartRecord], site: Site, limit: float) -> None:
        self.stored, self.site, self.limit = stored, site, limit
        self._parts = {part.index: part for part in parts}
        self._places = lru_cache(_KEPT_PARTS)(self._find)

    def without(self, mask: np.ndarray, index: int, first_sequence: int = 0) -> np.ndarray:
        """Return the mask (s, T) of a part's sequences from `first_sequence` on, False at long vectors."""
        places = self._places(index) - first_sequence * mask.shape[1]
        mask = mask.copy()
        mask.reshape(-1)[places[(places >= 0) & (places < mask.size)]] = False
        return mask

    def _find(self, index: int) -> np.ndarray:
        """Return the places int32 (n,) of the long vectors among a part's tokens, in order."""
        lengths = stored_lengths(self.stored, self._parts[index], self.site)
        return np.flatnonzero(lengths > self.limit).astype(np.int32)


def stored_lengths(stored: Artefact, part: PartRecord, site: Site) -> np.ndarray:
    """Return the lengths (n,) of a part's vectors. If none are stored, as in tables, the vectors are read."""
    if has_lengths(part):
        return np.asarray(pq.read_table(stored.part_file(part, LENGTHS_FILE), columns=[site.name]).column(0).to_numpy())
    array = open_site(stored, part, site)
    shards = (slice(*ends) for ends in ranges(array.shape[0], array.shard))
    return np.concatenate([np.empty(0, np.float32), *(lengths_of(array.read(rows)).reshape(-1) for rows in shards)])


def has_lengths(part: PartRecord) -> bool:
    return any(file.name == LENGTHS_FILE for file in part.files)
