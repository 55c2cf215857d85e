"""Continue a text with features set to values, beside the continuation without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from saeflow.corpus.token_parts import Frame
from saeflow.corpus.tokenise.texts import ids_of
from saeflow.features.changes import FeatureChange
from saeflow.features.splice import spliced_features
from saeflow.meaning.effects.run_model import RunModel, model_of_run
from saeflow.model.sites import run_on
from saeflow.query.ask import strengths_of
from saeflow.query.connection import connect_to_run
from saeflow.query.new_text import frame_then, tokens_settings
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, is_utf8
from saeflow.store.store import Store

STEER_COMMAND = 'saeflow steer RUN FEATURE=VALUE "prompt" --model FOLDER'
_MOST_NEW_TOKENS = 10_000
_MOST_LETTERS = 1_000_000
_LARGEST_SEED = 1 << 62


@dataclass(frozen=True)
class SteerSettings:
    """How a text is continued."""

    n_tokens: int = 40
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 0
    """Seed of the draws, if the temperature is above 0."""

    def require_sensible(self) -> None:
        """Raise UserError for numbers out of their range."""
        if not 1 <= self.n_tokens <= _MOST_NEW_TOKENS:
            raise UserError(f"--tokens is {self.n_tokens}; it may be 1 to {_MOST_NEW_TOKENS:,}.")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"--temperature is {self.temperature:g}; it may be 0 to 100.")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise UserError(f"--seed is {self.seed}; it may be 0 to {_LARGEST_SEED:,}.")


@dataclass(frozen=True)
class Continuations:
    """A prompt and how it goes on, without and with the features set."""

    prompt: str
    unchanged: str
    steered: str
    values: dict[int, float | None]
    """The value each feature was set to; None if it kept its own."""


def parse_assignments(words: Sequence[str]) -> dict[int, FeatureChange]:
    """Return the changes that words such as `12=3x` and `40=0` name, by feature. Raises UserError."""
    found: dict[int, FeatureChange] = {}
    for word in words:
        number, sign, value = word.partition("=")
        if not sign or not number.strip().isdecimal() or len(number.strip()) > 10:
            raise UserError(f"{brief(word)!r} sets no feature. Write FEATURE=VALUE, such as 12=3x or 40=0.")
        if int(number) in found:
            raise UserError(f"Feature {int(number)} is set twice. Name it once.")
        found[int(number)] = FeatureChange.parse(value, f"Feature {int(number)}")
    if not found:
        raise UserError("No feature is set. Write FEATURE=VALUE before the text, such as 12=3x.")
    return found


def steer(
    store: Store, run_name: str | None, changes: dict[int, FeatureChange], prompt: str, settings: SteerSettings,
    device: str = "auto", model_path: str = "",
) -> Continuations:  # fmt: skip
    """Continue the prompt twice. The features have their values at every token that the run encodes, the prompt's too.

    Each token is found by a pass over the whole text, so that every model that predicts its next token can be steered.
    Raises UserError for an empty or too long prompt, before any model is loaded where possible.
    """
    settings.require_sensible()
    if not prompt.strip() or not is_utf8(prompt) or len(prompt) > _MOST_LETTERS:
        raise UserError("The prompt is empty, no text, or longer than a million letters. Give a text to continue.")
    run, connection = connect_to_run(store, run_name, names=("stg_feature_stats", "stg_size"))
    with connection:
        features = sorted(changes)
        levels = dict(zip(features, strengths_of(connection, run, features).levels, strict=True))
    values = {feature: change.new_value(levels[feature]) for feature, change in changes.items()}
    config = model_of_run(store, run, model_path, device, STEER_COMMAND)
    loaded = RunModel.load(store, run, config)
    about, facts = tokens_settings(store, run)
    frame = frame_then(loaded.tokenizer, facts, about)
    ids = _beginning(frame, np.asarray(ids_of(loaded.tokenizer, [prompt], about)[0], np.int64))
    _require_context(loaded.model, len(ids), settings.n_tokens)
    end = {loaded.tokenizer.eos_token_id} - {None}
    plain = _continue(loaded.model, ids, settings, loaded.n_vocab, end)
    with spliced_features(loaded.model, loaded.sae, loaded.place, values):
        steered = _continue(loaded.model, ids, settings, loaded.n_vocab, end)
    texts = [loaded.tokenizer.decode(each, skip_special_tokens=True) for each in (plain, steered)]
    return Continuations(prompt, texts[0], texts[1], values)


def _beginning(frame: Frame, ids: np.ndarray) -> np.ndarray:
    """Return the prompt's ids with the special tokens that stand before a document."""
    return np.concatenate([np.asarray(frame.before, np.int64), ids])


def _require_context(model: nn.Module, n_prompt: int, n_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    if limit > 0 and n_prompt + n_tokens > limit:
        raise UserError(
            f"The prompt has {n_prompt:,} tokens and --tokens is {n_tokens:,}, but the model reads at most {limit:,}.\n"
            "Shorten the prompt, or lower --tokens."
        )


@torch.no_grad()
def _continue(model: nn.Module, prompt: np.ndarray, settings: SteerSettings, n_vocab: int, end: set[int]) -> list[int]:
    """Return the ids that follow, at most `n_tokens`, up to the end of the text."""
    dice = torch.Generator().manual_seed(settings.seed)
    ids = torch.from_numpy(prompt)[None]
    found: list[int] = []
    while len(found) < settings.n_tokens:
        logits = run_on(model, ids, None).logits[0, -1, :n_vocab].float().cpu()
        chosen = _choose(logits, settings.temperature, dice)
        if chosen in end:
            break
        found.append(chosen)
        ids = torch.cat([ids, torch.tensor([[chosen]])], 1)
    return found


def _choose(logits: Tensor, temperature: float, dice: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = torch.softmax(logits.double() / temperature, 0)
    return int(torch.multinomial(shares, 1, generator=dice))
