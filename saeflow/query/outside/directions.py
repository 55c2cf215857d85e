"""The decoder rows of a run's SAE, and cosines between those of two runs. PyTorch is loaded only when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from saeflow.query.questions import Value
from saeflow.query.runs import Run, pick_run, runs
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor


def directions_of(store: Store, run: Run) -> Tensor:
    """Return the decoder rows of a run's SAE as float32 (F, D). Raises UserError if the store does not have it."""
    from saeflow.sae.formats.load import load_sae

    sae = store.input_of(run.artefact, "saes")
    if not sae.exists():
        raise UserError(f"{sae.id} is not in the store, and the directions of {run.schema} are in its files.")
    return load_sae(sae.fetched()).W_dec.detach().float()


def can_compare(store: Store, one: Artefact, other: Artefact) -> bool:
    """True if directions of the two runs lie in one space: their SAEs read one model, or one table, at one site."""
    return one.record.facts.get("site") == other.record.facts.get("site") and _origin(store, one) == _origin(
        store, other
    )


def _origin(store: Store, run: Artefact) -> object:
    """Return the model's fingerprint, if the store knows it; else the activations' own name."""
    name = run.record.input("activations")
    stored = store.by_id(name) if name else None
    return (stored.record.facts.get("model") if stored and stored.exists() else None) or name


def cosines_with(store: Store, run: Run, other_run: str, feature: Value) -> pa.Array | None:
    """Return the cosine of a feature of the run with each feature of another, as structs (feature_id, cosine).

    None if the store lacks one of the two SAEs, or if their directions do not lie in one space. Raises UserError if
    there is no such run.
    """
    from torch.nn.functional import cosine_similarity

    other = pick_run(store, runs(store), other_run)
    saes = [each.artefact.record.input("saes") for each in (run, other)]
    if not can_compare(store, run.artefact, other.artefact) or not all(
        sae and store.by_id(sae).exists() for sae in saes
    ):
        return None
    mine, theirs = directions_of(store, run), directions_of(store, other)
    assert isinstance(feature, int)
    cosines = cosine_similarity(mine[feature : feature + 1], theirs).double().numpy()
    return pa.StructArray.from_arrays(
        [pa.array(range(len(cosines)), pa.int64()), pa.array(cosines)], ["feature_id", "cosine"]
    )
