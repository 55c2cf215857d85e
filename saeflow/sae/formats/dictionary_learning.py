"""Settings of dictionary_learning."""

from __future__ import annotations

import itertools
from pathlib import Path

from saeflow.recipe.settings import Architecture
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import SAEFolder, foreign_config, json_of, one_of, positive_count, positive_counts

THEIR_CFG, THEIR_WEIGHTS = "config.json", "ae.pt"

_DICTIONARY_CLASSES: dict[str, Architecture] = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka",
}  # fmt: skip
_OFF_CENTRE = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes that encode their input without subtracting the decoder bias first."""


def describe_dictionary_learning(settings: Path, weights: Path) -> SAEFolder:
    trainer = json_of(settings).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{settings} has no table `trainer`. dictionary_learning writes one beside ae.pt.")
    name = one_of(settings, trainer, "dict_class", tuple(_DICTIONARY_CLASSES))
    width = positive_count(settings, trainer, "activation_dim")
    n_features = positive_count(settings, trainer, "dict_size")
    nested = list(itertools.accumulate(positive_counts(settings, trainer, "group_sizes")))
    config = foreign_config(settings, _DICTIONARY_CLASSES[name], n_features, trainer, nested, None)
    takes_off = name not in _OFF_CENTRE
    return SAEFolder("dictionary_learning", config, width, width, settings, weights, takes_off, False, trainer)
