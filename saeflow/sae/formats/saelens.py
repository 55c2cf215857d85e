"""Settings of SAELens, versions 3 to 6, and of saeflow, which writes them too.

cfg.json and sae_weights.safetensors: W_enc (D, F), W_dec (F, D_out), b_enc, b_dec; threshold, topk_threshold or
log_threshold; b_gate, r_mag and b_mag of a gated one; W_skip (D_out, D) of a skip transcoder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from saeflow.recipe.settings import TOP_FAMILY, Architecture, SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import (
    AGAIN,
    Files,
    SAEFolder,
    Scale,
    foreign_config,
    json_of,
    one_of,
    positive_count,
    positive_counts,
    positive_number,
    short,
    text_or_none,
)
from saeflow.sae.parameters import InputNorm
from saeflow.sae.pursuit import NO_END, PursuitEnd

SAVED_AS: dict[Architecture, str] = {
    "relu": "standard", "topk": "topk", "gated": "gated",
    "jumprelu": "jumprelu", "batchtopk": "jumprelu", "matryoshka": "jumprelu",
    "abstopk": "abstopk",
    "mp": "matching_pursuit",
}  # fmt: skip
_SAELENS: dict[str, Architecture] = {
    "standard": "relu", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu",
    "batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka",  # SAELens saves these in the midst of training
    "abstopk": "abstopk", "matching_pursuit": "mp",
}  # fmt: skip
_BY_NORM = ("relu", *(name for name in TOP_FAMILY if name != "mp"))
"""Architectures whose values may be in units of contributions. A gate, or thresholds, would have to be scaled, too."""
_TENSORS = {"topk_threshold": "threshold", "finetuning_scaling_factor": "scaling_factor"}
_SCALER = "activation_scaler.json"
"""SAELens keeps the factor of activations here, beside a checkpoint of a training."""
_AVERAGE = "expected_average_only_in"


class _Kind(NamedTuple):
    architecture: Architecture
    transcodes: bool
    skips: bool


_SAELENS_KINDS = {name: _Kind(architecture, False, False) for name, architecture in _SAELENS.items()} | {
    f"{'' if name == 'standard' else f'{name}_'}{'skip_' if skips else ''}transcoder": _Kind(architecture, True, skips)
    for name, architecture in _SAELENS.items()
    for skips in (False, True)
    if name in SAVED_AS.values() and architecture != "mp"
}
_SAELENS_KINDS |= {
    f"skip_{name}": _Kind(_SAELENS[name], False, True) for name in SAVED_AS.values() if name != SAVED_AS["mp"]
}
"""What a name of an architecture means. SAELens itself has only some of these transcoders, and no `skip_` alone."""


def saelens_name(config: SAEConfig, skips: bool = False) -> str:
    """Return the name that SAELens has for the architecture."""
    wanted = config.target_site is not None, skips
    return next(
        name for name, kind in _SAELENS_KINDS.items()
        if kind == (_SAELENS[SAVED_AS[config.architecture]], *wanted)
    )  # fmt: skip


def describe_saelens(files: Files) -> SAEFolder:
    settings, weights = files.settings, files.weights
    cfg = _of_today(settings, files.read_settings | dict(files.card.get("settings", {})))
    name = one_of(settings, cfg, "architecture", tuple(_SAELENS_KINDS))
    kind = _SAELENS_KINDS[name]
    one_of(settings, cfg, "activation_fn", ("relu",))
    one_of(settings, cfg, "reshape_activations", ("none", "hook_z"))
    takes_off = one_of(settings, cfg, "apply_b_dec_to_input", (False,) if kind.transcodes else (True, False))
    may_scale = (False, True) if kind.architecture in _BY_NORM else (False,)
    by_norm = one_of(settings, cfg, "rescale_acts_by_decoder_norm", may_scale)
    width, n_features = positive_count(settings, cfg, "d_in"), positive_count(settings, cfg, "d_sae")
    out_width = positive_count(settings, cfg, "d_out") if kind.transcodes else width
    if kind.architecture == "mp":
        cfg = {"residual_threshold": 1e-2, "stop_on_duplicate_support": True, **cfg}
        cfg["k"] = cfg.get("max_iterations") or min(width, n_features)
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {}
    hook, target = (
        text_or_none(metadata.get(ours) or metadata.get(f"hook_name{end}") or cfg.get(f"hook_name{end}"))
        for ours, end in (("site", ""), ("target_site", "_out"))
    )
    if isinstance(metadata.get("saeflow"), dict):
        config = _own(settings, metadata["saeflow"], name, kind, n_features, cfg)
    else:
        target_site = (target or "another site") if kind.transcodes else None
        nested = positive_counts(settings, cfg, "matryoshka_widths")
        config = foreign_config(settings, kind.architecture, n_features, cfg, nested, target_site)
    return SAEFolder(
        "saeflow" if "saeflow" in metadata else "SAELens", config, width, out_width, settings, weights, takes_off,
        by_norm, metadata=metadata, names=_TENSORS, skips=kind.skips, scale=_saelens_scale(files, cfg),
        optional=frozenset({"scaling_factor"} if cfg["finetuning_scaling_factor"] else ()),
        input_norm=_input_norm(cfg), hook=hook, target_hook=target, pursuit_end=_pursuit_end(settings, cfg),
    )  # fmt: skip


def _pursuit_end(settings: Path, cfg: dict[str, Any]) -> PursuitEnd:
    if cfg["architecture"] != SAVED_AS["mp"]:
        return NO_END
    length = cfg["residual_threshold"]
    if isinstance(length, bool) or not isinstance(length, int | float) or not 0 <= length < math.inf:
        raise UserError(f"{settings}: residual_threshold is {short(length)}; it has to be a length. {AGAIN}")
    return PursuitEnd(float(length), one_of(settings, cfg, "stop_on_duplicate_support", (True, False)))


def _of_today(settings: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of SAELens before 6 under today's names, with defaults for those that may be left out."""
    function = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"
    normalised = cfg.get("normalize_activations")
    cfg = {
        "architecture": "standard", "reshape_activations": "none", "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False, "hook_name": cfg.get("hook_point"), **cfg, "activation_fn": function,
        "normalize_activations": {None: "none", False: "none", True: _AVERAGE}.get(normalised, normalised)
        if not isinstance(normalised, dict | list) else normalised,
        "finetuning_scaling_factor": bool(cfg.get("finetuning_scaling_factor")),
    }  # fmt: skip
    if function == "topk":
        given = cfg.get("activation_fn_kwargs") or cfg
        if not isinstance(given, dict):
            raise UserError(f"{settings}: activation_fn_kwargs is {short(given)}; it has to be a table. {AGAIN}")
        cfg |= {"architecture": "topk", "activation_fn": "relu", "k": given.get("k")}
    return cfg


def _input_norm(cfg: dict[str, Any]) -> InputNorm:
    found = cfg["normalize_activations"]
    return found if found in ("constant_norm_rescale", "layer_norm") else "none"


def _saelens_scale(files: Files, cfg: dict[str, Any]) -> Scale:
    """Return the factor that SAELens multiplies activations by before the autoencoder reads them."""
    known = ("none", _AVERAGE, "constant_scalar_rescale", "constant_norm_rescale", "layer_norm")
    kind = one_of(files.settings, cfg, "normalize_activations", known)
    if kind not in (_AVERAGE, "constant_scalar_rescale"):
        return Scale()
    beside = files.settings.parent / _SCALER
    if kind == "constant_scalar_rescale":
        factor = positive_number(files.settings, cfg, "activation_normalization_factor")
    elif files.asked.input_scale:
        return Scale()  # `source` takes it from the recipe
    elif "norm_scaling_factor" in files.card:
        factor = positive_number(files.settings, files.card, "norm_scaling_factor")
    elif beside.is_file():
        factor = positive_number(beside, json_of(beside), "scaling_factor")
    else:
        raise UserError(
            f"{files.settings}: normalize_activations is {_AVERAGE}, but the folder does not hold the factor.\n"
            "Set sae.input_scale to the root of d_in over the mean length of an activation; or fold it in with SAELens "
            "(fold_activation_norm_scaling_factor) and save again."
        )
    return Scale(factor, factor, keeps_values=True)


def _own(
    settings: Path, own: dict[str, Any], name: str, kind: _Kind, n_features: int, cfg: dict[str, Any]
) -> SAEConfig:
    try:
        config = SAEConfig.model_validate(own)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(
            f"{settings}: metadata.saeflow is not understood ({what}). Was it written by a later version of saeflow?"
        ) from None
    said = {"architecture": name, "d_sae": n_features, "k": cfg.get("k", config.k)}
    named = saelens_name(config, kind.skips)
    for key, value in {"architecture": named, "d_sae": config.n_features, "k": config.k}.items():
        if said[key] != value:
            raise UserError(
                f"{settings}: {key} is {said[key]!r}, but {value!r} follows from metadata.saeflow. Take "
                "metadata.saeflow out, and the folder is read as SAELens reads it."
            )
    return config
