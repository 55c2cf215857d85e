"""Compact a store: what was forgotten leaves the disk, runs follow, and small parts become larger ones."""

from __future__ import annotations

from contextlib import nullcontext

from saeflow.classes.annotations import erase_hidden_spans
from saeflow.pipeline import compact, encode
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.lifecycle.forget import erase_hidden_tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.stages import Place, anywhere, collect_new
from saeflow.query import catalog
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import use_threads
from saeflow.store.upgrade import upgrade


def compact_store(lineage: Lineage, progress: Progress, enough: int | None = 2, place: Place = anywhere) -> None:
    """Erase hidden documents, let every published run over these activations follow, and merge the runs' parts.

    Parts are merged where at least `enough` can be one; if it is None, level by level.
    """
    store, recipe = lineage.store, lineage.recipe
    upgrade(store)
    use_threads(recipe.threads)
    try:
        with kept_open():
            for each in dict.fromkeys([lineage, lineage.training]) if recipe.model else ():
                _without_hidden(each, progress, place)
            for run in encode.runs_over(store, lineage.activations):
                with nullcontext() if encode.holds_all(store, run) else place("encode"):
                    encode.refresh(store, run, progress, recipe=recipe)
                encode.add_tables(store, run, recipe, progress)
                compact.merge_parts(store, run, recipe, progress, enough, mend=True)
    finally:
        catalog.write_catalog(store)


def _without_hidden(lineage: Lineage, progress: Progress, place: Place) -> None:
    source = lineage.tokens
    erase_hidden_tokens(source, progress)
    erase_hidden_spans(lineage.store, source, progress)
    for stored in (a for a in lineage.store.artefacts("activations") if source.id in a.record.inputs):
        if stored != lineage.activations:
            progress.say(f"compact: {stored.id} belongs to another recipe; compact that too")
    collect_new(lineage, progress, place)
