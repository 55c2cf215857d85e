"""A corpus that changes, brought through every stage: what is new is read, stored, encoded and can be asked about."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from saeflow.pipeline import encode, import_table, tokens
from saeflow.pipeline import run as pipeline
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.lifecycle import retrain
from saeflow.pipeline.lifecycle.deletions import forget_removed, note_seen
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.lease import is_free
from saeflow.store.records import Damaged, read_part_folders
from saeflow.store.store import Store

_log = logging.getLogger(__name__)


def run(lineage: Lineage, progress: Progress, place: pipeline.Place = pipeline.anywhere) -> dict[str, Any]:
    """Bring new and changed documents through every stage, and forget removed ones if the recipe says so.

    Every published run over these activations encodes what is new, of the recipe's own the newest `schedule.keep_runs`;
    one that another run is writing does at the next ingest. Where the recipe's newest SAE has no run yet, it is
    trained, encoded and judged after that. Where nothing has changed, only records are read. The summary counts what is
    new: documents and tokens, and the indices of parts by artefact. Raises UserError where a run could not follow, or
    not be made, after the others have, and where too many documents are gone to be forgotten.
    """
    store, recipe, held = lineage.store, lineage.recipe, [lineage.tokens, lineage.activations]
    before, trained = _published_folders(store, held), False
    _keep_lists(held)
    with kept_open():
        removed = forget_removed(lineage, progress)
        _take_in(lineage, progress, place)
        note_seen(lineage.tokens, removed)
        _keep_lists(held)
        waiting = _encode_new(lineage, progress, place)
        catalog.write_catalog(store)
        try:
            trained = not _has_run(lineage) and _make_run(lineage, progress, place)
        except UserError as error:
            waiting[recipe.name] = str(error)
    failed = [f"{name} does not hold the new documents yet: {why}" for name, why in waiting.items()]
    if removed.refusal or failed:
        raise UserError("\n".join(filter(None, [removed.refusal, *failed])))
    return _ingest_summary(lineage, held, before) | {
        "n_removed": removed.n, "trained": trained, "grown": retrain.grown(lineage.anew()),
    }  # fmt: skip


def _take_in(lineage: Lineage, progress: Progress, place: pipeline.Place) -> None:
    """The stages that every run of a store shares."""
    if lineage.recipe.model is None:
        import_table.run(lineage, progress)
        return
    tokens.run(lineage, progress)
    pipeline.collect_new(lineage, progress, place)


def _keep_lists(held: list[Artefact]) -> None:
    """Read the lists of parts: as long as they are held here, no stage reads them again."""
    for each in held:
        with contextlib.suppress(Damaged):  # its stage mends it
            each.generation()


def _has_run(lineage: Lineage) -> bool:
    """Is every SAE of the recipe trained, encoded and judged?"""
    made = encode.runs_over(lineage.store, lineage.activations)
    runs = [member.features for member in lineage.members]
    return all(each in made for each in runs) and (lineage.recipe.is_sweep or (runs[0].path / "quality.json").is_file())


def _make_run(lineage: Lineage, progress: Progress, place: pipeline.Place) -> bool:
    """Train, encode and judge what is missing, unless another run is at that already."""
    for member in lineage.members:
        for each in (member.sae, member.features):
            if not is_free(each.slot):
                progress.say(f"ingest: another run is making {each.id}")
                return False
    now = lineage.anew()  # the corpus may have changed again
    pipeline.run(now, progress, place)
    if now.recipe.is_sweep:
        with place("encode"):
            pipeline.stages(now.recipe)["encode"](now, progress)
    return True


def _encode_new(lineage: Lineage, progress: Progress, place: pipeline.Place) -> dict[str, str]:
    """Let every published run over the recipe's activations hold all of them; those that cannot, and why."""
    store, waiting = lineage.store, {}
    for each in following(lineage):
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


def following(lineage: Lineage) -> list[Artefact]:
    """The published runs that new documents reach: all over the recipe's activations but, of each name of its own, the
    newest `schedule.keep_runs` and the recipe's own."""
    keep_runs = lineage.recipe.schedule.keep_runs
    every = encode.runs_over(lineage.store, lineage.activations)
    own = [member.features for member in lineage.members] if keep_runs else []
    of_name = {each.name: [run for run in every if run.name == each.name] for each in own}
    old = [run for runs in of_name.values() for run in runs[:-keep_runs]]
    return [run for run in every if run in own or run not in old]


def _published_folders(store: Store, held: list[Artefact]) -> dict[str, set[str]]:
    """The published parts of what an ingest adds parts to."""
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
