"""Statistics of a part's values: by feature, and by feature and source, position, strength, word or other feature.

Counts, maxima and histograms are exact however a part is cut into pieces. Sums are in float64, in the order in which
values are added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.sparse_values import SparseValues
from saeflow.corpus.selection import TokenSelection
from saeflow.features.coactivation import CoactivePairs, coactive_pairs
from saeflow.features.counting import LOWEST_BIN, N_BINS, Counts, KeyTotals, bins_of, most_frequent_keys, totals_by_key
from saeflow.features.files import write_table
from saeflow.features.sample import SampledDocuments, read_sampled_documents
from saeflow.features.schema import MOST_SOURCES, PART_TABLES, TOP, TOP_VOCAB
from saeflow.sae.exact import FeatureMajor, feature_statistics
from saeflow.sae.kernels import Doubles, Ids

TokenSource = tuple[str | None, bool]
"""Name of a source, and True if it stands for all sources that have no row of their own."""

REST_OF_SOURCES: TokenSource = (None, True)


@dataclass(frozen=True)
class TokenColumns:
    """Columns (n,) of the tokens of one part, from `first_token` on."""

    first_token: int
    mask: np.ndarray
    """True for tokens that are encoded."""
    vocab_ids: np.ndarray
    source_codes: np.ndarray
    """int32: places in `sources`."""
    bands: np.ndarray
    """int32: `bands_of` the positions."""
    sources: list[TokenSource]
    sampled: SampledDocuments
    """The documents of the whole part that are in the sample."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Tokens that are not encoded, by reason."""

    @property
    def left_out_counts(self) -> dict[str, int]:
        """`left_out` as counts of a part's record."""
        return {f"n_left_out_by_{reason}": n for reason, n in self.left_out.items()}

    def without(self, token_ids: np.ndarray) -> TokenColumns:
        """Return the columns if these tokens are not encoded, because their vectors are too long."""
        mask = self.mask.copy()
        mask[token_ids - self.first_token] = False
        left_out = {**self.left_out, "length": int(self.mask.sum() - mask.sum())}
        return replace(self, mask=mask, left_out=left_out)

    def of(self, token_ids: np.ndarray) -> TokenColumns:
        """Return the columns of some tokens."""
        at = token_ids - self.first_token
        columns = (self.mask[at], self.vocab_ids[at], self.source_codes[at], self.bands[at])
        return TokenColumns(self.first_token, *columns, self.sources, self.sampled)


def read_token_columns(selection: TokenSelection, index: int) -> TokenColumns:
    """Read the tokens of one part; sources beyond the MOST_SOURCES with most encoded tokens count as one."""
    part = selection.parts[index]
    tokens = pq.read_table(selection.source.part_file(part, "tokens.parquet"), columns=["vocab_id", "document_id"])
    left_out: Counter[str] = Counter()
    mask = selection.mask(index, left_out=left_out).reshape(-1)
    owners = tokens.column("document_id").fill_null(-1).to_numpy()
    codes, sources = _source_codes(selection, index, owners, mask)
    sampled = read_sampled_documents(selection, index, owners)
    bands = np.tile(bands_of(np.arange(selection.length)), part.counts["n_sequences"])
    first = part.counts["first_sequence"] * selection.length
    return TokenColumns(first, mask, tokens.column("vocab_id").to_numpy(), codes, bands, sources, sampled, left_out)


def bands_of(positions: np.ndarray) -> np.ndarray:
    """Return int32 bands: 0 for position 0, and b for the positions from 2^(b - 1) to 2^b - 1."""
    return np.frexp(positions.astype(np.float64))[1].astype(np.int32)


def _source_codes(
    selection: TokenSelection, index: int, owners: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, list[TokenSource]]:
    """Return codes int32 (n,) of all tokens, and the sources they stand for, by encoded tokens, then by name."""
    table = pq.read_table(
        selection.source.part_file(selection.parts[index], "documents.parquet"), columns=["document_id", "source"]
    )
    names = table.column("source").to_pylist()
    every = sorted(set(names), key=lambda name: (name is None, name or ""))
    number = {name: i for i, name in enumerate(every)}
    ids = table.column("document_id").to_numpy()
    of_document = np.array([number[name] for name in names], np.int64)
    order = np.argsort(ids)
    place = np.searchsorted(ids[order], owners[mask]) if len(ids) else np.empty(0, np.int64)
    found = of_document[order][place]
    counts = np.bincount(found, minlength=len(every))
    kept = np.argsort(-counts, kind="stable")[:MOST_SOURCES]
    code = np.full(len(every), len(kept), np.int32)
    code[kept] = np.arange(len(kept))
    codes = np.zeros(len(owners), np.int32)
    codes[mask] = code[found]
    sources: list[TokenSource] = [(every[i], False) for i in kept]
    return codes, [*sources, REST_OF_SOURCES]


_PIECE_VOCAB = 64
"""Vocabulary entries of a feature that are remembered from one piece of a part to the next."""

_MOST_TOTALS = 16
"""Pieces whose totals are kept apart before they are added up."""

_NO_TOTALS = KeyTotals(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0), np.empty(0))


class PartStatistics:
    """Adds up the pieces of a part: `count_tokens`, `add` its values, then take the `tables`."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.n_tokens = np.zeros(n_features, np.int64)
        self.sum_value = np.zeros(n_features)
        self.sum_squares = np.zeros(n_features)
        self.max_value = np.zeros(n_features, np.float32)
        self._codes: dict[TokenSource, int] = {REST_OF_SOURCES: 0}
        self._encoded: Counter[tuple[int, int]] = Counter()
        self._grouped: dict[str, list[KeyTotals]] = {}
        self._together = np.empty((0, 3), np.int64)

    def count_tokens(self, tokens: TokenColumns) -> None:
        """Count the tokens of a part that are encoded."""
        codes, bands = self._own_codes(tokens)[tokens.mask], tokens.bands[tokens.mask]
        pairs, counts = np.unique(np.stack([codes, bands]), axis=1, return_counts=True)
        for code, band, n in zip(*pairs.tolist(), counts.tolist(), strict=True):
            self._encoded[code, band] += n

    def add(
        self, tokens: TokenColumns, sparse: SparseValues, entries: FeatureMajor, totals: bool = True, pairs: bool = True
    ) -> None:
        """Add values of some tokens, in both orders: their `totals`, and the `pairs` of features that fire together."""
        found = feature_statistics(sparse, self.n_features)
        if totals:
            self._add_features(*found)
            self._add_groups(tokens, entries)
        if pairs:
            self._add_pairs(coactive_pairs(sparse, entries, found.n_tokens, TOP))

    def _add_features(self, n_tokens: Counts, total: Doubles, squares: Doubles, strongest: np.ndarray) -> None:
        self.n_tokens += n_tokens
        self.sum_value += total
        self.sum_squares += squares
        mine, theirs = self.max_value, strongest.astype(np.float32)
        ahead = (abs(theirs) > abs(mine)) | ((abs(theirs) == abs(mine)) & (theirs > 0))
        self.max_value = np.where(ahead, theirs, mine)

    def _add_groups(self, tokens: TokenColumns, entries: FeatureMajor) -> None:
        by_entry = FeatureMajor(entries.feature_starts, np.arange(len(entries.values), dtype=np.int32), entries.values)
        self._group("histogram", totals_by_key(by_entry, bins_of(entries.values) - LOWEST_BIN, N_BINS))
        self._group("sources", totals_by_key(entries, self._own_codes(tokens), len(self._codes)))
        self._group("positions", totals_by_key(entries, tokens.bands, _number_of_keys(tokens.bands)))
        words = most_frequent_keys(entries, tokens.vocab_ids, _number_of_keys(tokens.vocab_ids), _PIECE_VOCAB)
        self._grouped["vocab"] = [most_frequent(added_up([self._of("vocab"), words]), _PIECE_VOCAB)]

    def add_tables(self, tables: Mapping[str, pa.Table]) -> None:
        """Add another part by its tables, without words and pairs: a part keeps only the most frequent of these."""
        columns = {name: [column.to_numpy() for column in table.columns] for name, table in tables.items()}
        self._add_features(*columns["feature_stats"][1:])
        ids, bins, n = columns["feature_histogram"]
        none = np.zeros(len(n))
        self._group("histogram", KeyTotals(ids, bins.astype(np.int32) - LOWEST_BIN, n, none, none))
        ids, bands, n, total = columns["feature_positions"]
        self._group("positions", KeyTotals(ids, bands.astype(np.int32), n, total, np.zeros(len(n))))
        ids, n, total, squares = (columns["feature_sources"][i] for i in (0, 3, 4, 5))
        self._group("sources", KeyTotals(ids, self._codes_in(tables["feature_sources"]), n, total, squares))
        encoded = tables["encoded_tokens"]
        _, _, bands, n = columns["encoded_tokens"]
        for code, band, count in zip(self._codes_in(encoded).tolist(), bands.tolist(), n.tolist(), strict=True):
            self._encoded[code, band] += count

    def _codes_in(self, table: pa.Table) -> Ids:
        pairs = zip(table.column("source").to_pylist(), table.column("is_rest").to_pylist(), strict=True)
        return np.array([self._codes.setdefault(pair, len(self._codes)) for pair in pairs], np.int32)

    def set_words(self, first: int, found: KeyTotals) -> None:
        """Set the most frequent words of the features from `first` on, counted over the whole part."""
        if first == 0:
            self._grouped["vocab"] = []
        self._group("vocab", found._replace(feature_ids=found.feature_ids + np.int32(first)))

    def set_pairs(self, pairs: CoactivePairs) -> None:
        """Set which features fire together, counted over the whole part."""
        self._together = np.stack([each.astype(np.int64) for each in pairs], 1)

    def tables(self) -> dict[str, pa.Table]:
        """Return the part's tables by name, each sorted by its first columns."""
        ids = np.arange(self.n_features)
        columns: dict[str, Sequence[np.ndarray]] = {
            "feature_stats": [ids, self.n_tokens, self.sum_value, self.sum_squares, self.max_value],
            "feature_histogram": self._histogram(),
            "feature_sources": self._sources(),
            "feature_positions": list(self._of("positions")[:4]),
            "feature_vocab": list(most_frequent(self._of("vocab"), TOP_VOCAB)[:4]),
            "coactivation": list(self._together.T),
            "encoded_tokens": self._token_counts(),
        }
        return {name: _statistics_table(PART_TABLES[name], found) for name, found in columns.items()}

    def write(self, folder: Path) -> None:
        for name, table in self.tables().items():
            write_table(folder / f"{name}.parquet", table)

    def _own_codes(self, tokens: TokenColumns) -> Ids:
        """Return this object's numbers for the sources of a part."""
        mine = [self._codes.setdefault(source, len(self._codes)) for source in tokens.sources]
        return np.asarray(np.array(mine, np.int32)[tokens.source_codes])

    def _group(self, name: str, found: KeyTotals) -> None:
        groups = self._grouped.setdefault(name, [])
        groups.append(found)
        if len(groups) >= _MOST_TOTALS:
            self._grouped[name] = [added_up(groups)]

    def _of(self, name: str) -> KeyTotals:
        return added_up(self._grouped.get(name) or [_NO_TOTALS])

    def _add_pairs(self, pairs: CoactivePairs) -> None:
        """Add the pairs of another piece: counts of a pair add up, and a feature keeps the best TOP."""
        before = self._together
        self.set_pairs(pairs)
        if not len(before):
            return
        rows = np.concatenate([before, self._together])
        keys, place = np.unique(rows[:, 0] * self.n_features + rows[:, 1], return_inverse=True)
        both = np.bincount(place, rows[:, 2]).astype(np.int64)
        f, g = keys // self.n_features, keys % self.n_features
        index = both / (self.n_tokens[f] + self.n_tokens[g] - both)
        order = np.lexsort([g, -index, f])
        kept = order[_places_of_ids(f[order]) < TOP]
        self._together = np.stack([f[kept], g[kept], both[kept]], 1)

    def _histogram(self) -> list[np.ndarray]:
        found = self._of("histogram")
        return [found.feature_ids, found.keys + LOWEST_BIN, found.n_tokens]

    def _rows_of_sources(self) -> tuple[Ids, list[TokenSource]]:
        """Return the row each code is counted in: its own for sources with most tokens, else that of the rest."""
        tokens: Counter[int] = Counter()
        for (code, _), n in self._encoded.items():
            tokens[code] += n
        named = [source for source in self._codes if source != REST_OF_SOURCES]
        named.sort(key=lambda s: (-tokens[self._codes[s]], s[0] is None, s[0] or ""))
        rows = [*named[:MOST_SOURCES], REST_OF_SOURCES]
        place = {source: i for i, source in enumerate(rows)}
        return np.array([place.get(source, len(rows) - 1) for source in self._codes], np.int32), rows

    def _sources(self) -> list[np.ndarray]:
        found = self._of("sources")
        place, rows = self._rows_of_sources()
        found = added_up([found._replace(keys=place[found.keys])])
        names = np.array([name for name, _ in rows], object)[found.keys]
        is_rest = np.array([rest for _, rest in rows])[found.keys]
        return [found.feature_ids, names, is_rest, *found[2:]]

    def _token_counts(self) -> list[np.ndarray]:
        place, rows = self._rows_of_sources()
        counts: Counter[tuple[int, int]] = Counter()
        for (code, band), n in self._encoded.items():
            counts[int(place[code]), band] += n
        keys = sorted(counts)
        names = np.array([rows[row][0] for row, _ in keys], object)
        is_rest = np.array([rows[row][1] for row, _ in keys], bool)
        return [names, is_rest, np.array([band for _, band in keys]), np.array([counts[key] for key in keys], np.int64)]


def _number_of_keys(keys: np.ndarray) -> int:
    return int(keys.max(initial=-1)) + 1


def added_up(groups: Sequence[KeyTotals]) -> KeyTotals:
    """Return totals in which each feature and key has one row, added in the order given."""
    ids, keys, n, total, squares = (np.concatenate([group[i] for group in groups]) for i in range(5))
    order = np.lexsort((keys, ids))
    ids, keys = ids[order], keys[order]
    first = np.flatnonzero(np.r_[True, (ids[1:] != ids[:-1]) | (keys[1:] != keys[:-1])]) if len(ids) else order
    n, total, squares = (np.add.reduceat(each[order], first) if len(first) else each for each in (n, total, squares))
    return KeyTotals(ids[first], keys[first], n, total, squares)


def most_frequent(found: KeyTotals, most: int) -> KeyTotals:
    """Return each feature's `most` keys with most tokens, in the order of keys; among equals the lower keys count."""
    order = np.lexsort((found.keys, -found.n_tokens, found.feature_ids))
    kept = np.sort(order[_places_of_ids(found.feature_ids[order]) < most])
    return KeyTotals._make(each[kept] for each in found)


def _places_of_ids(ids: np.ndarray) -> np.ndarray:
    """Return the place of each entry among the entries of its id; ids are sorted."""
    if not len(ids):
        return ids
    first = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    return np.arange(len(ids)) - np.repeat(first, np.diff(np.r_[first, len(ids)]))


def _statistics_table(schema: pa.Schema, columns: Sequence[np.ndarray]) -> pa.Table:
    arrays = [pa.array(values, field.type, from_pandas=True) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
