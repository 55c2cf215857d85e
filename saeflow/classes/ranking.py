"""Kernels that rank the values of each feature and count each class along the ranks.

Values have 11 significant bits, so a feature has few different ones: values are sorted by their bits, and ties are
runs of equal bits. Zeros are never stored, and all tokens without a value share one large tie. All counts are whole
numbers; nothing depends on how features are spread over threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saeflow.runtime.compiled import compiled
from saeflow.sae.kernels import Doubles, Floats, Ids, Offsets

Codes = NDArray[np.unsignedinteger[Any]]
Classes = NDArray[np.uint32]
Keys = NDArray[np.uint64]

DIGIT = 11
"""Bits of a key that one pass of the sort looks at."""

EMPTY_BITS = 13
"""Low bits of a float32 that are zero in a number of 11 significant bits."""


@compiled
def place_values(
    first_feature: int, feature_ids: Ids, token_ids: Offsets, values: Floats, first_token: int, codes: Codes,
    documents: Ids, ends: Offsets, out_values: Floats, out_codes: Codes, out_documents: Ids,
) -> None:  # fmt: skip
    """Put each value of a counted token at the next free place of its feature, which `ends` holds."""
    n_places = len(codes)
    for i in range(len(feature_ids)):
        place = token_ids[i] - first_token
        if place < 0 or place >= n_places or codes[place] == 0:
            continue
        feature = feature_ids[i] - first_feature
        at = ends[feature]
        ends[feature] = at + 1
        out_values[at] = values[i]
        out_codes[at] = codes[place]
        out_documents[at] = documents[place]


@compiled
def _sort_keys(keys: Keys, spare: Keys, width: int) -> None:
    """Sort by the upper 32 bits, of which the low `width` differ; equal ones keep their order."""
    counts = np.empty(1 << DIGIT, np.int64)
    for shift in range(32, 32 + width, DIGIT):
        counts[:] = 0
        for i in range(len(keys)):
            counts[(keys[i] >> np.uint64(shift)) & np.uint64((1 << DIGIT) - 1)] += 1
        place = 0
        for digit in range(len(counts)):
            n = counts[digit]
            counts[digit] = place
            place += n
        for i in range(len(keys)):
            digit = (keys[i] >> np.uint64(shift)) & np.uint64((1 << DIGIT) - 1)
            spare[counts[digit]] = keys[i]
            counts[digit] += 1
        for place in range(len(keys)):  # as a loop it compiles eight times as fast: no message about shapes is built
            keys[place] = spare[place]


@compiled
def rank_keys(bits: Ids, items: Codes, keys: Keys, spare: Keys) -> tuple[np.int64, int]:
    """Write sorted keys, the largest value first. Return the bits of the largest value, shifted, and the shift.

    Bits are ordered as the values are. The upper half of a key says how far its value's shifted bits lie below the
    largest, the lower half is the value's item.
    """
    low_bits, least, most = np.int32(0), np.int64(1) << 40, -(np.int64(1) << 40)
    for i in range(len(bits)):
        low_bits |= bits[i]
        ordered = np.int64(bits[i] ^ ((bits[i] >> 31) & 0x7FFFFFFF))
        least, most = min(least, ordered), max(most, ordered)
    shift = EMPTY_BITS if low_bits & ((1 << EMPTY_BITS) - 1) == 0 else 0
    top = most >> shift
    for i in range(len(bits)):
        ordered = np.int64(bits[i] ^ ((bits[i] >> 31) & 0x7FFFFFFF))
        keys[i] = (np.uint64(top - (ordered >> shift)) << np.uint64(32)) | np.uint64(items[i])
    width, span = 0, top - (least >> shift)
    while span >> width:
        width += 1
    _sort_keys(keys, spare, width)
    return top, shift


@compiled
def _add_by_document(
    values: Floats, codes: Codes, documents: Ids, mean: float, set_starts: Offsets, set_classes: Classes,
    shares: Doubles, expected: Doubles, inside: Doubles, n_both: Offsets, sums_in: Doubles, squares: Doubles,
) -> None:  # fmt: skip
    """Count the feature's tokens in each class, add up their values, and the squares of what each document adds.

    A document adds the sum over its tokens of (y - share) (value - mean), where y is 1 in the class. `squares` gets
    only what the document's square is above that of a document in which the feature is silent; the caller adds those.
    """
    i, n = 0, len(values)
    while i < n:
        document, total = documents[i], 0.0
        inside[:] = 0
        while i < n and documents[i] == document:
            value = np.float64(values[i])
            total += value
            for k in range(set_starts[codes[i]], set_starts[codes[i] + 1]):
                c = set_classes[k]
                inside[c] += value
                n_both[c] += 1
            i += 1
        row = expected[document]
        for c in range(len(inside)):
            sums_in[c] += inside[c]
            excess = inside[c] - shares[c] * total
            squares[c] += excess * (excess - 2 * mean * row[c])


@compiled
def _mark_ties(keys: Keys, offset: int, above: Offsets, upon: Offsets) -> None:
    """Write for each entry how many tokens lie above its tie, and how many above the tie's end.

    `offset` tokens lie above the first entry.
    """
    start = 0
    for i in range(len(keys)):
        if keys[i] >> np.uint64(32) != keys[start] >> np.uint64(32):
            start = i
        above[i] = offset + start
    stop = len(keys)
    for i in range(len(keys) - 1, -1, -1):
        upon[i] = offset + stop
        if offset + i == above[i]:
            stop = i


@compiled
def _count_along_ranks(
    keys: Keys, above: Offsets, upon: Offsets, is_threshold: bool, class_tokens: Offsets, set_starts: Offsets,
    set_classes: Classes, n_in_tie: Offsets, last_tie: Offsets, n_found: Offsets, ranks: Offsets, precisions: Doubles,
    best_found: Offsets, best_upon: Offsets,
) -> None:  # fmt: skip
    """Count the classes of entries in the order of their values, the largest first.

    The k tokens of a class in one tie have the precision at the tie's end, found / upon: together k * found / upon. So
    the k-th of them adds (found + k - 1) / upon. `best_…` (C,): tokens of the class, and all tokens, at or above the
    best threshold; inside a tie the last token of the class decides.
    """
    for i in range(len(keys)):
        end, rank = upon[i], above[i] + upon[i]
        per_token = 1.0 / end
        code = keys[i] & np.uint64(0xFFFFFFFF)
        for place in range(set_starts[code], set_starts[code + np.uint64(1)]):
            c = set_classes[place]
            in_tie = n_in_tie[c] + 1 if last_tie[c] == end else np.int64(1)
            found = n_found[c] + 1
            n_in_tie[c], last_tie[c], n_found[c] = in_tie, end, found
            ranks[c] += rank
            precisions[c] += np.float64(found + in_tie - 1) * per_token
            both, most, size = best_found[c], best_upon[c], class_tokens[c]
            better = is_threshold and found * (most + size) > both * (end + size)
            best_found[c] = found if better else both
            best_upon[c] = end if better else most


@compiled
def _count_silent(
    n_zeros: int, before: int, class_tokens: Offsets, n_both: Offsets, n_found: Offsets, ranks: Offsets,
    precisions: Doubles,
) -> None:  # fmt: skip
    """Count the tokens without a value as one tie, with `before` tokens above it."""
    for c in range(len(class_tokens)):
        n_silent = class_tokens[c] - n_both[c]
        if n_silent > 0:
            n_found[c] += n_silent
            ranks[c] += n_silent * (2 * before + n_zeros)
            precisions[c] += np.float64(n_silent) * n_found[c] / (before + n_zeros)


@compiled
def score_features(
    starts: Offsets, ends: Offsets, bits: Ids, values: Floats, codes: Codes, documents: Ids, together: bool,
    n_tokens: int, class_tokens: Offsets, set_starts: Offsets, set_classes: Classes, expected: Doubles, n_both: Offsets,
    ranks: Offsets, precisions: Doubles, best: Offsets, sums_in: Doubles, squares: Doubles, totals: Doubles,
) -> None:  # fmt: skip
    """Write the counts of each feature, whose entries are starts[f] to ends[f], with each class.

    `n_both`, `ranks`, `precisions`, `sums_in` and `squares` are (F, C), `best` is (F, 3, C), `totals` (F, 2): all zero
    before. `ranks`: twice the number of tokens above each token of the class, ties counted half. `precisions`: for each
    token of the class the precision at its value. `totals`: sum and sum of squares. `expected` (documents, C): tokens
    of the class minus the document's tokens times the class's share.
    """
    n_classes = len(class_tokens)
    shares = class_tokens / np.float64(n_tokens)
    longest = 0
    for f in range(len(starts)):
        longest = max(longest, ends[f] - starts[f])
    keys, spare = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    above, upon = np.empty(longest, np.int64), np.empty(longest, np.int64)
    n_in_tie, last_tie = np.zeros(n_classes, np.int64), np.zeros(n_classes, np.int64)
    n_found = np.empty(n_classes, np.int64)
    inside = np.empty(n_classes, np.float64)
    for f in range(len(starts)):
        begin, end = starts[f], ends[f]
        n = end - begin
        for i in range(begin, end):
            value = np.float64(values[i])
            totals[f, 0] += value
            totals[f, 1] += value * value
        own_values, own_codes, own_documents = values[begin:end], codes[begin:end], documents[begin:end]
        if not together:
            order = np.argsort(own_documents, kind="mergesort")
            own_values, own_documents = own_values[order], own_documents[order]
            own_codes = own_codes[order]
        _add_by_document(
            own_values, own_codes, own_documents, totals[f, 0] / n_tokens, set_starts, set_classes, shares, expected,
            inside, n_both[f], sums_in[f], squares[f],
        )  # fmt: skip
        top, shift = rank_keys(bits[begin:end], codes[begin:end], keys[:n], spare[:n]) if n else (0, 0)
        n_found[:] = 0
        last_tie[:] = 0
        n_above = 0
        while n_above < n and (top - np.int64(keys[n_above] >> np.uint64(32))) >= 0:
            n_above += 1
        for sign in range(2):
            first, last, offset = (0, n_above, 0) if sign == 0 else (n_above, n, n_tokens - n)
            part = keys[first:last]
            _mark_ties(part, first + offset, above[: len(part)], upon[: len(part)])
            _count_along_ranks(
                part, above[: len(part)], upon[: len(part)], sign == 0, class_tokens, set_starts, set_classes, n_in_tie,
                last_tie, n_found, ranks[f], precisions[f], best[f, 0], best[f, 1],
            )  # fmt: skip
            if sign == 0:
                _count_silent(n_tokens - n, n_above, class_tokens, n_both[f], n_found, ranks[f], precisions[f])
        for c in range(n_classes):
            if best[f, 1, c] > 0:
                best[f, 2, c] = (top - np.int64(keys[best[f, 1, c] - 1] >> np.uint64(32))) << shift
