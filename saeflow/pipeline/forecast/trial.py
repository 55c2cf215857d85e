"""The recipe on a sample of its corpus, in a store of its own that is gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus.document import is_held_out
from saeflow.pipeline.forecast.survey import Survey
from saeflow.pipeline.forecast.trial_run import REFUSED
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import CorpusConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads

_PIECES = 16
"""Pieces of the sample in a first trial."""
_QUICK_SECONDS = 4.0
"""A model that reads the pieces in less is tried again on more of them: short work tells little of long work."""
_STEPS, _JUDGED = 60, 64
"""Training steps, and tokens evaluated for each piece of the sample."""


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
