"""Write an autoencoder as a folder that SAELens 6 reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saeflow.recipe.settings import PER_TOKEN
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.names import CFG, WEIGHTS
from saeflow.sae.formats.saelens import SAVED_AS, saelens_name
from saeflow.sae.formats.tensors import require_finite


def save_sae(sae: SparseAutoencoder, folder: Path, metadata: dict[str, Any]) -> None:
    """Write cfg.json and sae_weights.safetensors as SAELens 6 reads them; equal contents give equal bytes.

    A batchtopk or matryoshka autoencoder becomes a `jumprelu` one with the running threshold for every feature. A
    transcoder's input bias is folded into its encoder biases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _saelens_tensors(sae).items()}
    require_finite(tensors, f"The SAE in {folder}")
    write_tensors(folder / WEIGHTS, tensors)
    cfg = _saelens_cfg(sae, metadata)
    (folder / CFG).write_text(json.dumps(cfg, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whose mode follows the umask: the library's own can be read by their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def _saelens_tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    architecture, b_enc = sae.config.architecture, sae.b_enc.detach()
    tensors = {"W_enc": sae.W_enc.t(), "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.traits.pursues:
        del tensors["W_enc"]
        return tensors
    tensors |= {} if sae.W_skip is None else {"W_skip": sae.W_skip}
    shift = torch.zeros_like(b_enc).double()
    if sae.config.target_site is not None:
        shift = sae.W_enc.detach().double() @ sae.centre.double()
    b_enc = (b_enc.double() - shift).float()
    if architecture == "gated":
        b_mag = sae.b_mag.detach().double() - sae.r_mag.detach().double().exp() * shift
        return tensors | {"b_gate": b_enc, "r_mag": sae.r_mag, "b_mag": b_mag.float()}
    tensors["b_enc"] = b_enc
    if SAVED_AS[architecture] == "jumprelu":
        tensors["threshold"] = sae.threshold.expand(sae.config.n_features)
    return tensors


def _saelens_cfg(sae: SparseAutoencoder, metadata: dict[str, Any]) -> dict[str, Any]:
    config = sae.config
    cfg: dict[str, Any] = {
        "architecture": saelens_name(config, sae.W_skip is not None),
        "d_in": sae.W_enc.shape[1],
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.target_site is None,
        "normalize_activations": sae.input_norm,
        "reshape_activations": "none",
        "metadata": {**metadata, "saeflow": config.model_dump(mode="json", exclude={"input_scale", "whiten"})},
    }
    if config.target_site is not None:
        cfg["d_out"] = sae.W_dec.shape[1]
    if sae.traits.pursues:
        end = sae.pursuit_end
        cfg |= {
            "max_iterations": config.k, "residual_threshold": end.residual, "stop_on_duplicate_support": end.repeats
        }  # fmt: skip
    elif config.architecture in PER_TOKEN:
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg
