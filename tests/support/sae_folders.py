"""Folders of autoencoders as other programs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_saelens(folder: Path, architecture: str, tensors: dict[str, Tensor], /, **cfg: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    width, n = tensors["W_enc"].shape
    about = {"architecture": architecture, "d_in": width, "d_sae": n, "metadata": {"model_name": "gpt2"}}
    (folder / "cfg.json").write_text(json.dumps(about | cfg))
    return folder
