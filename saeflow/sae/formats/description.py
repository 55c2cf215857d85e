"""The description of an autoencoder in a folder, and the checks that its settings pass.

A reader of a format turns settings, names and shapes into one `SAEFolder`; `load` follows it. A setting that
`saeflow.sae.autoencoder` cannot follow is refused; the error names the file and the setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from saeflow.recipe.settings import PER_TOKEN, TOP_FAMILY, Architecture, SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.parameters import InputNorm
from saeflow.sae.pursuit import NO_END, PursuitEnd

SettingValue = TypeVar("SettingValue")


@dataclass(frozen=True)
class Files:
    """Where an autoencoder lies, and what is said about it outside of its files."""

    settings: Path
    weights: Path
    asked: SAEConfig = field(default_factory=SAEConfig)
    """The recipe's own section. A format that does not say something takes it from there."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """What a catalogue says: l0, variance_explained, norm_scaling_factor, and settings that replace the folder's."""

    @property
    def read_settings(self) -> dict[str, Any]:
        return json_of(self.settings)


@dataclass(frozen=True)
class Scale:
    """Constants that activations are multiplied by: what the autoencoder reads, and what it reconstructs."""

    read: float = 1.0
    target: float = 1.0
    keeps_values: bool = False
    """True if a feature's value is the scaled activations' own, as SAELens has it; else it has the target's units."""


@dataclass(frozen=True)
class SAEFolder:
    """A folder that holds an autoencoder: its settings, where its weights are, and how to read them."""

    writer: str
    config: SAEConfig
    width: int
    out_width: int
    settings: Path
    weights: Path
    takes_b_dec_off: bool = True
    """True if the decoder bias is subtracted before encoding; never in a transcoder."""
    by_norm: bool = False
    """True if values are in units of contributions: pre-activations times the length of their decoder row."""
    threshold_by_norm: bool = False
    """True if only the thresholds are in those units."""
    metadata: dict[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """The program's names of tensors, and our names (those of SAELens)."""
    transposed: frozenset[str] = frozenset()
    """Our names of matrices that the program keeps the other way round."""
    ignored: frozenset[str] = frozenset()
    """Tensors that say nothing about values."""
    optional: frozenset[str] = frozenset()
    """Our names of tensors that may be there."""
    pursuit_end: PursuitEnd = NO_END
    zeros: frozenset[str] = frozenset()
    """Our names of tensors that the program leaves out if they are zero."""
    skips: bool = False
    """True if a linear map of the input is added to the reconstruction: `W_skip` (D_out, D)."""
    scale: Scale = Scale()
    input_norm: InputNorm = "none"
    single_threshold: float | None = None
    """A threshold of all features that the settings name, in the units of scaled activations."""
    hook: str | None = None
    """The place in the model that was read, by the program's name."""
    target_hook: str | None = None
    says_target: bool = True
    """True if the format says whether this is a transcoder; else the recipe's sae.target_site does."""

    @property
    def place(self) -> Path:
        """The folder; or the file, if the folder holds several autoencoders."""
        return self.weights if self.settings == self.weights else self.settings.parent


@dataclass(frozen=True)
class Format:
    """One program's layout: its files, the latter perhaps a pattern, and the reader of its settings."""

    program: str
    settings: str | None
    weights: str
    describe: Callable[[Files], SAEFolder]

    @property
    def in_words(self) -> str:
        return f"{f'{self.settings} and ' if self.settings else ''}{self.weights} ({self.program})"


def foreign_config(
    settings: Path, architecture: Architecture, n_features: int, cfg: Mapping[str, Any], nested: list[int],
    target: str | None,
) -> SAEConfig:  # fmt: skip
    about: dict[str, Any] = {"architecture": architecture, "n_features": n_features, "unit_norm": False}
    if architecture in PER_TOKEN:
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
    "rescale_acts_by_decoder_norm": (
        "Fold the lengths of the decoder's rows in with SAELens (fold_W_dec_norm) and save again."
    ),
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


def positive_number(settings: Path, cfg: Mapping[str, Any], name: str) -> float:
    value = cfg.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise UserError(f"{settings}: {name} is {short(value)}; it has to be a number above 0. {AGAIN}")
    return float(value)


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
