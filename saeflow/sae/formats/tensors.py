"""Read tensors from files of other programs, and nothing but tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saeflow.runtime.errors import UserError, first_line
from saeflow.sae.formats.description import AGAIN, SAEFolder

_NAMES = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec",
    "decoder_bias": "b_dec", "decoder.bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
"""Names of dictionary_learning's tensors, and SAELens' names for them. `nn.Linear` keeps its matrices transposed."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises SafetensorError if it is damaged, OSError if it is refused."""
    path.open("rb").close()  # the library itself calls every refusal of the system a missing file
    return load_file(path)


def read_safetensors(found: SAEFolder) -> dict[str, Tensor]:
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


def read_torch(found: SAEFolder) -> dict[str, Tensor]:
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
