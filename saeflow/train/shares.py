"""Ranks that split the features: which trainings they can share, and their state put together and taken apart.

A checkpoint has the same files whichever ranks wrote it, so a training goes on with any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.ranks import Ranks
from saeflow.sae.autoencoder import SparseAutoencoder

_OF_ALL_FEATURES = {"b_dec", "centre"}
"""Names of parameters and buffers that have no row a feature."""


def require_shareable(recipes: Iterable[Recipe], ranks: Ranks) -> None:
    """Raise UserError, before any work, if several ranks cannot share one of these trainings."""
    for recipe in recipes if ranks.n > 1 else ():
        if recipe.cluster is not None:
            raise UserError(
                f"cluster is set, but torchrun has started {ranks.n} processes of this command.\n"
                "Leave cluster out, or run the command without torchrun."
            )
        if recipe.train.parallel == "features" and recipe.sae.source is None:
            _require_features(recipe, ranks)


def _require_features(recipe: Recipe, ranks: Ranks) -> None:
    sae, train = recipe.sae, recipe.train
    if sae.n_features < ranks.n:
        raise UserError(
            f"sae.n_features is {sae.n_features}, but {ranks.n} processes are to share the features.\n"
            f"Start at most {sae.n_features} processes, or raise sae.n_features."
        )
    if sae.architecture == "mp":
        raise UserError(
            "sae.architecture is mp, but train.parallel is features: each choice of a pursuit needs all features.\n"
            "Set train.parallel to data, or choose another architecture."
        )
    needs_all = {"train.resample_at": train.resample_at, "train.clip_norm": train.clip_norm}
    for name, value in (needs_all | ({"train.restarts": train.restarts} if train.restarts > 1 else {})).items():
        if value:
            raise UserError(
                f"{name} is {value}, but train.parallel is features: it needs all features in one process.\n"
                f"Set train.parallel to data, or leave {name} out."
            )


def whole_state(state: Mapping[str, Tensor], sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Return on the first rank a training's state with all features, in the processor's memory."""
    ranks, n = sae.split.features, sae.config.n_features
    return {
        name: ranks.brought_to_first(each, n) if ranks.n > 1 and _is_shared(name, each.dim(), sae) else each
        for name, each in state.items()
    }


def read_share(path: Path, sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Return this rank's share of a state that was written with all features. Other features are not read."""
    mine, found = sae.split.features.share(sae.config.n_features), {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_slice(name)
            shared = _is_shared(name, len(stored.get_shape()), sae)
            found[name] = stored[mine] if shared else file.get_tensor(name)
    return found


def _is_shared(name: str, n_dims: int, sae: SparseAutoencoder) -> bool:
    """True if a tensor has a row a feature. Names are `sae.NAME`, `adam.NUMBER.SLOT` and `whitening.NAME`."""
    kind, owner, *_ = name.split(".")
    if kind == "adam":
        owner = [each for each, _ in sae.named_parameters()][int(owner)]
    return n_dims > 0 and kind != "whitening" and owner not in _OF_ALL_FEATURES


def whole_sae(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Return on the first rank the autoencoder with all features, on the processor; elsewhere the rank's own."""
    if sae.split.features.n == 1:
        return sae
    state = whole_state({f"sae.{name}": value for name, value in sae.state_dict().items()}, sae)
    if not sae.split.features.is_first:
        return sae
    whole = SparseAutoencoder(sae.config, sae.W_enc.shape[1], sae.W_dec.shape[1], sae.threads)
    whole.load_state_dict({name.removeprefix("sae."): value for name, value in state.items()})
    return whole.train(sae.training)
