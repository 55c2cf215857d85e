"""Autoencoders as folders: `save` writes what SAELens 6 reads, `load` reads what any of the known programs wrote.

Where another program's autoencoder differs from `saeflow.sae.autoencoder`, the difference is folded into weights and
biases, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.runtime.errors import UserError, first_line
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats import AGAIN, CFG, SAVED_AS, WEIGHTS, SAEFolder, read_sae_folder, saelens_name

_NAMES = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec",
    "decoder_bias": "b_dec", "decoder.bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
"""Names of dictionary_learning's tensors, and SAELens' names for them. `nn.Linear` keeps its matrices transposed."""


def save(sae: SparseAutoencoder, folder: Path, metadata: dict[str, Any]) -> None:
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


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if a weight is NaN or infinite: nothing could be encoded with it."""
    for name, tensor in tensors.items():
        n_bad = tensor.numel() - int(tensor.isfinite().sum())
        if n_bad:
            raise UserError(
                f"{what}: {n_bad:,} of {tensor.numel():,} values of {name} are NaN or infinite in float32: nothing "
                "is published.\nThe weights or the activations are too large: bring the activations to a smaller scale."
            )


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whose mode follows the umask: the library's own can be read by their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises SafetensorError if it is damaged, OSError if it is refused."""
    path.open("rb").close()  # the library itself calls every refusal of the system a missing file
    return load_file(path)


def load(folder: Path, threads: int = 1) -> SparseAutoencoder:
    """Return an autoencoder, ready to encode on `threads` threads, from a folder that `read_sae_folder` understands.

    What `save` wrote comes back exactly, except that a transcoder's centre is 0: it is in the biases.
    """
    found = read_sae_folder(folder)
    read = _read_torch if found.writer == "dictionary_learning" else _read_safetensors
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


def _saelens_tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    architecture, b_enc = sae.config.architecture, sae.b_enc.detach()
    tensors = {"W_enc": sae.W_enc.t(), "W_dec": sae.W_dec, "b_dec": sae.b_dec}
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
        "architecture": saelens_name(config),
        "d_in": sae.W_enc.shape[1],
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.target_site is None,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**metadata, "saeflow": config.model_dump(mode="json")},
    }
    if config.target_site is not None:
        cfg["d_out"] = sae.W_dec.shape[1]
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _read_safetensors(found: SAEFolder) -> dict[str, Tensor]:
    try:
        tensors = read_tensors(found.weights)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{found.weights} is damaged ({error}). {AGAIN}") from None
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    tensors.pop("scaling_factor", None)  # used only with finetuning_scaling_factor, which is refused
    return tensors


def _read_torch(found: SAEFolder) -> dict[str, Tensor]:
    """Read tensors from a file of torch, which is a pickle and may hold any code.

    With `weights_only`, torch (2.6 and later) reads it by its own unpickler, which makes tensors and plain containers
    and runs nothing.
    """
    try:
        state = torch.load(found.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged file, or for one with code, is not documented
        raise UserError(
            f"{found.weights} cannot be read as tensors alone ({first_line(error)}); whatever "
            f"else it holds is never run. {AGAIN}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{found.weights} is no table of tensors (a state_dict). {AGAIN}")
    dropped = {"k", "group_sizes"} | ({"threshold"} if found.config.architecture == "topk" else set())
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in dropped:
            transposed = name in ("encoder.weight", "decoder.weight") and value.dim() == 2
            tensors[_NAMES.get(str(name), str(name))] = value.t() if transposed else value
    return tensors


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
