"""The sections of a recipe from the feed to the evaluation: each setting with its kind, default and meaning."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    ByteSize,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from saeflow.recipe.section import (
    PathFromRecipe,
    SAESource,
    Section,
    Share,
)

Overlap = Literal["refuse", "wait"]
"""What a run does while another process writes the same artefact: end at once, or wait."""

K_TOLERANCE = 0.05
"""Share by which L0 may differ from `sae.k` before anything is said."""

Architecture = Literal["relu", "gated", "topk", "batchtopk", "matryoshka", "jumprelu", "abstopk", "mp"]
"""The kinds of autoencoder. Add another one here and where `saeflow.sae.autoencoder` matches on it."""

TOP_FAMILY: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka", "abstopk", "mp")
"""Architectures that keep the k largest values of a token or a batch; the others are made sparse by a penalty."""

PER_TOKEN: tuple[Architecture, ...] = ("topk", "abstopk", "mp")
"""Architectures that keep `k` values of each token, or at most so many, whenever they encode."""

SIGNED: tuple[Architecture, ...] = ("abstopk",)
"""Architectures whose values may be below zero."""


class FeedConfig(Section):
    """How stored activations become shuffled batches."""

    batch_rows: PositiveInt = Field(4096, description="Tokens in one batch (B).")
    block_bytes: ByteSize = Field(ByteSize(8 << 20), description="Bytes read at once.")
    pool_bytes: ByteSize = Field(
        ByteSize(1 << 30), description="Memory for activations: half is being mixed while half is read ahead."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the order. The same seed gives the same order on any machine.")


class SAEConfig(Section):
    """The dictionary: its architecture, size and sparsity."""

    site: str | None = Field(
        None,
        examples=["transformer.h.6.mlp.act"],
        description="Stored site that the SAE reads. Needed only if several are stored.",
    )
    target_site: str | None = Field(
        None,
        examples=["transformer.h.6.mlp"],
        description="Stored site to reconstruct, which makes a transcoder. Default: the site that is read.",
    )
    source: SAESource | None = Field(
        None,
        examples=["sae"],
        description="A trained SAE to use instead of training one: its folder or file, OWNER/REPOSITORY/FOLDER on the "
        "Hugging Face hub, or RELEASE/SAE of SAELens' catalogue.",
    )
    input_scale: PositiveFloat | None = Field(
        None,
        examples=[1.5],
        description="Factor on activations before the SAE in `source` reads them, where its folder names none.",
    )
    architecture: Architecture = Field("batchtopk", description="Kind of autoencoder.")
    n_features: PositiveInt = Field(4096, description="Directions in the dictionary (F).")
    k: PositiveInt = Field(
        32,
        description="Active features per token (topk, abstopk, mp, batchtopk, matryoshka). jumprelu with penalty `l0` "
        "moves its thresholds until so many are active.",
    )
    prefixes: list[PositiveInt] = Field(
        [], description="Sizes of matryoshka's nested dictionaries. Default: 1/32, 3/32, 7/32 and 15/32 of F, and F."
    )
    l1_weight: float = Field(0.01, ge=0, description="Weight of mean(abs(values)) in the loss (relu, gated).")
    l1_norm_weighted: bool = Field(
        False, description="Multiply each value in that loss by the length of its decoder row."
    )
    penalty: Literal["l0", "tanh"] = Field(
        "l0",
        description="jumprelu's penalty. l0: (L0 / k - 1)², and thresholds follow k. tanh: of the values.",
    )
    penalty_weight: float = Field(1.0, ge=0, description="Weight of that penalty in the loss (jumprelu).")
    tanh_scale: PositiveFloat = Field(4.0, description="Factor inside the tanh of that penalty (jumprelu).")
    bandwidth: PositiveFloat = Field(
        0.5, description="Width of the window around a threshold that estimates its gradient (jumprelu)."
    )
    first_threshold: PositiveFloat = Field(
        0.1, description="Lowest threshold at the start, and every threshold if `first_share` is 0 (jumprelu)."
    )
    first_share: Share | None = Field(
        None,
        examples=[0.02],
        description="Share of tokens on which each feature fires at the start, set by its bias or threshold (relu, "
        "gated, jumprelu). Default: the share of 2 k features, at most 0.05 (gated, jumprelu), or zero biases (relu).",
    )
    unit_norm: bool = Field(True, description="Keep decoder rows at unit length.")
    normalise: bool = Field(
        True, description="Scale the data to mean squared norm D while training. The factor is folded in on saving."
    )
    whiten: bool = Field(
        False,
        description="Train on whitened activations: all directions vary alike. Folded in on saving (not for mp and "
        "transcoders).",
    )
    init: Literal["tied", "linear"] = Field(
        "tied", description="tied: both matrices start with the same random unit rows. linear: uniform, as nn.Linear."
    )
    encoder_scale: PositiveFloat | None = Field(
        None,
        examples=[1.0],
        description="Factor on the encoder's first rows. Default: 0.5 in the top-k family and in jumprelu with penalty "
        "`l0`, whose encoder then follows its gradients sooner; else 1.",
    )
    decoder_scale: PositiveFloat = Field(
        1.0, description="Factor on the decoder's first rows. It has an effect only without unit_norm."
    )
    decoder_bias: Literal["mean", "zero", "fixed"] = Field(
        "mean", description="Start of the decoder bias: the data's mean, or zero. fixed: it stays at zero."
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of the first weights.")

    @property
    def counts_k(self) -> bool:
        """True if `k` is the number of values that the architecture keeps per token."""
        return self.architecture in TOP_FAMILY

    @property
    def aims_at_k(self) -> bool:
        """True if training draws L0 to `k`, by thresholds that all tokens share."""
        own = self.architecture == "jumprelu" and self.penalty == "l0" and self.penalty_weight > 0
        return own and self.source is None

    def misses_k(self, l0: float) -> str | None:
        """Say that a trained SAE's L0 is more than 5% off `k`; None if it is not, or if `k` sets nothing."""
        off = l0 / self.k - 1
        if not (self.counts_k or self.aims_at_k) or self.source is not None or abs(off) <= K_TOLERANCE:
            return None
        return f"{abs(off):.0%} {'above' if off > 0 else 'below'} sae.k = {self.k}"

    @property
    def first_encoder_scale(self) -> float:
        return self.encoder_scale or (0.5 if self.counts_k or self.aims_at_k else 1.0)

    @property
    def nested(self) -> list[int]:
        """Sizes of the nested dictionaries in ascending order; the last one is F.

        Bussmann et al. 2025, arXiv 2503.17547.
        """
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
        if self.architecture == "mp" and self.target_site is not None:
            raise ValueError(
                f"sae.architecture is mp, but sae.target_site is {self.target_site}.\nMatching pursuit encodes by the "
                "directions that it reconstructs with. Leave target_site out, or choose another architecture."
            )
        if self.whiten and (self.architecture == "mp" or self.target_site is not None):
            what = "sae.architecture is mp" if self.architecture == "mp" else f"sae.target_site is {self.target_site}"
            raise ValueError(
                f"sae.whiten is true, but {what}: its weights cannot take the whitening in.\n"
                "Leave sae.whiten out, or choose another architecture that reconstructs what it reads."
            )
        if max(self.prefixes, default=0) > self.n_features:
            raise ValueError(
                f"sae.prefixes contains {max(self.prefixes)}, but sae.n_features is {self.n_features}.\n"
                f"Use sizes of at most {self.n_features}, or raise sae.n_features."
            )
        return self


class TrainConfig(Section):
    """The optimisation: how long, and how fast."""

    n_tokens: PositiveInt = Field(2_000_000, description="Tokens to train on. A store with fewer tokens is read again.")
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        examples=[0.05],
        description="Share of the documents to train on, chosen by a hash of their key. Their activations are stored "
        "apart, also if activations.keep is false. Raise it later to add more. Default: all that is stored.",
    )
    lr: PositiveFloat | None = Field(
        None,
        examples=[1e-3],
        description="Highest learning rate of Adam. Default: 1e-3, and higher where the top-k family or jumprelu with "
        "penalty `l0` train for less than 6,400 steps: up to 4e-3 * sqrt(256 / D).",
    )
    warmup_share: Share = Field(0.02, description="Share of steps at the start in which the learning rate rises.")
    decay_share: Share = Field(0.3, description="Share of steps at the end in which the learning rate falls to zero.")
    decay: Literal["linear", "cosine"] = Field("linear", description="Shape of that fall: a line or half a cosine.")
    beta1: Share = Field(0.9, description="Adam's decay rate of the mean gradient.")
    beta2: Share = Field(0.999, description="Adam's decay rate of the mean squared gradient.")
    clip_norm: PositiveFloat | None = Field(
        None,
        examples=[1.0],
        description="Longest gradient over all parameters together. Longer ones are scaled down to it.",
    )
    moments: Literal["float32", "8bit"] = Field(
        "float32",
        description="Precision of Adam's two moments of the matrices. 8bit: block-wise, as bitsandbytes defines it, in "
        "a quarter of the memory.",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the matrices in training. bfloat16: each step is computed in float32, then rounded "
        "at random so that small changes add up.",
    )
    sparsity_warmup_share: Share = Field(
        0.0, description="Share of steps at the start in which the penalty rises from zero (relu, gated, jumprelu)."
    )
    k_start: PositiveInt | None = Field(
        None, examples=[64], description="Active features per token at the start; falls to sae.k (top-k family)."
    )
    k_anneal_share: Share = Field(0.1, description="Share of steps in which k falls from `k_start` to sae.k.")
    token_topk_share: Share = Field(
        0.0,
        description="Share of steps at the start in which each token keeps its own k largest values (batchtopk, "
        "matryoshka).",
    )
    aux_weight: float = Field(
        1 / 32, ge=0, description="Weight of the auxiliary loss that revives dead features (top-k family, jumprelu)."
    )
    dead_after_tokens: PositiveInt = Field(
        200_000, description="A feature counts as dead once it has not fired for this many training tokens."
    )
    resample_at: list[Share] = Field(
        [], description="Points of the training, as shares, at which dead features start anew (Bricken et al. 2023)."
    )
    device: str = Field(
        "cpu",
        description="Device to train on: `cpu`, `cuda`, or `auto` for a GPU if there is one. It is not part of the "
        "SAE's identity.",
    )
    parallel: Literal["data", "features"] = Field(
        "data",
        description="What several processes share (`torchrun`, cluster.ranks): `data`, the tokens of each batch, or "
        "`features`, for dictionaries too large for one GPU. It is not part of the SAE's identity.",
    )
    kernels: bool = Field(
        True,
        description="On a GPU with Triton, saeflow's kernels take the steps of every architecture but mp. With several "
        "ranks: of the top-k family; if they share the features, not with `train.weights` bfloat16. False: torch's "
        "operations do. It is not part of the SAE's identity.",
    )
    restarts: PositiveInt = Field(
        1, description="Trainings from different seeds. The one with the best reconstruction is kept."
    )
    checkpoint_seconds: PositiveFloat = Field(
        60, description="Seconds between checkpoints: the most work a kill can lose."
    )
    log_every: PositiveInt = Field(10, description="Steps between rows of log.parquet.")
    tensorboard: PathFromRecipe | None = Field(
        None,
        examples=["tensorboard"],
        description="Folder for TensorBoard's event files. Needs the package tensorboard.",
    )


class FeaturesConfig(Section):
    """How the corpus is encoded."""

    batch_rows: PositiveInt = Field(4096, description="Tokens encoded at once. Results do not depend on it.")
    device: str = Field(
        "auto", description="Device for the encoder product: `auto`, `cpu` or `cuda`. Untested on GPUs."
    )
    check_values: NonNegativeInt = Field(
        20_000_000,
        description="Values of new parts to count again before publishing, at about two million per second. 0: none. "
        "`saeflow verify --full` checks all.",
    )
    compact_parts: PositiveInt = Field(
        4,
        ge=2,
        description="Parts of one level that become one part of the next. A smaller number has a question open fewer "
        "files, and a growing run write its values more often. `saeflow compact` merges all parts at any time.",
    )


class EvaluateConfig(Section):
    """How the trained SAE is judged on held-out documents."""

    max_tokens: PositiveInt = Field(250_000, description="Most held-out tokens to use.")
