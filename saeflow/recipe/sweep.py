"""Which SAEs a sweep trains: a grid of settings, or a list of them."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from saeflow.recipe.settings import SAEConfig, Section, TrainConfig

SWEPT: dict[str, type[Section]] = {"sae": SAEConfig, "train": TrainConfig}
"""Sections whose settings a sweep may change."""


def by_dotted_name(value: object) -> object:
    """`{"sae": {"k": 3}}`, which TOML makes of `sae.k = 3`, as `{"sae.k": 3}`."""
    if not isinstance(value, dict):
        return value
    return {
        dotted: setting
        for key, inner in value.items()
        for dotted, setting in (
            {f"{key}.{k}": v for k, v in inner.items()} if isinstance(inner, dict) else {key: inner}
        ).items()
    }


Swept = Annotated[dict[str, Any], BeforeValidator(by_dotted_name)]


class SweepConfig(Section):
    """Many SAEs trained in one reading of the activations."""

    grid: Annotated[dict[str, list[Any]], BeforeValidator(by_dotted_name)] = Field(
        {}, description='Values by setting, e.g. {"sae.k" = [16, 32]}; every combination is trained.'
    )
    each: list[Swept] = Field(
        [], description="Settings that belong together, a table an SAE; each with every combination of the grid."
    )

    @model_validator(mode="after")
    def _names_settings(self) -> SweepConfig:
        known = [f"{section}.{key}" for section, model in SWEPT.items() for key in model.model_fields]
        for key in dict.fromkeys([*self.grid, *(key for chosen in self.each for key in chosen)]):
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3) or ["sae.k", "sae.n_features", "train.lr"]
                raise ValueError(
                    f"sweep names {key}, which it cannot change. Nearest: {', '.join(near)}.\n"
                    "A sweep changes settings of [sae] and [train]; everything else is the same for all its SAEs."
                )
            if key in self.grid and not self.grid[key]:
                raise ValueError(f"sweep.grid has no values of {key}. Give some, or take it out.")
            if key in self.grid and any(key in chosen for chosen in self.each):
                raise ValueError(f"{key} is in sweep.grid and in sweep.each. Name it in one of them.")
        return self

    def combinations(self) -> list[dict[str, Any]]:
        """Settings by dotted name, one dict an SAE, in the order of their sections."""
        grid = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        order = [
            "sae.architecture",
            *(f"{section}.{key}" for section, model in SWEPT.items() for key in model.model_fields),
        ]
        both = [chosen | point for chosen in self.each or [{}] for point in grid]
        return [{key: settings[key] for key in order if key in settings} for settings in both]


def in_a_name(key: str, value: object) -> str:
    """A setting in a member's name: `topk`, `k16`, `l1_weight0p02`."""
    key = key.partition(".")[2]
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
