"""Forecast what a recipe will take: tokens, parts, bytes, memory and hours.

A survey reads the corpus once, for its lengths and a sample. A trial then runs the recipe's own stages on the sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saeflow.activations.shards import ITEM_BYTES
from saeflow.corpus import sources
from saeflow.corpus.document import is_held_out
from saeflow.corpus.token_parts import frame_of
from saeflow.corpus.tokenise.messages import contents_as_text
from saeflow.corpus.tokenise.texts import ids_of
from saeflow.features.part_encoder import SEGMENT_VALUES
from saeflow.model.load import load_tokenizer
from saeflow.pipeline.trial import try_out
from saeflow.recipe.fingerprint import FORMAT_VERSION, fingerprint
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import human_bytes
from saeflow.runtime.threads import n_threads
from saeflow.store.records import read_checked, write_checked
from saeflow.store.store import Store

_BYTES_PER_VALUE = 6.7
"""On disk, both orders together: measured on the demo and on SmolLM2."""
_MEMORY_PER_VALUE = 60
"""Bytes held while a part's values are sorted and written: measured on the demo."""
_MORE_PIECES, _PIECE_CHARACTERS = 256, 4000
"""Pieces of text in the sample, drawn as if the corpus were cut into pieces of this length."""


@dataclass(frozen=True)
class Survey:
    """Lengths of a corpus in characters, or in ids if it is tokenised, and a sample of its pieces."""

    n_documents: int
    n_characters: int
    n_held_out: int
    pieces: tuple[str | tuple[int, ...], ...]


def survey_corpus(recipe: Recipe, progress: Progress) -> Survey:
    """Read the corpus once, for its lengths and a sample (reservoir: Vitter 1985, algorithm R)."""
    if recipe.model is None or recipe.corpus is None or recipe.corpus.requests:
        raise UserError(
            "saeflow plan forecasts recipes that run a model. Tables of activations and an engine's requests are "
            "stored as they are: rows × columns × 2 bytes in float16, for each site. Run it: saeflow run RECIPE"
        )
    dice, about = random.Random(0), recipe.corpus
    pieces: list[str | tuple[int, ...]] = []
    n_documents = n_characters = n_held_out = n_pieces = 0
    with progress.bar("survey", None, "characters") as bar:
        for document in sources.open_corpus(about).documents:
            n_documents += 1
            content = contents_as_text(document.text) if about.messages else document.content
            n_characters += len(content)
            n_held_out += len(content) * is_held_out(document.key, about.seed, about.held_out)
            for piece in _cut_content(content):
                n_pieces += 1
                place = len(pieces) if len(pieces) < _MORE_PIECES else dice.randrange(n_pieces)
                pieces[place : place + 1] = [piece] if place < _MORE_PIECES else pieces[place : place + 1]
            bar.advance(len(content))
    if not pieces:
        raise UserError("All documents of the corpus are empty. Check corpus.text, the column that holds the text.")
    dice.shuffle(pieces)  # a small corpus fills the reservoir in its own order
    return Survey(n_documents, n_characters, n_held_out, tuple(pieces))


def _cut_content(content: str | tuple[int, ...]) -> Iterator[str | tuple[int, ...]]:
    length = _PIECE_CHARACTERS if isinstance(content, str) else _PIECE_CHARACTERS // 4
    for start in range(0, len(content), length):
        yield content[start : start + length]


@dataclass(frozen=True)
class StageForecast:
    """Bytes published, peak resident memory in bytes, seconds."""

    name: str
    n_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a whole recipe takes, from nothing."""

    n_documents: int
    n_tokens: int
    n_parts: int
    stages: tuple[StageForecast, ...]
    break_even: int
    """Number of SAEs from which storing is faster than streaming."""
    kept_bytes: int = 0
    """Bytes that the activations of the whole corpus take on disk, if they are kept."""
    keep_from: int | None = None
    """Number of SAEs, each encoded by a run of its own, from which keeping activations is faster. None: never."""

    @property
    def n_bytes(self) -> int:
        return sum(stage.n_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def extrapolate(recipe: Recipe, surveyed: Survey, tried: dict[str, Any], n_tokens: int) -> Forecast:
    """Extrapolate from the sample to `n_tokens`: activations from their layout, seconds from steady rates.

    SAEs of a sweep are assumed to train as fast as the recipe's own settings do. A sweep encodes nothing.
    """
    members = recipe.members()
    sample = tried["n_characters"]
    n_parts = max(1, round(n_tokens / part_size(recipe, sample / tried["n_tokens"])))
    chosen = recipe.sae.counts_k and recipe.sae.source is None
    l0 = recipe.sae.k if chosen else tried["n_values"] / tried["n_tokens"]
    sampled = (recipe.train.share or 0) if recipe.trains_on_sample else 0
    n_stored = n_tokens * (recipe.activations.keep + sampled)
    kept_bytes = activation_bytes(recipe, tried, n_tokens, n_parts)
    n_bytes = {
        "tokens": round(tried["token_bytes"] * n_tokens * (1 + sampled) / tried["n_tokens"]),
        "collect": round(kept_bytes * n_stored / n_tokens),
        "train": int(tried["sae_bytes"]) * len(members),
        "encode": round(n_tokens * l0 * _BYTES_PER_VALUE),
    }
    judged = min(recipe.evaluate.max_tokens, n_tokens * surveyed.n_held_out / max(surveyed.n_characters, 1))
    units = {
        "tokens": n_tokens * (1 + sampled), "activations": n_stored,
        "train": sum(member.train.n_tokens * member.train.restarts for member in members),
        "features": n_tokens, "evaluate": judged * len(members), "loss": 0 if recipe.is_sweep else 4 * judged,
    }  # fmt: skip
    stages, grown = [], 0
    for name, found in tried["stages"].items():
        if recipe.is_sweep and name in ("encode", "report"):
            continue
        grown = max(grown, growth(name, recipe, tried, n_tokens, n_parts, n_bytes["collect"], l0))
        seconds = stage_seconds(found, units)
        stages.append(StageForecast(name, n_bytes.get(name, 0), found["peak_bytes"] + grown, seconds))
    return Forecast(
        surveyed.n_documents, n_tokens, n_parts, tuple(stages), break_even(n_tokens, recipe.train.n_tokens), kept_bytes,
        keep_from(**tried["storing"]),
    )  # fmt: skip


def count_tokens(recipe: Recipe, surveyed: Survey) -> int:
    """Estimate the tokens of the corpus from those of all pieces of the sample, and special tokens of each document."""
    assert recipe.model is not None
    assert recipe.corpus is not None
    if recipe.corpus.token_ids:
        return surveyed.n_characters
    tokenizer = load_tokenizer(recipe.model)
    counted = ids_of(tokenizer, [piece for piece in surveyed.pieces if isinstance(piece, str)], recipe.tokens)
    share = surveyed.n_characters / max(1, sum(map(len, surveyed.pieces)))
    frame, n_text = frame_of(tokenizer, recipe.corpus, recipe.tokens), sum(map(len, counted)) * share
    n_frames: float = surveyed.n_documents
    if frame.in_each_sequence:
        room = recipe.tokens.context_length - len(frame)
        own_rows = recipe.tokens.packing == "isolated"
        n_frames = (
            max(n_frames, sum(-(-len(ids) // room) for ids in counted) * share)
            if own_rows
            else n_frames + n_text / room
        )
    return round(n_text + n_frames * len(frame))


def part_size(recipe: Recipe, characters_per_token: float) -> float:
    """Return the mean number of tokens in a part, which the last group of documents overfills by half its size."""
    wanted: int = recipe.tokens.part_tokens
    return wanted + min(1 << 20, wanted) / characters_per_token / 2


def activation_bytes(recipe: Recipe, tried: dict[str, Any], n_tokens: int, n_parts: int) -> int:
    """Return the bytes of whole chunks of whole sequences, padded and compressed as much as the sample's."""
    length, about = recipe.tokens.context_length, recipe.activations
    padded = tried["n_sequences"] * length / tried["n_tokens"] if recipe.tokens.packing == "isolated" else 1.0
    total = 0.0
    for width in tried["widths"]:
        row_bytes = length * width * ITEM_BYTES[about.dtype]
        rows = round(n_tokens * padded / n_parts / length) + 1  # the last two sequences of a part are half full
        chunk = max(1, min(rows, about.chunk_bytes // row_bytes))
        total += n_parts * math.ceil(rows / chunk) * chunk * row_bytes
    raw = sum(tried["widths"]) * ITEM_BYTES[about.dtype] * tried["n_tokens"]
    return round(total * (tried["activation_bytes"] / raw if about.compression != "none" else 1))


def growth(
    name: str, recipe: Recipe, tried: dict[str, Any], n_tokens: int, n_parts: int, stored: int, l0: float
) -> int:
    """Return bytes of memory beyond the trial's. The process keeps freed memory, so later stages have it, too."""
    if name == "train":
        return max(0, pool_memory(recipe, stored) - pool_memory(recipe, tried["activation_bytes"]))
    if name != "encode":
        return 0
    n_values = min(n_threads(recipe.threads), n_parts) * min(n_tokens / n_parts * l0, SEGMENT_VALUES)
    return int(max(0, n_values - tried["n_values"]) * _MEMORY_PER_VALUE)


def pool_memory(recipe: Recipe, stored: int) -> int:
    """Return the bytes that the feed holds: all activations if they fit in half a pool, else both halves."""
    return stored if stored <= recipe.feed.pool_bytes // 2 else int(recipe.feed.pool_bytes)


def stage_seconds(found: dict[str, Any], units: dict[str, float]) -> float:
    """Return the trial's start-up time, plus the units of each bar at its steady rate."""
    known = {bar: rate for bar, rate in found["rates"].items() if rate > 0}
    working = sum(found["counts"][bar] / rate for bar, rate in known.items())
    fixed = max(0.0, found["seconds"] - working)
    return float(fixed + sum(units.get(bar, 0) / rate for bar, rate in known.items()))


def break_even(n_tokens: int, train_tokens: int) -> int:
    """Return the number of SAEs from which storing is faster than streaming.

    Streaming runs the model over `train.n_tokens` for each SAE, storing over the corpus, once. Both feed the trainer
    faster than it trains.
    """
    return math.ceil(n_tokens / train_tokens)


def keep_from(forward: float, collect: float, read: float) -> int | None:
    """Return the number of SAEs, each encoded by a run of its own, from which keeping activations takes less time.

    Kept, they cost the model and writing once, and reading for each SAE; else the model for each. None: never less.
    """
    return math.ceil(collect / (forward - read)) if forward > read else None


def plan(store: Store, recipe: Recipe, progress: Progress) -> Forecast:
    """Survey, try and forecast; the store keeps the result. Raises UserError if the disk is too small."""
    surveyed = survey_corpus(recipe, progress)
    tried = try_out(recipe, surveyed.pieces, progress)
    forecast = extrapolate(recipe, surveyed, tried, count_tokens(recipe, surveyed))
    keep(store, recipe, forecast)
    return forecast


def keep(store: Store, recipe: Recipe, forecast: Forecast) -> None:
    """Write the forecast into the store. Raises UserError if the disk is too small for the recipe."""
    store.require_free(forecast.n_bytes, f"The recipe {recipe.name}")
    path = forecast_path(store, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, {"format_version": FORMAT_VERSION} | asdict(forecast))


def forecast_path(store: Store, recipe: Recipe) -> Path:
    digest = fingerprint(recipe.model_dump(mode="json", exclude={"schedule"}))
    return store.root / "tmp" / "forecasts" / f"{recipe.name}-{digest}.json"


def known_forecast(store: Store, recipe: Recipe) -> Forecast | None:
    """Return what `saeflow plan` said of this very recipe; None if it was not asked."""
    path = forecast_path(store, recipe)
    if not path.is_file():
        return None
    found = read_checked(path)
    found.pop("format_version")
    stages = tuple(StageForecast(**stage) for stage in found.pop("stages"))
    return Forecast(stages=stages, **found)


def rows(forecast: Forecast) -> list[tuple[str, str, str, str]]:
    """Return name, bytes, peak memory and time of each stage, then of all."""
    lines = [(s.name, human_bytes(s.n_bytes), human_bytes(s.peak_bytes), duration(s.seconds)) for s in forecast.stages]
    whole = human_bytes(forecast.n_bytes), human_bytes(forecast.peak_bytes), duration(forecast.seconds)
    return [*lines, ("all", *whole)]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
