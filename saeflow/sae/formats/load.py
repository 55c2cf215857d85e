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
from saeflow.sae.formats.save import require_finite
from saeflow.sae.formats.source import read_sae_folder
from saeflow.sae.formats.tensors import read_safetensors, read_torch


def load_sae(folder: Path, threads: int = 1) -> SparseAutoencoder:
    """Return an autoencoder, ready to encode on `threads` threads, from a folder that `read_sae_folder` understands.

    What `save` wrote comes back exactly, except that a transcoder's centre is 0: it is in the biases.
    """
    found = read_sae_folder(folder)
    read = read_torch if found.writer == "dictionary_learning" else read_safetensors
    tensors = _required_tensors(found, read(found))
    values = _folded(found, tensors)
    sae = SparseAutoencoder(found.config, found.width, found.out_width, threads)
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(value)
    require_finite({name: getattr(sae, name) for name in values if name != "log_threshold"}, str(found.weights))
    return sae.eval()


def _folded(found: SAEFolder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters and buffers of `SparseAutoencoder`, from tensors by their names in SAELens."""
    w_enc, w_dec, b_dec = tensors["W_enc"].t(), tensors["W_dec"], tensors["b_dec"]
    gated = found.config.architecture == "gated"
    b_enc = tensors["b_gate" if gated else "b_enc"].double()
    out = {}
    if found.by_norm:
        lengths = torch.linalg.vector_norm(w_dec.double(), dim=1).clamp(min=1e-8)
        w_enc, w_dec, b_enc = w_enc.double() * lengths[:, None], w_dec.double() / lengths[:, None], b_enc * lengths
    if gated:
        out = {"r_mag": tensors["r_mag"], "b_mag": tensors["b_mag"].double()}
    if not found.takes_b_dec_off and found.config.target_site is None:
        shift = w_enc.double() @ b_dec.double()
        b_enc = b_enc + shift
        if gated:
            out["b_mag"] = out["b_mag"] + out["r_mag"].double().exp() * shift
    if "threshold" in tensors:
        # Values are never negative, so a threshold below zero, such as one that was never set, means zero.
        threshold = tensors["threshold"].clamp(min=0)
        if found.config.architecture == "jumprelu":
            out |= {"threshold": threshold, "log_threshold": threshold.log()}
        elif threshold.min() != threshold.max():
            raise UserError(
                f"{found.weights}: threshold has several values, but {found.settings.name} says "
                f"{found.config.architecture}, which has one for all. Set architecture to jumprelu there."
            )
        else:
            out["threshold"] = threshold.flatten()[0]
    return out | {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}


def _required_tensors(found: SAEFolder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return exactly the tensors of the architecture in float32. Raises UserError for a wrong shape or number."""
    n, config = found.config.n_features, found.config
    vectors = ["b_gate", "r_mag", "b_mag"] if config.architecture == "gated" else ["b_enc"]
    vectors += ["threshold"] if SAVED_AS[config.architecture] == "jumprelu" else []
    wanted = {"W_enc": (found.width, n), "W_dec": (n, found.out_width), "b_dec": (found.out_width,)}
    wanted |= dict.fromkeys(vectors, (n,))
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
    out = {}
    for name, shape in wanted.items():
        tensor = tensors[name]
        if name == "threshold" and tensor.numel() == 1:
            tensor = tensor.flatten().expand(n)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{found.weights}: {name} is {_sizes(tensor.shape)}, but {found.settings.name} says {_sizes(shape)}. "
                f"{AGAIN}"
            )
        out[name] = tensor.float()
        if not tensor.is_floating_point() or not out[name].isfinite().all():
            what = "NaN or infinite values" if tensor.is_floating_point() else f"{tensor.dtype}, not real numbers"
            raise UserError(f"{found.weights}: {name} holds {what}. {AGAIN}")
    return out


def _sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "one number"
