"""The facts behind each fingerprint: which settings make two artefacts the same. No store is read here."""

from __future__ import annotations

from typing import Any

from saeflow.activations.tables.source import source_checksum
from saeflow.model.load import model_fingerprint
from saeflow.recipe.fingerprint import fingerprint, settings_that_count
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import ModelConfig
from saeflow.sae import formats
from saeflow.store.files import checksum_once
from saeflow.store.records import Generation

_NO_SETTINGS = {"checkpoint_seconds", "device"}
"""Of `[train]`, what changes nothing in the SAE."""

_DATA_SEEN = ("generation", "hidden", "n_train_tokens")
"""Facts of a trained SAE that say which data it has seen; the others are settings."""


def token_facts(recipe: Recipe) -> dict[str, Any]:
    """Of tokens: corpus settings, tokenizer and packing. How much corpus there is does not count."""
    if recipe.model is None:
        return table_facts(recipe)
    assert recipe.corpus is not None
    return {
        "corpus": settings_that_count(recipe.corpus),
        "tokenizer": model_fingerprint(ModelConfig(path=recipe.model.path, revision=recipe.model.revision)),
        **settings_that_count(recipe.tokens),
    }


def table_facts(recipe: Recipe) -> dict[str, Any]:
    """Of activations that no model makes: the bytes of the table, or the settings by which it is made."""
    about = recipe.activations
    made = settings_that_count(about.synthetic) if about.synthetic else None
    if made and about.synthetic and about.synthetic.grows:
        del made["n_samples"]
    share = recipe.corpus.held_out if recipe.corpus else 0.0
    return {
        "source": about.source,
        "content": source_checksum(about.source) if about.source else None,
        "synthetic": made,
        "part_rows": about.part_rows,
        "held_out": share,
        **({"source_array": about.source_array} if about.source_array else {}),
    }


def activation_facts(recipe: Recipe, tokens_fp: str) -> dict[str, Any]:
    """Of activations: their tokens, the model or table they come from, the sites, and how they are stored."""
    about = recipe.activations
    source = table_facts(recipe) if recipe.model is None else {"model": model_fingerprint(recipe.model)}
    return {
        "tokens": tokens_fp,
        **source,
        "sites": about.sites,
        "dtype": about.dtype,
        "forward_batch": about.forward_batch,
        "layout": [about.chunk_bytes, about.shard_bytes],
        **({"compression": about.compression} if about.compression != "none" else {}),
    }


def training_facts(recipe: Recipe, activations_fp: str) -> dict[str, Any]:
    """Of a trained SAE: its settings and those of its training, but not yet which data it has seen."""
    return {
        "activations": activations_fp,
        "sae": settings_that_count(recipe.sae),
        "train": {name: value for name, value in settings_that_count(recipe.train).items() if name not in _NO_SETTINGS},
        "feed": settings_that_count(recipe.feed),
        "threads": recipe.threads,
    }


def without_data_seen(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a trained SAE as `training_facts` gives them."""
    return {name: value for name, value in facts.items() if name not in _DATA_SEEN}


def hidden_fact(generation: Generation) -> dict[str, str]:
    """Which documents are hidden in a generation of the tokens; nothing where none is."""
    return {"hidden": fingerprint(generation.hidden_ids)} if generation.hidden_ids else {}


def import_facts(recipe: Recipe, activations_fp: str) -> dict[str, Any]:
    """Of an imported SAE: the bytes of its two files, and the activations it is used on."""
    found = formats.describe_source(recipe.sae)
    files = {"settings": found.settings, "weights": found.weights}
    return {
        "activations": activations_fp,
        "sae": settings_that_count(formats.effective_config(recipe.sae)),
        "imported": {name: checksum_once(path) for name, path in files.items()},
    }
