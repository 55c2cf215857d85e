"""Which SAEs a sweep trains: a grid of settings, or a list of them."""

from __future__ import annotations

import itertools
import json
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from saeflow.recipe.section import Section, from_folder, recipe_folder, sae_from_folder
from saeflow.recipe.settings import Architecture, SAEConfig, TrainConfig
from saeflow.runtime.text import nearest

_SECTIONS: dict[str, type[Section]] = {"sae": SAEConfig, "train": TrainConfig}
_SHARED = {"train.share"}
"""Settings among them that decide which activations are kept: all SAEs of a sweep share those."""
_SETTINGS = [
    name
    for section, model in _SECTIONS.items()
    for name in (f"{section}.{key}" for key in model.model_fields)
    if name not in _SHARED
]
"""What a sweep may change."""
_PATHS = {"sae.source": sae_from_folder, "train.tensorboard": from_folder}
"""Settings among them that are paths, and how each counts from the recipe's folder."""


def _by_dotted_name(value: object) -> object:
    """Return `{"sae": {"k": 3}}`, which TOML makes of `sae.k = 3`, as `{"sae.k": 3}`."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= {f"{key}.{name}": each for name, each in inner.items()} if isinstance(inner, dict) else {key: inner}
    return flat


class SweepConfig(Section):
    """Train many SAEs while reading the activations once."""

    grid: Annotated[dict[str, list[Any]], BeforeValidator(_by_dotted_name)] = Field(
        {}, description='Values by setting, e.g. {"sae.k" = [16, 32]}. Every combination is trained.'
    )
    each: list[Annotated[dict[str, Any], BeforeValidator(_by_dotted_name)]] = Field(
        [],
        description="Settings that belong together, one table per SAE. Each is combined with every point of the grid.",
    )

    def names(self, setting: str) -> bool:
        """True if the sweep changes this setting."""
        return setting in self.grid or any(setting in chosen for chosen in self.each)

    @field_validator("grid", "each")
    @classmethod
    def _paths_count_from_the_recipe(cls, value: Any, info: ValidationInfo) -> Any:
        folder = recipe_folder(info)

        def absolute(key: str, setting: Any) -> Any:
            if isinstance(setting, list):
                return [absolute(key, each) for each in setting]
            return _PATHS[key](folder, setting) if folder and key in _PATHS and isinstance(setting, str) else setting

        tables = value if isinstance(value, list) else [value]
        found = [{key: absolute(key, each) for key, each in table.items()} for table in tables]
        return found if isinstance(value, list) else found[0]

    @model_validator(mode="after")
    def _names_settings(self) -> SweepConfig:
        for key in dict.fromkeys([*self.grid, *(key for chosen in self.each for key in chosen)]):
            if key not in _SETTINGS:
                near = nearest(key, _SETTINGS) or ["sae.k", "sae.n_features", "train.lr"]
                raise ValueError(
                    f"sweep names {key}, which it cannot change. Nearest: {', '.join(near)}.\n"
                    "A sweep changes settings of [sae] and [train]; all its SAEs share the rest."
                )
            if key in self.grid and not self.grid[key]:
                raise ValueError(f"sweep.grid has no values for {key}. Give some, or leave it out.")
            if key in self.grid and any(key in chosen for chosen in self.each):
                raise ValueError(f"{key} is in both sweep.grid and sweep.each. Name it in one of them.")
        return self

    def combinations(self) -> list[dict[str, Any]]:
        """Return the settings of each SAE by dotted name, in the order of their sections."""
        grid = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        order = ["sae.architecture", *_SETTINGS]
        both = [chosen | point for chosen in self.each or [{}] for point in grid]
        return [{key: settings[key] for key in order if key in settings} for settings in both]


def member_name_of(recipe: str, settings: dict[str, Any]) -> str:
    """Return the name of a sweep's SAE, e.g. `demo_topk_k16_l1_weight0p02`."""
    return "_".join([recipe, *(_in_a_name(key.partition(".")[2], value) for key, value in settings.items())])


def _in_a_name(key: str, value: object) -> str:
    match value:
        case bool():
            return key if value else f"no_{key}"
        case str():
            return re.sub("[^a-z0-9]+", "_", value.lower()).strip("_")
        case list():
            return key + "_".join(re.sub("[^a-z0-9]+", "p", str(item).lower()) for item in value)
        case float():
            short = f"{value:g}"
            value = short if float(short) == value else repr(value)
    return key + str(value).lower().replace(".", "p").replace("-", "m").replace("+", "")


_PENALTY = {"sae.penalty", "sae.penalty_weight", "sae.tanh_scale", "sae.bandwidth", "sae.first_threshold"}
_L1 = {"sae.l1_weight", "sae.l1_norm_weighted"}
_FALLING_K = {"train.k_start", "train.k_anneal_share", "train.token_topk_share"}
_TOP_IGNORES = {*_PENALTY, *_L1, "sae.first_share", "train.sparsity_warmup_share"}
IGNORED_SETTINGS: dict[Architecture, set[str]] = {
    "relu": {*_PENALTY, *_FALLING_K, "sae.k", "sae.prefixes", "train.aux_weight"},
    "gated": {*_PENALTY, *_FALLING_K, "sae.prefixes", "train.aux_weight"},  # k decides where its gate starts
    "jumprelu": {*_FALLING_K, "sae.l1_weight", "sae.prefixes"},
    "topk": {*_TOP_IGNORES, "sae.prefixes", "train.token_topk_share"},
    "abstopk": {*_TOP_IGNORES, "sae.prefixes", "train.token_topk_share"},
    "mp": {*_TOP_IGNORES, "sae.prefixes", "sae.encoder_scale", "train.token_topk_share", "train.aux_weight"},
    "batchtopk": {*_TOP_IGNORES, "sae.prefixes"},
    "matryoshka": _TOP_IGNORES,
}
"""Settings that each architecture does not read."""


def settings_by_name(sae: SAEConfig, train: TrainConfig) -> dict[str, str]:
    """Return every setting that a sweep may change, as JSON by dotted name."""
    return {
        f"{name}.{key}": json.dumps(value)
        for name, section in (("sae", sae), ("train", train))
        for key, value in section.model_dump(mode="json").items()
    }


def settings_with_effect(sae: SAEConfig, train: TrainConfig) -> str:
    """Return the settings that the architecture reads as one text. Equal texts make equal SAEs."""
    ignored = {*IGNORED_SETTINGS[sae.architecture], "sae.input_scale"} if sae.source is None else set()
    return json.dumps({key: value for key, value in settings_by_name(sae, train).items() if key not in ignored})
