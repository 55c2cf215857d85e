"""Fingerprints: eight hex digits that stand for settings; and the version of the disk format."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from saeflow.recipe.section import Section
from saeflow.recipe.settings import SAEConfig

FORMAT_VERSION = 3
"""Version of the disk format, written into every artefact (see data/README.md)."""


def fingerprint(*facts: object) -> str:
    """Return eight hex digits that stand for JSON-able facts. Equal facts give equal digits on any machine."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_as_json)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _as_json(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"cannot fingerprint {type(value).__name__}")


_ADDED_IN_FORMAT_2 = {
    "skip_positions", "skip_special", "skip_norms_above", "token_ids", "parse_special", "compression", "source_array",
    "requests", "request_layers", "messages", "roles",
    "target_site", "prefixes", "penalty", "penalty_weight", "tanh_scale", "bandwidth", "first_threshold", "first_share",
    "encoder_scale", "input_scale", "whiten",
    "decay", "clip_norm", "sparsity_warmup_share", "k_start", "k_anneal_share",
    "token_topk_share", "moments", "weights",
    "l0", "zipf_exponent", "max_rate", "magnitude_floor", "magnitude_scale", "group_share", "group_chance", "noise",
    "offset",
}  # fmt: skip
"""Settings that format 1 did not have. At their defaults they are left out, so that its fingerprints still hold."""


def settings_that_count(section: Section) -> dict[str, Any]:
    """Return the section's settings for a fingerprint.

    The share of a corpus that is read does not count, nor the folder that an SAE came from.
    """
    not_counted = {"share", "folder", "tensorboard", "chat_template"} | (
        {"source"} if isinstance(section, SAEConfig) else set()
    )
    data = section.model_dump(mode="json", exclude=not_counted)
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(section).model_fields.items()
    }
    return {name: value for name, value in data.items() if name not in _ADDED_IN_FORMAT_2 or value != defaults[name]}
