"""Settings of SAELens, versions 3 to 6, and of saeflow, which writes them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from saeflow.recipe.settings import TOP_FAMILY, Architecture, SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import (
    AGAIN,
    SAEFolder,
    WritingProgram,
    foreign_config,
    json_of,
    one_of,
    positive_count,
    positive_counts,
    short,
)

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

SAVED_AS: dict[Architecture, str] = {
    "relu": "standard", "topk": "topk", "gated": "gated",
    "jumprelu": "jumprelu", "batchtopk": "jumprelu", "matryoshka": "jumprelu",
}  # fmt: skip
_SAELENS: dict[str, Architecture] = {
    "standard": "relu", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu",
    "batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka",  # SAELens saves these in the midst of training
    "transcoder": "relu", "jumprelu_transcoder": "jumprelu",
    "topk_transcoder": "topk", "gated_transcoder": "gated",  # ours: SAELens has none
}  # fmt: skip
_BY_NORM = [name for name, architecture in _SAELENS.items() if architecture in ("relu", *TOP_FAMILY)]
"""Names whose values may be in units of contributions. A gate, or thresholds, would have to be scaled as well."""


def saelens_name(config: SAEConfig) -> str:
    """Return the name that SAELens has for the architecture."""
    name = SAVED_AS[config.architecture]
    if config.target_site is None:
        return name
    return "transcoder" if name == "standard" else f"{name}_transcoder"


def describe_saelens(settings: Path, weights: Path) -> SAEFolder:
    cfg = _of_today(settings, json_of(settings))
    name = one_of(settings, cfg, "architecture", tuple(_SAELENS))
    transcodes = name.endswith("transcoder")
    one_of(settings, cfg, "activation_fn", ("relu",))
    one_of(settings, cfg, "normalize_activations", ("none",))
    one_of(settings, cfg, "reshape_activations", ("none", "hook_z"))
    one_of(settings, cfg, "finetuning_scaling_factor", (False,))
    takes_off = one_of(settings, cfg, "apply_b_dec_to_input", (False,) if transcodes else (True, False))
    by_norm = one_of(settings, cfg, "rescale_acts_by_decoder_norm", (False, True) if name in _BY_NORM else (False,))
    width, n_features = positive_count(settings, cfg, "d_in"), positive_count(settings, cfg, "d_sae")
    out_width = positive_count(settings, cfg, "d_out") if transcodes else width
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {}
    if isinstance(metadata.get("saeflow"), dict):
        config = _own(settings, metadata["saeflow"], name, n_features, cfg)
    else:
        target = str(metadata.get("hook_name_out") or "another site") if transcodes else None
        nested = positive_counts(settings, cfg, "matryoshka_widths")
        config = foreign_config(settings, _SAELENS[name], n_features, cfg, nested, target)
    writer: WritingProgram = "saeflow" if "saeflow" in metadata else "SAELens"
    return SAEFolder(writer, config, width, out_width, settings, weights, takes_off, by_norm, metadata)


def _of_today(settings: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of SAELens before 6 under today's names, with defaults for those that may be left out."""
    function = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"
    normalised = cfg.get("normalize_activations")
    cfg = {
        "architecture": "standard", "reshape_activations": "none", "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False, **cfg, "activation_fn": function,
        "normalize_activations": "none" if normalised in (None, False) else normalised,
        "finetuning_scaling_factor": bool(cfg.get("finetuning_scaling_factor")),
    }  # fmt: skip
    if function == "topk":
        given = cfg.get("activation_fn_kwargs") or cfg
        if not isinstance(given, dict):
            raise UserError(f"{settings}: activation_fn_kwargs is {short(given)}; it has to be a table. {AGAIN}")
        cfg |= {"architecture": "topk", "activation_fn": "relu", "k": given.get("k")}
    return cfg


def _own(settings: Path, own: dict[str, Any], name: str, n_features: int, cfg: dict[str, Any]) -> SAEConfig:
    try:
        config = SAEConfig.model_validate(own)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(
            f"{settings}: metadata.saeflow is not understood ({what}). Was it written by a later version of saeflow?"
        ) from None
    said = {"architecture": name, "d_sae": n_features, "k": cfg.get("k", config.k)}
    for key, value in {"architecture": saelens_name(config), "d_sae": config.n_features, "k": config.k}.items():
        if said[key] != value:
            raise UserError(
                f"{settings}: {key} is {said[key]!r}, but {value!r} follows from metadata.saeflow. Take "
                "metadata.saeflow out, and the folder is read as SAELens reads it."
            )
    return config
