"""The other side of test_other_peers.py: a JSON object in, folders and values out, by sparsify or dictionary_learning.

Runs with the interpreter of `make peers` and imports nothing of ours. `x`: a .npy of rows (n, D).
`dictionary_learning`: the folder that holds the package. `folders`: for each folder the class of the autoencoder, its
arguments and a seed of its weights. Beside each one `values.npz` is written.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


def dictionaries(folder: str) -> dict[str, Any]:
    """Classes of dictionary_learning by name. Its package imports much that is not needed here, so it is left out."""
    package = types.ModuleType("dictionary_learning")
    package.__path__ = [str(Path(folder) / "dictionary_learning")]
    sys.modules["dictionary_learning"] = package
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    modules = (dictionary, batch_top_k, matryoshka_batch_top_k, top_k)
    return {name: found for module in modules for name, found in vars(module).items() if inspect.isclass(found)}


def draw(module: torch.nn.Module, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=dice) / 3)
            if name == "threshold":
                parameter.abs_().add_(0.5)
        for name, buffer in module.named_buffers():
            if name == "threshold":
                buffer.fill_(3.0)


def of_dictionary_learning(folder: Path, kind: dict[str, Any], classes: dict[str, Any], x: torch.Tensor) -> None:
    made = classes[kind["class"]](**kind["settings"])
    draw(made, kind["seed"])
    torch.save(made.state_dict(), folder / "ae.pt")
    trainer = kind["settings"] | {"dict_class": kind["class"], "lm_name": "gpt2", "layer": 0}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    values = made.encode(x)
    np.savez(folder / "values.npz", values=values.numpy(), reconstruction=made.decode(values).numpy())


def of_sparsify(folder: Path, kind: dict[str, Any], x: torch.Tensor) -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    made = SparseCoder(x.shape[1], SparseCoderConfig(**kind["settings"]))
    draw(made, kind["seed"])
    made.save_to_disk(folder)
    top, indices, pre = made.encode(x)
    values = torch.zeros_like(pre).scatter_(1, indices, top)
    np.savez(folder / "values.npz", values=values.numpy(), reconstruction=made(x).sae_out.numpy())


def main() -> None:
    about = json.load(sys.stdin)
    x, classes = torch.from_numpy(np.load(about["x"])), dictionaries(about["dictionary_learning"])
    for name, kind in about["folders"].items():
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            if kind["class"] == "SparseCoder":
                of_sparsify(folder, kind, x)
            else:
                of_dictionary_learning(folder, kind, classes, x)


if __name__ == "__main__":
    main()
