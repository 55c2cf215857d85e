"""Sampled tokens of classes, and what features, neurons and random directions give there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from saeflow.activations.shards import is_kept, open_site, stored_sites
from saeflow.classes.membership import Ints, Membership
from saeflow.classes.values import ValueFiles
from saeflow.query.runs import Run
from saeflow.runtime.threads import in_parallel, n_threads, ranges
from saeflow.store.store import Store

TEST_SHARE = 0.3
"""Share of the documents that no probe is fitted on."""

N_OTHERS = 20_000
"""Tokens drawn from all counted tokens, for every class."""

N_MEMBERS = 5_000
"""Tokens drawn from the tokens of each class besides."""

SAMPLE_ROWS_AT_ONCE = 2_048


@dataclass(frozen=True)
class Sample:
    """Sampled tokens (rows): some of all counted tokens, and more of each class.

    A class is probed on its own tokens and on those drawn from all: tokens that were drawn for other classes would be
    too common among the rest. A row of the class stands for more or fewer tokens than another row, so weights give the
    class its share of the corpus.
    """

    places: Ints
    """(rows,) token_id minus the membership's first token, ascending."""
    is_test: NDArray[np.bool_]
    """(rows,) True if the token's document is held out."""
    of_all: NDArray[np.bool_]
    """(rows,) True at tokens drawn from all counted tokens."""
    of_class: NDArray[np.bool_]
    """(rows, C) True at tokens drawn from those of the class."""
    inside: NDArray[np.bool_]
    """(rows, C) True at tokens of the class."""
    shares: NDArray[np.float64]
    """(C,) share of the class among all counted tokens."""

    def rows(self, c: int) -> tuple[Ints, Ints]:
        """Return the training rows and the held-out rows of a class."""
        mine = self.of_all | self.of_class[:, c]
        return np.flatnonzero(mine & ~self.is_test), np.flatnonzero(mine & self.is_test)

    def weights(self, c: int, rows: Ints) -> NDArray[np.float64]:
        """Return how much each of these rows counts, so that the class has its share of the corpus among them."""
        inside = self.inside[rows, c]
        n_in = max(int(inside.sum()), 1)
        n_out = max(len(rows) - int(inside.sum()), 1)
        return np.asarray(np.where(inside, self.shares[c] / n_in, (1 - self.shares[c]) / n_out) * len(rows))


def draw_sample(members: Membership, seed: int, n_others: int = N_OTHERS, n_members: int = N_MEMBERS) -> Sample:
    """Draw tokens of all classes, and hold TEST_SHARE of the documents out. The seed decides both."""
    dice = np.random.default_rng(seed)
    held_out = np.zeros(members.n_documents, bool)
    held_out[dice.permutation(members.n_documents)[: round(TEST_SHARE * members.n_documents)]] = True
    counted = np.flatnonzero(members.codes)
    chosen = [_draw_at_most(dice, counted, n_others)]
    for c in range(len(members.classes)):
        has = members.sets_with(c)
        chosen.append(_draw_at_most(dice, counted[has[members.codes[counted]]], n_members))
    places = np.unique(np.concatenate(chosen))
    of_all, *of_class = (np.isin(places, each, assume_unique=True) for each in chosen)
    inside = np.stack([members.sets_with(c)[members.codes[places]] for c in range(len(members.classes))], 1)
    return Sample(
        places, held_out[members.documents[places]], of_all, np.stack(of_class, 1), inside,
        members.class_tokens / max(members.n_tokens, 1),
    )  # fmt: skip


def _draw_at_most(dice: np.random.Generator, places: Ints, most: int) -> Ints:
    return places if len(places) <= most else np.sort(dice.choice(places, most, replace=False))


def feature_values(files: ValueFiles, members: Membership, places: Ints, threads: int = 0) -> sparse.csc_array:
    """Return float32 (rows, F): every feature's value at these places, in one pass over the feature-major files."""
    codes = np.zeros(len(members.codes), np.uint16)
    codes[places] = 1
    rows = np.zeros(len(codes), np.int32)
    rows[places] = np.arange(len(places))
    numbered = replace(members, codes=codes, documents=rows)

    def read(block: tuple[int, int]) -> sparse.csc_array:
        found = files.read(*block, numbered)
        sizes = found.ends - found.starts
        owners = np.repeat(np.arange(len(sizes)), sizes)
        entries = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + found.starts[owners]
        starts = np.r_[0, np.cumsum(sizes)]
        values, at = found.values[entries], found.documents[entries]
        return sparse.csc_array((values, at, starts), shape=(len(places), len(sizes)))

    return sparse.csc_array(sparse.hstack(in_parallel(read, files.blocks(), n_threads(threads)), format="csc"))


def neuron_values(store: Store, run: Run, first_token: int, places: Ints) -> NDArray[np.float32] | None:
    """Return float32 (rows, D): the stored activations of the site that the SAE reads; None if they are not stored."""
    name = run.artefact.record.input("activations")
    source = store.by_id(name) if name else None
    if source is None or not source.exists() or not is_kept(source):
        return None
    sites = {site.name: site for site in stored_sites(source)}
    site = sites.get(run.artefact.record.facts.get("site", ""))
    if site is None:
        return None
    length = int(run.artefact.fact("context_length"))
    out = np.full((len(places), site.width), np.nan, np.float32)
    sequences, positions = (places + first_token) // length, (places + first_token) % length
    for part in source.published().parts:
        first, n = part.counts["first_sequence"], part.counts["n_sequences"]
        start, stop = np.searchsorted(sequences, (first, first + n))
        if start == stop:
            continue
        array = open_site(source, part, site)
        for a, b in ranges(n, array.shard):
            low, high = np.searchsorted(sequences[start:stop], (first + a, first + b)) + start
            if low < high:
                values = array.read(slice(a, b))
                at = torch.from_numpy(sequences[low:high] - first - a), torch.from_numpy(positions[low:high])
                out[low:high] = values[at].float().numpy()
    return out


def random_values(neurons: NDArray[np.float32], n_features: int, n_active: int, seed: int) -> sparse.csc_array:
    """Return float32 (rows, F) of an SAE that was never trained: random unit directions, the largest products kept.

    Activations are centred at their mean. At each token the `n_active` largest positive products are its values, so
    that as many features fire as in the run.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, neurons.shape[1], generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = torch.from_numpy(neurons.mean(0, dtype=np.float64).astype(np.float32))
    pieces = []
    for start, stop in ranges(len(neurons), SAMPLE_ROWS_AT_ONCE):
        products = (torch.from_numpy(neurons[start:stop]) - mean) @ directions.T
        values, ids = products.topk(min(n_active, n_features), dim=1)
        values = values.clamp_(min=0)
        starts = np.arange(0, values.numel() + 1, values.shape[1])
        shape = (stop - start, n_features)
        pieces.append(sparse.csr_array((values.numpy().ravel(), ids.numpy().ravel(), starts), shape=shape))
    found = sparse.csc_array(sparse.vstack(pieces, format="csr"))
    found.eliminate_zeros()
    return found
