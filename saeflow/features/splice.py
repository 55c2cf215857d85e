"""Change features inside a running language model, and leave everything else at the site as it is.

A vector is the SAE's reconstruction plus what the SAE misses. Setting feature f from v to w gives
x + (w - v) · W_dec[f]: the part that the SAE misses, and all other features, stay (Templeton et al. 2024, "Scaling
Monosemanticity", clamp features in this way).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saeflow.activations.lengths import longest_allowed, too_long
from saeflow.activations.shards import stored_sites
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import choose_site, spliced
from saeflow.runtime.devices import to_processor
from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store


@dataclass(frozen=True)
class SplicePlace:
    """The sites of a model that an SAE reads and reconstructs, and the tokens that it leaves alone."""

    read: str
    target: str
    """The site that the SAE reconstructs: another one only for a transcoder."""
    dtype: torch.dtype
    """Precision in which activations were stored before they were encoded."""
    longest: float | None = None
    """Vectors longer than this are left alone."""
    special: Sequence[int] = ()
    """Vocabulary ids that are left alone."""
    positions: Sequence[int] = ()
    """Positions in the context that are left alone."""

    @classmethod
    def of_run(cls, store: Store, run: Artefact, sae: SparseAutoencoder) -> SplicePlace:
        """Return where the SAE of a run sits. `run` is the artefact of its features."""
        tokens, stored = store.input_of(run, "tokens"), store.input_of(run, "activations")
        sites = stored_sites(stored)
        read = choose_site(sites, run.fact("site"))
        target = choose_site(sites, sae.config.target_site) if sae.config.target_site else read
        selection = TokenSelection.from_facts(tokens, run.record.facts)
        return cls(
            read.name,
            target.name,
            getattr(torch, stored.fact("dtype")),
            longest_allowed(selection, stored, read),
            selection.special.tolist(),
            selection.skip_positions,
        )


def unit_lengths(sae: SparseAutoencoder, x: Tensor) -> Tensor | float:
    """Return how long one unit of value is at the vectors x (n, D): 1, or what `input_norm` divided by, (n, 1)."""
    if sae.input_norm == "none":
        return 1.0
    wide = x.double()
    if sae.input_norm == "layer_norm":
        return wide.std(dim=1, keepdim=True).float()
    length: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp(min=1e-30) / math.sqrt(x.shape[1])
    return length.float()


def require_spliceable(sae: SparseAutoencoder) -> None:
    """Raise UserError for an SAE whose values have no fixed meaning at the site that would be changed."""
    if sae.input_norm != "none" and sae.config.target_site is not None:
        raise UserError(
            "This transcoder normalises what it reads, so a value has no fixed length at its target.\n"
            "Take an SAE of the target itself, or a transcoder without normalisation."
        )


@contextlib.contextmanager
def spliced_features(
    model: nn.Module, sae: SparseAutoencoder, place: SplicePlace, values: Mapping[int, float | None]
) -> Iterator[None]:
    """While open, each of these features has its value at every token that the SAE reads (None: its own value).

    Works with any caller of the model, `generate` with a cache too. The SAE encodes each vector once a pass.
    """
    require_spliceable(sae)
    changed = {feature: value for feature, value in values.items() if value is not None}
    features = torch.tensor(sorted(changed), dtype=torch.int64)
    wanted = torch.tensor([changed[feature] for feature in sorted(changed)], dtype=torch.float32)
    directions = sae.W_dec.detach()[features].float().cpu()
    here = threading.local()

    def note_ids(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        here.alone = _left_alone(place, inputs, named)

    def change(x: Tensor, there: Tensor) -> Tensor:
        rows = to_processor(x.detach().flatten(0, -2).to(place.dtype))
        delta = wanted - values_of(sae, rows, features)
        delta[torch.from_numpy(too_long(rows, place.longest))] = 0
        alone = getattr(here, "alone", None)
        if alone is not None and alone.shape == x.shape[:-1]:
            delta[alone.flatten()] = 0
        moved = (delta @ directions) * unit_lengths(sae, rows)
        return there + moved.view(there.shape).to(there)

    hook = model.register_forward_pre_hook(note_ids, with_kwargs=True)
    try:
        with spliced(model, place.read, place.target, change) if changed else contextlib.nullcontext():
            yield
    finally:
        hook.remove()


def values_of(sae: SparseAutoencoder, rows: Tensor, features: Tensor) -> Tensor:
    """Return the values (n, m) float32 of m features, in ascending order, at vectors (n, D), exactly as stored."""
    sparse = sae.encode_sparse(rows)
    tokens = np.repeat(np.arange(len(rows)), np.diff(sparse.row_starts))
    wanted = features.numpy()
    places = np.searchsorted(wanted, sparse.feature_ids)
    places[places == len(wanted)] = 0
    mine = wanted[places] == sparse.feature_ids if len(wanted) else np.zeros(len(places), bool)
    found = np.zeros((len(rows), len(wanted)), np.float32)
    found[tokens[mine], places[mine]] = np.asarray(sparse.values, np.float32)[mine]
    return torch.from_numpy(found)


def _left_alone(place: SplicePlace, inputs: Any, named: dict[str, Any]) -> Tensor | None:
    """Return bool (B, T): True at tokens of this pass that the run skips; None if the pass was given no ids."""
    ids = named.get("input_ids", inputs[0] if inputs else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    before = named.get("past_key_values")
    start = 0 if before is None or not hasattr(before, "get_seq_length") else int(before.get_seq_length())
    positions = torch.arange(start, start + ids.shape[1])
    special, skipped = (torch.tensor(list(each), dtype=torch.int64) for each in (place.special, place.positions))
    return torch.isin(ids.cpu(), special) | torch.isin(positions, skipped)
