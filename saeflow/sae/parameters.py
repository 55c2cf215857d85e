"""The parameters of a sparse autoencoder: how they start, and what keeps them in shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.linear import fast_dtype
from saeflow.runtime.threads import in_parallel
from saeflow.sae.architectures import TRAITS, Traits
from saeflow.sae.batch import worker_ranges
from saeflow.sae.encoder import Encoder
from saeflow.sae.split import WHOLE, Split
from saeflow.sae.step import DENSE_SHARE

InputNorm = Literal["none", "constant_norm_rescale", "layer_norm"]
"""What is done to each vector before it is read, and undone afterwards, by SAELens' names: it gets the length of the
root of D; or it is centred and divided by the standard deviation of its numbers."""

_START_ROWS = 4096
"""Rows from which biases and thresholds of a sparse start are taken."""
THRESHOLD_GAIN, LEAST_THRESHOLD = 0.03, 1e-6
"""Change of jumprelu's log thresholds in a step, per unit of log(L0 / k), and the lowest threshold."""


class SAEParameters(nn.Module):
    """Weights, biases, thresholds and counters, by their names in a checkpoint and in a folder of SAELens."""

    threshold: Tensor
    tokens_since_fired: Tensor
    centre: Tensor
    W_skip: Tensor | None

    def __init__(
        self, config: SAEConfig, width: int, out_width: int | None = None, threads: int = 1, split: Split = WHOLE
    ) -> None:
        super().__init__()
        self.config, self.split = config, split
        mine = split.features.share(config.n_features)
        w_enc, b_enc, w_dec = _initial_weights(config, width, out_width or width, mine)
        self.W_enc, self.b_enc, self.W_dec = (nn.Parameter(weight) for weight in (w_enc, b_enc, w_dec))
        self.b_dec = nn.Parameter(torch.zeros(w_dec.shape[1]), requires_grad=config.decoder_bias != "fixed")
        if self.traits.pursues:
            self.W_enc, self.b_enc = (nn.Parameter(each, requires_grad=False) for each in (w_dec.clone(), 0 * b_enc))
        threshold = torch.zeros(())
        match config.architecture:
            case "gated":
                self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(len(b_enc))) for _ in range(2))
            case "jumprelu":
                threshold = torch.full((len(b_enc),), config.first_threshold)
                self.log_threshold = nn.Parameter(threshold.log())
        self.register_buffer("threshold", threshold)
        self.register_buffer("tokens_since_fired", torch.zeros(len(b_enc), dtype=torch.int64))
        if config.target_site is not None:
            self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("W_skip", None)
        self.input_norm: InputNorm = "none"
        """Only an imported SAE has this, or a skip connection `W_skip` (D_out, D)."""
        self.threads = threads
        """Threads of the processor that training and encoding use."""
        self.product_dtype: torch.dtype | None = None
        """Precision of the encoder product; None takes the quicker of bfloat16 and float32. No value depends on it."""
        self.use_kernels = True
        self.dense_share = DENSE_SHARE
        """Share of active entries above which a training step is dense."""
        self.cut_guess = 0.0
        """A number that the entries which the next batch chooses will exceed: see `top_entries_of_batch`."""
        self.log_off_k = 0.0
        """log(L0 / k) of the last step, which `after_step` makes up for (jumprelu with penalty `l0`)."""
        self._kept_encoder: tuple[object, Encoder] | None = None

    @property
    def traits(self) -> Traits:
        return TRAITS[self.config.architecture]

    @property
    def b_in(self) -> Tensor:
        """(D): subtracted from the input."""
        return self.b_dec if self.config.target_site is None else self.centre

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """What a training step gives gradients for, in their order."""
        if self.traits.pursues:
            return [self.W_dec, self.b_dec]
        own = (getattr(self, name) for name in self.traits.own_parameters)
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec, *own]

    def initialise(self, mean: Tensor, target_mean: Tensor | None = None) -> None:
        """Let the decoder bias start at the mean of the target; `mean` (D) is the mean of the input."""
        with torch.no_grad():
            if self.config.target_site is not None:
                self.centre.copy_(mean)
            if self.config.decoder_bias == "mean":
                self.b_dec.copy_(mean if target_mean is None else target_mean)

    @torch.no_grad()
    def start_sparse(self, rows: Tensor, features: Tensor | None = None) -> None:
        """Let each feature, or some (int64 ids), fire on `first_share` of the first rows (n, D).

        This sets its bias, or its threshold (jumprelu).
        """
        share = self.config.first_share
        if share is None and self.config.architecture != "relu":
            share = min(2 * self.config.k / self.config.n_features, 0.05)
        if not share or self.config.counts_k:
            return
        chosen = torch.arange(len(self.b_enc)) if features is None else features
        centred = rows[:_START_ROWS] - self.b_in
        rank = max(round((1 - share) * len(centred)), 1)
        for some in chosen.split(1024):
            pre = torch.addmm(self.b_enc[some], centred, self.W_enc[some].t())
            cuts = pre.kthvalue(rank, dim=0).values
            if self.config.architecture == "jumprelu":
                self.log_threshold[some] = cuts.clamp(min=self.config.first_threshold).log()
                self.threshold[some] = self.log_threshold[some].exp()
            else:
                self.b_enc[some] -= cuts

    @torch.no_grad()
    def after_step(self, in_bfloat16: bool = False) -> None:
        """Bring decoder rows back to unit length and thresholds up to date; call it after every optimiser step.

        With `in_bfloat16`, the step began with numbers of bfloat16. Then rows that still consist of such numbers have
        not moved. They stay, as their length is off by the rounding, which would move them at every step.

        Where jumprelu aims at k, all thresholds also move together: integral control of their logarithms. The penalty's
        gradient alone is too slow, since Adam changes a logarithm by at most the learning rate in a step, while
        pre-activations grow severalfold.
        """

        def normalise(features: tuple[int, int]) -> None:
            rows = self.W_dec[slice(*features)]
            lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            if in_bfloat16:
                moved = (rows.view(torch.int32) & 0xFFFF).any(1, keepdim=True)
                lengths = torch.where(moved, lengths, 1.0)
            rows.div_(lengths)

        if self.config.unit_norm:
            in_parallel(normalise, worker_ranges(self.W_dec, 512), self.threads)
        if self.traits.pursues:
            self.W_enc.copy_(self.W_dec)
        if self.config.architecture == "jumprelu":
            self.log_threshold.add_(THRESHOLD_GAIN * min(max(self.log_off_k, -3.0), 3.0))
            self.log_threshold.clamp_(min=math.log(LEAST_THRESHOLD))
            self.log_off_k = 0.0
            torch.exp(self.log_threshold, out=self.threshold)

    def current_encoder(self, cut: Tensor | None = None) -> Encoder:
        """Return the encoder in the precision of the product.

        In eval mode it is kept until a parameter changes. In training it is made anew every time: fused optimisers
        change parameters without telling.
        """
        dtype = self.product_dtype or fast_dtype(self.W_enc.device)
        weights = self.W_enc, self.b_enc, self.b_in
        b_in = torch.zeros_like(self.b_in) if self.traits.pursues else self.b_in  # it reads residuals
        if self.training:
            return Encoder(*weights[:2], b_in, dtype, cut, self.threads)
        state = dtype, self.threads, *((p.data_ptr(), p._version) for p in (*weights, self.threshold))
        if self._kept_encoder is None or self._kept_encoder[0] != state:
            self._kept_encoder = state, Encoder(*weights[:2], b_in, dtype, cut, self.threads)
        return self._kept_encoder[1]

    def train(self, mode: bool = True) -> Self:
        self._kept_encoder = None
        return super().train(mode)


def _initial_weights(
    config: SAEConfig, width: int, out_width: int, mine: slice
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return W_enc (F, D), b_enc (F), W_dec (F, D_out) of the features that are `mine`.

    `linear` draws uniformly within one over the root of the fan-in. A transcoder's matrices have nothing in common, so
    `tied` draws both.
    """
    generator = torch.Generator().manual_seed(config.seed)
    n = config.n_features
    if config.init == "tied":

        def unit_rows(size: int) -> Tensor:
            drawn = _drawn(lambda k: torch.randn(k, size, generator=generator), n, mine)
            return tf.normalize(drawn, dim=1)

        directions = unit_rows(width)
        outward = directions if config.target_site is None else unit_rows(out_width)
        decoder_scale = 1.0 if config.unit_norm else config.decoder_scale
        biases = torch.zeros(len(directions))
        return directions * config.first_encoder_scale, biases, outward * decoder_scale

    def uniform(fan_in: int, *size: int) -> Tensor:
        drawn = _drawn(lambda k: torch.rand(k, *size, generator=generator), n, mine)
        return drawn.mul_(2).sub_(1).div_(math.sqrt(fan_in))

    decoder = uniform(n, out_width) * config.decoder_scale
    if config.unit_norm:
        decoder = tf.normalize(decoder, dim=1)
    return uniform(width, width) * config.first_encoder_scale, uniform(width), decoder


_DRAWN_ROWS = 4096
"""Rows drawn at a time. Torch draws normal numbers in groups of 16, so only blocks of whole groups equal one draw."""


def _drawn(draw: Callable[[int], Tensor], n: int, mine: slice) -> Tensor:
    """Return the rows `mine` of n random rows, as one draw of n rows gives them, without holding all."""
    if mine == slice(0, n):
        return draw(n)
    starts = [0, *range(_DRAWN_ROWS, n - 16, _DRAWN_ROWS)]
    kept = []
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        block = draw(stop - start)
        kept.append(block[max(mine.start - start, 0) : max(mine.stop - start, 0)].clone())
    return torch.cat(kept)
