"""Bring new documents of a corpus through every stage, and train a new SAE once the store has grown enough."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

from saeflow.features.levels import AFTER_APPEND
from saeflow.pipeline import compact, encode, stages, tokens, train
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lifecycle.forget import forget_removed, note_seen
from saeflow.pipeline.lineage import Lineage, n_tokens_seen
from saeflow.query import catalog
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.lease import is_free
from saeflow.store.lists import read_part_folders
from saeflow.store.records import Damaged
from saeflow.store.store import Store

_log = logging.getLogger(__name__)


def run(lineage: Lineage, progress: Progress, place: stages.Place = stages.anywhere) -> dict[str, Any]:
    """Bring new and changed documents through every stage, and forget removed ones if the recipe says so.

    Every published run over these activations encodes the new documents; of the recipe's own runs, only the newest
    `schedule.keep_runs`. A run that another process is writing follows at the next ingest. Then, if the recipe's newest
    SAE has no run yet, it is trained, encoded and judged. If nothing has changed, only records are read. At last, once
    all new documents can be asked about, some of the runs' parts are merged. The summary counts new documents and
    tokens, and lists new parts by artefact.

    Raises UserError, once all other runs have followed, if a run could not follow or be made, or if too many documents
    are gone to be forgotten.
    """
    store, recipe, held = lineage.store, lineage.recipe, [lineage.tokens, lineage.activations]
    before, trained = _published_folders(store, held), False
    _keep_lists(held)
    with kept_open():
        removed = [(each, forget_removed(each, progress)) for each in dict.fromkeys([lineage, lineage.training])]
        if recipe.model is None:
            import_table.run(lineage, progress)
        else:
            tokens.run(lineage, progress)
            stages.collect_new(lineage, progress, place)
        for each, gone in removed:
            note_seen(each.tokens, gone)
        _keep_lists(held)
        runs = following(lineage)
        waiting = _encode_new(lineage, runs, progress, place)
        catalog.write_catalog(store)
        try:
            trained = _make_run(lineage, progress, place)
        except UserError as error:
            waiting[recipe.name] = str(error)
        summary = _ingest_summary(lineage, held, before)
        _merge_some(lineage, runs, progress)
    failed = [f"{name} does not hold the new documents yet: {why}" for name, why in waiting.items()]
    whole = removed[0][1]
    if whole.refusal or failed:
        raise UserError("\n".join(filter(None, [whole.refusal, *failed])))
    return summary | {"n_removed": whole.n, "trained": trained, "grown": grown(lineage.anew())}


def _keep_lists(held: list[Artefact]) -> None:
    """Read the lists of parts. While they are held here, no stage reads them again."""
    for each in held:
        with contextlib.suppress(Damaged):  # its stage mends it
            each.generation()


def _make_run(lineage: Lineage, progress: Progress, place: stages.Place) -> bool:
    """Train, encode and judge missing SAEs of the recipe, unless another run does so. True if this run did."""
    made = encode.runs_over(lineage.store, lineage.activations)
    runs = [member.features for member in lineage.members]
    judged = lineage.recipe.is_sweep or (runs[0].path / "quality.json").is_file()
    if judged and all(each in made for each in runs):
        return False
    for member in lineage.members:
        for each in (member.sae, member.features):
            if not is_free(each.slot):
                progress.say(f"ingest: another run is making {each.id}")
                return False
    now = lineage.anew()  # the corpus may have changed again
    stages.run(now, progress, place)
    if now.recipe.is_sweep:
        with place("encode"):
            stages.stages_of(now.recipe)["encode"](now, progress)
    return True


def _encode_new(lineage: Lineage, runs: Sequence[Artefact], progress: Progress, place: stages.Place) -> dict[str, str]:
    """Let runs over the recipe's activations encode all of them. Return runs that could not, and why."""
    store, waiting = lineage.store, {}
    for each in runs:
        if not is_free(each.slot):
            progress.say(f"ingest: another run is writing {each.id}, which follows at the next ingest")
            continue
        try:
            with contextlib.nullcontext() if encode.holds_all(store, each) else place("encode"):
                encode.refresh(store, each, progress, grow=True, recipe=lineage.recipe)
        except (UserError, OSError) as error:
            waiting[each.id] = str(error)
        except Exception as error:  # whatever it is, the other runs follow
            _log.exception("%s could not be encoded", each.id)
            waiting[each.id] = f"{type(error).__name__}: {error}"
    return waiting


def _merge_some(lineage: Lineage, runs: Sequence[Artefact], progress: Progress) -> None:
    """Merge some parts of these runs, for about a minute each. A later ingest, or `compact`, merges the others."""
    n_merged = 0
    for each in (run for run in runs if is_free(run.slot)):
        try:
            n_merged += compact.merge_parts(lineage.store, each, lineage.recipe, progress, sizes=AFTER_APPEND)
        except (UserError, OSError) as error:  # its parts can be asked about as they are
            progress.say(f"ingest: parts of {each.id} are not merged: {error}")
    if n_merged:
        catalog.write_catalog(lineage.store)


def following(lineage: Lineage) -> list[Artefact]:
    """Return the published runs over the recipe's activations that new documents reach.

    Of runs with a name of the recipe's own, these are the newest `schedule.keep_runs` and the recipe's present run.
    """
    keep_runs = lineage.recipe.schedule.keep_runs
    every = encode.runs_over(lineage.store, lineage.activations)
    own = [member.features for member in lineage.members] if keep_runs else []
    old = [run for name in {each.name for each in own} for run in [r for r in every if r.name == name][:-keep_runs]]
    return [run for run in every if run in own or run not in old]


def _published_folders(store: Store, held: list[Artefact]) -> dict[str, set[str]]:
    """Return the folders of published parts, by artefact that an ingest adds parts to."""
    found = {}
    for each in (*held, *encode.runs_over(store, held[1])):
        with contextlib.suppress(Damaged, OSError):  # not yet there, or about to be mended
            found[each.id] = set(read_part_folders(each.list_path(each.current_number())))
    return found


def _ingest_summary(lineage: Lineage, held: list[Artefact], before: dict[str, set[str]]) -> dict[str, Any]:
    now = _published_folders(lineage.store, held)
    fresh = {name: folders - before.get(name, set()) for name, folders in now.items()}
    new = [part for part in held[0].published().parts if part.folder in fresh[held[0].id]]
    return {
        "run": lineage.recipe.name,
        "store": lineage.store.name,
        **{count: sum(part.counts[count] for part in new) for count in ("n_documents", "n_tokens")},
        "parts": {name: sorted(int(each.partition("-")[0]) for each in folders) for name, folders in fresh.items()},
    }


def grown(lineage: Lineage) -> float:
    """Return the share by which training tokens have grown since the recipe's newest SAE; the largest of a sweep.

    Infinite if no SAE is trained, 0 for an imported SAE. If an earlier saeflow trained the SAE and its generation is
    gone, growth counts from the oldest generation that is kept.
    """
    return max(map(_grown, lineage.training.members))


def _grown(lineage: Lineage) -> float:
    if lineage.recipe.sae.source is not None:
        return 0.0
    stored, trained = lineage.activations, lineage.sae
    if not trained.complete():
        return math.inf
    now, then = stored.published().total("n_train_tokens"), _n_tokens_trained_on(stored, trained)
    return now / then - 1 if then else math.inf


def _n_tokens_trained_on(stored: Artefact, trained: Artefact) -> int:
    if (known := n_tokens_seen(trained)) is not None:
        return known
    number = int(trained.fact("generation"))
    generation = stored.generation(min(each for each in stored.numbers() if each >= number))
    return generation.total("n_train_tokens") if generation else 0


def retrain(
    lineage: Lineage, progress: Progress, share: float | None = None, place: stages.Place = stages.anywhere
) -> dict[str, Any]:
    """Train on the present store, encode and judge; with a `share` only if the store has grown by it."""
    recipe, growth = lineage.recipe, grown(lineage)
    if recipe.sae.source is not None or (share is not None and growth < share):
        asked = "the SAE is from elsewhere" if share is None else f"asked for {share:.1%}"
        progress.say(f"retrain: the store has grown by {growth:.1%} since the newest SAE ({asked}); nothing to do")
        return {"run": recipe.name, "trained": [], "grown": growth}
    fresh = lineage.anew(fresh=True)
    with kept_open():
        with place("train"):
            made = train.run_all(fresh, progress)
        every = stages.stages_of(recipe)
        for name, stage in itertools.islice(every.items(), list(every).index("train") + 1, None):
            with place(name):
                stage(fresh, progress)
    runs = [member.features.id for member in fresh.members]
    return {"run": recipe.name, "trained": [each.id for each in made], "grown": growth, "runs": runs}
