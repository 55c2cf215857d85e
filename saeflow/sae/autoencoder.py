"""The sparse autoencoder: its parameters, its loss, and exact encoding."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.devices import to_device
from saeflow.sae import dense_step, kernels, sparse_step
from saeflow.sae import encoder as encoding
from saeflow.sae.architectures import Gated, JumpReLU, Relu, Rule, Top
from saeflow.sae.encoder import Encoder, Readout, SparseValues, fast_dtype
from saeflow.sae.sparse_step import Auxiliary, Batch, Outcome, Task, Weights

THRESHOLD_MEMORY = 0.9
"""Share of the running threshold that a batch leaves in place."""
_START_ROWS = 4096
"""Rows from which biases and thresholds of a sparse start are taken."""


@dataclass(frozen=True)
class StepInfo:
    """What a training step saw.

    `unexplained` is the share of the batch's variance that the reconstruction misses; `auxiliary` the share of the rest
    that dead features miss, and `sparsity` the penalty, both before their weights: mean(abs(values)) (relu, gated), or
    (L0 / k - 1)² or the mean sum of tanh (jumprelu); `n_active` the mean number of active features of a token; `fired`
    the number of tokens of each feature (F).
    """

    unexplained: float
    auxiliary: float
    sparsity: float
    n_active: float
    n_dead: int
    fired: Tensor


class SparseAutoencoder(nn.Module):
    """Explain each activation vector as a short non-negative sum of learned directions.

        pre            = (x - b_in) @ W_enc.T + b_enc               (B, F)
        values         = sparsify(pre)                               (B, F)
        reconstruction = values @ W_dec + b_dec                      (B, D_out)

    `W_enc` (F, D) and `W_dec` (F, D_out) have a row a feature. Rows of `W_dec` are the feature directions. With
    `unit_norm` they have unit length after every optimiser step, so a feature's value is its contribution in the units
    of the activations. What sparsify is says `saeflow.sae.architectures` for each architecture, with its source.

    An autoencoder reconstructs what it reads, and b_in is b_dec. A *transcoder* (`target_site`) reconstructs another
    site's activations (Dunefsky et al. 2024, arXiv 2406.11944); its b_in is the mean of what it reads and is not
    trained.

    In training, `batchtopk` and `matryoshka` take their threshold from the batch at hand. `encode_sparse` applies the
    running threshold instead, so a token's features do not depend on its batch mates. To add an architecture, name
    it in `sections.Architecture`, write its rule, and choose it in `_rule` and `_readout`.
    """

    threshold: Tensor
    tokens_since_fired: Tensor
    centre: Tensor

    def __init__(self, config: SAEConfig, width: int, out_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        w_enc, b_enc, w_dec = _initial_weights(config, width, out_width or width)
        self.W_enc, self.b_enc, self.W_dec = (nn.Parameter(weight) for weight in (w_enc, b_enc, w_dec))
        self.b_dec = nn.Parameter(torch.zeros(w_dec.shape[1]), requires_grad=config.decoder_bias != "fixed")
        threshold = torch.zeros(())
        match config.architecture:
            case "gated":
                self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(config.n_features)) for _ in range(2))
            case "jumprelu":
                threshold = torch.full((config.n_features,), config.first_threshold)
                self.log_threshold = nn.Parameter(threshold.log())
        self.register_buffer("threshold", threshold)
        self.register_buffer("tokens_since_fired", torch.zeros(config.n_features, dtype=torch.int64))
        if config.target_site is not None:
            self.register_buffer("centre", torch.zeros(width))
        self.product_dtype: torch.dtype | None = None
        """Precision of the encoder product; None takes the quicker of bfloat16 and float32. Values on disk are
        exact."""
        self.use_kernels = True
        self._kept: tuple[object, Encoder] | None = None
        self._guess = 0.0

    @property
    def b_in(self) -> Tensor:
        """What is taken off what is read (D)."""
        return self.b_dec if self.config.target_site is None else self.centre

    def initialise(self, mean: Tensor, target_mean: Tensor | None = None) -> None:
        """Let the decoder bias start at the mean of what is reconstructed; `mean` (D) is that of what is read."""
        with torch.no_grad():
            if self.config.target_site is not None:
                self.centre.copy_(mean)
            if self.config.decoder_bias == "mean":
                self.b_dec.copy_(mean if target_mean is None else target_mean)

    @torch.no_grad()
    def start_sparse(self, rows: Tensor, features: Tensor | None = None) -> None:
        """Let each feature, or some (int64 ids), fire on `first_share` of the first rows (n, D), by its bias, or by its
        threshold (jumprelu)."""
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

    def training_loss(
        self,
        x: Tensor,
        aux_weight: float = 0.0,
        dead_after_tokens: int = 200_000,
        *,
        target: Tensor | None = None,
        k: int | None = None,
        sparsity: float = 1.0,
        by_token: bool = False,
    ) -> tuple[Tensor, StepInfo]:
        """Loss of a batch (B, D) of float32, to be differentiated for the parameters, not for `x`.

        topk, batchtopk, matryoshka: share of variance unexplained, sum((x - reconstruction)²) / sum((x - mean(x))²)
        over the batch, for matryoshka the mean of that share over its nested dictionaries. relu, gated, jumprelu:
        mean((x - reconstruction)²), gated also that of its gate's own reconstruction, plus `sparsity` times the
        penalty. topk family and jumprelu: plus `aux_weight` times the share of the remaining error that features silent
        for `dead_after_tokens` miss. `target` (B, D_out) takes the place of x in all of that, for a transcoder; `k`
        that of the configured one; `by_token` lets batchtopk and matryoshka choose as topk does. With `unit_norm` the
        loss is that of directions of unit length, so its gradient keeps the length. In training mode the step also
        updates the running threshold and the silence counters.
        """
        if target is None and self.config.target_site is not None:
            target = x
        with torch.no_grad():
            loss, info, gradients = self._step(
                x, aux_weight, dead_after_tokens, target, k or self.config.k, sparsity, by_token
            )
        hung = cast(Tensor, _Computed.apply(loss, gradients, *self._trained()))  # type: ignore[no-untyped-call]
        return hung, info

    def _trained(self) -> list[nn.Parameter]:
        own = {"gated": ("r_mag", "b_mag"), "jumprelu": ("log_threshold",)}.get(self.config.architecture, ())
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec, *(getattr(self, name) for name in own)]

    def _step(
        self, x: Tensor, aux_weight: float, dead_after: int, target: Tensor | None, k: int, sparsity: float,
        by_token: bool,
    ) -> tuple[Tensor, StepInfo, tuple[Tensor, ...]]:  # fmt: skip
        by_token = by_token or self.config.architecture == "topk"
        encoder = self._current_encoder()
        batch = sparse_step.prepare(x, self.b_in, target, self.b_dec, encoder.dtype)
        rule, weights = self._rule(batch, sparsity), Weights(*(p.detach() for p in self._trained()[:4]))
        ends = torch.tensor(self.config.nested, dtype=torch.int32)
        task = Task(rule, ends, batch.scale(self.config.counts_k), self.config.unit_norm, self.use_kernels)
        outcome, chosen = self._outcome(x, batch, encoder, weights, task, k, by_token)
        dead = (self.tokens_since_fired >= dead_after).nonzero().flatten()
        weight = aux_weight if self.config.counts_k or self.config.architecture == "jumprelu" else 0.0
        auxiliary = Auxiliary.plan(dead, len(x), batch.target.shape[1], k, weight)
        aux_loss = auxiliary.add_to(outcome, batch, weights, encoder, task)
        n_active = outcome.n_active / len(x)
        penalty, sparsity_loss = rule.penalty_loss(outcome.penalty, n_active)
        loss = outcome.mean_error * task.scale + penalty + aux_weight * aux_loss
        if self.training and math.isfinite(loss):  # what a batch that is no number leaves behind must not be kept
            self._remember(len(x), outcome.fired, None if by_token else chosen)
        unexplained = outcome.error / batch.variance
        info = StepInfo(unexplained, aux_loss, sparsity_loss, n_active, len(dead), outcome.fired)
        return torch.tensor(loss, device=x.device), info, self._gradients(outcome, rule, weights, n_active)

    def _outcome(
        self, x: Tensor, batch: Batch, encoder: Encoder, weights: Weights, task: Task, k: int,
        by_token: bool,
    ) -> tuple[Outcome, sparse_step.Entries | None]:  # fmt: skip
        suited = encoder.suited_to(x) if self.use_kernels else encoder
        rows = batch.low if suited is encoder else x
        if self.config.counts_k:
            chosen, self._guess = sparse_step.select_top(rows, suited, k, by_token, self._guess, self.use_kernels)
        else:
            cut = cast(Tensor | float, task.rule.cut)
            if isinstance(cut, Tensor):
                suited = suited.with_cut(cut)
            if encoding.share_positive(rows, suited) > dense_step.DENSEST:
                return dense_step.run(batch, encoder, weights, task), None
            chosen = sparse_step.select_above(rows, suited, self.use_kernels)
        return sparse_step.run(batch, chosen, weights, task), chosen

    def _rule(self, batch: Batch, sparsity: float) -> Rule:
        config, n_rows = self.config, len(batch.low)
        weighted = config.l1_norm_weighted or (config.architecture == "jumprelu" and not config.unit_norm)
        lengths = torch.linalg.vector_norm(self.W_dec.detach(), dim=1) if weighted else None
        paid = config.l1_weight * sparsity, n_rows * config.n_features, lengths
        match config.architecture:
            case "relu":
                return Relu(*paid)
            case "gated":
                return Gated(*paid, self.r_mag.detach(), self.b_mag.detach(), self.b_enc.detach())
            case "jumprelu":
                scale = config.tanh_scale if config.penalty == "tanh" else None
                weight, width = config.penalty_weight * sparsity, batch.target.shape[1]
                return JumpReLU(self.threshold, config.bandwidth, weight, config.k, n_rows, width, scale, lengths)
            case _:
                return Top()

    def _gradients(self, outcome: Outcome, rule: Rule, weights: Weights, n_active: float) -> tuple[Tensor, ...]:
        """In the order of `_trained`."""
        d_w_dec, d_b_dec = outcome.d_w_dec, outcome.d_b_dec
        if "length" in outcome.sums:
            per_length = outcome.sums["length"] / torch.linalg.vector_norm(weights.w_dec, dim=1)
            along = per_length[:, None] * weights.w_dec
            d_w_dec = d_w_dec if self.config.unit_norm else d_w_dec + along
        if self.config.target_site is None:
            d_b_dec = d_b_dec - outcome.d_pre @ weights.w_enc
        d_b_enc = rule.bias_gradient(outcome.d_pre, outcome.sums)
        return outcome.d_w_enc, d_b_enc, d_w_dec, d_b_dec, *rule.own_gradients(outcome.sums, n_active)

    def _remember(self, n_rows: int, fired: Tensor, chosen: sparse_step.Entries | None) -> None:
        """Count the tokens since each feature fired, and let the running threshold follow the least value chosen of a
        batch."""
        self.tokens_since_fired.add_(n_rows).masked_fill_(fired > 0, 0)
        if self.config.counts_k and chosen is not None and len(chosen.values):
            memory = torch.where(self.threshold > 0, THRESHOLD_MEMORY, 0.0)
            self.threshold.mul_(memory).add_((1 - memory) * chosen.values.min())

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring decoder rows back to unit length and thresholds up to date; call it after every optimiser step."""

        def normalise(features: tuple[int, int]) -> None:
            rows = self.W_dec[slice(*features)]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

        if self.config.unit_norm:
            kernels.in_parallel(normalise, sparse_step.pieces(self.W_dec, 512))
        if self.config.architecture == "jumprelu":
            torch.exp(self.log_threshold, out=self.threshold)

    def _current_encoder(self, cut: Tensor | None = None) -> Encoder:
        """The encoder in the precision of the product; kept in eval mode until a parameter changes.

        In training it is made anew every time: fused optimisers change parameters without telling.
        """
        dtype = self.product_dtype or fast_dtype(self.W_enc.device)
        weights = self.W_enc, self.b_enc, self.b_in
        if self.training:
            return Encoder(*weights, dtype, cut)
        state = dtype, *((p.data_ptr(), p._version) for p in (*weights, self.threshold))
        if self._kept is None or self._kept[0] != state:
            self._kept = state, Encoder(*weights, dtype, cut)
        return self._kept[1]

    def train(self, mode: bool = True) -> SparseAutoencoder:
        self._kept = None
        return super().train(mode)

    def _readout(self) -> Readout:
        thresholds = self.threshold.expand(self.config.n_features)
        match self.config.architecture:
            case "relu":
                return Readout.plain(torch.zeros_like(thresholds))
            case "topk":
                return Readout.plain(torch.zeros_like(thresholds), self.config.k)
            case "gated":
                stretch = self.r_mag.detach().double().exp()
                shift = self.b_mag.detach().double() - stretch * self.b_enc.detach().double()
                return Readout(np.zeros(len(stretch)), stretch.cpu().numpy(), shift.cpu().numpy(), None)
            case _:
                return Readout.plain(thresholds)

    def _cut(self, readout: Readout) -> Tensor | None:
        return torch.from_numpy(readout.thresholds).to(self.W_enc.device) if readout.thresholds.any() else None

    @torch.no_grad()
    def prepare(self) -> None:
        """Bring the weights into the form of the product, before several threads ask for them: what one asks of a GPU,
        the others' streams do not wait for."""
        if self.use_kernels and self.W_enc.device.type == "cuda":
            encoder = self._current_encoder(self._cut(self._readout()))
            encoder.prepare()
            _ = encoder.bounds
            torch.cuda.synchronize(self.W_enc.device)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseValues:
        """Every non-zero value of tokens (B, D) in float16, bfloat16 or float32, exactly as the disk contract says.

        Pre-activations in float64; relu keeps those above 0, topk the k largest positive of a token (among equals the
        lower features), batchtopk and matryoshka those above the running threshold, jumprelu those above the feature's;
        gated stretches and shifts those above 0. Values are rounded to 11 significand bits.
        A token's values depend neither on its batch nor on the number of threads.
        """
        readout = self._readout()
        cut = self._cut(readout)
        if self.use_kernels and x.device.type == "cpu" and self.W_enc.device.type == "cpu":
            return encoding.encode(x, self._current_encoder(cut), readout)
        x = to_device(x, self.W_enc.device)
        if self.use_kernels and self.W_enc.device.type != "cpu":
            return encoding.encode_by_screen(x, self._current_encoder(cut), readout)
        return encoding.encode_anywhere(x, self.W_enc, self.b_enc, self.b_in, readout)

    @torch.no_grad()
    def decode(self, sparse: SparseValues) -> Tensor:
        """Reconstructions (B, D_out) in float32."""
        entries = (torch.from_numpy(array).to(self.W_dec.device) for array in sparse)
        return sparse_step.decode(sparse_step.Entries(*entries), self.W_dec) + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode, as `encode_sparse` does, and decode."""
        return self.decode(self.encode_sparse(x))

    forward = reconstruct

    def folded(self, scale: float, target_scale: float | None = None) -> SparseAutoencoder:
        """The same autoencoder for activations before they were multiplied by `scale` (a transcoder's target: by
        `target_scale`), with values in the units of what it reconstructs."""
        other = copy.deepcopy(self).train(self.training)
        out = scale if target_scale is None else target_scale
        with torch.no_grad():
            for name in ("b_enc", "b_dec", "threshold", "b_mag"):
                if hasattr(other, name):
                    getattr(other, name).div_(out)
            if self.config.architecture == "jumprelu":
                other.log_threshold.sub_(math.log(out))
            if self.config.target_site is not None:
                other.centre.div_(scale)
                other.W_enc.mul_(scale / out)
        return other


class _Computed(torch.autograd.Function):
    """Hang a loss that is already computed into the graph, with its gradients for the parameters."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # held by nobody else, they need no copy
        return None, None, *(gradients if d_loss.item() == 1 else (each * d_loss for each in gradients))


def _initial_weights(config: SAEConfig, width: int, out_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc (F, D), b_enc (F), W_dec (F, D_out). `linear` draws uniformly within one over the root of the fan-in.

    A transcoder's matrices have nothing in common, so `tied` draws both.
    """
    generator = torch.Generator().manual_seed(config.seed)
    n = config.n_features
    if config.init == "tied":
        directions = tf.normalize(torch.randn(n, width, generator=generator), dim=1)
        outward = directions
        if config.target_site is not None:
            outward = tf.normalize(torch.randn(n, out_width, generator=generator), dim=1)
        decoder_scale = 1.0 if config.unit_norm else config.decoder_scale
        return directions * config.first_encoder_scale, torch.zeros(n), outward * decoder_scale

    def uniform(fan_in: int, *size: int) -> Tensor:
        return torch.rand(size, generator=generator).mul_(2).sub_(1).div_(math.sqrt(fan_in))

    decoder = uniform(n, n, out_width) * config.decoder_scale
    if config.unit_norm:
        decoder = tf.normalize(decoder, dim=1)
    return uniform(width, n, width) * config.first_encoder_scale, uniform(width, n), decoder
