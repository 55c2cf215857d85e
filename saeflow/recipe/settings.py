"""The sections of a recipe: settings, their kinds, their defaults and what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Share = Annotated[float, Field(ge=0, lt=1)]


Overlap = Literal["refuse", "wait"]
"""What is done while somebody else writes the same artefact: end at once, or wait."""


class Section(BaseModel, frozen=True, extra="forbid"):
    """A part of a recipe. Unknown keys are refused, values never change after reading."""


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_one_or_many)]


class CorpusConfig(Section):
    """Where the documents come from, and which of them are held out."""

    files: Paths = Field([], description="Parquet, CSV, JSON lines or text files; globs and URLs allowed.")
    sql: str | None = Field(
        None,
        examples=["select text, source from 'texts.parquet'"],
        description="A select giving `text` and any metadata columns, instead of files.",
    )
    folder: str | None = Field(
        None, examples=["texts"], description="Where relative paths in `sql` count from; default: the recipe's folder."
    )
    text: str = Field("text", description="Column that holds the text.")
    token_ids: str | None = Field(
        None,
        examples=["token_ids"],
        description="Column of lists of vocabulary ids, for a corpus tokenised already, instead of `text`.",
    )
    key: str | None = Field(
        None, examples=["id"], description="Column that names a document; default `key`, then file and row."
    )
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
    prepend_bos: bool | None = Field(
        None, examples=[True], description="Start documents with BOS; default: the tokenizer's habit."
    )
    parse_special: bool = Field(
        False, description="Read names such as <|im_start|> in texts as the special tokens they name (chat templates)."
    )
    part_tokens: PositiveInt = Field(262_144, description="A part is closed once it holds this many tokens.")


class SyntheticConfig(Section):
    """Activations with known structure instead of a model's: the toys of the founding articles, and a benchmark.

    What `superposed` means is said in `saeflow.activations.synthetic.superposition`.
    """

    kind: Literal["sparse", "superposition", "superposed"] = Field(
        description="Sparse mixtures, a trained toy model, or superposed features of many frequencies and any number "
        "of rows."
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
                f"activations.synthetic.n_active is {self.n_active}, but there are {self.n_true} known features "
                "(n_true).\n"
                f"Set n_active to at most {self.n_true}, or raise n_true."
            )
        if self.kind != "superposed":
            return self
        if self.l0 > self.n_true * self.max_rate:
            raise ValueError(
                f"activations.synthetic.l0 is {self.l0:g}, but {self.n_true} features at a rate of at most "
                f"{self.max_rate:g} give {self.n_true * self.max_rate:g}.\n"
                "Lower activations.synthetic.l0, or raise n_true or max_rate."
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
        None,
        examples=["activations.parquet"],
        description="Bring your own: CSV, Parquet, npy, npz, safetensors, Zarr or SAELens' cache instead of a model.",
    )
    source_array: str | None = Field(
        None,
        examples=["activations"],
        description="Which array of the source, or column of lists, where it has several.",
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
"""The kinds of autoencoder there are. Another one is added here and where `saeflow.sae.autoencoder` matches on it."""

TOP_FAMILY: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka")
"""Architectures that choose the k largest values of a token or of a batch; the others pay for values by a penalty."""


class SAEConfig(Section):
    """The dictionary: architecture, size and sparsity."""

    site: str | None = Field(
        None,
        examples=["transformer.h.6.mlp.act"],
        description="Which stored site is read; needed when there are several.",
    )
    target_site: str | None = Field(
        None,
        examples=["transformer.h.6.mlp"],
        description="Stored site to reconstruct from the one read: makes a transcoder. Default: the one read.",
    )
    source: str | None = Field(
        None,
        examples=["sae"],
        description="Folder of a trained SAE (SAELens, dictionary_learning) to use instead of training one.",
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
        None,
        examples=[0.02],
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
    encoder_scale: PositiveFloat | None = Field(
        None,
        examples=[1.0],
        description="Factor on the encoder's first rows; default: 0.5 in the top-k family, whose encoder then "
        "follows its gradients sooner, else 1.",
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
    def first_encoder_scale(self) -> float:
        return self.encoder_scale or (0.5 if self.counts_k else 1.0)

    @property
    def nested(self) -> list[int]:
        """Sizes of the nested dictionaries in ascending order, the last of them F (Bussmann et al. 2025, arXiv
        2503.17547)."""
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
        None,
        examples=[1.0],
        description="Longest gradient, all parameters together; longer ones are scaled down to it.",
    )
    sparsity_warmup_share: Share = Field(
        0.0, description="Share of steps over which the penalty rises from zero (relu, gated, jumprelu)."
    )
    k_start: PositiveInt | None = Field(
        None, examples=[64], description="Active features per token at the start, falling to sae.k (top-k family)."
    )
    k_anneal_share: Share = Field(0.1, description="Share of steps over which k falls from `k_start` to sae.k.")
    token_topk_share: Share = Field(
        0.0,
        description="Share of steps at the start in which each token keeps its own k largest (batchtopk, matryoshka).",
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
    device: str = Field(
        "cpu",
        description="Where it runs: `cpu`, `cuda`, or `auto`, which is a GPU where there is one. Not a setting of "
        "the SAE.",
    )
    restarts: PositiveInt = Field(1, description="Trainings from other seeds; the best reconstruction is kept.")
    checkpoint_seconds: PositiveFloat = Field(60, description="Work at most lost when a run is killed.")
    log_every: PositiveInt = Field(10, description="Steps between rows of log.parquet.")
    tensorboard: str | None = Field(
        None,
        examples=["tensorboard"],
        description="Folder for TensorBoard's event files; needs the package tensorboard.",
    )


class FeaturesConfig(Section):
    """How the corpus is encoded."""

    batch_rows: PositiveInt = Field(4096, description="Tokens encoded at once; results do not depend on it.")
    device: str = Field(
        "auto", description="`auto`, `cpu` or `cuda`: where the encoder's product runs (on a GPU not tried yet)."
    )
    check_values: NonNegativeInt = Field(
        20_000_000,
        description="Values of new parts that are counted again before they are published, about a second for two "
        "million; 0: none. `saeflow verify --full` checks all.",
    )
    compact_parts: PositiveInt = Field(
        16, ge=2, description="A run merges its parts by itself from so many on; `saeflow compact` does it at any time."
    )


class EvaluateConfig(Section):
    """How the trained SAE is judged on held-out documents."""

    max_tokens: PositiveInt = Field(250_000, description="Held-out tokens used at most.")


class ClusterConfig(Section):
    """Dask workers that collect, encode, compact and train; the store is all that they share with this machine."""

    address: str | None = Field(
        None,
        pattern=r"^(tcp|tls)://\S+:\d+$",
        examples=["tcp://127.0.0.1:8786"],
        description="Scheduler of a cluster that is there; certificates of tls:// are those of Dask's own settings.",
    )
    scheduler_file: str | None = Field(
        None, examples=["scheduler.json"], description="The file that `dask scheduler --scheduler-file` wrote, instead."
    )
    kind: Literal["local", "local-cuda", "slurm", "pbs", "sge", "lsf", "kubernetes"] | None = Field(
        None,
        examples=["local"],
        description="A cluster that saeflow starts and ends itself; `local` where neither of the above is given.",
    )
    n_workers: PositiveInt | None = Field(
        None, examples=[2], description="Workers that it starts; default: one a core (`local`) or GPU (`local-cuda`)."
    )
    threads_per_worker: PositiveInt = Field(
        1,
        description="Parts that such a worker encodes at once; it collects, trains and merges one at a time. Not of "
        "kubernetes, where options give a worker its cores.",
    )
    options: dict[str, Any] = Field(
        {}, description="Further arguments of the class of dask, dask_cuda, dask_jobqueue or dask_kubernetes."
    )
    wait_seconds: PositiveFloat = Field(60, description="How long to wait for the scheduler and for a first worker.")

    @property
    def starts(self) -> str | None:
        """The kind of cluster to start, None where one is there already."""
        return None if self.address or self.scheduler_file else self.kind or "local"

    @model_validator(mode="after")
    def _is_one_cluster(self) -> ClusterConfig:
        named = {"address": self.address, "scheduler_file": self.scheduler_file, "kind": self.kind}
        if len(given := [f"cluster.{name}" for name, value in named.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} name a cluster each. Keep one of them.")
        if self.starts not in (None, "local", "local-cuda") and self.n_workers is None:
            raise ValueError(f"cluster.kind is {self.kind!r}, which needs cluster.n_workers: how many to start.")
        fields = type(self).model_fields
        about_starting = ("n_workers", "threads_per_worker", "options")
        given = [name for name in about_starting if getattr(self, name) != fields[name].default]
        if self.starts is None and given:
            raise ValueError(
                f"cluster.{given[0]} is for a cluster that saeflow starts (cluster.kind), but the workers of "
                f"cluster.{'address' if self.address else 'scheduler_file'} are started by others. Leave it out."
            )
        if self.starts == "kubernetes" and "threads_per_worker" in given:
            raise ValueError(
                f"cluster.threads_per_worker is {self.threads_per_worker}, but of kubernetes the image and "
                "cluster.options say how many threads a worker has. Leave it out."
            )
        return self


def by_address(value: object) -> object:
    """`cluster = "tcp://host:8786"` as its section; an empty section is none."""
    return {"address": value} if isinstance(value, str) else value or None
