"""Numbers for n-grams, words and pairs of keys, without sorting: by hashes, in the order of first appearance.

A *key* is a whole number that a family of rules gives to a token: its vocabulary id, the n-gram before it, its source.
Tokens of one key make one simple rule. Keys below 0 belong to no rule.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saeflow.runtime.compiled import compiled
from saeflow.sae.kernels import Ids

Places = NDArray[np.int64]
Sides = NDArray[np.uint8]
Hashes = NDArray[np.uint64]

NOT_ENCODED, TRAINING, HELD_OUT = 0, 1, 2
"""Sides of a token: not encoded, of a document for choosing, of a document for testing."""

LEAST_FIRINGS = 2
"""Training firings of a key that may be part of a rule."""


@compiled
def mixed_number(left: np.uint64, right: np.uint64) -> np.uint64:
    """Mix two numbers: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = left * np.uint64(0x9E3779B97F4A7C15) + right + np.uint64(0x632BE59BD9B4E019)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def hash_ngrams(vocab_ids: Ids, contexts: Ids, first: int, last: int, out: Hashes) -> None:
    """Hash the tokens from `first` to `last` places back, e.g. 1 and 0; 0 where the text has not begun so early."""
    for t in range(len(vocab_ids)):
        out[t] = 0
        if vocab_ids[t] < 0 or contexts[t] < first:
            continue
        mixed = np.uint64(first - last + 1)
        for back in range(first, last - 1, -1):
            mixed = mixed_number(mixed, np.uint64(vocab_ids[t - back]))
        out[t] = mixed


@compiled
def hash_pairs(left: Ids, right: Ids, out: Hashes) -> None:
    """Hash two keys of each token; 0 where one of them is below 0."""
    for t in range(len(left)):
        out[t] = 0
        if left[t] >= 0 and right[t] >= 0:
            out[t] = mixed_number(np.uint64(left[t]) + np.uint64(1), np.uint64(right[t]))


@compiled
def hash_words(vocab_ids: Ids, contexts: Ids, begins: NDArray[np.bool_], word: Hashes, before: Hashes) -> None:
    """Hash the letters of each token's word so far into `word`, the whole word before it into `before`; 0 for none.

    `begins` says which entries begin a word. The first word of a sequence may have begun earlier, so it has none.
    """
    for t in range(len(vocab_ids)):
        word[t], before[t] = 0, 0
        if vocab_ids[t] < 0:
            continue
        new = begins[vocab_ids[t]]
        if contexts[t] == 0:
            word[t] = mixed_number(np.uint64(7), np.uint64(vocab_ids[t])) if new else np.uint64(0)
        elif new:
            word[t], before[t] = mixed_number(np.uint64(7), np.uint64(vocab_ids[t])), word[t - 1]
        elif word[t - 1] > 0:
            word[t], before[t] = mixed_number(word[t - 1], np.uint64(vocab_ids[t])), before[t - 1]


@compiled
def number_hashes(
    hashes: Hashes, sides: Sides, least: int, table: Hashes, numbers: Ids, keys: Ids, examples: Places
) -> int:
    """Number the hashes of at least `least` training tokens by first appearance; return how many there are.

    `keys` (n,) gets the numbers, -1 for other tokens; `examples` (n,) a training token of each number. `table` and
    `numbers` hold zeros, a power of two of them, more than n.
    """
    mask, n_groups = np.uint64(len(table) - 1), 0
    for t in range(len(hashes)):
        keys[t] = -1
        if hashes[t] == 0:
            continue
        slot = hashes[t] & mask
        while table[slot] != 0 and table[slot] != hashes[t]:
            slot = (slot + np.uint64(1)) & mask
        if table[slot] == 0:
            table[slot], numbers[slot], examples[n_groups] = hashes[t], n_groups, -1
            n_groups += 1
        keys[t] = numbers[slot]
    n_training = np.zeros(n_groups, np.int32)
    for t in range(len(hashes)):
        if keys[t] >= 0 and sides[t] == TRAINING:
            n_training[keys[t]] += 1
            if examples[keys[t]] < 0:
                examples[keys[t]] = t
    kept = 0
    for group in range(n_groups):
        if n_training[group] >= least:
            examples[kept], n_training[group] = examples[group], kept
            kept += 1
        else:
            n_training[group] = -1
    for t in range(len(hashes)):
        if keys[t] >= 0:
            keys[t] = n_training[keys[t]]
    return kept
