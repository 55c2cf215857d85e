"""The recipe: everything a run needs, as one validated model."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, ValidationError, model_validator

from saeflow.recipe.schedule import ScheduleConfig
from saeflow.recipe.settings import (
    NAME,
    ActivationsConfig,
    Architecture,
    ClusterConfig,
    CorpusConfig,
    EvaluateConfig,
    FeaturesConfig,
    FeedConfig,
    ModelConfig,
    Overlap,
    SAEConfig,
    Section,
    TokensConfig,
    TrainConfig,
    by_address,
)
from saeflow.recipe.sweep import SweepConfig, in_a_name
from saeflow.runtime.errors import UserError


class Recipe(Section):
    """One pipeline, from corpus to queries."""

    name: str = Field(pattern=NAME, description="Names the artefacts and the run.")
    data: str | None = Field(
        None,
        examples=["other_recipe"],
        pattern=NAME,
        description="Name of the recipe whose stored tokens and activations are used; default: this one.",
    )
    store: str | None = Field(
        None, examples=["data/store"], description="Store folder; `--store` and SAEFLOW_STORE come first."
    )
    threads: NonNegativeInt = Field(0, description="Processor threads; 0 takes all. Fix it for byte-equal results.")
    overlap: Overlap = Field(
        "refuse",
        description="While another run writes the same: `refuse` ends at once and names it, `wait` waits for it.",
    )
    corpus: CorpusConfig | None = None
    model: ModelConfig | None = None
    tokens: TokensConfig = TokensConfig()
    activations: ActivationsConfig = ActivationsConfig()
    feed: FeedConfig = FeedConfig()
    sae: SAEConfig = SAEConfig()
    train: TrainConfig = TrainConfig()
    features: FeaturesConfig = FeaturesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sweep: SweepConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    cluster: Annotated[ClusterConfig | None, BeforeValidator(by_address)] = None

    @property
    def data_name(self) -> str:
        """What the tokens and activations are called."""
        return self.data or self.name

    def members(self) -> list[Recipe]:
        """The recipes of a sweep's SAEs, which read this recipe's activations; without a sweep, the recipe itself."""
        settings = self.sweep.combinations() if self.sweep else [{}]
        if settings == [{}]:
            return [self]
        return [self._member(chosen) for chosen in settings]

    def _member(self, settings: dict[str, Any]) -> Recipe:
        data = self.model_dump(exclude={"sweep"}, exclude_unset=True)
        name = "_".join([self.name, *(in_a_name(key, value) for key, value in settings.items())])
        for key, value in settings.items():
            put(data, key.split("."), value)
        return parse_recipe(data | {"name": name, "data": self.data_name}, name)

    @property
    def is_sweep(self) -> bool:
        return self.sweep is not None and self.sweep.combinations() != [{}]

    @model_validator(mode="after")
    def _members_are_recipes(self) -> Recipe:
        try:
            members = self.members() if self.is_sweep else []
        except UserError as error:
            raise ValueError(f"a member of the sweep cannot be:\n{error}") from None
        names = [member.name for member in members]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two SAEs of the sweep would be called {twice[0]}. Let their settings differ.")
        seen: dict[str, Recipe] = {}
        for member in members:
            other = seen.setdefault(_all_that_is_read(member), member)
            if other is not member:
                keys = sorted(dict(_settings(other)).items() ^ dict(_settings(member)).items())
                ignored = " and ".join(dict.fromkeys(key for key, _ in keys))
                raise ValueError(
                    f"{other.name} and {member.name} of the sweep would be the same SAE: {member.sae.architecture} "
                    f"does not read {ignored}.\n"
                    "Take one of them out: give that architecture an entry of its own in sweep.each."
                )
        return self

    @model_validator(mode="after")
    def _has_one_source(self) -> Recipe:
        brought = [self.activations.source, self.activations.synthetic]
        n_sources = sum(source is not None for source in [self.model, *brought])
        if n_sources != 1:
            raise ValueError(
                f"the recipe names {n_sources} sources of activations; exactly one is needed:\n"
                "a [model] section, activations.source (a table), or [activations.synthetic]."
            )
        if self.model is not None and self.corpus is None:
            raise ValueError(
                'a [corpus] section is missing: say which texts the model reads, e.g. files = ["my.parquet"].'
            )
        if self.model is not None and not self.activations.sites:
            raise ValueError(
                f"activations.sites is empty. Name the modules to read; `saeflow sites {self.model.path}` lists them."
            )
        return self

    @model_validator(mode="after")
    def _k_falls(self) -> Recipe:
        start = self.train.k_start
        if start is not None and self.sae.counts_k and not self.sae.k <= start <= self.sae.n_features:
            raise ValueError(
                f"train.k_start is {start}, but k falls from it to sae.k ({self.sae.k}) and counts features of "
                f"sae.n_features ({self.sae.n_features}).\n"
                f"Set train.k_start to {self.sae.k} at least and {self.sae.n_features} at most."
            )
        return self


_PENALTY = {"sae.penalty", "sae.penalty_weight", "sae.tanh_scale", "sae.bandwidth", "sae.first_threshold"}
_L1 = {"sae.l1_weight", "sae.l1_norm_weighted"}
_FALLING_K = {"train.k_start", "train.k_anneal_share", "train.token_topk_share"}
_TOP = {*_PENALTY, *_L1, "sae.first_share", "train.sparsity_warmup_share"}
_IGNORED: dict[Architecture, set[str]] = {
    "relu": {*_PENALTY, *_FALLING_K, "sae.k", "sae.prefixes", "train.aux_weight"},
    "gated": {*_PENALTY, *_FALLING_K, "sae.prefixes", "train.aux_weight"},  # k decides where its gate starts
    "jumprelu": {*_FALLING_K, "sae.l1_weight", "sae.prefixes"},
    "topk": {*_TOP, "sae.prefixes", "train.token_topk_share"},
    "batchtopk": {*_TOP, "sae.prefixes"},
    "matryoshka": _TOP,
}
"""Settings that an architecture does not read."""


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    """What a sweep may change, as JSON by dotted name."""
    sections: dict[str, Section] = {"sae": recipe.sae, "train": recipe.train}
    return [
        (f"{section}.{key}", json.dumps(value))
        for section, model in sections.items()
        for key, value in model.model_dump(mode="json").items()
    ]


def _all_that_is_read(recipe: Recipe) -> str:
    ignored = _IGNORED[recipe.sae.architecture] if recipe.sae.source is None else set()
    return json.dumps([setting for setting in _settings(recipe) if setting[0] not in ignored])


def require_one(recipe: Recipe, command: str) -> None:
    """Refuse a whole sweep where a command is about one SAE."""
    if recipe.is_sweep:
        names = [member.name for member in recipe.members()]
        raise UserError(
            f"{recipe.name} is a sweep of {len(names)} SAEs. Name the one: saeflow {command} RECIPE --member NAME\n"
            f"They are: {', '.join(names)}."
        )


def parse_recipe(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, origin) for item in error.errors())) from error


def put(data: dict[str, Any], keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
    data[keys[-1]] = value


def _explain(error: Any, origin: str) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(known)}."
        return f"{origin}: unknown key {name}. {hint}"
    if error["type"] == "missing":
        return f"{origin}: {name} is missing. {_describe(error['loc'])}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{origin}: {message}"
    return f"{origin}: {name} is {error['input']!r}, but: {message[:1].lower()}{message[1:]}. {_describe(error['loc'])}"


def _section(location: tuple[Any, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        choices = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not choices:
            break
        model = choices[0]
    return model


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    return list(_section(location).model_fields)


def _describe(location: tuple[Any, ...]) -> str:
    field = _section(location[:-1]).model_fields.get(str(location[-1]))
    return (field.description or "") if field else ""
