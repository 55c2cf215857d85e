"""How long activation vectors are, by position. Massive activations show while collecting, not after training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.activations.lengths import has_lengths, median_length, stored_lengths
from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection, positions_from_start
from saeflow.model.sites import Site
from saeflow.recipe.settings import ActivationsConfig
from saeflow.runtime.devices import to_processor
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


def norms_of(values: Tensor) -> np.ndarray:
    """Return the lengths float32 (s, T) of vectors (s, T, D)."""
    return to_processor(torch.linalg.vector_norm(values, dim=2, dtype=torch.float32)).numpy()


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
    for site in stored_sites(target):
        median = median_length(used.source, target, site)
        skipped = [] if used.skip_norms_above else massive_positions(means.get(site.name, np.empty(0)))
        found = _long_vectors(used, target, site, factor * median, skipped)
        if found is None or not (used.skip_norms_above or found.share_of_squares > _LEAST_SHARE):
            continue
        way_out = f" An SAE would spend its loss there.\nSet {_SETTING}."
        progress.say(
            f"activations: at {site.name}, {found.n_long:,} of {found.n_tokens:,} vectors are longer than {factor:g} "
            f"times the median length {median:,.4g}{found.pieces(used.source)}"
            + (" and are left out." if used.skip_norms_above else f".{way_out}")
        )


_LEAST_SHARE = 0.01
"""Share of all squared lengths from which on long vectors are said."""
_SETTING = f"activations.skip_norms_above = {_MASSIVE_FACTOR}; nothing is collected again"


@dataclass(frozen=True)
class _LongVectors:
    n_tokens: int
    n_long: int
    share_of_squares: float
    vocab_ids: Counter[int]

    def pieces(self, source: Artefact) -> str:
        most = self.vocab_ids.most_common(3)
        pieces = pq.read_table(source.own_file("vocab.parquet"), columns=["piece"]).column("piece")
        return f", most often {', '.join(f'{pieces[i].as_py()!r} ({n:,})' for i, n in most)}" if most else ""


def _long_vectors(
    used: TokenSelection, target: Artefact, site: Site, limit: float, skipped: Sequence[int]
) -> _LongVectors | None:
    """Count selected vectors longer than `limit`, but at the `skipped` positions, in a sample of parts."""
    parts = [part for part in target.published().parts if has_lengths(part)]
    n, n_long, squares, long_squares, vocab_ids = 0, 0, 0.0, 0.0, Counter[int]()
    for part in parts[:: -(-len(parts) // _PARTS_READ) or 1]:
        mask = used.mask(part.index)
        mask[:, list(skipped)] = False
        lengths = stored_lengths(target, part, site)[mask.reshape(-1)].astype(np.float64)
        long = lengths > limit
        n, n_long = n + len(long), n_long + int(long.sum())
        squares, long_squares = squares + float((lengths**2).sum()), long_squares + float((lengths[long] ** 2).sum())
        if long.any():
            ids = token_parts.read_part(used.source, used.parts[part.index])[0][mask][long]
            vocab_ids.update(ids.tolist())
    return _LongVectors(n, n_long, long_squares / (squares or 1), vocab_ids) if n else None


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
