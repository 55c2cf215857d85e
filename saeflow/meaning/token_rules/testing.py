"""Rules tested on every held-out token: how often they are right, and tokens at which they are wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeflow.features.counting import Counts
from saeflow.meaning.token_rules.counting import MOST_KEYS, Firings, is_among
from saeflow.meaning.token_rules.hashing import HELD_OUT, Hashes, Places, Sides, mixed_number
from saeflow.runtime.compiled import compiled
from saeflow.sae.kernels import Ids

MOST_MISTAKES = 5
"""Mistakes of each kind that are kept of a rule."""


class Keyed(NamedTuple):
    """A family's keys, the keys of it that are in each feature's rule, and the tokens of each key."""

    keys: Ids
    """(n,)"""
    chosen: Ids
    """(F, MOST_KEYS)"""
    starts: Places
    """(K + 1,) and the tokens: see `counting.index_keys`. Held-out tokens are at the ends of the lists."""
    token_ids: Ids


class Mistakes(NamedTuple):
    """Held-out tokens (F, MOST_MISTAKES) at which a feature and its rule disagree; -1 where there are fewer."""

    missed: Ids
    """Tokens outside the rule at which the feature fires: the strongest, the strongest first."""
    missed_order: Hashes
    """Numbers by which the missed ones ascend."""
    false_alarms: Ids
    """Tokens in the rule at which the feature is silent: drawn at random, the same ones for the same feature."""
    alarms_order: Hashes
    """Random numbers by which the false alarms ascend: the smallest of all."""


def no_mistakes(n_features: int) -> Mistakes:
    """Return room for the mistakes of so many features."""
    shape = (2, n_features, MOST_MISTAKES)
    tokens, order = np.full(shape, -1, np.int32), np.zeros(shape, np.uint64)
    return Mistakes(tokens[0], order[0], tokens[1], order[1])


@compiled
def _keep_mistake(token: int, place: np.uint64, tokens: Ids, order: Hashes) -> None:
    """Put a token among those with the smallest numbers, ascending."""
    at = MOST_MISTAKES
    while at > 0 and (tokens[at - 1] < 0 or place < order[at - 1]):
        at -= 1
    for j in range(MOST_MISTAKES - 1, at, -1):
        tokens[j], order[j] = tokens[j - 1], order[j - 1]
    if at < MOST_MISTAKES:
        tokens[at], order[at] = token, place


@compiled
def test_rules(
    feature_ids: NDArray[np.int64], firings: Firings, sides: Sides, first: Keyed, second: Keyed, out: Counts,
    mistakes: Mistakes,
) -> None:  # fmt: skip
    """Count for each feature its held-out firings, the held-out tokens in its rule, and both: `out` (F, 3).

    `firings` are held-out ones. A token is in the rule if its key of either family is chosen.
    """
    starts, ends, token_ids, values = firings
    missed, missed_order, alarms, alarms_order = mistakes
    strengths = values.view(np.uint32)  # those of positive numbers ascend as the numbers do
    fires = np.zeros(len(sides), np.bool_)
    for f in range(len(starts)):
        out[f, 0] = ends[f] - starts[f]
        for i in range(starts[f], ends[f]):
            t = token_ids[i]
            fires[t] = True
            if is_among(first.keys[t], first.chosen[f]) or is_among(second.keys[t], second.chosen[f]):
                out[f, 2] += 1
            else:
                weakness = np.uint64(0xFFFFFFFF) - np.uint64(strengths[i])
                _keep_mistake(t, (weakness << np.uint64(32)) | np.uint64(t), missed[f], missed_order[f])
        for part in range(2):
            keyed = second if part else first
            for j in range(MOST_KEYS):
                k = keyed.chosen[f, j]
                i = keyed.starts[k + 1] - 1 if k >= 0 else -1
                while k >= 0 and i >= keyed.starts[k] and sides[keyed.token_ids[i]] == HELD_OUT:
                    t = keyed.token_ids[i]
                    i -= 1
                    if part and is_among(first.keys[t], first.chosen[f]):
                        continue
                    out[f, 1] += 1
                    if not fires[t]:
                        draw = mixed_number(np.uint64(feature_ids[f]), np.uint64(t))
                        _keep_mistake(t, draw, alarms[f], alarms_order[f])
        for i in range(starts[f], ends[f]):
            fires[token_ids[i]] = False
