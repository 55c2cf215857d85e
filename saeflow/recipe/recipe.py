"""The recipe: everything a run needs, as one validated model, mostly read from a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from saeflow.recipe.cluster import ClusterConfig, by_address
from saeflow.recipe.data_settings import (
    ActivationsConfig,
    CorpusConfig,
    ModelConfig,
    TokensConfig,
)
from saeflow.recipe.schedule import ScheduleConfig
from saeflow.recipe.section import RECIPE_NAME, PathFromRecipe, Section, message_of
from saeflow.recipe.settings import (
    EvaluateConfig,
    FeaturesConfig,
    FeedConfig,
    Overlap,
    SAEConfig,
    TrainConfig,
)
from saeflow.recipe.sweep import SweepConfig, member_name_of, settings_by_name, settings_with_effect
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import brief, decoded_text


class Recipe(Section):
    """One pipeline, from corpus to answers."""

    name: str = Field(max_length=200, pattern=RECIPE_NAME, description="Name of the artefacts and of the run.")
    data: str | None = Field(
        None,
        examples=["other_recipe"],
        max_length=200,
        pattern=RECIPE_NAME,
        description="Recipe whose stored tokens and activations this one uses. Default: its own.",
    )
    store: PathFromRecipe | None = Field(
        None,
        examples=["data/store"],
        description="Folder of the store. `--store` and SAEFLOW_STORE take precedence.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Processor threads. 0: all. Set a number if results must be equal byte for byte."
    )
    overlap: Overlap = Field(
        "refuse",
        description="If another run writes the same artefact: `refuse` stops and names that run, `wait` waits for it.",
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
        """The name of the tokens and activations."""
        return self.data or self.name

    def members(self) -> list[Recipe]:
        """Return one recipe per SAE of the sweep, which all read the same activations; without a sweep, this one."""
        settings = self.sweep.combinations() if self.sweep else [{}]
        if settings == [{}]:
            return [self]
        return [self._member(chosen) for chosen in settings]

    def _member(self, settings: dict[str, Any]) -> Recipe:
        data = self.model_dump(exclude={"sweep"}, exclude_unset=True)
        name = member_name_of(self.name, settings)
        for dotted, value in settings.items():
            set_setting(data, dotted, value)
        return parse_recipe(data | {"name": name, "data": self.data_name}, name)

    @property
    def trains_on_sample(self) -> bool:
        """True if SAEs are trained on a sample of the corpus, which is stored apart."""
        return self.train.share is not None and any(member.sae.source is None for member in self.members())

    def sample(self) -> Recipe:
        """Return the recipe that stores the sample to train on: of fewer documents, with activations kept."""
        assert self.corpus is not None
        share = self.corpus.share * (self.train.share or 1.0)
        changes = {
            "data": f"{self.data_name[:194]}_train",
            "corpus": self.corpus.model_copy(update={"share": share}),
            "activations": self.activations.model_copy(update={"keep": True}),
            "train": self.train.model_copy(update={"share": None}),
        }
        return self.model_copy(update=changes)

    @property
    def is_sweep(self) -> bool:
        return self.sweep is not None and self.sweep.combinations() != [{}]

    @model_validator(mode="after")
    def _members_are_different_recipes(self) -> Recipe:
        try:
            members = self.members() if self.is_sweep else []
        except UserError as error:
            raise ValueError(f"an SAE of the sweep has settings that do not work:\n{error}") from None
        names = [member.name for member in members]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two SAEs of the sweep would be called {twice[0]}. Give them different settings.")
        by_effect: dict[str, Recipe] = {}
        for member in members:
            other = by_effect.setdefault(settings_with_effect(member.sae, member.train), member)
            if other is not member:
                raise ValueError(_same_sae(other, member))
        return self

    @model_validator(mode="after")
    def _has_one_source(self) -> Recipe:
        sources = [self.model, self.activations.source, self.activations.synthetic]
        n_sources = sum(source is not None for source in sources)
        if n_sources != 1:
            raise ValueError(
                f"the recipe names {n_sources} sources of activations, but it needs exactly one:\n"
                "a [model] section, activations.source (a table), or [activations.synthetic]."
            )
        if self.model is not None and self.corpus is None:
            raise ValueError(
                'a [corpus] section is missing. Name the texts that the model reads, e.g. files = ["my.parquet"].'
            )
        imports = self.sae.source or (self.sweep and self.sweep.names("sae.source"))
        if self.model is not None and not self.activations.sites and not imports:
            raise ValueError(
                f"activations.sites is empty. Name the modules to read; `saeflow sites {self.model.path}` lists them."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _requests_stay_apart(cls, data: Any) -> Any:
        """A sequence holds tokens of one request only, as the engine read them."""
        corpus = data.get("corpus") if isinstance(data, dict) else None
        named = corpus.get("requests") if isinstance(corpus, dict) else getattr(corpus, "requests", None)
        tokens = data.get("tokens", {}) if named else None
        return {**data, "tokens": {"packing": "isolated", **tokens}} if isinstance(tokens, dict) else data

    @model_validator(mode="after")
    def _requests_are_read_as_they_are(self) -> Recipe:
        if self.corpus is None or self.corpus.requests is None:
            return self
        if self.model is None:
            raise ValueError('a [model] section is missing. corpus.requests needs its tokenizer, e.g. path = "gpt2".')
        given = {
            "tokens.packing": self.tokens.packing == "isolated",
            "tokens.prepend_bos": not self.tokens.prepend_bos,
            "corpus.token_ids": self.corpus.token_ids is None,
        }
        if wrong := [name for name, fits in given.items() if not fits]:
            raise ValueError(
                f"corpus.requests takes the tokens as the engine read them, one request after another, so that "
                f"{' and '.join(wrong)} cannot be set. Leave it out."
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_it_reads_again(self) -> Recipe:
        if self.model is None and self.train.share is not None:
            raise ValueError("train.share needs a [model]: all rows of a table are trained on. Leave it out.")
        if self.activations.keep:
            return self
        if self.model is None:
            raise ValueError(
                "activations.keep is false, but no model can make these activations again.\n"
                "Set it to true: only the activations of a [model] may go unkept."
            )
        if self.train.share is None and any(each.sae.source is None for each in self.members()):
            raise ValueError(
                "activations.keep is false, so there is nothing to train an SAE on.\nName a trained one in sae.source, "
                "or set train.share, e.g. to 0.05: so much of the corpus is stored and trained on."
            )
        return self

    @model_validator(mode="after")
    def _roles_are_of_messages(self) -> Recipe:
        messages = self.corpus.messages if self.corpus else None
        if self.activations.roles and not messages:
            raise ValueError(
                f"activations.roles is {self.activations.roles}, but the corpus has no conversations.\n"
                "Name their column with corpus.messages, or leave activations.roles out."
            )
        if self.corpus and messages and self.corpus.tokenised:
            other = "corpus.token_ids" if self.corpus.token_ids else "corpus.requests"
            raise ValueError(f"corpus.messages and {other} are both set. Leave one of them out.")
        return self

    @model_validator(mode="after")
    def _k_falls(self) -> Recipe:
        start = self.train.k_start
        if start is not None and self.sae.counts_k and not self.sae.k <= start <= self.sae.n_features:
            raise ValueError(
                f"train.k_start is {start}, but it must lie between sae.k ({self.sae.k}), to which it falls, and "
                f"sae.n_features ({self.sae.n_features}).\n"
                f"Set train.k_start to at least {self.sae.k} and at most {self.sae.n_features}."
            )
        return self


def _same_sae(one: Recipe, other: Recipe) -> str:
    mine, theirs = settings_by_name(one.sae, one.train), settings_by_name(other.sae, other.train)
    ignored = sorted(key for key, value in mine.items() if value != theirs[key])
    return (
        f"{one.name} and {other.name} of the sweep would be the same SAE: {other.sae.architecture} does not read "
        f"{' and '.join(ignored)}.\n"
        "Leave one of them out: give this architecture an entry of its own in sweep.each."
    )


def require_one(recipe: Recipe, command: str) -> None:
    """Raise UserError if the recipe is a whole sweep; `command` works on one SAE."""
    if recipe.is_sweep:
        names = [member.name for member in recipe.members()]
        raise UserError(
            f"{recipe.name} is a sweep of {len(names)} SAEs. Name one of them: saeflow {command} RECIPE --member NAME\n"
            f"They are: {', '.join(names)}."
        )


def parse_recipe(data: dict[str, Any], origin: str = "recipe", folder: Path | None = None) -> Recipe:
    """Validate settings. `origin` names them in messages; relative paths count from `folder`, if it is given.

    Raises UserError that names everything that is wrong.
    """
    try:
        return Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        messages = [message_of(item, Recipe) for item in error.errors()]
        raise UserError("\n".join(f"{origin}: {message}" for message in messages)) from error


def set_setting(data: dict[str, Any], dotted: str, value: object) -> None:
    """Set one setting by its dotted name in the nested settings of a recipe."""
    *sections, key = dotted.split(".")
    for n, section in enumerate(sections, 1):
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            name = brief(".".join(sections[:n]))
            raise UserError(f"There is no setting {brief(dotted)}: {name} holds a value, no further settings.")
    data[key] = value


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe. Relative paths in it count from its folder.

    `overrides` replace values by dotted name, e.g. `{"sae.k": 16}`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No recipe at {path}. Write one with `saeflow init {path}`.")
    try:
        data = tomllib.loads(decoded_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {first_line(error)}.") from error
    for dotted, value in overrides.items():
        set_setting(data, dotted, value)
    return parse_recipe(data, str(path), path.resolve().parent)
