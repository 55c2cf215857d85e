"""The recipe: everything a run needs, as one validated model read from a TOML file."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

FORMAT_VERSION = 2
"""Version of the bytes on disk, written into every artefact (see data/README.md)."""

Share = Annotated[float, Field(ge=0, lt=1)]


class UserError(Exception):
    """Something the user can mend: the setting, what it is, what it may be, what to do. Exit code 2."""


class Section(BaseModel, frozen=True, extra="forbid"):
    """A part of a recipe. Unknown keys are refused, values never change after reading."""


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_one_or_many)]


class CorpusConfig(Section):
    """Where the documents come from, and which of them are held out."""

    files: Paths = Field([], description="Parquet, CSV, JSON lines or text files; globs and URLs allowed.")
    sql: str | None = Field(None, examples=["select text, source from 'texts.parquet'"], description="A select giving `text` and any metadata columns, instead of files.")
    folder: str | None = Field(
        None, examples=["texts"], description="Where relative paths in `sql` count from; default: the recipe's folder."
    )
    text: str = Field("text", description="Column that holds the text.")
    token_ids: str | None = Field(
        None, examples=["token_ids"], description="Column of lists of vocabulary ids, for a corpus tokenised already, instead of `text`."
    )
    key: str | None = Field(None, examples=["id"], description="Column that names a document; default `key`, then file and row.")
    dedup: bool = Field(False, description="Keep only the first of documents with equal text.")
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the documents read, chosen by hash of their key; raise it later to append.",
    )
    held_out: Share = Field(0.05, description="Share of documents kept for evaluation, chosen by hash of their key.")
    seed: int = Field(0, description="Seed of that choice.")


class ModelConfig(Section):
    """The language model whose activations are read."""

    path: str = Field(description="Local folder, or name on the Hugging Face hub.")
    revision: str | None = Field(None, examples=["main"], description="Commit or tag on the hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision of the forward pass.")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda`.")


class TokensConfig(Section):
    """How documents become fixed-length sequences."""

    context_length: PositiveInt = Field(256, description="Tokens in one sequence.")
    packing: Literal["concatenated", "isolated"] = Field(
        "concatenated", description="Documents joined end to end, or one document a row with padding."
    )
    prepend_bos: bool | None = Field(None, examples=[True], description="Start documents with BOS; default: the tokenizer's habit.")
    parse_special: bool = Field(
        False, description="Read names such as <|im_start|> in texts as the special tokens they name (chat templates)."
    )
    part_tokens: PositiveInt = Field(262_144, description="A part is closed once it holds this many tokens.")


class SyntheticConfig(Section):
    """Activations with known structure instead of a model's: the toys of the founding articles, and a benchmark.

    What `superposed` means is said in `saeflow.superposed`.
    """

    kind: Literal["sparse", "superposition", "superposed"] = Field(
        description="Sparse mixtures, a trained toy model, or superposed features of many frequencies and any number of rows."
    )
    n_samples: PositiveInt = Field(5000, description="Rows made; kind `superposed` appends when it is raised later.")
    n_neurons: PositiveInt = Field(5, description="Width of the hidden layer (D).")
    n_true: PositiveInt = Field(20, description="Known features mixed into it.")
    n_active: PositiveInt = Field(2, description="At most this many known features in one row (kind `sparse`).")
    density: PositiveFloat = Field(0.1, lt=1, description="Chance that a feature is present (kind `superposition`).")
    l0: PositiveFloat = Field(16.0, description="Known features in a row on average (this and below: `superposed`).")
    zipf_exponent: float = Field(
        1.0, ge=0, description="A feature's firing rate falls with its rank to this power; 0: all rates are equal."
    )
    max_rate: PositiveFloat = Field(0.2, lt=1, description="No feature fires more often; the others share the rest.")
    magnitude_floor: float = Field(1.0, ge=0, description="Least strength of a feature that fires.")
    magnitude_scale: PositiveFloat = Field(
        0.25,
        description="Strength above the floor: half-normal, the absolute value of a normal number of this deviation.",
    )
    group_share: float = Field(0.2, ge=0, le=1, description="Share of features in groups of four that fire together.")
    group_chance: PositiveFloat = Field(
        0.25, le=1, description="Chance that the most frequent of a group fires in the group's event."
    )
    noise: float = Field(0.05, ge=0, description="Standard deviation of Gaussian noise on every neuron.")
    offset: float = Field(1.0, ge=0, description="Length of a vector, the same in all rows, that is added to them.")
    seed: int = Field(0, description="Seed of the directions and of the samples.")

    @property
    def grows(self) -> bool:
        """Can rows be appended later?"""
        return self.kind == "superposed"

    @model_validator(mode="after")
    def _rates_fit(self) -> SyntheticConfig:
        if self.kind == "sparse" and self.n_active > self.n_true:
            raise ValueError(
                f"activations.synthetic.n_active is {self.n_active}, but there are {self.n_true} known features (n_true).\n"
                f"Set n_active to at most {self.n_true}, or raise n_true."
            )
        if self.kind != "superposed":
            return self
        if self.l0 > self.n_true * self.max_rate:
            raise ValueError(
                f"activations.synthetic.l0 is {self.l0:g}, but {self.n_true} features at a rate of at most {self.max_rate:g} "
                f"give {self.n_true * self.max_rate:g}.\nLower activations.synthetic.l0, or raise n_true or max_rate."
            )
        if self.group_share and self.max_rate >= self.group_chance:
            raise ValueError(
                f"activations.synthetic.max_rate is {self.max_rate:g}, but members of a group fire in group_chance = "
                f"{self.group_chance:g} of its events,\nso none can fire that often. Set max_rate below group_chance."
            )
        return self


class ActivationsConfig(Section):
    """Which activations are stored, and how."""

    sites: Paths = Field([], description="Module names or globs; add `:input` to read a module's input.")
    source: str | None = Field(
        None, examples=["activations.parquet"],
        description="Bring your own: CSV, Parquet, npy, npz, safetensors, Zarr or SAELens' cache instead of a model.",
    )
    source_array: str | None = Field(
        None, examples=["activations"], description="Which array of the source, or column of lists, where it has several."
    )
    synthetic: SyntheticConfig | None = Field(None, description="Made activations instead of a model's.")
    dtype: Literal["float16", "float32", "bfloat16"] = Field("float16", description="Precision on disk.")
    compression: Literal["none", "zstd"] = Field(
        "none",
        description="`zstd` where disk is dear: a fifth of it after a ReLU, 7 to 9 tenths elsewhere; writes slower.",
    )
    skip_positions: list[NonNegativeInt] = Field(
        [], description="Positions never trained on, encoded or judged, e.g. [0] where the model keeps a huge vector."
    )
    skip_special: bool = Field(False, description="The same for special tokens, such as BOS.")
    forward_batch: PositiveInt = Field(16, description="Sequences in one forward pass.")
    chunk_bytes: ByteSize = Field(ByteSize(4 << 20), description="Unit of decoding inside a shard.")
    shard_bytes: ByteSize = Field(ByteSize(32 << 20), description="Unit of storage.")
    part_rows: PositiveInt = Field(262_144, description="Rows in a part of brought or made activations.")


class FeedConfig(Section):
    """How stored activations become shuffled minibatches."""

    batch_rows: PositiveInt = Field(4096, description="Tokens in one minibatch (B).")
    block_bytes: ByteSize = Field(ByteSize(8 << 20), description="Unit of reading.")
    pool_bytes: ByteSize = Field(
        ByteSize(1 << 30), description="Activations held in memory, half mixed, half read ahead."
    )
    seed: int = Field(0, description="Same seed, same order, on any machine.")


NAME = r"^[a-z0-9][a-z0-9_]*$"
"""What a recipe may be called."""

Architecture = Literal["relu", "gated", "topk", "batchtopk", "matryoshka", "jumprelu"]
"""The kinds of autoencoder there are. Another one is added here and where `saeflow.sae` matches on it."""

TOP_FAMILY: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka")
"""Architectures that choose the k largest values of a token or of a batch; the others pay for values by a penalty."""


class SAEConfig(Section):
    """The dictionary: architecture, size and sparsity."""

    site: str | None = Field(None, examples=["transformer.h.6.mlp.act"], description="Which stored site is read; needed when there are several.")
    target_site: str | None = Field(
        None, examples=["transformer.h.6.mlp"], description="Stored site to reconstruct from the one read: makes a transcoder. Default: the one read."
    )
    source: str | None = Field(
        None, examples=["sae"], description="Folder of a trained SAE (SAELens, dictionary_learning) to use instead of training one."
    )
    architecture: Architecture = Field("batchtopk", description="Kind of autoencoder.")
    n_features: PositiveInt = Field(4096, description="Directions in the dictionary (F).")
    k: PositiveInt = Field(
        32, description="Active features per token (topk, batchtopk, matryoshka); jumprelu's target with penalty `l0`."
    )
    prefixes: list[PositiveInt] = Field(
        [], description="Sizes of matryoshka's nested dictionaries; default: 1/32, 3/32, 7/32, 15/32 of F, and F."
    )
    l1_weight: float = Field(0.01, ge=0, description="Weight of mean(abs(values)) in the loss (relu, gated).")
    l1_norm_weighted: bool = Field(False, description="Weigh each value by its decoder row's length in that loss.")
    penalty: Literal["l0", "tanh"] = Field(
        "l0", description="jumprelu: (L0 / k - 1)², which aims at k features a token, or tanh of the values."
    )
    penalty_weight: float = Field(1.0, ge=0, description="Weight of that penalty in the loss (jumprelu).")
    tanh_scale: PositiveFloat = Field(4.0, description="Factor inside that tanh (jumprelu).")
    bandwidth: PositiveFloat = Field(
        0.5, description="Width of the window around a threshold in which its gradient is estimated (jumprelu)."
    )
    first_threshold: PositiveFloat = Field(
        0.1, description="The least threshold at the start, and every one where `first_share` is 0 (jumprelu)."
    )
    first_share: Share | None = Field(
        None, examples=[0.02],
        description="Share of tokens on which each feature fires at the start (relu, gated, jumprelu), by its bias or "
        "threshold; default: that of 2 k features, at most 0.05, for gated and jumprelu, and biases of zero for relu.",
    )
    unit_norm: bool = Field(True, description="Keep decoder rows at unit length.")
    normalise: bool = Field(
        True, description="Scale the data set to mean squared norm D while training; folded in at save."
    )
    init: Literal["tied", "linear"] = Field(
        "tied", description="Random unit rows shared by both matrices, or uniform as torch's nn.Linear."
    )
    decoder_scale: PositiveFloat = Field(1.0, description="Factor on the decoder's first rows (without unit_norm).")
    decoder_bias: Literal["mean", "zero", "fixed"] = Field(
        "mean", description="Where the decoder bias starts; `fixed` keeps it at zero."
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of the initial weights.")

    @property
    def counts_k(self) -> bool:
        """Is `k` the number of features that are chosen?"""
        return self.architecture in TOP_FAMILY

    @property
    def nested(self) -> list[int]:
        """Sizes of the nested dictionaries in ascending order, the last of them F (Bussmann et al. 2025, arXiv 2503.17547)."""
        if self.architecture != "matryoshka":
            return [self.n_features]
        shares = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
        chosen = self.prefixes or [max(1, round(share * self.n_features)) for share in shares]
        return sorted({*chosen, self.n_features})

    @model_validator(mode="after")
    def _k_fits(self) -> SAEConfig:
        if self.counts_k and self.k > self.n_features:
            raise ValueError(
                f"sae.k is {self.k}, but sae.n_features is {self.n_features}.\n"
                f"Set sae.k to at most {self.n_features}, or raise sae.n_features."
            )
        if max(self.prefixes, default=0) > self.n_features:
            raise ValueError(
                f"sae.prefixes holds {max(self.prefixes)}, but sae.n_features is {self.n_features}.\n"
                f"Give sizes of at most {self.n_features}, or raise sae.n_features."
            )
        return self


class TrainConfig(Section):
    """The optimisation: how long, how fast."""

    n_tokens: PositiveInt = Field(2_000_000, description="Tokens seen in training; the store is read again if smaller.")
    lr: PositiveFloat = Field(1e-3, description="Peak learning rate of Adam.")
    warmup_share: Share = Field(0.02, description="Share of steps over which the learning rate rises.")
    decay_share: Share = Field(0.3, description="Share of steps at the end over which it falls to zero.")
    decay: Literal["linear", "cosine"] = Field("linear", description="How it falls: straight, or as half a cosine.")
    beta1: Share = Field(0.9, description="Adam's first moment.")
    beta2: Share = Field(0.999, description="Adam's second moment.")
    clip_norm: PositiveFloat | None = Field(
        None, examples=[1.0], description="Longest gradient, all parameters together; longer ones are scaled down to it."
    )
    sparsity_warmup_share: Share = Field(
        0.0, description="Share of steps over which the penalty rises from zero (relu, gated, jumprelu)."
    )
    k_start: PositiveInt | None = Field(
        None, examples=[64], description="Active features per token at the start, falling to sae.k (top-k family)."
    )
    k_anneal_share: Share = Field(0.1, description="Share of steps over which k falls from `k_start` to sae.k.")
    token_topk_share: Share = Field(
        0.0, description="Share of steps at the start in which each token keeps its own k largest (batchtopk, matryoshka)."
    )
    aux_weight: float = Field(
        1 / 32, ge=0, description="Weight of the auxiliary loss of dead features (top-k family, jumprelu)."
    )
    dead_after_tokens: PositiveInt = Field(
        200_000, description="A feature silent this long counts as dead in training."
    )
    resample_at: list[Share] = Field(
        [], description="Shares of the training at which dead features start anew (Bricken et al. 2023)."
    )
    restarts: PositiveInt = Field(1, description="Trainings from other seeds; the best reconstruction is kept.")
    checkpoint_seconds: PositiveFloat = Field(60, description="Work at most lost when a run is killed.")
    log_every: PositiveInt = Field(10, description="Steps between rows of log.parquet.")
    tensorboard: str | None = Field(
        None, examples=["tensorboard"], description="Folder for TensorBoard's event files; needs the package tensorboard."
    )


class FeaturesConfig(Section):
    """How the corpus is encoded."""

    batch_rows: PositiveInt = Field(4096, description="Tokens encoded at once; results do not depend on it.")


class EvaluateConfig(Section):
    """How the trained SAE is judged on held-out documents."""

    max_tokens: PositiveInt = Field(250_000, description="Held-out tokens used at most.")


SWEPT: dict[str, type[Section]] = {"sae": SAEConfig, "train": TrainConfig}
"""Sections whose settings a sweep may change."""


def _by_dotted_name(value: object) -> object:
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


Swept = Annotated[dict[str, Any], BeforeValidator(_by_dotted_name)]


class SweepConfig(Section):
    """Many SAEs trained in one reading of the activations."""

    grid: Annotated[dict[str, list[Any]], BeforeValidator(_by_dotted_name)] = Field(
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


def _named(key: str, value: object) -> str:
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


class Recipe(Section):
    """One pipeline, from corpus to queries."""

    name: str = Field(pattern=NAME, description="Names the artefacts and the run.")
    data: str | None = Field(
        None,
        examples=["other_recipe"],
        pattern=NAME,
        description="Name of the recipe whose stored tokens and activations are used; default: this one.",
    )
    store: str | None = Field(None, examples=["data/store"], description="Store folder; `--store` and SAEFLOW_STORE come first.")
    threads: NonNegativeInt = Field(0, description="Processor threads; 0 takes all. Fix it for byte-equal results.")
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
        name = "_".join([self.name, *(_named(key, value) for key, value in settings.items())])
        for key, value in settings.items():
            _put(data, key.split("."), value)
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
                    f"{other.name} and {member.name} of the sweep would be the same SAE: {member.sae.architecture} does not "
                    f"read {ignored}.\nTake one of them out: give that architecture an entry of its own in sweep.each."
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


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe; relative paths inside it count from the folder it lies in.

    `overrides` replace values by dotted name, e.g. `{"sae.k": 16}`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No recipe at {path}. Write one with `saeflow init {path}`.")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from error
    for dotted, value in overrides.items():
        _put(data, dotted.split("."), value)
    return parse_recipe(_anchored(data, path.resolve().parent), str(path))


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


def _put(data: dict[str, Any], keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
    data[keys[-1]] = value


def _anchored(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the recipe's own relative paths absolute; URLs and hub names stay as they are."""

    def anchor(value: object) -> object:
        if isinstance(value, list):
            return [anchor(item) for item in value]
        if not isinstance(value, str) or "://" in value or Path(value).is_absolute():
            return value
        return os.path.normpath(folder / value)

    def anchor_if_there(value: object) -> object:
        return anchor(value) if isinstance(value, str) and (folder / value).exists() else value

    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    if isinstance(data.get("corpus"), dict) and "sql" in data["corpus"]:
        data["corpus"].setdefault("folder", str(folder))
    for section, key, how in [
        ("corpus", "files", anchor),
        ("corpus", "folder", anchor),
        ("activations", "source", anchor),
        ("sae", "source", anchor),
        ("train", "tensorboard", anchor),
        ("model", "path", anchor_if_there),
    ]:
        if isinstance(data.get(section), dict) and key in data[section]:
            data[section][key] = how(data[section][key])
    if isinstance(sweep := data.get("sweep"), dict):
        for key in sweep:
            sweep[key] = _map(sweep[key], lambda chosen: _anchored_settings(chosen, anchor))
    if isinstance(data.get("store"), str):
        data["store"] = anchor(data["store"])
    return data


def _map(value: object, change: Callable[[object], object]) -> object:
    return [change(item) for item in value] if isinstance(value, list) else change(value)


def _anchored_settings(chosen: object, anchor: Callable[[object], object]) -> object:
    """A sweep's settings, by dotted name or nested, with their paths anchored."""
    flat = _by_dotted_name(chosen)
    if not isinstance(flat, dict):
        return chosen
    return {key: anchor(value) if key in ("sae.source", "train.tensorboard") else value for key, value in flat.items()}


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


def fingerprint(*facts: object) -> str:
    """Eight hex digits that stand for JSON-able facts; equal facts, equal digits, on any machine."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"cannot fingerprint {type(value).__name__}")


_SINCE_2 = {
    "skip_positions", "skip_special", "token_ids", "parse_special", "compression", "source_array",
    "target_site", "prefixes", "penalty", "penalty_weight", "tanh_scale", "bandwidth", "first_threshold", "first_share",
    "decay", "clip_norm", "sparsity_warmup_share", "k_start", "k_anneal_share",
    "token_topk_share",
    "l0", "zipf_exponent", "max_rate", "magnitude_floor", "magnitude_scale", "group_share", "group_chance", "noise",
    "offset",
}  # fmt: skip
"""Settings that format 1 did not have: at their defaults they leave fingerprints as they were."""


def facts_of(section: Section) -> dict[str, Any]:
    """The section's settings for a fingerprint; how much of a corpus is read does not count, nor where an SAE came from."""
    not_settings = {"share", "folder", "tensorboard"} | ({"source"} if isinstance(section, SAEConfig) else set())
    data = section.model_dump(mode="json", exclude=not_settings)
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(section).model_fields.items()
    }
    return {name: value for name, value in data.items() if name not in _SINCE_2 or value != defaults[name]}
