"""The sparse autoencoder: its parameters, losses, exact encoding, and its folder on disk."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saeflow import encoding, kernels, sparse_step
from saeflow.config import SAEConfig, UserError
from saeflow.encoding import Encoder, SparseValues, fast_dtype
from saeflow.sparse_step import Auxiliary, Weights

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
THRESHOLD_MEMORY = 0.9
"""Share of the running threshold that a batch leaves in place."""


@dataclass(frozen=True)
class StepInfo:
    """What a training step saw.

    `unexplained` is the share of the batch's variance that the reconstruction misses; `auxiliary` the share of the rest
    that dead features miss (top-k family) and `sparsity` mean(abs(values)) (relu), both before their weights;
    `n_active` the mean number of active features of a token; `fired` the number of tokens of each feature (F).
    """

    unexplained: float
    auxiliary: float
    sparsity: float
    n_active: float
    n_dead: int
    fired: Tensor


class SparseAutoencoder(nn.Module):
    """Explain each activation vector as a short non-negative sum of learned directions.

        values         = sparsify((x - b_dec) @ W_enc.T + b_enc)    (B, F)
        reconstruction = values @ W_dec + b_dec                      (B, D)

    `W_enc` and `W_dec` are (F, D), a row a feature. Rows of `W_dec` are the feature directions. With `unit_norm` they
    have unit length after every optimiser step, so a feature's value is its contribution in the units of the
    activations.

    In training, `batchtopk` takes its threshold from the batch at hand. `encode_sparse` applies the running threshold
    instead, so a token's features do not depend on its batch mates (Bussmann et al. 2024, arXiv 2412.06410).
    """

    threshold: Tensor
    tokens_since_fired: Tensor

    def __init__(self, config: SAEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        w_enc, b_enc, w_dec = _initial_weights(config, width)
        self.W_enc, self.b_enc, self.W_dec = (nn.Parameter(weight) for weight in (w_enc, b_enc, w_dec))
        self.b_dec = nn.Parameter(torch.zeros(width), requires_grad=config.decoder_bias != "fixed")
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("tokens_since_fired", torch.zeros(config.n_features, dtype=torch.int64))
        self.product_dtype: torch.dtype | None = None
        """Precision of the encoder product; None takes the quicker of bfloat16 and float32. Values on disk are exact."""
        self.use_kernels = True
        self._kept: tuple[object, Encoder] | None = None
        self._guess = 0.0

    def initialise(self, mean: Tensor) -> None:
        """Let the decoder bias start at `mean` (D)."""
        with torch.no_grad():
            self.b_dec.copy_(mean)

    def training_loss(
        self, x: Tensor, aux_weight: float = 0.0, dead_after_tokens: int = 200_000
    ) -> tuple[Tensor, StepInfo]:
        """Loss of a batch (B, D) of float32, to be differentiated for the parameters, not for `x`.

        topk, batchtopk: share of variance unexplained, sum((x - reconstruction)²) / sum((x - mean(x))²) over the batch,
        plus `aux_weight` times the share of the remaining error that features silent for `dead_after_tokens` miss.
        relu: mean((x - reconstruction)²) + l1_weight * mean(abs(values)).
        With `unit_norm` the loss is that of directions scaled to unit length, so its gradient keeps the length.
        In training mode the step also updates the running threshold and the silence counters.
        """
        n_dead = int((self.tokens_since_fired >= dead_after_tokens).sum())
        if self.config.architecture == "relu":
            loss, info = self._relu_loss(x, n_dead)
        else:
            loss, info = self._top_loss(x, aux_weight, dead_after_tokens)
        if self.training:
            self.tokens_since_fired.add_(len(x)).masked_fill_(info.fired > 0, 0)
        return loss, info

    def _relu_loss(self, x: Tensor, n_dead: int) -> tuple[Tensor, StepInfo]:
        w_dec = tf.normalize(self.W_dec, dim=1) if self.config.unit_norm else self.W_dec
        values = tf.relu(tf.linear(x - self.b_dec, self.W_enc, self.b_enc))
        error = (values @ w_dec + self.b_dec - x).square()
        lengths = torch.linalg.vector_norm(w_dec, dim=1) if self.config.l1_norm_weighted else 1.0
        sparsity = (values * lengths).mean()  # values are not negative
        with torch.no_grad():
            fired = (values > 0).sum(0)
            unexplained = error.sum() / (x - x.mean(0)).square().sum().clamp(min=1e-30)
        info = StepInfo(unexplained.item(), 0.0, sparsity.item(), fired.sum().item() / len(x), n_dead, fired)
        return error.mean() + self.config.l1_weight * sparsity, info

    def _top_loss(self, x: Tensor, aux_weight: float, dead_after_tokens: int) -> tuple[Tensor, StepInfo]:
        config, weights = self.config, Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        with torch.no_grad():
            encoder = self._current_encoder()
            prepared = sparse_step.prepare(x, self.b_dec, encoder.dtype)
            suited = encoder.suited_to(x) if self.use_kernels else encoder
            entries, self._guess = sparse_step.select(
                prepared.low if suited is encoder else x, suited, config.k,
                config.architecture == "topk", self._guess, self.use_kernels,
            )  # fmt: skip
            dead = (self.tokens_since_fired >= dead_after_tokens).nonzero().flatten()
            auxiliary = Auxiliary.plan(dead, len(x), x.shape[1], config.k, aux_weight)
            plain = Weights(*(weight.detach() for weight in weights))
            unexplained, aux_loss, step = sparse_step.run(
                prepared, entries, plain, encoder, auxiliary, config.unit_norm, self.use_kernels
            )
            fired = torch.bincount(entries.feature_ids, minlength=config.n_features)
            if self.training:
                self._follow_threshold(entries.values)
            total = (unexplained + aux_weight * aux_loss).float()
        loss = cast(Tensor, sparse_step.SparseLoss.apply(total, step, *weights))  # type: ignore[no-untyped-call]
        n_active = len(entries.values) / len(x)
        return loss, StepInfo(unexplained.item(), aux_loss.item(), 0.0, n_active, len(dead), fired)

    def _follow_threshold(self, values: Tensor) -> None:
        if self.config.architecture != "batchtopk" or not len(values):
            return
        least = values.min()
        memory = torch.where(self.threshold > 0, THRESHOLD_MEMORY, 0.0)
        self.threshold.mul_(memory).add_((1 - memory) * least)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring decoder rows back to unit length; call it after every optimiser step."""

        def normalise(features: tuple[int, int]) -> None:
            rows = self.W_dec[slice(*features)]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

        if self.config.unit_norm:
            kernels.in_parallel(normalise, kernels.ranges(len(self.W_dec), 512))

    def _current_encoder(self) -> Encoder:
        """The encoder in the precision of the product; kept in eval mode until a parameter changes.

        In training it is made anew every time: fused optimisers change parameters without telling.
        """
        dtype = self.product_dtype or (fast_dtype() if self.W_enc.device.type == "cpu" else torch.bfloat16)
        if self.training:
            return Encoder(self.W_enc, self.b_enc, self.b_dec, dtype)
        state = dtype, *((p.data_ptr(), p._version) for p in (self.W_enc, self.b_enc, self.b_dec))
        if self._kept is None or self._kept[0] != state:
            self._kept = state, Encoder(self.W_enc, self.b_enc, self.b_dec, dtype)
        return self._kept[1]

    def train(self, mode: bool = True) -> SparseAutoencoder:
        self._kept = None
        return super().train(mode)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseValues:
        """Every non-zero value of tokens (B, D) in float16, bfloat16 or float32, exactly as the disk contract says.

        Pre-activations in float64; relu keeps those above 0, topk the k largest positive of a token (among equals the
        lower features), batchtopk those above the running threshold; values are rounded to 11 significand bits.
        A token's values depend neither on its batch nor on the number of threads.
        """
        rule: encoding.Rule = "top" if self.config.architecture == "topk" else "above"
        threshold = self.threshold.item() if self.config.architecture == "batchtopk" else 0.0
        if self.use_kernels and x.device.type == "cpu" and self.W_enc.device.type == "cpu":
            return encoding.encode(x, self._current_encoder(), rule, threshold, self.config.k)
        weights = self.W_enc, self.b_enc, self.b_dec
        return encoding.encode_anywhere(x.to(self.W_enc.device), *weights, rule, threshold, self.config.k)

    @torch.no_grad()
    def decode(self, sparse: SparseValues) -> Tensor:
        """Reconstructions (B, D) in float32."""
        entries = (torch.from_numpy(array).to(self.W_dec.device) for array in sparse)
        return sparse_step.decode(sparse_step.Entries(*entries), self.W_dec) + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode, as `encode_sparse` does, and decode."""
        return self.decode(self.encode_sparse(x))

    forward = reconstruct

    def folded(self, scale: float) -> SparseAutoencoder:
        """The same autoencoder for activations before they were multiplied by `scale`, with values in their units."""
        other = copy.deepcopy(self).train(self.training)
        with torch.no_grad():
            for tensor in (other.b_enc, other.b_dec, other.threshold):
                tensor.div_(scale)
        return other

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Write cfg.json and sae_weights.safetensors as SAELens 6 reads them; equal contents give equal bytes.

        A batchtopk autoencoder becomes a `jumprelu` one with the running threshold for every feature.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "W_enc": self.W_enc.t(), "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec
        }  # fmt: skip
        if self.config.architecture == "batchtopk":
            tensors["threshold"] = self.threshold.expand(self.config.n_features)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
        cfg = _saelens_cfg(self.config, self.b_dec.numel(), metadata)
        (folder / CFG).write_text(json.dumps(cfg, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> SparseAutoencoder:
        """Read what `save` wrote, or any SAELens 6 autoencoder of the architectures known here, ready to encode."""
        for name in (CFG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"No {name} in {folder}. A trained autoencoder has {CFG} and {WEIGHTS}.")
        cfg = json.loads((folder / CFG).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
        sae = cls(_own_config(cfg, folder), int(cfg["d_in"]))
        threshold = tensors.get("threshold", torch.zeros(1))
        if threshold.min() != threshold.max():
            raise UserError(f"{folder} has a threshold for each feature; saeflow reads one threshold for all.")
        with torch.no_grad():
            sae.W_enc.copy_(tensors["W_enc"].t())
            sae.W_dec.copy_(tensors["W_dec"])
            sae.b_enc.copy_(tensors["b_enc"])
            sae.b_dec.copy_(tensors["b_dec"])
            sae.threshold.copy_(threshold[0])
        return sae.eval()


def _initial_weights(config: SAEConfig, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc (F, D), b_enc (F), W_dec (F, D). `linear` draws uniformly within one over the root of the fan-in."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.n_features, width
    if config.init == "tied":
        directions = tf.normalize(torch.randn(shape, generator=generator), dim=1)
        return directions.clone(), torch.zeros(config.n_features), directions * _decoder_scale(config)

    def uniform(fan_in: int, *size: int) -> Tensor:
        return torch.rand(size, generator=generator).mul_(2).sub_(1).div_(math.sqrt(fan_in))

    decoder = uniform(config.n_features, *shape) * config.decoder_scale
    if config.unit_norm:
        decoder = tf.normalize(decoder, dim=1)
    return uniform(width, *shape), uniform(width, config.n_features), decoder


def _decoder_scale(config: SAEConfig) -> float:
    return 1.0 if config.unit_norm else config.decoder_scale


def _saelens_cfg(config: SAEConfig, width: int, metadata: dict[str, Any]) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "architecture": {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu"}[config.architecture],
        "d_in": width,
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**metadata, "saeflow": config.model_dump(mode="json")},
    }
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _own_config(cfg: dict[str, Any], folder: Path) -> SAEConfig:
    if own := cfg.get("metadata", {}).get("saeflow"):
        return SAEConfig.model_validate(own)
    known = {"standard": "relu", "topk": "topk", "jumprelu": "batchtopk"}
    wanted = {
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    if cfg.get("architecture") not in known:
        raise UserError(f"{folder / CFG}: architecture is {cfg.get('architecture')!r}; known are {', '.join(known)}.")
    for name, value in wanted.items():
        if cfg.get(name, value) != value:
            raise UserError(f"{folder / CFG}: {name} is {cfg[name]!r}; saeflow reads {value!r} only.")
    shape = {"n_features": cfg["d_sae"], "k": cfg["k"]} if "k" in cfg else {"n_features": cfg["d_sae"]}
    return SAEConfig.model_validate({"architecture": known[cfg["architecture"]], "unit_norm": False} | shape)
