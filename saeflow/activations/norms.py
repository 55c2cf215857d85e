"""How long activation vectors are, by position. Massive activations show while collecting, not after training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.lengths import has_lengths, median_length, median_of, stored_lengths
from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection, positions_from_start
from saeflow.model.sites import Site
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact

NORMS_FILE = "norms.parquet"
_MASSIVE_FACTOR = 10
"""A position is massive if its mean norm is this many times that of the median position.

Sun et al. 2024 (arXiv 2402.17762) call a value massive from 1,000 times the median magnitude on. In a Gaussian vector
of width D that is 670 / √D times its norm: 10 at D = 4,096, and more in narrower ones.
"""
_PARTS_READ = 200
"""Parts to read for the warning, evenly spread."""


class Norms:
    """Count tokens, sum their norms and keep the largest norm of one part, by site and position.

    Sums are float64 and are added batch by batch. So batches must come in order to give equal bytes.
    """

    def __init__(self, sites: Sequence[Site], length: int) -> None:
        self.sites = sites
        shape = len(sites), length
        self.n_tokens, self.sums, self.largest = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)

    def add(self, norms: Sequence[np.ndarray], mask: np.ndarray) -> None:
        """Add the norms (s, T) of the sites. `mask` marks real tokens."""
        for i, each in enumerate(norms):
            real = np.where(mask, each.astype(np.float64), 0)
            self.n_tokens[i] += mask.sum(0)
            self.sums[i] += real.sum(0)
            np.maximum(self.largest[i], real.max(0, initial=0), out=self.largest[i])

    def write(self, path: Path) -> None:
        n_sites, length = self.n_tokens.shape
        columns = {
            "site": np.repeat([site.name for site in self.sites], length),
            "position": np.tile(np.arange(length, dtype=np.int32), n_sites),
            "n_tokens": self.n_tokens.reshape(-1), "sum_norm": self.sums.reshape(-1),
            "max_norm": self.largest.reshape(-1),
        }  # fmt: skip
        pq.write_table(pa.table(columns), path, compression="zstd")


def mean_norms(target: Artefact) -> dict[str, np.ndarray]:
    """Return the mean norm (T,) by site, NaN where there was no token.

    Parts of earlier versions have no norms. Of many parts, a sample is read.
    """
    parts = [part for part in target.published().parts if any(file.name == NORMS_FILE for file in part.files)]
    chosen = parts[:: -(-len(parts) // _PARTS_READ) or 1]
    found: dict[str, np.ndarray] = {}
    for table in (pq.read_table(target.part_file(part, NORMS_FILE)) for part in chosen):
        names = table.column("site").to_numpy()
        sums = np.stack([table.column(name).to_numpy() for name in ("n_tokens", "sum_norm")])
        for name in dict.fromkeys(names):
            found[name] = found.get(name, 0) + sums[:, names == name]
    with np.errstate(invalid="ignore"):
        return {name: sums / n for name, (n, sums) in found.items()}


def massive_positions(means: np.ndarray) -> list[int]:
    """Return the positions whose mean norm is more than ten times that of the median position."""
    median = np.nanmedian(means) if np.isfinite(means).any() else np.nan
    return np.flatnonzero(means > _MASSIVE_FACTOR * median).tolist()


def say_which_are_long(used: TokenSelection, target: Artefact, progress: Progress) -> None:
    """Count the vectors that a setting leaves out for their length, and name their most frequent tokens.

    Without that setting, name it if such vectors, away from massive positions, would draw the loss.
    """
    factor, means = used.skip_norms_above or _MASSIVE_FACTOR, mean_norms(target)
    parts = [part for part in target.published().parts if has_lengths(part)]
    for site in stored_sites(target):
        found = _LongVectors(factor, median_length(used.source, target, site))
        skipped = [] if used.skip_norms_above else massive_positions(means.get(site.name, np.empty(0)))
        for part in parts[:: -(-len(parts) // _PARTS_READ) or 1]:
            mask = used.mask(part.index)
            mask[:, skipped] = False
            ids = partial(_vocab_ids, used, part.index, mask)
            found.add(stored_lengths(target, part, site)[mask.reshape(-1)], ids)
        if found.n_tokens and (used.skip_norms_above or found.share_of_squares > _LEAST_SHARE):
            way_out = f".\nAn SAE would spend its loss there. Set {_SETTING}; nothing is collected again."
            ending = " and are left out." if used.skip_norms_above else way_out
            progress.say(f"activations: at {site.name}, {found.in_words(used.source)}{ending}")


def _vocab_ids(used: TokenSelection, index: int, mask: np.ndarray) -> np.ndarray:
    """Return the vocab_ids (n,) where `mask` (s, T) is True of the first sequences of a part."""
    vocab_ids: np.ndarray = token_parts.read_part(used.source, used.parts[index])[0]
    return np.asarray(vocab_ids[: len(mask), : mask.shape[1]][mask])


def say_which_are_long_first(
    used: TokenSelection, index: int, lengths: Mapping[str, np.ndarray], progress: Progress
) -> None:
    """Name them by the lengths (s, T) of a part's first tokens: activations that are not kept have no others.

    With the setting nothing is said: encoding counts what is left out.
    """
    for site, each in {} if used.skip_norms_above else lengths.items():
        mask = used.mask(index, slice(0, len(each)))[:, : each.shape[1]]
        found = _LongVectors(_MASSIVE_FACTOR, median_of(each[mask]))
        found.add(each[mask], partial(_vocab_ids, used, index, mask))
        if found.share_of_squares > _LEAST_SHARE:
            progress.say(
                f"activations: at {site}, {found.in_words(used.source, 'of the first')}.\n"
                f"Unless the SAE was trained on such vectors, set {_SETTING}."
            )


_LEAST_SHARE = 0.01
"""Share of all squared lengths from which on long vectors are said."""
_SETTING = f"activations.skip_norms_above = {_MASSIVE_FACTOR}"


@dataclass
class _LongVectors:
    """Counts vectors that are longer than `factor` times the median length."""

    factor: float
    median: float
    n_tokens: int = 0
    n_long: int = 0
    squares: float = 0.0
    long_squares: float = 0.0
    vocab_ids: Counter[int] = field(default_factory=Counter)

    @property
    def share_of_squares(self) -> float:
        return self.long_squares / (self.squares or 1)

    def add(self, lengths: np.ndarray, vocab_ids: Callable[[], np.ndarray]) -> None:
        """Count vectors of these lengths (n,). `vocab_ids` returns those of their tokens (n,)."""
        lengths = lengths.astype(np.float64)
        long = (lengths > self.factor * self.median) & (self.median > 0)
        self.n_tokens, self.n_long = self.n_tokens + len(lengths), self.n_long + int(long.sum())
        self.squares, self.long_squares = self.squares + _square(lengths), self.long_squares + _square(lengths[long])
        if long.any():
            self.vocab_ids.update(vocab_ids()[long].tolist())

    def in_words(self, source: Artefact, of: str = "of") -> str:
        most = self.vocab_ids.most_common(3)
        names = pq.read_table(source.own_file("vocab.parquet"), columns=["piece"]).column("piece")
        pieces = f", most often {', '.join(f'{names[i].as_py()!r} ({n:,})' for i, n in most)}" if most else ""
        return (
            f"{self.n_long:,} {of} {self.n_tokens:,} vectors are longer than {self.factor:g} times the median length "
            f"{self.median:,.4g}{pieces}"
        )


def _square(lengths: np.ndarray) -> float:
    return float((lengths**2).sum())


def warn_of_massive_positions(target: Artefact, config: ActivationsConfig, progress: Progress) -> None:
    """Name the positions with massive activations that no setting skips yet, and how to skip them."""
    for site, means in mean_norms(target).items():
        found = massive_positions(means)
        skipped = positions_from_start(config.skip_positions, len(means))
        fresh = [position for position in found if position not in skipped]
        if fresh:
            top = max(fresh, key=lambda position: float(means[position]))
            every = sorted({*fresh, *skipped})
            progress.say(
                f"activations: at {site}, vectors at position {', '.join(map(str, fresh))} are massive: mean norm "
                f"{means[top]:,.4g} at position {top} against {np.nanmedian(means):,.4g} at the median position.\n"
                f"An SAE would spend its loss there. Set activations.skip_positions = {every}; nothing is collected "
                "again."
            )
