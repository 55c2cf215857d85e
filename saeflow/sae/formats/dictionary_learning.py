"""Settings of dictionary_learning: all trainers whose dictionary reads and reconstructs one site.

config.json and ae.pt, a table of tensors; its table `trainer` names the class of the dictionary.
"""

from __future__ import annotations

import itertools
import re

from saeflow.recipe.settings import Architecture
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import (
    Files,
    SAEFolder,
    foreign_config,
    one_of,
    positive_count,
    positive_counts,
    text_or_none,
)

_DICTIONARY_CLASSES: dict[str, Architecture] = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka",
    "MatroyshkaBatchTopKSAE": "matryoshka",
}  # fmt: skip
_OFF_CENTRE = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes that encode their input without subtracting the decoder bias first."""
_DICTIONARY_NAMES = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec",
    "decoder_bias": "b_dec", "decoder.bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
_HOOKS = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out",
          "attention_out": "hook_attn_out", "attn_out": "hook_attn_out"}  # fmt: skip


def describe_dictionary_learning(files: Files) -> SAEFolder:
    settings = files.settings
    trainer = files.read_settings.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{settings} has no table `trainer`. dictionary_learning writes one beside ae.pt.")
    name = one_of(settings, trainer, "dict_class", tuple(_DICTIONARY_CLASSES))
    width = positive_count(settings, trainer, "activation_dim")
    n_features = positive_count(settings, trainer, "dict_size")
    nested = list(itertools.accumulate(positive_counts(settings, trainer, "group_sizes")))
    config = foreign_config(settings, _DICTIONARY_CLASSES[name], n_features, trainer, nested, None)
    ignored = {"k", "group_sizes"} | ({"threshold"} if config.architecture == "topk" else set())
    return SAEFolder(
        "dictionary_learning", config, width, width, settings, files.weights, name not in _OFF_CENTRE,
        metadata=trainer, names=_DICTIONARY_NAMES, ignored=frozenset(ignored), hook=_hook_of_trainer(trainer),
    )  # fmt: skip


def _hook_of_trainer(trainer: dict[str, object]) -> str | None:
    """Return TransformerLens' name for `resid_post_layer_12`; other names of submodules as they are."""
    name, layer = text_or_none(trainer.get("submodule_name")), trainer.get("layer")
    parts = re.fullmatch(r"(\w+?)_layer_(\d+)", name or "")
    if parts and parts[1] in _HOOKS:
        return f"blocks.{parts[2]}.{_HOOKS[parts[1]]}"
    return name or (f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else None)
