"""What a recipe will take: tokens, parts, bytes, memory and hours, from a trial of its own stages on a sample."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.shards import ITEM_BYTES
from saeflow.corpus import sources
from saeflow.corpus.document import is_held_out
from saeflow.corpus.tokenizer import bos_ids, ids_of
from saeflow.model.load import load_tokenizer
from saeflow.pipeline.forecast.trial_run import REFUSED
from saeflow.recipe.fingerprint import FORMAT_VERSION, fingerprint
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import CorpusConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import human_bytes
from saeflow.runtime.threads import n_threads
from saeflow.store.records import read_checked, write_checked
from saeflow.store.store import Store

_PIECES, _MORE_PIECES, _PIECE_CHARACTERS = 16, 256, 4000
"""The sample: so many pieces of text, drawn as if the corpus were cut into pieces of this length."""
_QUICK_SECONDS = 4.0
"""A model that reads the pieces in less is tried again on more of them: short work tells little of long work."""
_STEPS, _JUDGED = 60, 64
"""Training steps, and tokens evaluated for each piece of the sample."""
_BYTES_PER_VALUE = 6.7
"""On disk, both orders together: measured on the demo and on SmolLM2."""
_MEMORY_PER_VALUE = 60
"""Held while a part's values are sorted and written, in bytes: measured on the demo."""


@dataclass(frozen=True)
class Survey:
    """The corpus by its lengths: documents, characters (ids where it is tokenised), those held out, and the sample."""

    n_documents: int
    n_characters: int
    n_held_out: int
    pieces: tuple[str | tuple[int, ...], ...]


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


def survey(recipe: Recipe, progress: Progress) -> Survey:
    """Read the corpus once, for its lengths and a sample (reservoir: Vitter 1985, algorithm R)."""
    if recipe.model is None or recipe.corpus is None:
        raise UserError(
            "saeflow plan forecasts recipes that run a model. A table of activations is stored as it is: "
            "its rows × its columns × 2 bytes in float16. Run it: saeflow run RECIPE"
        )
    dice, about = random.Random(0), recipe.corpus
    pieces: list[str | tuple[int, ...]] = []
    n_documents = n_characters = n_held_out = n_pieces = 0
    with progress.bar("survey", None, "characters") as bar:
        for document in sources.open_corpus(about).documents:
            n_documents += 1
            n_characters += len(document.content)
            n_held_out += len(document.content) * is_held_out(document.key, about.seed, about.held_out)
            for piece in _cut(document.content):
                n_pieces += 1
                place = len(pieces) if len(pieces) < _MORE_PIECES else dice.randrange(n_pieces)
                pieces[place : place + 1] = [piece] if place < _MORE_PIECES else pieces[place : place + 1]
            bar.advance(len(document.content))
    if not pieces:
        raise UserError("All documents of the corpus are empty. Check corpus.text, the column that holds the text.")
    dice.shuffle(pieces)  # a small corpus fills the reservoir in its own order
    return Survey(n_documents, n_characters, n_held_out, tuple(pieces))


def _cut(content: str | tuple[int, ...]) -> Iterator[str | tuple[int, ...]]:
    length = _PIECE_CHARACTERS if isinstance(content, str) else _PIECE_CHARACTERS // 4
    for start in range(0, len(content), length):
        yield content[start : start + length]


def trial_recipe(recipe: Recipe, pieces: Sequence[str | tuple[int, ...]], folder: Path) -> Recipe:
    """The recipe on the sample alone: as many parts as threads, a short training, a short evaluation."""
    assert recipe.corpus is not None
    column = recipe.corpus.token_ids or recipe.corpus.text
    keys = [f"piece/{i}" for i in range(len(pieces))]
    pq.write_table(pa.table({"key": keys, column: list(pieces)}), folder / "sample.parquet")
    share = 0.25 if recipe.corpus.held_out else 0.0
    seed = next(
        s
        for s in range(1000)
        if not share
        or share / 1.5 < sum(is_held_out(key, s, share) for key in keys) / len(keys) < share * 1.5
        or s == 999
    )
    n_tokens = max(1, sum(map(len, pieces)) // (4 * 2 * n_threads(recipe.threads)))
    return recipe.model_copy(
        update={
            "corpus": CorpusConfig(
                files=[str(folder / "sample.parquet")],
                text=recipe.corpus.text,
                token_ids=recipe.corpus.token_ids,
                key="key",
                held_out=share,
                seed=seed,
            ),
            "cluster": None,  # a trial is of this machine
            "tokens": recipe.tokens.model_copy(update={"part_tokens": n_tokens}),
            "train": recipe.train.model_copy(
                update={"n_tokens": _STEPS * recipe.feed.batch_rows, "restarts": 1, "tensorboard": None}
            ),
            "sweep": None,
            "evaluate": recipe.evaluate.model_copy(update={"max_tokens": _JUDGED * len(pieces)}),
        }
    )


def try_out(recipe: Recipe, surveyed: Survey, progress: Progress) -> dict[str, Any]:
    """The stages on a few pieces, and where they take no time, on more."""
    tried = _tried(recipe, surveyed.pieces[:_PIECES], progress)
    if len(surveyed.pieces) > _PIECES and tried["stages"]["collect"]["working"] < _QUICK_SECONDS:
        return _tried(recipe, surveyed.pieces, progress)
    return tried


def _tried(recipe: Recipe, pieces: Sequence[str | tuple[int, ...]], progress: Progress) -> dict[str, Any]:
    """Run the stages on the sample in a process of its own and a store of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="saeflow-plan-") as temporary:
        folder = Path(temporary)
        small = trial_recipe(recipe, pieces, folder)
        (folder / "recipe.json").write_text(small.model_dump_json(), "utf-8")
        progress.say(f"plan: trying every stage on {sum(map(len, pieces)):,} characters")
        command = [
            sys.executable,
            "-m",
            "saeflow.pipeline.forecast.trial_run",
            str(folder / "recipe.json"),
            str(folder / "store"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode == REFUSED:
        raise UserError(json.loads(done.stdout.splitlines()[-1])["refused"])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"The trial of the recipe failed: {last}\n"
            "See all of it on a few documents, in a store that you can delete: "
            "saeflow run RECIPE --set corpus.share=0.01 --store /tmp/trial"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"n_characters": sum(map(len, pieces))}


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
"""Values of a part that are held at once (part_writer.SEGMENT_VALUES)."""


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
    """Survey, trial and forecast; kept in the store for later comparison. Raises UserError where the disk is too
    small."""
    surveyed = survey(recipe, progress)
    forecast = extrapolate(recipe, surveyed, try_out(recipe, surveyed, progress), count_tokens(recipe, surveyed))
    store.require_free(forecast.n_bytes, f"The recipe {recipe.name}")
    path = forecast_path(store, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, {"format_version": FORMAT_VERSION} | asdict(forecast))
    return forecast


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
