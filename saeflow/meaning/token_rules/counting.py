"""Kernels that count a feature's firings by key, and find the best union of keys. `hashing` says what a key is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeflow.meaning.token_rules.hashing import LEAST_FIRINGS, TRAINING, Places, Sides, mixed_number
from saeflow.runtime.compiled import compiled
from saeflow.sae.kernels import Ids

MOST_KEYS = 6
"""Keys of one family in a rule: more than a reader takes in at a glance is no simple rule."""

PRICE = 0.01
"""F1 on training documents that each further key of a rule must add."""


MOST_FIRINGS = 16_384
"""Training firings above which a rule is chosen on a sample: on a half of all stretches of tokens, a quarter, …"""

N_LEVELS = 12
"""Samples there are: the last takes one stretch in 2,048."""

STRETCH = 256
"""Tokens that are in a sample together."""


class Firings(NamedTuple):
    """Tokens at which each feature of a range fires, in any order."""

    starts: Places
    """(F,): where the tokens of each feature begin."""
    ends: Places
    token_ids: Ids
    values: NDArray[np.float32]


class Unions(NamedTuple):
    """The best union of keys of one family for each feature."""

    keys: Ids
    """(F, MOST_KEYS): the best first; -1 where there are fewer."""
    score: NDArray[np.float64]
    """(F,): F1 on training tokens, less PRICE for every key after the first."""


@compiled
def sample_levels(sides: Sides) -> Sides:
    """Return 0 for tokens that are not for training, else 1 + l if the samples 0 to l hold the token.

    A stretch is in sample l with a chance of 2^-l, by a hash of its number. Sample 0 holds every stretch.
    """
    levels = np.zeros(len(sides), np.uint8)
    for t in range(len(sides)):
        if sides[t] == TRAINING:
            mixed, level = mixed_number(np.uint64(11), np.uint64(t // STRETCH)), 0
            while level < N_LEVELS - 1 and mixed & np.uint64(1) == 0:
                mixed, level = mixed >> np.uint64(1), level + 1
            levels[t] = level + 1
    return levels


@compiled
def count_training(keys: Ids, levels: Sides, out: Ids) -> None:
    """Set `out` (N_LEVELS, K) to the training tokens of each key in each sample."""
    for t in range(len(keys)):
        if keys[t] >= 0 and levels[t] > 0:
            out[levels[t] - 1, keys[t]] += 1
    for level in range(N_LEVELS - 2, -1, -1):
        for k in range(out.shape[1]):
            out[level, k] += out[level + 1, k]


@compiled
def choose_samples(firings: Firings, levels: Sides) -> Sides:
    """Return for each feature the first sample with at most MOST_FIRINGS training firings, or the last."""
    starts, ends, token_ids, _ = firings
    found = np.zeros(len(starts), np.uint8)
    counts = np.zeros(N_LEVELS + 1, np.int64)
    for f in range(len(starts)):
        counts[:] = 0
        for i in range(starts[f], ends[f]):
            counts[levels[token_ids[i]]] += 1
        n_fired = counts[1:].sum()
        while n_fired > MOST_FIRINGS and found[f] < N_LEVELS - 1:
            n_fired -= counts[found[f] + 1]
            found[f] += 1
    return found


@compiled
def select_firings(firings: Firings, groups: Sides, least: Sides, most: int) -> Firings:
    """Return only the firings at tokens whose group is from `least` (F,) to `most`."""
    starts, ends, token_ids, values = firings
    new_starts, new_ends = np.empty_like(starts), np.empty_like(ends)
    n_kept = 0
    for f in range(len(starts)):
        for i in range(starts[f], ends[f]):
            n_kept += least[f] <= groups[token_ids[i]] <= most
    kept, kept_values = np.empty(n_kept, np.int32), np.empty(n_kept, np.float32)
    at = 0
    for f in range(len(starts)):
        new_starts[f] = at
        for i in range(starts[f], ends[f]):
            if least[f] <= groups[token_ids[i]] <= most:
                kept[at], kept_values[at] = token_ids[i], values[i]
                at += 1
        new_ends[f] = at
    return Firings(new_starts, new_ends, kept, kept_values)


@compiled
def collect_firings(
    feature_ids: Ids, token_ids: Places, values: NDArray[np.float32], first: int, n_tokens: int, limits: Places,
    found: Firings,
) -> bool:  # fmt: skip
    """Put firings behind those that their features have; the ends move on. False for a token that cannot be right.

    `limits` (F,) says where each feature's room ends.
    """
    _, ends, out, out_values = found
    for i in range(len(feature_ids)):
        f = feature_ids[i] - first
        if ends[f] >= limits[f] or token_ids[i] < 0 or token_ids[i] >= n_tokens:
            return False
        out[ends[f]], out_values[ends[f]] = token_ids[i], values[i]
        ends[f] += 1
    return True


@compiled
def index_keys(keys: Ids, order: Ids, starts: Places, token_ids: Ids) -> None:
    """List the tokens of each key in this order: key k has `token_ids[starts[k]:starts[k + 1]]`.

    `starts` (K + 1) holds zeros.
    """
    for t in range(len(keys)):
        if keys[t] >= 0:
            starts[keys[t] + 1] += 1
    for k in range(len(starts) - 1):
        starts[k + 1] += starts[k]
    at = starts.copy()
    for i in range(len(order)):
        t = order[i]
        if keys[t] >= 0:
            token_ids[at[keys[t]]] = t
            at[keys[t]] += 1


@compiled
def is_among(key: int, chosen: Ids) -> bool:
    """True if the key is one of these. No key below 0 is."""
    if key < 0:
        return False
    for i in range(len(chosen)):  # noqa: SIM110  # a generator does not compile
        if chosen[i] == key:
            return True
    return False


@compiled
def _best_keys(
    met: Ids, n_met: int, counts: Ids, sizes: Ids, bound: float, best: Ids, gains: NDArray[np.float64]
) -> int:
    """Put the keys with the largest gain above zero into `best`; equal gains by number. Return how many there are."""
    n_best = 0
    for i in range(n_met):
        k = met[i]
        gain = 2.0 * counts[k] - bound * sizes[k]
        if gain <= 0:
            continue
        at = n_best
        while at > 0 and (gain > gains[at - 1] or (gain == gains[at - 1] and k < best[at - 1])):
            at -= 1
        if at == MOST_KEYS:
            continue
        n_best = min(n_best + 1, MOST_KEYS)
        for j in range(n_best - 1, at, -1):
            best[j], gains[j] = best[j - 1], gains[j - 1]
        best[at], gains[at] = k, gain
    return n_best


@compiled
def best_unions(
    firings: Firings, levels: Sides, samples: Sides, keys: Ids, sizes: Ids, allowed: Ids, price: float,
    first_keys: Ids, first_chosen: Ids, index_starts: Places, index_tokens: Ids, found: Unions,
) -> None:  # fmt: skip
    """Find for each feature the union of at most MOST_KEYS keys with the best F1 on training tokens, less its price.

    `samples` (F,) says which sample the firings of a feature are from; others are not among them. `keys` (n,) are a
    family, and `sizes` (N_LEVELS, K) count the training tokens of each key. `allowed` (F, A) names the only keys that a
    feature may have, unless A is 0. The union adds to the keys `first_chosen` (F, C) of another family, if C is not 0:
    `first_keys` (n,) are that family, and `index_keys` made its lists.

    A union of disjoint keys has F1 = 2 hits / (firings + size). Dinkelbach's method (1967) maximises such a ratio: for
    a bound F on F1, the best keys are those with the largest 2 hits - F size above zero, and they give a better F.
    """
    starts, ends, token_ids, _ = firings
    chosen, score = found
    n_keys = sizes.shape[1]
    counts, lost, met = np.zeros(n_keys, np.int32), np.zeros(n_keys, np.int32), np.empty(n_keys, np.int32)
    own, best, gains = np.empty(n_keys, np.int32), np.empty(MOST_KEYS, np.int32), np.empty(MOST_KEYS, np.float64)
    adds = first_chosen.shape[1] > 0
    for f in range(len(starts)):
        fired, n_met, first_hits, first_size = 0, 0, 0, 0
        sample = samples[f]
        for i in range(starts[f], ends[f]):
            t = token_ids[i]
            fired += 1
            if adds and is_among(first_keys[t], first_chosen[f]):
                first_hits += 1
                continue
            k = keys[t]
            if k >= 0:
                if counts[k] == 0:
                    met[n_met] = k
                    n_met += 1
                counts[k] += 1
        if adds:
            for j in range(first_chosen.shape[1]):
                k1 = first_chosen[f, j]
                if k1 < 0:
                    continue
                for i in range(index_starts[k1], index_starts[k1 + 1]):
                    t = index_tokens[i]
                    if levels[t] <= sample:
                        break
                    first_size += 1
                    if keys[t] >= 0:
                        lost[keys[t]] += 1
        n_kept, bound = 0, 2.0 * first_hits / max(1, fired + first_size)
        for i in range(n_met):
            k = met[i]
            usable = counts[k] >= LEAST_FIRINGS and (allowed.shape[1] == 0 or is_among(k, allowed[f]))
            if usable:
                met[n_kept] = k
                own[k] = sizes[sample, k] - lost[k]
                n_kept += 1
                bound = max(bound, 2.0 * (first_hits + counts[k]) / (fired + first_size + own[k]))
            else:
                counts[k] = 0
        n_best = 0
        for _ in range(30):
            n_best = _best_keys(met, n_kept, counts, own, bound, best, gains)
            inner, outer = first_hits, first_size
            for i in range(n_best):
                inner += counts[best[i]]
                outer += own[best[i]]
            better = 2.0 * inner / max(1, fired + outer)
            if better <= bound:
                break
            bound = better
        score[f] = 0.0
        inner, outer, n_taken = first_hits, first_size, 0
        for i in range(n_best):
            inner += counts[best[i]]
            outer += own[best[i]]
            net = 2.0 * inner / (fired + outer) - price * i
            if net > score[f]:
                score[f], n_taken = net, i + 1
        for i in range(MOST_KEYS):
            chosen[f, i] = best[i] if i < n_taken else -1
        for i in range(n_kept):
            counts[met[i]] = 0
        if adds:
            for j in range(first_chosen.shape[1]):
                k1 = first_chosen[f, j]
                if k1 < 0:
                    continue
                for i in range(index_starts[k1], index_starts[k1 + 1]):
                    if levels[index_tokens[i]] <= sample:
                        break
                    if keys[index_tokens[i]] >= 0:
                        lost[keys[index_tokens[i]]] = 0
