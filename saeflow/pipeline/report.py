"""Pictures of a run: the features of a small table as a heat map, and how often features fire."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from saeflow.activations import shards
from saeflow.corpus import token_parts
from saeflow.features.schema import holding
from saeflow.pipeline.lineage import Lineage
from saeflow.runtime.progress import Progress
from saeflow.sae import interchange
from saeflow.store.artefact import Artefact
from saeflow.store.files import replacing

MAX_ROWS = 64
"""A table of at most so many rows is drawn whole."""

_DRAWN = "saeflow parts"
"""Says in the picture's file what it shows: a PNG keeps such a text as it is."""

ACTIVE = 0.1
"""A feature is drawn as active above this share of its own maximum."""


def run(lineage: Lineage, progress: Progress) -> Path:
    """Draw the run's picture beside its features, again where the features are others than those that were drawn."""
    target = lineage.features
    generation = target.published()
    small = lineage.recipe.model is None and generation.total("n_tokens") <= MAX_ROWS
    path = target.own_file("features.png" if small else "density.png")
    if path.is_file() and f"{_DRAWN}\0{holding(generation.parts)}".encode() in path.read_bytes():
        return path
    with target.writing():
        drawn = holding(target.published().parts)
        figure = _heat_map(lineage) if small else _densities(target)
        with target.publishing(), replacing(path) as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks are drawn as boxes
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None, _DRAWN: drawn})
        target.storage.send(path)
    progress.say(f"report: picture in {path}")
    return path


def feature_table(lineage: Lineage) -> tuple[list[str], np.ndarray]:
    """Row labels and the value of every feature on every row (N, F), for tables that fit in memory."""
    source, stored, site = lineage.tokens, lineage.activations, lineage.site
    sae = interchange.load(lineage.sae.fetched())
    vocab = pq.read_table(source.own_file("vocab.parquet")).column("piece").to_pylist()
    labels: list[str] = []
    values = []
    for token_part, part in zip(source.published().parts, stored.published().parts, strict=True):
        labels += [vocab[i] for i in token_parts.read_part(source, token_part)[0][:, 0]]
        rows = shards.open_site(stored, part, site).read(slice(None))
        sparse = sae.encode_sparse(rows.reshape(-1, site.width))
        dense = np.zeros((len(rows), sae.config.n_features), np.float32)
        dense[np.repeat(np.arange(len(rows)), np.diff(sparse.row_starts)), sparse.feature_ids] = sparse.values
        values.append(dense)
    return labels, np.concatenate(values)


def active_sets(labels: list[str], values: np.ndarray) -> dict[int, frozenset[str]]:
    """For each live feature, the rows on which it is above `ACTIVE` of its own maximum."""
    sets = {}
    for feature, column in enumerate(values.T):
        if column.max() > 0:
            sets[feature] = frozenset(np.array(labels)[column > ACTIVE * column.max()].tolist())
    return sets


def _heat_map(lineage: Lineage) -> Any:
    """Live features × rows, each feature scaled to its own maximum."""
    from matplotlib.figure import Figure

    labels, values = feature_table(lineage)
    live = np.flatnonzero(values.max(0) > 0)
    scaled = (values[:, live] / values[:, live].max(0)).T
    figure = Figure(figsize=(2 + 0.7 * len(labels), 1.6 + 0.32 * len(live)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scaled, aspect="auto", cmap="magma", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), [_plain(label) for label in labels], rotation=40, ha="right")
    axes.set_yticks(range(len(live)), [str(feature) for feature in live])
    axes.set_ylabel("feature")
    axes.set_title(f"{_plain(lineage.recipe.name)}: values over each feature's maximum")
    figure.colorbar(image, ax=axes)
    return figure


def _plain(text: str) -> str:
    """Text without matplotlib's own markup."""
    return text.replace("$", r"\$")


def _densities(target: Artefact) -> Any:
    """Histogram of log10 density over live features."""
    from matplotlib.figure import Figure

    parts = target.published().parts
    tables = [pq.read_table(target.part_file(part, "feature_stats.parquet"), columns=["n_tokens"]) for part in parts]
    n_firing = np.sum([table.column(0).to_numpy() for table in tables], axis=0)
    density = n_firing / max(target.published().total("n_tokens"), 1)
    live = density[density > 0]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    lowest = min(math.floor(np.log10(live.min())), -1) if len(live) else -6
    axes.hist(np.log10(live), bins=list(np.linspace(lowest, 0, 10 * -lowest + 1)))
    axes.set_xlabel("log10 of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    axes.set_title(f"{len(live):,} live features, {len(density) - len(live):,} dead")
    return figure
