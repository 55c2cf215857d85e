"""The section [activations.synthetic]: activations with known features, made instead of collected."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from saeflow.recipe.section import Section


class SyntheticConfig(Section):
    """Make activations with known features: the toys of the founding articles, and a benchmark.

    `saeflow.activations.synthetic` explains the kind `superposed`.
    """

    kind: Literal["sparse", "superposition", "superposed"] = Field(
        description="sparse: sparse mixtures. superposition: a trained toy model. superposed: many features that "
        "differ in frequency, and any number of rows."
    )
    n_samples: PositiveInt = Field(
        5000, description="Rows to make. With kind `superposed` you can raise it later; the new rows are appended."
    )
    n_neurons: PositiveInt = Field(5, description="Width of an activation (D).")
    n_true: PositiveInt = Field(20, description="Known features.")
    n_active: PositiveInt = Field(2, description="Most known features in one row (kind `sparse`).")
    density: PositiveFloat = Field(0.1, lt=1, description="Chance that a feature is present (kind `superposition`).")
    l0: PositiveFloat = Field(
        16.0, description="Mean number of known features in a row (this and all below: kind `superposed`)."
    )
    zipf_exponent: float = Field(
        1.0, ge=0, description="A feature's firing rate falls with this power of its rank. 0: all rates are equal."
    )
    max_rate: PositiveFloat = Field(
        0.2, lt=1, description="Highest firing rate. Features above it are cut to it, and the others share the rest."
    )
    magnitude_floor: float = Field(1.0, ge=0, description="Lowest strength of a feature that fires.")
    magnitude_scale: PositiveFloat = Field(
        0.25, description="Strength above the floor is half-normal: |x| of a normal x with this standard deviation."
    )
    group_share: float = Field(0.2, ge=0, le=1, description="Share of features in groups of four that fire together.")
    group_chance: PositiveFloat = Field(
        0.25, le=1, description="Chance that a group's most frequent feature fires when the group has an event."
    )
    noise: float = Field(0.05, ge=0, description="Standard deviation of the Gaussian noise on every neuron.")
    offset: float = Field(1.0, ge=0, description="Length of one fixed vector that is added to every row.")
    seed: int = Field(0, description="Seed of the directions and the rows.")

    @property
    def grows(self) -> bool:
        """True if rows can be appended later."""
        return self.kind == "superposed"

    @model_validator(mode="after")
    def _rates_fit(self) -> SyntheticConfig:
        if self.kind == "sparse" and self.n_active > self.n_true:
            raise ValueError(
                f"activations.synthetic.n_active is {self.n_active}, but there are {self.n_true} known features "
                "(n_true).\n"
                f"Set n_active to at most {self.n_true}, or raise n_true."
            )
        if self.kind != "superposed":
            return self
        if self.l0 > self.n_true * self.max_rate:
            raise ValueError(
                f"activations.synthetic.l0 is {self.l0:g}, but {self.n_true} features (n_true) at a rate of at most "
                f"{self.max_rate:g} (max_rate) reach only {self.n_true * self.max_rate:g}.\n"
                "Lower activations.synthetic.l0, or raise n_true or max_rate."
            )
        if self.group_share and self.max_rate >= self.group_chance:
            raise ValueError(
                f"activations.synthetic.max_rate is {self.max_rate:g}, but a feature in a group fires in at most "
                f"{self.group_chance:g} of the group's events (group_chance).\n"
                "Set max_rate below group_chance."
            )
        return self
