"""Load the autoencoder of a folder, whatever program wrote it.

Where another program's autoencoder differs from `saeflow.sae.autoencoder`, the difference is folded into weights and
biases, in float64.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.description import AGAIN, SAEFolder
from saeflow.sae.formats.saelens import SAVED_AS
from saeflow.sae.formats.source import read_sae_folder
from saeflow.sae.formats.tensors import read_weights, require_finite, sizes

Tensors = dict[str, Tensor]
"""By SAELens' names: W_enc (D, F), W_dec (F, D_out) and so on."""


def load_sae(folder: Path, threads: int = 1) -> SparseAutoencoder:
    """Return an autoencoder, ready to encode on `threads` threads, from a folder that `read_sae_folder` understands.

    What `save_sae` wrote comes back exactly, except that a transcoder's centre is 0: it is in the biases.
    """
    return load_described(read_sae_folder(folder), threads)


def load_described(found: SAEFolder, threads: int = 1) -> SparseAutoencoder:
    """Return the autoencoder that `describe_source` found."""
    return autoencoder_of(found, required_tensors(found, read_weights(found.weights)), threads)


def autoencoder_of(found: SAEFolder, tensors: Tensors, threads: int = 1) -> SparseAutoencoder:
    """Return the autoencoder of a description and its tensors, by SAELens' names."""
    values = _folded(found, tensors)
    sae = SparseAutoencoder(found.config, found.width, found.out_width, threads)
    with torch.no_grad():
        for name, value in values.items():
            if name == "W_skip":
                sae.W_skip = value.float()
            else:
                getattr(sae, name).copy_(value)
    sae.input_norm = found.input_norm
    sae.pursuit_end = found.pursuit_end._replace(residual=found.pursuit_end.residual / found.scale.read)
    require_finite({name: getattr(sae, name) for name in values if name != "log_threshold"}, str(found.weights))
    return sae.eval()


def _folded(found: SAEFolder, tensors: Tensors) -> Tensors:
    """Return parameters and buffers of `SparseAutoencoder`, from tensors by their names in SAELens."""
    w_dec, b_dec = tensors["W_dec"], tensors["b_dec"]
    if found.config.architecture == "mp":
        b_dec = b_dec if found.takes_b_dec_off else torch.zeros_like(b_dec)
        return _unscaled(found, {"W_enc": w_dec, "W_dec": w_dec, "b_dec": b_dec})
    w_enc = tensors["W_enc"].t()
    gated = found.config.architecture == "gated"
    b_enc = tensors["b_gate" if gated else "b_enc"].double()
    out = {name: tensors[name] for name in ("r_mag", "b_mag", "threshold", "W_skip") if name in tensors}
    if found.single_threshold is not None:
        out["threshold"] = b_enc.new_full(b_enc.shape, found.single_threshold)
    if found.by_norm or found.threshold_by_norm:
        lengths = torch.linalg.vector_norm(w_dec.double(), dim=1).clamp(min=1e-8)
        if found.by_norm:
            w_enc, w_dec, b_enc = w_enc.double() * lengths[:, None], w_dec.double() / lengths[:, None], b_enc * lengths
        else:
            out["threshold"] = out["threshold"].double() / lengths
    if "scaling_factor" in tensors:
        w_dec = w_dec.double() * tensors["scaling_factor"].double()[:, None]
    if not found.takes_b_dec_off and found.config.target_site is None:
        shift = w_enc.double() @ b_dec.double()
        b_enc = b_enc + shift
        if gated:
            out["b_mag"] = out["b_mag"].double() + out["r_mag"].double().exp() * shift
    values = out | {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    return _with_thresholds(found, _unscaled(found, values))


def _unscaled(found: SAEFolder, values: Tensors) -> Tensors:
    """Return the tensors that read activations before they were multiplied by a constant."""
    scale = found.scale
    if scale.read == scale.target == 1:
        return values
    factors = {"W_dec": 1 / scale.target, "b_dec": 1 / scale.target, "W_skip": scale.read / scale.target}
    if scale.keeps_values:
        factors |= {"W_enc": scale.read}
    else:
        factors |= dict.fromkeys(("b_enc", "b_mag", "threshold"), 1 / scale.read)
        factors["W_dec"] = scale.read / scale.target
    return {name: value.double() * factors.get(name, 1.0) for name, value in values.items()}


def _with_thresholds(found: SAEFolder, values: Tensors) -> Tensors:
    """Return the tensors with thresholds as the architecture has them: of each feature, or one for all."""
    if "threshold" in values:
        # Values are never negative, so a threshold below zero, such as one that was never set, means zero.
        threshold = values["threshold"].clamp(min=0)
        if found.config.architecture == "jumprelu":
            values |= {"threshold": threshold, "log_threshold": threshold.log()}
        elif threshold.min() != threshold.max():
            raise UserError(
                f"{found.weights}: threshold has several values, but {found.settings.name} says "
                f"{found.config.architecture}, which has one for all. Set architecture to jumprelu there."
            )
        else:
            values["threshold"] = threshold.flatten()[0]
    return values


def _by_our_names(found: SAEFolder, tensors: Tensors) -> Tensors:
    named = {}
    for theirs, tensor in tensors.items():
        if theirs not in found.ignored:
            name = found.names.get(theirs, theirs)
            turned = name in found.transposed or theirs.endswith(".weight")  # nn.Linear keeps (out, in)
            named[name] = tensor.t() if turned and tensor.dim() == 2 else tensor
    if "log_threshold" in named:
        named["threshold"] = named.pop("log_threshold").exp()
    if "scaling_factor" in named and bool((named["scaling_factor"] == 1).all()):
        del named["scaling_factor"]
    n_zeros = {"b_dec": found.out_width, "b_enc": found.config.n_features}
    return {name: torch.zeros(n_zeros[name]) for name in found.zeros} | named


def required_tensors(found: SAEFolder, tensors: Tensors) -> Tensors:
    """Return exactly the tensors of the architecture in float32. Raises UserError for a wrong shape or number."""
    tensors, n, config = _by_our_names(found, tensors), found.config.n_features, found.config
    vectors = ["b_gate", "r_mag", "b_mag"] if config.architecture == "gated" else ["b_enc"]
    if SAVED_AS[config.architecture] == "jumprelu" and found.single_threshold is None:
        vectors += ["threshold"]
    wanted = {"W_enc": (found.width, n), "W_dec": (n, found.out_width), "b_dec": (found.out_width,)}
    if config.architecture == "mp":
        vectors = []
        del wanted["W_enc"]
    wanted |= {"W_skip": (found.out_width, found.width)} if found.skips else {}
    wanted |= dict.fromkeys([*vectors, *(found.optional & tensors.keys())], (n,))
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(
            f"{found.weights} lacks {', '.join(missing)}, which {config.architecture} needs; it holds "
            f"{', '.join(sorted(tensors))}. {AGAIN}"
        )
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise UserError(
            f"{found.weights} holds {', '.join(unknown)}, which {config.architecture} has not. Without them it would "
            f"be another autoencoder. Check what {found.settings.name} says of its architecture."
        )
    return {name: _fitting(found, name, tensors[name], shape) for name, shape in wanted.items()}


def _fitting(found: SAEFolder, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor in float32, after comparing its shape and numbers with what is wanted."""
    if name == "threshold" and tensor.numel() == 1:
        tensor = tensor.flatten().expand(shape)
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{found.weights}: {name} is {sizes(tuple(tensor.shape))}, but {found.settings.name} says {sizes(shape)}. "
            f"{AGAIN}"
        )
    out = tensor.float()
    if not tensor.is_floating_point() or not out.isfinite().all():
        what = "NaN or infinite values" if tensor.is_floating_point() else f"{tensor.dtype}, not real numbers"
        raise UserError(f"{found.weights}: {name} holds {what}. {AGAIN}")
    return out
