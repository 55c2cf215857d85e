"""Gemma Scope 1 (params.npz) and 2 (config.json and params.safetensors): JumpReLU, some of them transcoders.

W_enc (D, F), W_dec (F, D), b_enc, b_dec and threshold, in version 2 in lower case, and for some transcoders
affine_skip_connection (D, D_out). The decoder bias is not subtracted from what is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import Files, SAEFolder, foreign_config, one_of, text_or_none
from saeflow.sae.formats.tensors import shapes_in_words, shapes_of

_GEMMA_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
_GEMMA_HOOKS = {
    "res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoder": "ln2.hook_normalized"
}  # fmt: skip


def describe_gemma_scope(files: Files) -> SAEFolder:
    layer, kind = _layer(files.weights), _kind(files.weights)
    hook = f"blocks.{layer}.{_GEMMA_HOOKS[kind]}" if layer is not None and kind else None
    target = f"blocks.{layer}.hook_mlp_out" if kind == "transcoder" else None
    said = {"l0": int(match[1])} if (match := re.search(r"l0_(\d+)", files.weights.parent.name)) else {}
    return _jumprelu("Gemma Scope", files, said, hook, target, target is not None)


def describe_gemma_scope_2(files: Files) -> SAEFolder:
    cfg = files.read_settings
    one_of(files.settings, cfg, "architecture", ("jump_relu",))
    hook, target = (_module(text_or_none(cfg.get(f"hf_hook_point_{end}"))) for end in ("in", "out"))
    return _jumprelu("Gemma Scope 2", files, cfg, hook, target if target != hook else None, True)


def _jumprelu(
    writer: str, files: Files, cfg: dict[str, Any], hook: str | None, target: str | None, says_target: bool
) -> SAEFolder:
    shapes = {_GEMMA_NAMES.get(name, name): shape for name, shape in shapes_of(files.weights).items()}
    w_enc, w_dec = (shapes.get(name, ()) for name in ("W_enc", "W_dec"))
    if len(w_enc) != 2 or len(w_dec) != 2 or min(*w_enc, *w_dec) < 1:
        raise UserError(
            f"{files.weights}: saeflow reads matrices W_enc and W_dec of one site; it holds {shapes_in_words(shapes)}."
        )
    target_site = (target or "another site") if target or "W_skip" in shapes else None
    if not says_target:
        target_site = files.asked.target_site
    config = foreign_config(files.settings, "jumprelu", w_enc[1], {}, [], target_site)
    return SAEFolder(
        writer, config, w_enc[0], w_dec[1], files.settings, files.weights, False, metadata=cfg, names=_GEMMA_NAMES,
        transposed=frozenset({"W_skip"}), skips="W_skip" in shapes, hook=hook, target_hook=target,
        says_target=says_target,
    )  # fmt: skip


def _layer(path: Path) -> int | None:
    found = [int(match[1]) for part in path.parts if (match := re.fullmatch(r"layer_(\d+)", part))]
    return found[-1] if found else None


def _kind(path: Path) -> str | None:
    """Return the kind that the nearest folder above names, as gemma-scope-2b-pt-res does."""
    names = rf"(?:^|[-_])({'|'.join(_GEMMA_HOOKS)})s?(?:$|[-_])"
    return next((match[1] for part in path.parts[-2::-1] if (match := re.search(names, part))), None)


def _module(hook: str | None) -> str | None:
    """Return `model.layers.3` for `model.layers.3.output`, and `…o_proj:input` for `…o_proj.input`."""
    return hook and re.sub(r"\.input$", ":input", hook.removesuffix(".output"))
