"""The yardstick: an interpolated trigram with modified Kneser-Ney smoothing (Chen and Goodman 1998)."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]

ORDERS = (1, 2, 3)
START = (0.7, 1.1, 1.5)  # discounts of grams counted once, twice and more often
STEPS = (0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01)


@dataclass(frozen=True)
class Order:
    """Counts of one order; a gram is the number `context * vocabulary + word`.

    Orders below the highest count in how many different left contexts a gram was seen.
    """

    grams: Integers
    counts: Integers
    contexts: Integers
    totals: Integers
    n_once_twice_more: Integers  # (contexts, 3): grams of the context counted once, twice, more often


@dataclass(frozen=True)
class Seen:
    """What one order knows of each event to be scored."""

    counts: Integers
    totals: Integers
    n_once_twice_more: Integers


def events(documents: list[NDArray[np.uint16]], end_of_text: int, vocabulary: int) -> Integers:
    """Every token of every document and its closing mark, as trigram numbers; a document starts after two marks."""
    mark = np.full(2, end_of_text, np.int64)
    streams = [np.concatenate([mark, document, mark[:1]]) for document in documents]
    return np.concatenate([(s[:-2] * vocabulary + s[1:-1]) * vocabulary + s[2:] for s in streams])


def count(trigrams: Integers, vocabulary: int) -> list[Order]:
    """The three orders, unigrams first."""
    orders = []
    keys = trigrams
    for order in reversed(ORDERS):
        grams, counts = np.unique(keys, return_counts=True)
        orders.append(group(grams, counts, vocabulary))
        keys = grams % vocabulary ** (order - 1)
    return orders[::-1]


def group(grams: Integers, counts: Integers, vocabulary: int) -> Order:
    contexts, at = np.unique(grams // vocabulary, return_inverse=True)
    totals = np.bincount(at, weights=counts).astype(np.int64)
    sizes = np.stack([np.bincount(at[np.minimum(counts, 3) == k], minlength=len(contexts)) for k in ORDERS], 1)
    return Order(grams, counts, contexts, totals, sizes)


def look_up(orders: list[Order], trigrams: Integers, vocabulary: int) -> list[Seen]:
    seen = []
    for n, order in zip(ORDERS, orders, strict=True):
        grams = trigrams % vocabulary**n
        gram_at, gram_known = find(order.grams, grams)
        at, known = find(order.contexts, grams // vocabulary)
        seen.append(
            Seen(
                np.where(gram_known, order.counts[gram_at], 0),
                np.where(known, order.totals[at], 0),
                np.where(known[:, None], order.n_once_twice_more[at], 0),
            )
        )
    return seen


def find(sorted_keys: Integers, keys: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return at, sorted_keys[at] == keys


def nats(seen: list[Seen], discounts: Reals, vocabulary: int) -> Reals:
    """Nats of each event; `discounts` (3 orders, 3) are taken from grams counted once, twice, more often."""
    probability = np.full(len(seen[0].counts), 1 / vocabulary)
    for order, discount in zip(seen, discounts.reshape(len(ORDERS), 3), strict=True):
        taken = np.append(0.0, discount)[np.minimum(order.counts, 3)]
        kept = order.counts - taken + order.n_once_twice_more @ discount * probability
        probability = np.where(order.totals > 0, kept / np.maximum(order.totals, 1), probability)
    loss: Reals = -np.log(probability)
    return loss


def tune(seen: list[Seen], vocabulary: int) -> Reals:
    """The nine discounts that predict the given events best, found by moving one at a time in ever smaller steps."""
    best = np.tile(START, len(ORDERS))
    most = np.tile([1.0, 2.0, 3.0], len(ORDERS))
    loss = nats(seen, best, vocabulary).mean()
    for step in STEPS:
        for at, sign in itertools.product(range(best.size), (-1, 1)):
            moved = best.copy()
            moved[at] = np.clip(moved[at] + sign * step, 0.01, most[at] - 0.01)
            if (moved_loss := nats(seen, moved, vocabulary).mean()) < loss:
                best, loss = moved, moved_loss
    return best
