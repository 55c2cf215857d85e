"""Single files without settings, or with a few: Qwen-Scope, circuit-tracer and others.

Qwen-Scope, layer{n}.sae.pt: W_enc (F, D), W_dec (D, F), b_enc, b_dec; the k of TopK is in the name of its repository.
Others of torch (Goodfire, DeepSeek-R1 by qresearch): encoder.weight or encoder_linear.weight (F, D) and so on, with a
ReLU. The decoder bias is not subtracted from what is read. Attention SAEs of Kissane and Krzyzanowski: W_enc (D, F),
W_dec (F, D) and a file {name}_cfg.json beside. Transcoders of circuit-tracer, layer_{n}.safetensors: W_enc and W_dec
(F, D), b_enc, b_dec, perhaps W_skip (D, D).
"""

from __future__ import annotations

import re
from pathlib import Path

from saeflow.recipe.settings import Architecture
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import (
    Files,
    SAEFolder,
    foreign_config,
    json_of,
    positive_count,
    text_or_none,
)
from saeflow.sae.formats.tensors import Shapes, shapes_in_words, shapes_of

_LINEAR_NAMES = {
    f"{part}{kind}.{what}": f"{letter}_{part[:3]}"
    for part in ("encoder", "decoder") for kind in ("", "_linear") for what, letter in (("weight", "W"), ("bias", "b"))
}  # fmt: skip


def describe_torch_file(files: Files) -> SAEFolder:
    path, shapes = files.weights, shapes_of(files.weights)
    beside = path.with_name(f"{path.stem}_cfg.json")
    if beside.is_file():
        return _with_settings(path, beside)
    named = {_LINEAR_NAMES.get(name, name): shape for name, shape in shapes.items()}
    n_features, width = _sizes(path, named, turned=True)
    is_qwen = "W_enc" in shapes
    config = foreign_config(
        path, "topk" if is_qwen else "relu", n_features, {"k": _k(path, files) if is_qwen else None}, [],
        files.asked.target_site,
    )  # fmt: skip
    return SAEFolder(
        "Qwen-Scope" if is_qwen else "torch file", config, width, width, path, path, False, names=_LINEAR_NAMES,
        transposed=frozenset({"W_enc", "W_dec"} if is_qwen else ()), hook=_hook_of_file(path), says_target=False,
    )  # fmt: skip


def describe_circuit_tracer(files: Files) -> SAEFolder:
    path, shapes = files.weights, shapes_of(files.weights)
    n_features, width = _sizes(path, shapes, turned=False)
    layer = path.stem.rpartition("_")[2]
    hook, target = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
    architecture: Architecture = "jumprelu" if "threshold" in shapes else "relu"
    config = foreign_config(path, architecture, n_features, {}, [], target)
    return SAEFolder(
        "circuit-tracer", config, width, width, path, path, False, transposed=frozenset({"W_enc"}),
        skips="W_skip" in shapes, hook=hook, target_hook=target,
    )  # fmt: skip


def _with_settings(path: Path, settings: Path) -> SAEFolder:
    cfg = json_of(settings)
    width, n_features = positive_count(settings, cfg, "act_size"), positive_count(settings, cfg, "dict_size")
    config = foreign_config(settings, "relu", n_features, cfg, [], None)
    hook = text_or_none(cfg.get("act_name"))
    return SAEFolder("torch file", config, width, width, settings, path, metadata=cfg, hook=hook)


def _sizes(path: Path, shapes: Shapes, turned: bool) -> tuple[int, int]:
    """Return features and width. `turned`: the decoder is kept as (D, F). Files of torch do not say which is which, so
    there have to be at least as many features as numbers."""
    w_enc, w_dec = shapes.get("W_enc", ()), shapes.get("W_dec", ())
    if len(w_enc) != 2 or w_dec != (w_enc[::-1] if turned else w_enc) or not 1 <= w_enc[1] <= w_enc[0]:
        decoder = "width × features" if turned else "features × width"
        raise UserError(
            f"{path}: saeflow reads W_enc (features × width) and W_dec ({decoder}), or encoder.weight and "
            f"decoder.weight; it holds {shapes_in_words(shapes)}."
        )
    return w_enc[0], w_enc[1]


def _k(path: Path, files: Files) -> int:
    found = [int(match[1]) for part in path.parts if (match := re.search(r"(?:^|[-_])L0_(\d+)", part))]
    if not found and "k" not in files.asked.model_fields_set:
        raise UserError(
            f"{path} does not say how many features a token keeps, and no folder above it is named …L0_50.\n"
            "Set sae.k: the number after L0_ in the name of its repository."
        )
    return found[-1] if found else files.asked.k


def _hook_of_file(path: Path) -> str | None:
    layer = re.search(r"(?:layer[-_]?|[-_]l)(\d+)(?=\D|$)", path.stem)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else None
