"""What a recipe will take: tokens, parts, bytes, memory and hours, from a trial of its own stages on a sample."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saeflow.activations.shards import ITEM_BYTES
from saeflow.corpus.token_parts import bos_ids, ids_of
from saeflow.model.load import load_tokenizer
from saeflow.pipeline.forecast.survey import Survey, survey
from saeflow.pipeline.forecast.trial import try_out
from saeflow.recipe.fingerprint import FORMAT_VERSION, fingerprint
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import human_bytes
from saeflow.runtime.threads import n_threads
from saeflow.store.records import read_checked, write_checked
from saeflow.store.store import Store

_BYTES_PER_VALUE = 6.7
"""On disk, both orders together: measured on the demo and on SmolLM2."""
_MEMORY_PER_VALUE = 60
"""Held while a part's values are sorted and written, in bytes: measured on the demo."""


@dataclass(frozen=True)
class StageForecast:
    """Bytes published, peak resident memory in bytes, seconds."""

    name: str
    n_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """Of a whole recipe, from nothing. `break_even` is the number of SAEs from which storing is faster than
    streaming."""

    n_documents: int
    n_tokens: int
    n_parts: int
    stages: tuple[StageForecast, ...]
    break_even: int

    @property
    def n_bytes(self) -> int:
        return sum(stage.n_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def stage(self, name: str) -> StageForecast | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def extrapolate(recipe: Recipe, surveyed: Survey, tried: dict[str, Any], n_tokens: int) -> Forecast:
    """From the sample to a corpus of `n_tokens`: activations from their layout, seconds from steady rates.

    The SAEs of a sweep are taken to train as fast as the recipe's own settings do; a sweep encodes nothing.
    """
    members = recipe.members()
    sample = tried["n_characters"]
    n_parts = max(1, round(n_tokens / part_size(recipe, sample / tried["n_tokens"])))
    chosen = recipe.sae.counts_k and recipe.sae.source is None
    l0 = recipe.sae.k if chosen else tried["n_values"] / tried["n_tokens"]
    n_bytes = {
        "tokens": round(tried["token_bytes"] * n_tokens / tried["n_tokens"]),
        "collect": activation_bytes(recipe, tried, n_tokens, n_parts),
        "train": int(tried["sae_bytes"]) * len(members),
        "encode": round(n_tokens * l0 * _BYTES_PER_VALUE),
    }
    judged = min(recipe.evaluate.max_tokens, n_tokens * surveyed.n_held_out / max(surveyed.n_characters, 1))
    units = {
        "tokens": n_tokens, "activations": n_tokens,
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
    return Forecast(surveyed.n_documents, n_tokens, n_parts, tuple(stages), break_even(n_tokens, recipe.train.n_tokens))


def count_tokens(recipe: Recipe, surveyed: Survey) -> int:
    """Of the whole corpus, from those of all the pieces, which are many more than are tried, and a BOS a document."""
    assert recipe.model is not None
    assert recipe.corpus is not None
    if recipe.corpus.token_ids:
        return surveyed.n_characters
    tokenizer = load_tokenizer(recipe.model)
    counted = ids_of(tokenizer, [piece for piece in surveyed.pieces if isinstance(piece, str)], recipe.tokens)
    share = surveyed.n_characters / max(1, sum(map(len, surveyed.pieces)))
    return round(sum(map(len, counted)) * share) + surveyed.n_documents * len(bos_ids(tokenizer, recipe.tokens))


def part_size(recipe: Recipe, characters_per_token: float) -> float:
    """Tokens of a part: a group of documents of up to `part_tokens` characters may overfill it; half of one, on
    average."""
    wanted: int = recipe.tokens.part_tokens
    return wanted + min(1 << 20, wanted) / characters_per_token / 2


def activation_bytes(recipe: Recipe, tried: dict[str, Any], n_tokens: int, n_parts: int) -> int:
    """Whole chunks of whole sequences; as much padding where documents are isolated, and compressed, as the sample
    was."""
    length, about = recipe.tokens.context_length, recipe.activations
    padded = tried["n_sequences"] * length / tried["n_tokens"] if recipe.tokens.packing == "isolated" else 1.0
    total = 0.0
    for width in tried["widths"]:
        row_bytes = length * width * ITEM_BYTES[about.dtype]
        rows = (
            round(n_tokens * padded / n_parts / length) + 1
        )  # the last sequence of training and of held out are half full
        chunk = max(1, min(rows, about.chunk_bytes // row_bytes))
        total += n_parts * math.ceil(rows / chunk) * chunk * row_bytes
    raw = sum(tried["widths"]) * ITEM_BYTES[about.dtype] * tried["n_tokens"]
    return round(total * (tried["activation_bytes"] / raw if about.compression != "none" else 1))


def growth(
    name: str, recipe: Recipe, tried: dict[str, Any], n_tokens: int, n_parts: int, stored: int, l0: float
) -> int:
    """Memory beyond that of the trial, in bytes; freed memory is kept by the process, so later stages have it, too."""
    match name:
        case "train":
            return max(0, pool_memory(recipe, stored) - pool_memory(recipe, tried["activation_bytes"]))
        case "encode":
            workers = min(n_threads(recipe.threads), n_parts)
            here = min(n_tokens / n_parts * l0, _SEGMENT)
            return int(max(0, workers * here - tried["n_values"]) * _MEMORY_PER_VALUE)
    return 0


_SEGMENT = 24_000_000
"""Values of a part that are held at once (part_encoder.SEGMENT_VALUES)."""


def pool_memory(recipe: Recipe, stored: int) -> int:
    """What the feed holds: the store, where half a pool holds it, else both halves."""
    return stored if stored <= recipe.feed.pool_bytes // 2 else int(recipe.feed.pool_bytes)


def stage_seconds(found: dict[str, Any], units: dict[str, float]) -> float:
    """Start-up as in the trial, then the units of each bar at its steady rate."""
    known = {bar: rate for bar, rate in found["rates"].items() if rate > 0}
    working = sum(found["counts"][bar] / rate for bar, rate in known.items())
    fixed = max(0.0, found["seconds"] - working)
    return float(fixed + sum(units.get(bar, 0) / rate for bar, rate in known.items()))


def break_even(n_tokens: int, train_tokens: int) -> int:
    """SAEs from which storing is faster. Streaming runs the model over the tokens of every training, N × train.n_tokens
    in all; storing over the corpus, once. Both feed the trainer faster than it trains."""
    return math.ceil(n_tokens / train_tokens)


def plan(store: Store, recipe: Recipe, progress: Progress) -> Forecast:
    """Survey, try and forecast; the store keeps the result. Raises UserError if the disk is too small."""
    surveyed = survey(recipe, progress)
    tried = try_out(recipe, surveyed, progress)
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
    return (
        store.root
        / "tmp"
        / "forecasts"
        / f"{recipe.name}-{fingerprint(recipe.model_dump(mode='json', exclude={'schedule'}))}.json"
    )


def known_forecast(store: Store, recipe: Recipe) -> Forecast | None:
    """What `saeflow plan` said of this very recipe."""
    path = forecast_path(store, recipe)
    if not path.is_file():
        return None
    found = read_checked(path)
    found.pop("format_version")
    stages = tuple(StageForecast(**stage) for stage in found.pop("stages"))
    return Forecast(stages=stages, **found)


def rows(forecast: Forecast) -> list[tuple[str, str, str, str]]:
    """A line a stage, and the whole: name, bytes, peak memory, time."""
    lines = [(s.name, human_bytes(s.n_bytes), human_bytes(s.peak_bytes), duration(s.seconds)) for s in forecast.stages]
    whole = human_bytes(forecast.n_bytes), human_bytes(forecast.peak_bytes), duration(forecast.seconds)
    return [*lines, ("all", *whole)]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
