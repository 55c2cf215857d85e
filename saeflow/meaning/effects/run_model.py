"""The language model, the tokenizer and the SAE of a run, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from torch import nn

from saeflow.features.splice import SplicePlace, require_spliceable
from saeflow.model.load import load_model, load_tokenizer
from saeflow.model.sites import predicts_next_token, require_running_order
from saeflow.query.new_text import model_settings
from saeflow.query.runs import Run
from saeflow.recipe.data_settings import ModelConfig
from saeflow.runtime.devices import choose_device
from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_sae
from saeflow.store.store import Store


@dataclass(frozen=True)
class RunModel:
    """A run's model, tokenizer and SAE, and where the SAE sits in the model."""

    model: nn.Module
    tokenizer: Any
    sae: SparseAutoencoder
    place: SplicePlace
    context_length: int
    n_vocab: int
    """Entries that the tokenizer gives; the model may have a few more."""

    @classmethod
    def load(cls, store: Store, run: Run, config: ModelConfig) -> RunModel:
        """Load them. Raises UserError if the model does not predict the next token, or if the SAE cannot be changed."""
        tokens = store.input_of(run.artefact, "tokens")
        sae = load_sae(store.input_of(run.artefact, "saes").fetched())
        require_spliceable(sae)
        place = SplicePlace.of_run(store, run.artefact, sae)
        model = load_model(config)
        if not predicts_next_token(model):
            raise UserError(
                f"A {type(model).__name__} does not predict the next token, so a change of a feature has no effect "
                "on what it says.\nName a run of a model such as GPT-2 or Llama."
            )
        if place.read != place.target:
            require_running_order(model, place.read, place.target)
        n_vocab = pq.read_metadata(tokens.own_file("vocab.parquet")).num_rows
        return cls(model, load_tokenizer(config), sae, place, int(tokens.fact("context_length")), n_vocab)


def model_of_run(store: Store, run: Run, given: str, device: str, remedy: str) -> ModelConfig:
    """Return the settings that load a run's model on a device. Raises UserError if either is not there."""
    choose_device("--device", device)
    config = model_settings(store.input_of(run.artefact, "activations"), given, remedy)
    return config.model_copy(update={"device": device})
