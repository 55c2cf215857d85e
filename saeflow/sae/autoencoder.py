"""The sparse autoencoder: its loss, exact encoding and reconstruction."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseValues
from saeflow.runtime.devices import to_device
from saeflow.sae.encoder import Encoder
from saeflow.sae.exact import ActivationFunction, encode_on_accelerator, encode_on_processor
from saeflow.sae.gradients import decode
from saeflow.sae.loss import LossOptions, StepInfo, loss_of_batch
from saeflow.sae.parameters import SAEParameters
from saeflow.sae.pursuit import NO_END, pursue

Encode = Callable[[Tensor, Encoder, ActivationFunction], SparseValues]


class SparseAutoencoder(SAEParameters):
    """Explain each activation vector as a short sum of learned directions.

        pre            = (x - b_in) @ W_enc.T + b_enc               (B, F)
        values         = sparsify(pre)                               (B, F)
        reconstruction = values @ W_dec + b_dec                      (B, D_out)

    `W_enc` (F, D) and `W_dec` (F, D_out) have a row a feature. Rows of `W_dec` are the feature directions. With
    `unit_norm` they have unit length after every optimiser step, so a feature's value is its contribution in the units
    of the activations. `saeflow.sae.architectures` says for each architecture what sparsify is, and its source.

    An autoencoder reconstructs its input, and b_in is b_dec. A *transcoder* (`target_site`) reconstructs another site's
    activations (Dunefsky et al. 2024, arXiv 2406.11944); its b_in is the mean of its input and is not trained.

    In training, `batchtopk` and `matryoshka` take their threshold from the batch at hand. `encode_sparse` applies the
    running threshold instead, so a token's features do not depend on its batch mates.

    An imported SAE may also have a skip connection, which adds x @ W_skip.T to the reconstruction (Paulo et al. 2025,
    arXiv 2501.18823), and may normalise each vector before it is read (`input_norm`).

    docs/built/add-an-architecture.md says how to add one.
    """

    def training_loss(
        self, x: Tensor, aux_weight: float = 0.0, dead_after_tokens: int = 200_000, *, target: Tensor | None = None,
        k: int | None = None, sparsity: float = 1.0, by_token: bool = False,
    ) -> tuple[Tensor, StepInfo]:  # fmt: skip
        """Return the loss of a batch (B, D) of float32, to be differentiated for the parameters, not for `x`.

        - top-k family: share of variance unexplained, sum((x - reconstruction)²) / sum((x - mean(x))²)
          over the batch; for matryoshka the mean of that share over its nested dictionaries.
        - relu, gated, jumprelu: mean((x - reconstruction)²), for gated also that of its gate's own reconstruction, plus
          `sparsity` times the penalty.
        - topk family and jumprelu: plus `aux_weight` times the share of the remaining error that features silent for
          `dead_after_tokens` miss.

        For a transcoder, `target` (B, D_out) takes the place of x as what is reconstructed. `k` replaces the configured
        one; `by_token` lets batchtopk and matryoshka choose as topk does. With `unit_norm` the loss is that of
        directions of unit length, so its gradient keeps the length. In training mode the step also updates the running
        threshold and the silence counters.
        """
        if target is None and self.config.target_site is not None:
            target = x
        by_token = by_token or self.traits.chooses_by_token
        options = LossOptions(aux_weight, dead_after_tokens, k or self.config.k, sparsity, by_token)
        return loss_of_batch(self, x, target, options)

    pursuit_end = NO_END

    def activation_function(self) -> ActivationFunction:
        """Return how an exact pre-activation becomes a value, outside of training."""
        thresholds = self.threshold.expand(self.config.n_features)
        match self.config.architecture:
            case "relu":
                return ActivationFunction.identity(torch.zeros_like(thresholds))
            case "topk":
                return ActivationFunction.identity(torch.zeros_like(thresholds), self.config.k)
            case "mp":
                return ActivationFunction.identity(torch.zeros_like(thresholds), 1)  # of each step of the pursuit
            case "abstopk":
                return ActivationFunction.identity(torch.zeros_like(thresholds), self.config.k, signed=True)
            case "gated":
                stretch = self.r_mag.detach().double().exp()
                shift = self.b_mag.detach().double() - stretch * self.b_enc.detach().double()
                return ActivationFunction(np.zeros(len(stretch)), stretch.cpu().numpy(), shift.cpu().numpy(), None)
            case "batchtopk" | "matryoshka" | "jumprelu":
                return ActivationFunction.identity(thresholds)
            case unknown:
                assert_never(unknown)

    def _cut(self, function: ActivationFunction) -> Tensor | None:
        return torch.from_numpy(function.thresholds).to(self.W_enc.device) if function.thresholds.any() else None

    @torch.no_grad()
    def prepare(self) -> None:
        """Bring weights on a GPU into the form of the product: one thread's stream does not wait for another's work."""
        if self.use_kernels and self.W_enc.device.type == "cuda":
            encoder = self.current_encoder(self._cut(self.activation_function()))
            encoder.prepare()
            _ = encoder.bounds
            torch.cuda.synchronize(self.W_enc.device)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseValues:
        """Return every non-zero value of tokens (B, D) in float16, bfloat16 or float32, exactly as data/README.md says.

        Pre-activations are computed in float64. relu keeps those above 0, topk the k largest positive of a token (among
        equals the lower features), abstopk the k of largest magnitude with their signs, batchtopk and matryoshka those
        above the running threshold, jumprelu those above the feature's threshold; gated stretches and shifts those
        above 0; mp takes the largest k times, each from what the others left.
        Values are rounded to 11 significand bits.
        A token's values depend neither on its batch nor on the number of threads.
        """
        function = self.activation_function()
        cut, x = self._cut(function), self._normalised(x)[0]
        encode: Encode = encode_on_processor
        if not self.use_kernels or x.device.type != "cpu" or self.W_enc.device.type != "cpu":
            encode, x = self._encode_on_accelerator(), to_device(x, self.W_enc.device)
        encoder = self.current_encoder(cut)

        def choose(rows: Tensor) -> SparseValues:
            return encode(rows, encoder, function)

        if self.traits.pursues:
            return pursue(x, self.W_dec.detach(), self.b_dec.detach(), self.config.k, self.pursuit_end, choose)
        return choose(x)

    def _encode_on_accelerator(self) -> Encode:
        """Return what encodes where the weights are: the kernels of a GPU with Triton, or torch's operations."""
        on_gpu = self.W_enc.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        if not (on_gpu and self.use_kernels):
            return encode_on_accelerator
        from saeflow.sae.gpu.encode import encode_by_kernels  # which imports triton

        return encode_by_kernels

    @torch.no_grad()
    def decode(self, sparse: SparseValues, x: Tensor | None = None) -> Tensor:
        """Return reconstructions (B, D_out) in float32. A skip connection and `input_norm` need the tokens x (B, D)."""
        entries = SparseRows(*(torch.from_numpy(array).to(self.W_dec.device) for array in sparse))
        there = decode(entries, self.W_dec) + self.b_dec
        if self.W_skip is None and self.input_norm == "none":
            return there
        assert x is not None, "this SAE reconstructs from its input, too"
        normalised, shift, length = self._normalised(to_device(x, self.W_dec.device))
        if self.W_skip is not None:
            there = there + normalised.float() @ self.W_skip.t()
        return there if length is None or shift is None else (there * length + shift).float()

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return vectors as they are read, and what was subtracted from each, and what each was then divided by."""
        if self.input_norm == "none":
            return x, None, None
        wide = x.double()
        if self.input_norm == "layer_norm":
            shift = wide.mean(dim=1, keepdim=True)
            length = (wide - shift).std(dim=1, keepdim=True)
            return ((wide - shift) / (length + 1e-5)).float(), shift, length
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp(min=1e-30) / math.sqrt(x.shape[1])
        return (wide / length).float(), torch.zeros_like(length), length

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode, as `encode_sparse` does, and decode."""
        return self.decode(self.encode_sparse(x), x)

    forward = reconstruct

    def folded(self, scale: float, target_scale: float | None = None) -> SparseAutoencoder:
        """Return the same autoencoder for activations before they were multiplied by `scale`.

        A transcoder's target was multiplied by `target_scale`. Values have the units of what is reconstructed.
        """
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
