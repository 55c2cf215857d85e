"""A map of decoder directions: each feature's row of the decoder, laid on a plane."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.runtime.errors import UserError, first_line
from saeflow.sae.formats.names import WEIGHTS
from saeflow.store.artefact import Artefact

MOST_MAPS = 8
"""Maps kept in memory: 1 MB each for 131,072 features."""

MOST_FOR_UMAP = 20_000
"""Features that UMAP lays out while a page waits."""

_DECODER_ROWS = 8_192
"""Rows of the decoder that are read at once."""

_kept: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
_one_at_a_time = threading.Lock()


def has_umap(n_features: int) -> bool:
    return n_features <= MOST_FOR_UMAP and importlib.util.find_spec("umap") is not None


def places(sae: Artefact, by: str = "pca") -> np.ndarray:
    """Return the place of each feature, (F, 2), from the unit rows of the decoder. Kept in memory once computed."""
    path = sae.own_file(WEIGHTS)
    key = (str(path), by)
    with _one_at_a_time:
        if key not in _kept:
            _kept[key] = umap_places(path) if by == "umap" else pca_places(path)
        _kept.move_to_end(key)
        while len(_kept) > MOST_MAPS:
            _kept.popitem(last=False)
        return _kept[key]


def umap_places(path: Path) -> np.ndarray:
    rows = np.concatenate(list(unit_rows(path)))
    if not has_umap(len(rows)):
        raise UserError(f"UMAP is not installed, or the SAE has more than {MOST_FOR_UMAP:,} features. Look at the PCA.")
    return np.asarray(importlib.import_module("umap").UMAP(metric="cosine", random_state=0).fit_transform(rows))


def pca_places(path: Path, n_rounds: int = 12) -> np.ndarray:
    """Return the coordinates on the two directions along which the rows vary most.

    Subspace iteration on blocks of rows (Halko et al. 2011, arXiv 0909.4061): memory does not grow with the number of
    features. A direction's largest entry is positive, so that the map is the same on any machine.
    """
    n_rows = sum(map(len, unit_rows(path)))
    mean = (sum(rows.sum(0, dtype=np.float64) for rows in unit_rows(path)) / n_rows).astype(np.float32)
    n_columns = min(12, len(mean))
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((len(mean), n_columns)).astype(np.float32))[0]
    for _ in range(n_rounds):
        product = sum((rows - mean).T @ ((rows - mean) @ basis) for rows in unit_rows(path))
        basis = np.linalg.svd(product, full_matrices=False)[0]
    axes = basis[:, :2] * np.sign(basis[np.abs(basis[:, :2]).argmax(0), range(2)])
    return np.concatenate([(rows - mean) @ axes for rows in unit_rows(path)])


def unit_rows(path: Path) -> Iterator[np.ndarray]:
    """Yield the decoder's rows at unit length, a block at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, "np")
        rows = file.get_slice("W_dec")
    except (OSError, SafetensorError) as error:
        raise UserError(f"The decoder's directions cannot be read from {path.name}: {first_line(error)}") from error
    with file:
        n_rows = rows.get_shape()[0]
        for start in range(0, n_rows, _DECODER_ROWS):
            block = rows[start : min(start + _DECODER_ROWS, n_rows)].astype(np.float32)
            yield block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
