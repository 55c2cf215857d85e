"""The description of an autoencoder in a folder, and the checks that its settings pass.

A setting that `saeflow.sae.autoencoder` cannot follow is refused; the error names the file and the setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from saeflow.recipe.settings import TOP_FAMILY, Architecture, SAEConfig
from saeflow.runtime.errors import UserError

WritingProgram = Literal["saeflow", "SAELens", "dictionary_learning"]
SettingValue = TypeVar("SettingValue")


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


def foreign_config(
    settings: Path, architecture: Architecture, n_features: int, cfg: dict[str, Any], nested: list[int],
    target: str | None,
) -> SAEConfig:  # fmt: skip
    about: dict[str, Any] = {"architecture": architecture, "n_features": n_features, "unit_norm": False}
    if architecture == "topk":
        about["k"] = positive_count(settings, cfg, "k")
    elif architecture in TOP_FAMILY and isinstance(k := cfg.get("k"), int | float):
        if not abs(k) < _TOO_MANY:  # NaN, too
            raise UserError(f"{settings}: k is {short(k)}; it has to be a number of features. {AGAIN}")
        about["k"] = max(1, round(k))  # an average, which encoding does not use
    if about.get("k", 1) > n_features:
        raise UserError(f"{settings}: k is {about['k']}, more than its {n_features} features. {AGAIN}")
    if architecture in TOP_FAMILY:
        about["k"] = about.get("k", min(n_features, 32))
    if architecture == "matryoshka":
        about["prefixes"] = [size for size in nested if size <= n_features]
    return SAEConfig.model_validate(about | {"target_site": target})


def positive_counts(settings: Path, cfg: Mapping[str, Any], name: str) -> list[int]:
    found = cfg.get(name) or []
    if not isinstance(found, list):
        raise UserError(f"{settings}: {name} is {short(found)}; it has to be a list of whole numbers. {AGAIN}")
    return [positive_count(settings, {name: each}, name) for each in found]


_TOO_MANY = 2**31
"""Larger than any count."""
AGAIN = "Copy the folder again from where it comes from."


def json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged, it is no JSON ({error}). {AGAIN}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged, it holds no settings. {AGAIN}")
    return found


def one_of(settings: Path, cfg: Mapping[str, Any], name: str, known: tuple[SettingValue, ...]) -> SettingValue:
    value = cfg.get(name)
    if value not in known or type(value) is not type(known[known.index(value)]):
        may = ", ".join(json.dumps(each) for each in known)
        raise UserError(
            f"{settings}: {name} is {short(value)}; saeflow reads {may}. {_WAYS_OUT.get(name, '')}".rstrip()
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


def short(value: object) -> str:
    """Return a value as JSON, cut short so that the message stays readable."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def positive_count(settings: Path, cfg: Mapping[str, Any], name: str) -> int:
    value = cfg.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < _TOO_MANY or value % 1:
        raise UserError(f"{settings}: {name} is {short(value)}; it has to be a whole number above 0. {AGAIN}")
    return int(value)
