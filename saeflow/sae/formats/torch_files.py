"""Single files of torch without settings: Qwen-Scope's layer{n}.sae.pt, and others with the names of `nn.Linear`.

Qwen-Scope: W_enc (F, D), W_dec (D, F), b_enc, b_dec; the k of TopK is in the name of its repository. Others
(Goodfire, DeepSeek-R1 by qresearch): encoder.weight or encoder_linear.weight (F, D) and so on, with a ReLU. The decoder
bias is not subtracted from what is read.
"""

from __future__ import annotations

import re
from pathlib import Path

from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import Files, SAEFolder, foreign_config
from saeflow.sae.formats.tensors import in_words, shapes_of

_NAMES = {
    f"{part}{kind}.{what}": f"{letter}_{part[:3]}"
    for part in ("encoder", "decoder") for kind in ("", "_linear") for what, letter in (("weight", "W"), ("bias", "b"))
}  # fmt: skip


def describe_torch_file(files: Files) -> SAEFolder:
    path, shapes = files.weights, shapes_of(files.weights)
    named = {_NAMES.get(name, name): shape for name, shape in shapes.items()}
    w_enc, w_dec = named.get("W_enc", ()), named.get("W_dec", ())
    if len(w_enc) != 2 or w_dec != w_enc[::-1] or min(w_enc) < 1:
        raise UserError(
            f"{path}: saeflow reads W_enc (features × width) and W_dec (width × features), or encoder.weight and "
            f"decoder.weight; it holds {in_words(shapes)}."
        )
    is_qwen, (n_features, width) = "W_enc" in shapes, w_enc
    config = foreign_config(
        path, "topk" if is_qwen else "relu", n_features, {"k": _k(path, files) if is_qwen else None}, [],
        files.asked.target_site,
    )  # fmt: skip
    return SAEFolder(
        "Qwen-Scope" if is_qwen else "torch file", config, width, width, path, path, False, names=_NAMES,
        transposed=frozenset({"W_enc", "W_dec"} if is_qwen else ()), hook=_hook(path), says_target=False,
    )  # fmt: skip


def _k(path: Path, files: Files) -> int:
    found = [int(match[1]) for part in path.parts if (match := re.search(r"(?:^|[-_])L0_(\d+)", part))]
    if not found and "k" not in files.asked.model_fields_set:
        raise UserError(
            f"{path} does not say how many features a token keeps, and no folder above it is named …L0_50.\n"
            "Set sae.k: the number after L0_ in the name of its repository."
        )
    return found[-1] if found else files.asked.k


def _hook(path: Path) -> str | None:
    layer = re.search(r"(?:layer[-_]?|[-_]l)(\d+)(?=\D|$)", path.stem)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else None
