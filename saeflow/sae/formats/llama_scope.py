"""Llama Scope and its successors (OpenMOSS): hyperparams.json with checkpoints/*.safetensors, or config.json with
sae_weights.safetensors.

Activations are scaled to a mean length of the root of D by constants that are kept; they are folded in, so that values
have the units of the activations, as in OpenMOSS' own `inference` mode.
"""

from __future__ import annotations

import math
from typing import Any

from saeflow.recipe.settings import Architecture
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import (
    Files,
    SAEFolder,
    Scale,
    foreign_config,
    one_of,
    positive_count,
    positive_number,
    short,
    text_or_none,
)
from saeflow.sae.formats.tensors import read_weights, shapes_of

_OPENMOSS_NAMES = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "decoder.bias": "b_dec",
    "W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec",
    "log_jumprelu_threshold": "log_threshold", "activation_function.log_jumprelu_threshold": "log_threshold",
}  # fmt: skip
_NORM = "dataset_average_activation_norm"
_FUNCTIONS: dict[str, Architecture] = {"relu": "relu", "topk": "topk", "jumprelu": "jumprelu"}


def describe_llama_scope(files: Files) -> SAEFolder:
    settings, shapes = files.settings, shapes_of(files.weights)
    defaults = {"apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False, "use_decoder_bias": True}
    cfg: dict[str, Any] = defaults | {"sparsity_include_decoder_norm": True, "sae_type": "sae"} | files.read_settings
    one_of(settings, cfg, "sae_type", ("sae",))
    one_of(settings, cfg, "use_glu_encoder", (False,))
    cfg["act_fn"] = str(cfg.get("act_fn")).lower()
    architecture = _FUNCTIONS[one_of(settings, cfg, "act_fn", tuple(_FUNCTIONS))]
    width = positive_count(settings, cfg, "d_model")
    n_features = cfg.get("d_sae") or width * positive_number(settings, cfg, "expansion_factor")
    n_features = positive_count(settings, {"d_sae": n_features}, "d_sae")
    hook, target = (text_or_none(cfg.get(f"hook_point_{end}")) for end in ("in", "out"))
    transcodes = hook != target and target is not None
    cfg["k"] = cfg.get("top_k")
    config = foreign_config(settings, architecture, n_features, cfg, [], target if transcodes else None)
    takes_off = one_of(settings, cfg, "apply_decoder_bias_to_pre_encoder", (False,) if transcodes else (False, True))
    by_norm = one_of(settings, cfg, "sparsity_include_decoder_norm", (False, True)) and architecture != "relu"
    no_bias = not one_of(settings, cfg, "use_decoder_bias", (True, False))
    scale, single = _openmoss_scale(files, cfg, width, hook, target), None
    if architecture == "jumprelu" and not _has_thresholds(shapes):  # one for all, of activations before the scaling
        single = positive_number(settings, cfg, "jump_relu_threshold") * scale.read
    return SAEFolder(
        "Llama Scope", config, width, width, settings, files.weights, takes_off,
        by_norm=by_norm and architecture == "topk", threshold_by_norm=by_norm and architecture == "jumprelu",
        metadata=files.read_settings, names=_OPENMOSS_NAMES, scale=scale,
        ignored=frozenset(name for name in shapes if name.startswith(_NORM)),
        zeros=frozenset({"b_dec"} if no_bias else ()), hook=hook, target_hook=target if transcodes else None,
        single_threshold=single,
    )  # fmt: skip


def _has_thresholds(shapes: Any) -> bool:
    return any(_OPENMOSS_NAMES.get(name) == "log_threshold" for name in shapes)


def _openmoss_scale(files: Files, cfg: dict[str, Any], width: int, hook: str | None, target: str | None) -> Scale:
    """Return the two factors. They are in the settings, or among the tensors by the names of the hooks."""
    kind = one_of(files.settings, {"norm_activation": "dataset-wise"} | cfg, "norm_activation", _HOW)
    if kind == "inference" or files.asked.input_scale:
        return Scale()
    lengths = cfg.get(_NORM)
    if not isinstance(lengths, dict):
        found = {name: tensor for name, tensor in read_weights(files.weights).items() if name.startswith(_NORM)}
        lengths = {name.split(".", 1)[-1]: float(tensor) for name, tensor in found.items() if tensor.numel() == 1}
    given = [lengths.get("in", lengths.get(hook)), lengths.get("out", lengths.get(target))]
    if given[0] is None and "norm_scaling_factor" in files.card:
        given = [math.sqrt(width) / positive_number(files.settings, files.card, "norm_scaling_factor")] * 2
    if given[0] is None:
        raise UserError(
            f"{files.settings}: norm_activation is {short(kind)}, but {_NORM} is nowhere.\n"
            "Set sae.input_scale to the root of d_model over the mean length of an activation."
        )
    read = positive_number(files.settings, {_NORM: given[0]}, _NORM)
    out = positive_number(files.settings, {_NORM: given[1] or read}, _NORM)
    return Scale(math.sqrt(width) / read, math.sqrt(width) / out)


_HOW = ("dataset-wise", "inference")
