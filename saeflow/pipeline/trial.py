"""Try a recipe on a sample of its corpus, in a process of its own, so that start-up and memory are those of a run.

That process is `python -m saeflow.pipeline.trial RECIPE.json STORE`. It runs every stage, measures each, and prints
the answer as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.shards import open_site
from saeflow.corpus.document import is_held_out
from saeflow.pipeline import collect
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.stages import stages_of_run
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import measure_usage
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.temporary import temporary_folder
from saeflow.runtime.terminal import write_exactly
from saeflow.runtime.threads import map_in_order, n_threads, ranges
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

_FIRST_PIECES = 16
"""Pieces of the sample in a first trial."""
_QUICK_SECONDS = 4.0
"""If the model reads those in less time, it is tried again on all pieces: short work says little of long work."""
_STEPS, _JUDGED = 60, 64
"""Training steps, and tokens evaluated for each piece of the sample."""
REFUSED = 2
"""What the process returns after an error that a user can mend: then its answer is `{"refused": message}`."""

Pieces = Sequence[str | tuple[int, ...]]


def trial_recipe(recipe: Recipe, pieces: Pieces, folder: Path) -> Recipe:
    """Return the recipe on the sample alone: as many parts as threads, a short training, a short evaluation."""
    assert recipe.corpus is not None
    column = recipe.corpus.token_ids or recipe.corpus.text
    keys = [f"piece/{i}" for i in range(len(pieces))]
    pq.write_table(pa.table({"key": keys, column: list(pieces)}), folder / "sample.parquet")
    held_out = 0.25 if recipe.corpus.held_out else 0.0
    n_tokens = max(1, sum(map(len, pieces)) // (4 * 2 * n_threads(recipe.threads)))
    share = None if recipe.train.share is None else 1.0  # of so few documents, less might be none
    short = {"n_tokens": _STEPS * recipe.feed.batch_rows, "restarts": 1, "tensorboard": None, "share": share}
    corpus = CorpusConfig(
        files=[str(folder / "sample.parquet")], text=recipe.corpus.text, token_ids=recipe.corpus.token_ids, key="key",
        held_out=held_out, seed=_seed_that_holds_out(held_out, keys),
    )  # fmt: skip
    return recipe.model_copy(
        update={
            "corpus": corpus,
            "activations": recipe.activations.model_copy(update={"roles": []}),
            "cluster": None,  # a trial is of this machine
            "tokens": recipe.tokens.model_copy(update={"part_tokens": n_tokens}),
            "train": recipe.train.model_copy(update=short),
            "sweep": None,
            "evaluate": recipe.evaluate.model_copy(update={"max_tokens": _JUDGED * len(pieces)}),
        }
    )


def _seed_that_holds_out(share: float, keys: Sequence[str]) -> int:
    """Return the first seed below 1000 that holds out about this share of the keys; 999 if none does."""
    for seed in range(1000 if share else 0):
        if share / 1.5 < sum(is_held_out(key, seed, share) for key in keys) / len(keys) < share * 1.5:
            return seed
    return 999 if share else 0


def try_out(recipe: Recipe, pieces: Pieces, progress: Progress) -> dict[str, Any]:
    """Try the stages on a few pieces, and if they take no time, on all."""
    tried = _tried(recipe, pieces[:_FIRST_PIECES], progress)
    longest = tried["stages"]["collect" if recipe.activations.keep else "encode"]["working"]  # the model runs there
    if len(pieces) > _FIRST_PIECES and longest < _QUICK_SECONDS:
        return _tried(recipe, pieces, progress)
    return tried


def _tried(recipe: Recipe, pieces: Pieces, progress: Progress) -> dict[str, Any]:
    """Run the stages on the sample, in a store that is removed afterwards."""
    with temporary_folder("saeflow-plan-") as folder:
        small = trial_recipe(recipe, pieces, folder)
        (folder / "recipe.json").write_text(small.model_dump_json(), "utf-8")
        progress.say(f"plan: trying every stage on {sum(map(len, pieces)):,} characters")
        command = [sys.executable, "-m", __name__, str(folder / "recipe.json"), str(folder / "store")]
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


Heard = dict[str, list[tuple[float, int]]]
"""When each bar reached how many units."""


def _hear(heard: Heard, bar: Bar) -> None:
    heard.setdefault(bar.stage, []).append((time.monotonic(), bar.done))


def _steady_rate(points: list[tuple[float, int]]) -> float:
    """Return units per second over the second half; 0 if too little was heard."""
    moved = [point for i, point in enumerate(points) if not i or point[1] > points[i - 1][1]]
    later = moved[len(moved) // 2 - 1 :] if len(moved) > 3 else moved
    seconds = later[-1][0] - later[0][0]
    return (later[-1][1] - later[0][1]) / seconds if seconds > 0 else 0.0


def measure(recipe: Recipe, store: Store) -> dict[str, object]:
    """Return seconds, peak memory and bars of every stage, and the sizes in the store afterwards."""
    found: dict[str, dict[str, Any]] = {}
    lineage = Lineage(store, recipe)
    kept = _lineage_that_keeps(lineage)
    for name, stage in stages_of_run(recipe).items():
        found[name] = _measured(stage, lineage)
    n_tokens = lineage.tokens.published().total("n_tokens")
    about = found["collect"] if "activations" in found["collect"]["rates"] else _measured(collect.run, kept)
    rate = about["rates"]["activations"] or math.inf
    storing = {"forward": _forward_seconds(kept), "collect": n_tokens / rate, "read": _read_seconds(kept)}
    source, stored, encoded = (each.published() for each in (lineage.tokens, kept.activations, lineage.features))
    return {
        "stages": found,
        "n_tokens": n_tokens,
        "n_sequences": source.total("n_sequences"),
        "n_values": encoded.total("n_values"),
        "token_bytes": sum(part.n_bytes for part in source.parts),
        "activation_bytes": sum(part.n_bytes for part in stored.parts),
        "sae_bytes": sum(file.n_bytes for sae in store.artefacts("saes") for file in sae.record.files),
        "widths": [site.width for site in lineage.stored_sites],
        "storing": storing,
    }


def _measured(stage: Callable[[Lineage, Progress], object], lineage: Lineage) -> dict[str, Any]:
    """Run a stage. Return its seconds, peak memory and bars."""
    heard: Heard = {}
    with measure_usage() as taken:
        stage(lineage, Progress(verbosity=-1, listener=partial(_hear, heard)))
    return asdict(taken) | {
        "rates": {bar: _steady_rate(points) for bar, points in heard.items()},
        "counts": {bar: points[-1][1] for bar, points in heard.items()},
        "working": sum(points[-1][0] - points[0][0] for points in heard.values()),
    }


def _lineage_that_keeps(lineage: Lineage) -> Lineage:
    """Return a lineage of the same tokens whose activations are kept: collected now, if no stage has."""
    if lineage.training is not lineage or lineage.recipe.activations.keep:
        return lineage.training
    about = lineage.recipe.activations.model_copy(update={"keep": True})
    return Lineage(lineage.store, lineage.recipe.model_copy(update={"activations": about}))


def _seconds(work: Callable[[PartRecord], object], parts: Iterable[PartRecord]) -> float:
    began = time.monotonic()
    for part in parts:
        work(part)
    return time.monotonic() - began


def _forward_seconds(kept: Lineage) -> float:
    """Return the time that the model alone takes for the sample."""
    forward = collect.open_collector(kept, []).forward
    return _seconds(lambda part: deque(forward.run(part, lambda *_: None), 0), kept.tokens.published().parts)


def _read_seconds(kept: Lineage) -> float:
    """Return the time that reading all activations of the sample takes."""

    def read(part: PartRecord) -> None:
        arrays = [open_site(kept.activations, part, site) for site in kept.stored_sites]
        rows = [slice(*ends) for ends in ranges(part.counts["n_sequences"], arrays[0].chunk)]
        threads = n_threads(kept.recipe.threads)
        deque(map_in_order(lambda each: [array.read(each) for array in arrays], rows, threads), 0)

    return _seconds(read, kept.activations.published().parts)


def measure_for_parent(recipe_file: Path, folder: Path) -> int:
    try:
        found = measure(Recipe.model_validate_json(recipe_file.read_text("utf-8")), Store.create(folder))
    except UserError as error:
        write_exactly([json.dumps({"refused": str(error)}).encode()])
        return REFUSED
    write_exactly([json.dumps(found).encode()])
    return 0


if __name__ == "__main__":
    sys.exit(measure_for_parent(*map(Path, sys.argv[1:])))
