"""Facts: what a fingerprint is made of. Equal facts mean equal contents, so an artefact is made once."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from typing import Any

from saeflow.activations.tables.source import source_checksum
from saeflow.corpus.token_parts import special_tokens
from saeflow.corpus.tokenise.templates import ChatTemplate
from saeflow.model.load import load_tokenizer, model_fingerprint
from saeflow.recipe.data_settings import ActivationsConfig, ModelConfig
from saeflow.recipe.fingerprint import FORMAT_VERSION, fingerprint, settings_that_count
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.sae.formats.source import describe_source
from saeflow.store.files import checksum_once
from saeflow.store.records import Generation, read_or_empty, write_checked
from saeflow.store.user_cache import ForeignCache, cache_folder, trusted_folder

_NO_SETTINGS = {"checkpoint_seconds", "device", "kernels", "parallel"}
"""Settings of `[train]` that change nothing in the SAE."""

DATA_SEEN = ("generation", "hidden", "n_train_tokens")
"""Facts of a trained SAE that say which data it has seen. The others are settings."""


def facts_of_tokens(recipe: Recipe) -> dict[str, Any]:
    """Return corpus settings, tokenizer and packing. The size of the corpus does not count."""
    if recipe.model is None:
        return table_facts(recipe)
    assert recipe.corpus is not None
    tokenizer = ModelConfig(path=recipe.model.path, revision=recipe.model.revision)
    own = recipe.tokens.prepend_bos is None and not (recipe.corpus.tokenised or recipe.corpus.messages)
    return {
        "corpus": settings_that_count(recipe.corpus),
        "tokenizer": model_fingerprint(tokenizer),
        **settings_that_count(recipe.tokens),
        **(_special_tokens_fact(tokenizer) if own else {}),
        **(_template_fact(recipe, tokenizer) if recipe.corpus.messages else {}),
    }


def facts_of_activations(recipe: Recipe, tokens_fp: str) -> dict[str, Any]:
    """Return the tokens, the model or table, the sites, and how activations are stored."""
    about = recipe.activations
    source = table_facts(recipe) if recipe.model is None else {"model": model_fingerprint(recipe.model)}
    return {
        "tokens": tokens_fp,
        **source,
        "sites": about.sites,
        "dtype": about.dtype,
        "forward_batch": about.forward_batch,
        **({"request_layers": about.request_layers} if about.request_layers else {}),
        **(_how_stored(about) if about.keep else {"keep": False}),
    }


def facts_of_training(recipe: Recipe, train: TrainConfig, activations_fp: str) -> dict[str, Any]:
    """Return the settings of a training, with `train` in place of the recipe's."""
    return {
        "activations": activations_fp,
        "sae": settings_that_count(recipe.sae),
        "train": {name: value for name, value in settings_that_count(train).items() if name not in _NO_SETTINGS},
        "feed": settings_that_count(recipe.feed),
        "threads": recipe.threads,
    }


def facts_of_import(source: SAEConfig, config: SAEConfig, activations_fp: str) -> dict[str, Any]:
    """Return the files of the SAE that `sae.source` names, and its settings."""
    found = describe_source(source)
    files = {"settings": found.settings, "weights": found.weights}
    imported = {name: checksum_once(path) for name, path in files.items()}
    return {"activations": activations_fp, "sae": settings_that_count(config), "imported": imported}


def table_facts(recipe: Recipe) -> dict[str, Any]:
    """Return facts of activations that no model makes: the bytes of the table, or the settings that make it."""
    about, corpus = recipe.activations, recipe.corpus
    made = settings_that_count(about.synthetic) if about.synthetic else None
    if made and about.synthetic and about.synthetic.grows:
        del made["n_samples"]
    return {
        "source": about.source,
        "content": source_checksum(about.source) if about.source else None,
        "synthetic": made,
        "part_rows": about.part_rows,
        "held_out": corpus.held_out if corpus else 0.0,
        **({"seed": corpus.seed} if corpus and corpus.held_out and corpus.seed else {}),
        **({"source_array": about.source_array} if about.source_array else {}),
    }


def _how_stored(about: ActivationsConfig) -> dict[str, Any]:
    compressed = {"compression": about.compression} if about.compression != "none" else {}
    return {"layout": [about.chunk_bytes, about.shard_bytes]} | compressed


def _template_fact(recipe: Recipe, model: ModelConfig) -> dict[str, str]:
    """Return a digest of the chat template, which may lie in a file that is none of the model's."""
    template = ChatTemplate(load_tokenizer(model), recipe.tokens.chat_template)
    return {"chat_template": fingerprint(template.given or template.tokenizer.chat_template)}


def _special_tokens_fact(model: ModelConfig) -> dict[str, Any]:
    """Return the special tokens that its tokenizer puts around texts; nothing if BOS at most, as in earlier versions.

    The user's cache keeps the answer, as some tokenizers take ten seconds to load.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, RuntimeError, ForeignCache):  # there may be no cache
        about = fingerprint(model_fingerprint(model), version("transformers"))
        path = trusted_folder(cache_folder(f"tokenizer://{about}")) / "special_tokens.json"
        known = read_or_empty(path)
        if "names" not in known:
            known = {"format_version": FORMAT_VERSION, "names": special_tokens(load_tokenizer(model))}
            write_checked(path, known)
    names = known["names"] if "names" in known else special_tokens(load_tokenizer(model))
    return {"special_tokens": names} if names else {}


def hidden_fact(generation: Generation) -> dict[str, str]:
    """Return a digest of the documents that are hidden in a generation of the tokens; nothing if none is."""
    return {"hidden": fingerprint(generation.hidden_ids)} if generation.hidden_ids else {}


def without_data(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a trained SAE that are settings."""
    return {name: fact for name, fact in facts.items() if name not in DATA_SEEN}
