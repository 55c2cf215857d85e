"""Statistics of a part's values: per feature, and per feature and source, position, strength, word, other feature.

Counts, maxima and histograms are exact however a part is cut; sums are in float64, in the order in which values are
added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from saeflow.features.counting import FIRST_BIN, Grouped, Pairs, bins_of, by_key, coactive, most_frequent_keys
from saeflow.features.schema import MOST_SOURCES, PART_TABLES, TOP, TOP_VOCAB
from saeflow.features.token_columns import REST, Source, TokenFacts
from saeflow.sae.encoder import FeatureMajor, FeatureStatistics, SparseValues, feature_statistics
from saeflow.sae.kernels import Ids

_VOCAB_HELD = 64
"""Vocabulary entries of a feature that are remembered from one piece of a part to the next."""

_GROUPS_HELD = 16
"""Pieces whose groups are kept apart before they are merged."""

_N_BINS = 4 * 255
"""Bins of all finite float32."""


_NOTHING = Grouped(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0), np.empty(0))


class Totals:
    """Adds up pieces of a part: `see` its tokens, `add` its values, then take the tables."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.n_tokens = np.zeros(n_features, np.int64)
        self.sum_value = np.zeros(n_features)
        self.sum_squares = np.zeros(n_features)
        self.max_value = np.zeros(n_features, np.float32)
        self._codes: dict[Source, int] = {REST: 0}
        self._encoded: Counter[tuple[int, int]] = Counter()
        self._grouped: dict[str, list[Grouped]] = {}
        self._together = np.empty((0, 3), np.int64)

    def see(self, facts: TokenFacts) -> None:
        """Count the used tokens of a part."""
        codes, bands = self._own_codes(facts)[facts.mask], facts.bands[facts.mask]
        pairs, counts = np.unique(np.stack([codes, bands]), axis=1, return_counts=True)
        for code, band, n in zip(*pairs.tolist(), counts.tolist(), strict=True):
            self._encoded[code, band] += n

    def add(
        self, facts: TokenFacts, sparse: SparseValues, entries: FeatureMajor, stats: bool = True, pairs: bool = True
    ) -> None:
        """Values of some tokens, whose facts these are, in both orders. `pairs`: also which features fire together."""
        found = feature_statistics(sparse, self.n_features)
        if stats:
            self._add_statistics(found, facts, entries)
        if pairs:
            self._pair(coactive(sparse, entries, found.n_tokens, TOP))

    def _add_statistics(self, found: FeatureStatistics, facts: TokenFacts, entries: FeatureMajor) -> None:
        self.n_tokens += found.n_tokens
        self.sum_value += found.sum
        self.sum_squares += found.sum_squares
        self.max_value = np.maximum(self.max_value, found.max)
        by_entry = FeatureMajor(entries.feature_starts, np.arange(len(entries.values), dtype=np.int32), entries.values)
        self._group("histogram", by_key(by_entry, bins_of(entries.values) - np.int32(FIRST_BIN), _N_BINS))
        self._group("sources", by_key(entries, self._own_codes(facts), len(self._codes)))
        self._group("positions", by_key(entries, facts.bands, _n_keys(facts.bands)))
        words = most_frequent_keys(entries, facts.vocab_ids, _n_keys(facts.vocab_ids), _VOCAB_HELD)
        self._grouped["vocab"] = [most_frequent(merged([self._of("vocab"), words]), _VOCAB_HELD)]

    def absorb(self, tables: Mapping[str, pa.Table]) -> None:
        """Another part by its tables, but for words and pairs, of which a part keeps the most frequent ones only."""
        columns = {name: [column.to_numpy() for column in table.columns] for name, table in tables.items()}
        _, n_tokens, sum_value, sum_squares, max_value = columns["feature_stats"]
        self.n_tokens += n_tokens
        self.sum_value += sum_value
        self.sum_squares += sum_squares
        self.max_value = np.maximum(self.max_value, max_value.astype(np.float32))
        ids, bins, n = columns["feature_histogram"]
        self._group("histogram", Grouped(ids, bins.astype(np.int32) - FIRST_BIN, n, np.zeros(len(n)), np.zeros(len(n))))
        ids, bands, n, total = columns["feature_positions"]
        self._group("positions", Grouped(ids, bands.astype(np.int32), n, total, np.zeros(len(n))))
        ids, n, total, squares = (columns["feature_sources"][i] for i in (0, 3, 4, 5))
        self._group("sources", Grouped(ids, self._codes_in(tables["feature_sources"]), n, total, squares))
        seen = tables["encoded_tokens"]
        _, _, bands, n = columns["encoded_tokens"]
        for code, band, count in zip(self._codes_in(seen).tolist(), bands.tolist(), n.tolist(), strict=True):
            self._encoded[code, band] += count

    def _codes_in(self, table: pa.Table) -> Ids:
        pairs = zip(table.column("source").to_pylist(), table.column("is_rest").to_pylist(), strict=True)
        return np.array([self._codes.setdefault(pair, len(self._codes)) for pair in pairs], np.int32)

    def words(self, first: int, found: Grouped) -> None:
        """Most frequent words of the features from `first` on, in the place of those known so far: counted over the
        whole part by the caller."""
        if first == 0:
            self._grouped["vocab"] = []
        self._group("vocab", found._replace(feature_ids=found.feature_ids + np.int32(first)))

    def together(self, pairs: Pairs) -> None:
        """Set which features fire together, where the caller has counted them over the whole part."""
        self._together = np.stack([each.astype(np.int64) for each in pairs], 1)

    def tables(self) -> dict[str, pa.Table]:
        """The part's tables by name, each sorted by its first columns."""
        columns: dict[str, Sequence[np.ndarray]] = {
            "feature_stats": [
                np.arange(self.n_features), self.n_tokens, self.sum_value, self.sum_squares, self.max_value,
            ],
            "feature_histogram": self._histogram(),
            "feature_sources": self._sources(),
            "feature_positions": list(self._of("positions")[:4]),
            "feature_vocab": list(most_frequent(self._of("vocab"), TOP_VOCAB)[:4]),
            "coactivation": list(self._together.T),
            "encoded_tokens": self._seen(),
        }  # fmt: skip
        return {name: _table(PART_TABLES[name], found) for name, found in columns.items()}

    def _own_codes(self, facts: TokenFacts) -> Ids:
        """Numbers of this object for the sources of a part."""
        mine = [self._codes.setdefault(source, len(self._codes)) for source in facts.sources]
        return np.asarray(np.array(mine, np.int32)[facts.source_codes])

    def _group(self, name: str, found: Grouped) -> None:
        groups = self._grouped.setdefault(name, [])
        groups.append(found)
        if len(groups) >= _GROUPS_HELD:
            self._grouped[name] = [merged(groups)]

    def _of(self, name: str) -> Grouped:
        return merged(self._grouped.get(name) or [_NOTHING])

    def _pair(self, pairs: Pairs) -> None:
        """Pairs of another piece: counts add up where a pair stands in both, and the best TOP of a feature remain."""
        before = self._together
        self.together(pairs)
        if not len(before):
            return
        rows = np.concatenate([before, self._together])
        keys, place = np.unique(rows[:, 0] * self.n_features + rows[:, 1], return_inverse=True)
        both = np.bincount(place, rows[:, 2]).astype(np.int64)
        f, g = keys // self.n_features, keys % self.n_features
        index = both / (self.n_tokens[f] + self.n_tokens[g] - both)
        order = np.lexsort([g, -index, f])
        kept = order[_places(f[order]) < TOP]
        self._together = np.stack([f[kept], g[kept], both[kept]], 1)

    def _histogram(self) -> list[np.ndarray]:
        found = self._of("histogram")
        return [found.feature_ids, found.keys + FIRST_BIN, found.n_tokens]

    def _kept_sources(self) -> tuple[Ids, list[Source]]:
        """For each code the row it is counted in: of the sources with most tokens its own, else that of the rest."""
        tokens: Counter[int] = Counter()
        for (code, _), n in self._encoded.items():
            tokens[code] += n
        named = [source for source in self._codes if source != REST]
        named.sort(key=lambda s: (-tokens[self._codes[s]], s[0] is None, s[0] or ""))
        rows = [*named[:MOST_SOURCES], REST]
        place = {source: i for i, source in enumerate(rows)}
        return np.array([place.get(source, len(rows) - 1) for source in self._codes], np.int32), rows

    def _sources(self) -> list[np.ndarray]:
        found = self._of("sources")
        place, rows = self._kept_sources()
        found = merged([found._replace(keys=place[found.keys])])
        names = np.array([name for name, _ in rows], object)[found.keys]
        is_rest = np.array([rest for _, rest in rows])[found.keys]
        return [found.feature_ids, names, is_rest, *found[2:]]

    def _seen(self) -> list[np.ndarray]:
        place, rows = self._kept_sources()
        counts: Counter[tuple[int, int]] = Counter()
        for (code, band), n in self._encoded.items():
            counts[int(place[code]), band] += n
        keys = sorted(counts)
        names = np.array([rows[row][0] for row, _ in keys], object)
        is_rest = np.array([rows[row][1] for row, _ in keys], bool)
        return [names, is_rest, np.array([band for _, band in keys]), np.array([counts[key] for key in keys], np.int64)]


def _n_keys(keys: np.ndarray) -> int:
    return int(keys.max(initial=-1)) + 1


def merged(groups: Sequence[Grouped]) -> Grouped:
    """Groups of the same feature and key as one, added in the order given."""
    ids, keys, n, total, squares = (np.concatenate([group[i] for group in groups]) for i in range(5))
    order = np.lexsort((keys, ids))
    ids, keys = ids[order], keys[order]
    first = np.flatnonzero(np.r_[True, (ids[1:] != ids[:-1]) | (keys[1:] != keys[:-1])]) if len(ids) else order
    n, total, squares = (np.add.reduceat(each[order], first) if len(first) else each for each in (n, total, squares))
    return Grouped(ids[first], keys[first], n, total, squares)


def most_frequent(found: Grouped, most: int) -> Grouped:
    """Of each feature the keys with most tokens, at most so many; among equals the lower ones. In the order of keys."""
    order = np.lexsort((found.keys, -found.n_tokens, found.feature_ids))
    kept = np.sort(order[_places(found.feature_ids[order]) < most])
    return Grouped._make(each[kept] for each in found)


def _places(ids: np.ndarray) -> np.ndarray:
    """Place of each entry among those of its id; ids are sorted."""
    if not len(ids):
        return ids
    first = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    return np.arange(len(ids)) - np.repeat(first, np.diff(np.r_[first, len(ids)]))


def _table(schema: pa.Schema, columns: Sequence[np.ndarray]) -> pa.Table:
    arrays = [pa.array(values, field.type, from_pandas=True) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
