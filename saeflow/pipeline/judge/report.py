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
from saeflow.pipeline.judge.evaluate import firing_counts
from saeflow.pipeline.lineage import Lineage
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.sae.formats.load import load_sae
from saeflow.store.artefact import Artefact
from saeflow.store.files import replacing

MAX_ROWS = 64
"""Rows of the largest table that is drawn whole."""

_DRAWN = "saeflow parts"
"""Name of a text in the PNG file that says which parts are drawn."""


def run(lineage: Lineage, progress: Progress) -> Path:
    """Draw the run's picture beside its features, unless it shows the present features already."""
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
    """Return row labels and all values (N, F) of a table that fits in memory."""
    source, stored, site = lineage.tokens, lineage.activations, lineage.site
    sae = load_sae(lineage.sae.fetched(), n_threads(lineage.recipe.threads))
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


def _heat_map(lineage: Lineage) -> Any:
    """Draw live features × rows, each feature scaled to its own maximum."""
    from matplotlib.figure import Figure

    labels, values = feature_table(lineage)
    most = np.abs(values).max(0)
    live = np.flatnonzero(most)
    scaled = (values[:, live] / most[live]).T
    figure = Figure(figsize=(2 + 0.7 * len(labels), 1.6 + 0.32 * len(live)), layout="constrained")
    axes = figure.subplots()
    signed = bool((scaled < 0).any())
    image = axes.imshow(scaled, aspect="auto", cmap="RdBu_r" if signed else "magma", vmin=-1 if signed else 0, vmax=1)
    axes.set_xticks(range(len(labels)), [_plain(label) for label in labels], rotation=40, ha="right")
    axes.set_yticks(range(len(live)), [str(feature) for feature in live])
    axes.set_ylabel("feature")
    axes.set_title(f"{_plain(lineage.recipe.name)}: values over each feature's maximum")
    figure.colorbar(image, ax=axes)
    return figure


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _densities(target: Artefact) -> Any:
    """Draw a histogram of log10 density over live features."""
    from matplotlib.figure import Figure

    n_firing, n_tokens = firing_counts(target)
    density = n_firing / max(n_tokens, 1)
    live = density[density > 0]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    lowest = min(math.floor(np.log10(live.min())), -1) if len(live) else -6
    axes.hist(np.log10(live), bins=list(np.linspace(lowest, 0, 10 * -lowest + 1)))
    axes.set_xlabel("log10 of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    axes.set_title(f"{len(live):,} live features, {len(density) - len(live):,} dead")
    return figure
