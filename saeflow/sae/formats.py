"""Settings in the folder of an autoencoder: ours, one of SAELens, or one of dictionary_learning.

A setting that `saeflow.sae.autoencoder` cannot follow is refused; the error names the file and the setting.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from saeflow.recipe.settings import TOP_FAMILY, Architecture, SAEConfig
from saeflow.runtime.errors import UserError

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
THEIR_CFG, THEIR_WEIGHTS = "config.json", "ae.pt"
"""The two files in a folder of SAELens, and of dictionary_learning."""

WritingProgram = Literal["saeflow", "SAELens", "dictionary_learning"]
SettingValue = TypeVar("SettingValue")

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
_DICTIONARY_CLASSES: dict[str, Architecture] = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka",
}  # fmt: skip
_OFF_CENTRE = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes that encode their input without subtracting the decoder bias first."""


@dataclass(frozen=True)
class SAEFolder:
    """A folder that holds an autoencoder: its settings, and where its weights are."""

    writer: WritingProgram
    config: SAEConfig
    width: int
    out_width: int
    settings: Path
    weights: Path
    takes_b_dec_off: bool = True
    """True if the decoder bias is subtracted before encoding; never in a transcoder."""
    by_norm: bool = False
    """True if values are in units of contributions: pre-activations times the length of their decoder row."""
    metadata: dict[str, Any] = field(default_factory=dict)


def read_sae_folder(folder: Path) -> SAEFolder:
    """Read the settings. Raises UserError, which names the file and the setting, for one that cannot be followed."""
    for settings, weights, read in ((CFG, WEIGHTS, _saelens), (THEIR_CFG, THEIR_WEIGHTS, _dictionary_learning)):
        if any((folder / name).is_file() for name in (settings, weights)):
            for name in (settings, weights):
                if not (folder / name).is_file():
                    raise UserError(f"No {name} in {folder}. A trained autoencoder has {settings} and {weights}.")
            return read(folder / settings, folder / weights)
    raise UserError(
        f"No {CFG} in {folder}. An autoencoder is a folder with {CFG} and {WEIGHTS} (saeflow, SAELens), or with "
        f"{THEIR_CFG} and {THEIR_WEIGHTS} (dictionary_learning)."
    )


def describe_source(config: SAEConfig) -> SAEFolder:
    """Read the folder that `sae.source` names."""
    assert config.source is not None
    folder = Path(config.source)
    if not folder.is_dir():
        raise UserError(
            f"sae.source is {config.source}, but there is no such folder.\nName the folder of a trained SAE, with "
            f"{CFG} and {WEIGHTS}, or with {THEIR_CFG} and {THEIR_WEIGHTS}."
        )
    return read_sae_folder(folder)


def effective_config(config: SAEConfig) -> SAEConfig:
    """Return the settings of the recipe's SAE, or of the folder in `sae.source` on the recipe's sites.

    Raises UserError for a setting that the recipe gives and the folder contradicts.
    """
    if config.source is None:
        return config
    found = describe_source(config)
    _require_agreement(config, found)
    sites = {"site": config.site, "target_site": config.target_site}
    return found.config.model_copy(update=sites | {"source": None})


def _require_agreement(asked: SAEConfig, found: SAEFolder) -> None:
    names = ["architecture", "n_features", *(["k"] if found.config.architecture == "topk" else [])]
    for name in names:
        value, there = getattr(asked, name), getattr(found.config, name)
        if value not in (there, SAEConfig.model_fields[name].default):
            raise UserError(
                f"sae.{name} is {value}, but the SAE in {found.weights.parent} has {there}.\n"
                f"Set sae.{name} to {there}, or leave it out: it comes from sae.source."
            )
    if (asked.target_site is None) != (found.config.target_site is None):
        what, remedy = "a", "Set it to the site that it reconstructs."
        if found.config.target_site is None:
            what, remedy = "no", "Leave it out: the SAE reconstructs what it reads."
        raise UserError(
            f"The SAE in {found.weights.parent} is {what} transcoder, but sae.target_site is {asked.target_site}.\n"
            f"{remedy}"
        )


def saelens_name(config: SAEConfig) -> str:
    """Return the name that SAELens has for the architecture."""
    name = SAVED_AS[config.architecture]
    if config.target_site is None:
        return name
    return "transcoder" if name == "standard" else f"{name}_transcoder"


def _saelens(settings: Path, weights: Path) -> SAEFolder:
    cfg = _of_today(settings, _json_of(settings))
    name = _one_of(settings, cfg, "architecture", tuple(_SAELENS))
    transcodes = name.endswith("transcoder")
    _one_of(settings, cfg, "activation_fn", ("relu",))
    _one_of(settings, cfg, "normalize_activations", ("none",))
    _one_of(settings, cfg, "reshape_activations", ("none", "hook_z"))
    _one_of(settings, cfg, "finetuning_scaling_factor", (False,))
    takes_off = _one_of(settings, cfg, "apply_b_dec_to_input", (False,) if transcodes else (True, False))
    by_norm = _one_of(settings, cfg, "rescale_acts_by_decoder_norm", (False, True) if name in _BY_NORM else (False,))
    width, n_features = _positive_count(settings, cfg, "d_in"), _positive_count(settings, cfg, "d_sae")
    out_width = _positive_count(settings, cfg, "d_out") if transcodes else width
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {}
    if isinstance(metadata.get("saeflow"), dict):
        config = _own(settings, metadata["saeflow"], name, n_features, cfg)
    else:
        target = str(metadata.get("hook_name_out") or "another site") if transcodes else None
        nested = _positive_counts(settings, cfg, "matryoshka_widths")
        config = _foreign(settings, _SAELENS[name], n_features, cfg, nested, target)
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
            raise UserError(f"{settings}: activation_fn_kwargs is {_short(given)}; it has to be a table. {AGAIN}")
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


def _dictionary_learning(settings: Path, weights: Path) -> SAEFolder:
    trainer = _json_of(settings).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{settings} has no table `trainer`. dictionary_learning writes one beside ae.pt.")
    name = _one_of(settings, trainer, "dict_class", tuple(_DICTIONARY_CLASSES))
    width = _positive_count(settings, trainer, "activation_dim")
    n_features = _positive_count(settings, trainer, "dict_size")
    nested = list(itertools.accumulate(_positive_counts(settings, trainer, "group_sizes")))
    config = _foreign(settings, _DICTIONARY_CLASSES[name], n_features, trainer, nested, None)
    takes_off = name not in _OFF_CENTRE
    return SAEFolder("dictionary_learning", config, width, width, settings, weights, takes_off, False, trainer)


def _foreign(
    settings: Path, architecture: Architecture, n_features: int, cfg: dict[str, Any], nested: list[int],
    target: str | None,
) -> SAEConfig:  # fmt: skip
    about: dict[str, Any] = {"architecture": architecture, "n_features": n_features, "unit_norm": False}
    if architecture == "topk":
        about["k"] = _positive_count(settings, cfg, "k")
    elif architecture in TOP_FAMILY and isinstance(k := cfg.get("k"), int | float):
        if not abs(k) < _TOO_MANY:  # NaN, too
            raise UserError(f"{settings}: k is {_short(k)}; it has to be a number of features. {AGAIN}")
        about["k"] = max(1, round(k))  # an average, which encoding does not use
    if about.get("k", 1) > n_features:
        raise UserError(f"{settings}: k is {about['k']}, more than its {n_features} features. {AGAIN}")
    if architecture in TOP_FAMILY:
        about["k"] = about.get("k", min(n_features, 32))
    if architecture == "matryoshka":
        about["prefixes"] = [size for size in nested if size <= n_features]
    return SAEConfig.model_validate(about | {"target_site": target})


def _positive_counts(settings: Path, cfg: Mapping[str, Any], name: str) -> list[int]:
    found = cfg.get(name) or []
    if not isinstance(found, list):
        raise UserError(f"{settings}: {name} is {_short(found)}; it has to be a list of whole numbers. {AGAIN}")
    return [_positive_count(settings, {name: each}, name) for each in found]


_TOO_MANY = 2**31
"""Larger than any count."""
AGAIN = "Copy the folder again from where it comes from."


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged, it is no JSON ({error}). {AGAIN}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged, it holds no settings. {AGAIN}")
    return found


def _one_of(settings: Path, cfg: Mapping[str, Any], name: str, known: tuple[SettingValue, ...]) -> SettingValue:
    value = cfg.get(name)
    if value not in known or type(value) is not type(known[known.index(value)]):
        may = ", ".join(json.dumps(each) for each in known)
        raise UserError(
            f"{settings}: {name} is {_short(value)}; saeflow reads {may}. {_WAYS_OUT.get(name, '')}".rstrip()
        )
    return known[known.index(value)]


_WAYS_OUT = {
    "normalize_activations": (
        "If it is a constant factor, fold it in with SAELens (fold_activation_norm_scaling_factor) and save again."
    ),
    "rescale_acts_by_decoder_norm": (
        "Fold the lengths of the decoder's rows in with SAELens (fold_W_dec_norm) and save again."
    ),
    "finetuning_scaling_factor": "Fold the tensor scaling_factor into the decoder, and save again.",
}


def _short(value: object) -> str:
    """Return a value as JSON, cut short so that the message stays readable."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _positive_count(settings: Path, cfg: Mapping[str, Any], name: str) -> int:
    value = cfg.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < _TOO_MANY or value % 1:
        raise UserError(f"{settings}: {name} is {_short(value)}; it has to be a whole number above 0. {AGAIN}")
    return int(value)
