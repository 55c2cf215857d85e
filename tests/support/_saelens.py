"""SAELens' side of test_saelens.py: a JSON object in, folders and values out.

Runs with the interpreter of `make peers` and imports nothing of ours. `x`: a .npy of rows (n, D). `folders`: for each
folder null, where an SAE of ours lies that is to be loaded, or what SAE of random weights SAELens shall make and save
there. Beside each SAE `values.npz` is written, or `refused.txt` where SAELens does not load it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import saes


def of_random_weights(kind: dict[str, Any]) -> Any:
    """Thresholds and decoder rows of all sizes."""
    sae = getattr(saes, kind["class"])(getattr(saes, kind["class"] + "Config")(**kind["settings"]))
    dice = torch.Generator().manual_seed(kind["seed"])
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=dice) / 3)
            if name == "threshold":
                parameter.abs_().add_(0.5)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(4.0)
    return sae


def saved(folder: Path, kind: dict[str, Any]) -> Any:
    """One of training is saved as it is, and in the folder `inference` as SAELens would publish it; returns the
    latter."""
    sae = of_random_weights(kind)
    sae.save_model(folder)
    if "Training" not in kind["class"]:
        return sae
    sae.save_inference_model(folder / "inference")
    return saes.SAE.load_from_disk(folder / "inference")


def main() -> None:
    about = json.load(sys.stdin)
    x = torch.from_numpy(np.load(about["x"]))
    for name, kind in about["folders"].items():
        folder = Path(name)
        try:
            sae = saes.SAE.load_from_disk(folder) if kind is None else saved(folder, kind)
        except KeyError as error:
            (folder / "refused.txt").write_text(str(error), "utf-8")
            continue
        with torch.no_grad():
            values = sae.encode(x)
            again = sae(x) if hasattr(sae, "W_skip") else sae.decode(values)
            np.savez(folder / "values.npz", values=values.numpy(), reconstruction=again.numpy())


if __name__ == "__main__":
    main()
