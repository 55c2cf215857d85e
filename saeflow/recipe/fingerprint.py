"""Eight hex digits that stand for settings, and the version of what is written."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from saeflow.recipe.settings import SAEConfig, Section

FORMAT_VERSION = 2
"""Version of the bytes on disk, written into every artefact (see data/README.md)."""


def fingerprint(*facts: object) -> str:
    """Eight hex digits that stand for JSON-able facts; equal facts, equal digits, on any machine."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"cannot fingerprint {type(value).__name__}")


_SINCE_2 = {
    "skip_positions", "skip_special", "token_ids", "parse_special", "compression", "source_array",
    "target_site", "prefixes", "penalty", "penalty_weight", "tanh_scale", "bandwidth", "first_threshold", "first_share",
    "encoder_scale",
    "decay", "clip_norm", "sparsity_warmup_share", "k_start", "k_anneal_share",
    "token_topk_share",
    "l0", "zipf_exponent", "max_rate", "magnitude_floor", "magnitude_scale", "group_share", "group_chance", "noise",
    "offset",
}  # fmt: skip
"""Settings that format 1 did not have: at their defaults they leave fingerprints as they were."""


def facts_of(section: Section) -> dict[str, Any]:
    """The section's settings for a fingerprint; how much of a corpus is read does not count, nor where an SAE came
    from."""
    not_settings = {"share", "folder", "tensorboard"} | ({"source"} if isinstance(section, SAEConfig) else set())
    data = section.model_dump(mode="json", exclude=not_settings)
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(section).model_fields.items()
    }
    return {name: value for name, value in data.items() if name not in _SINCE_2 or value != defaults[name]}
