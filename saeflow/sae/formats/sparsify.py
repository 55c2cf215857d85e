"""Settings of sparsify (EleutherAI): cfg.json and sae.safetensors in a folder for each module of the model.

Tensors: encoder.weight (F, D), encoder.bias, W_dec (F, D), b_dec, W_skip (D, D).
"""

from __future__ import annotations

from saeflow.recipe.settings import Architecture
from saeflow.sae.formats.description import Files, SAEFolder, foreign_config, one_of, positive_count
from saeflow.sae.formats.tensors import shapes_of

_SPARSIFY_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}


def describe_sparsify(files: Files) -> SAEFolder:
    settings = files.settings
    cfg = {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False} | files.read_settings
    one_of(settings, cfg, "activation", ("topk",))
    architecture: Architecture = "abstopk" if one_of(settings, cfg, "signed", (False, True)) else "topk"
    transcodes = one_of(settings, cfg, "transcode", (False, True))
    held = shapes_of(files.weights).get("encoder.weight", ())  # settings may leave sizes out
    if len(held) == 2:
        cfg = {"d_in": held[1]} | cfg | {"num_latents": cfg.get("num_latents") or held[0]}
    width, n_features = (positive_count(settings, cfg, name) for name in ("d_in", "num_latents"))
    config = foreign_config(settings, architecture, n_features, cfg, [], "another site" if transcodes else None)
    return SAEFolder(
        "sparsify", config, width, width, settings, files.weights, not transcodes, metadata=cfg, names=_SPARSIFY_NAMES,
        skips=one_of(settings, cfg, "skip_connection", (False, True)), hook=settings.parent.name,
        target_hook=settings.parent.name,
    )  # fmt: skip
