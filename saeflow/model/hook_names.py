"""Names that other programs have for places in a model, and the sites that they mean.

TransformerLens calls places by their meaning, the same in every model: `blocks.6.hook_resid_post`. Others name modules,
perhaps counted from the base model: `layers.6.mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = r"(?:.+\.)?(?:h|layers|blocks|layer|block)\.{}"
_ATTENTION = r"\.(?:self_attn|attn|attention)(?:\.(?:attention|self))?"
_MLP = r"\.(?:mlp|feed_forward|ffn)"
_OF_LAYER: dict[str, tuple[str, ...]] = {
    "hook_resid_pre": (":input",),
    "hook_resid_post": ("",),
    "hook_resid_mid": (r"\.pre_feedforward_layernorm:input", r"\.(?:ln_2|post_attention_layernorm):input"),
    "hook_mlp_in": (r"\.pre_feedforward_layernorm:input", r"\.(?:ln_2|post_attention_layernorm):input"),
    "hook_mlp_out": (r"\.post_feedforward_layernorm", _MLP),
    "hook_attn_out": (_ATTENTION, r"\.post_attention_layernorm"),
    "attn.hook_z": (rf"{_ATTENTION}\.(?:o_proj|c_proj|dense|out_proj):input",),
    "mlp.hook_in": (f"{_MLP}:input",),
    "mlp.hook_pre": (rf"{_MLP}\.(?:gate_proj|c_fc|dense_h_to_4h|fc_in|fc1)",),
    "mlp.hook_post": (rf"{_MLP}\.(?:down_proj|c_proj|dense_4h_to_h|fc_out|fc2):input",),
    "ln1.hook_normalized": (r"\.(?:ln_1|input_layernorm)",),
    "ln2.hook_normalized": (r"\.pre_feedforward_layernorm", r"\.(?:ln_2|post_attention_layernorm)"),
}
"""What follows a layer's name, the likeliest first. Layers of Gemma have a norm after their MLP and attention, and
TransformerLens means its output."""
_OF_LAYER |= {"hook_z": _OF_LAYER["attn.hook_z"], "mlp.hook_out": _OF_LAYER["hook_mlp_out"]}
_OF_MODEL = {
    "hook_embed": r"(?:.+\.)?(?:wte|embed_tokens|embed_in|word_embeddings)",
    "ln_final.hook_normalized": r"(?:.+\.)?(?:ln_f|norm|final_layer_norm)",
}


def site_of_hook(hook: str | None, names: Sequence[str]) -> str | None:
    """Return the site among `names` that another program's name means; None if there is none, or if several could be
    meant."""
    if hook in names:
        return hook
    for pattern in _patterns(hook or "", names):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def is_understood(hook: str | None) -> bool:
    """True if `site_of_hook` finds the place that is meant wherever it is among the names."""
    return bool(hook) and len(_patterns(str(hook), ())) > 0


def _patterns(hook: str, names: Sequence[str]) -> list[str]:
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if layer:
        ends = _OF_LAYER.get(layer[2], ())
        after_norm = any(name.endswith(".post_feedforward_layernorm") for name in names)
        if layer[2] == "hook_attn_out" and after_norm:
            ends = ends[::-1]
        return [_LAYER.format(layer[1]) + end for end in ends]
    if hook in _OF_MODEL:
        return [_OF_MODEL[hook]]
    return [rf"(?:.+\.)?{re.escape(hook)}"] if re.search(r"(?:^|\.)(?:h|layers|layer)\.\d+", hook) else []
