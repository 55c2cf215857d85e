"""All stages of a recipe in order, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from saeflow.pipeline import collect, encode, evaluate, import_table, report, sweep, tokens, train
from saeflow.pipeline.dask import workers
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.memory import measure_usage
from saeflow.runtime.progress import Progress
from saeflow.store.records import read_checked
from saeflow.store.upgrade import upgrade

Stage = Callable[[Lineage, Progress], Any]

Place = Callable[[str], AbstractContextManager[None]]
"""Holds, while the stage of that name works, what it must not use together with others: a GPU."""


def anywhere(stage: str) -> AbstractContextManager[None]:
    """No stage waits for a place."""
    return nullcontext()


def devices_of(recipe: Recipe, stage: str) -> list[str]:
    """The settings of `device` by which a stage uses this machine; what a cluster's workers do is theirs."""
    model = [recipe.model.device] if recipe.model else []
    match stage:
        case "evaluate":
            return model
        case "collect" if recipe.cluster is None:
            return model
        case "train" if recipe.cluster is None:
            return [member.train.device for member in recipe.members()]
        case "encode" if recipe.cluster is None:
            return [recipe.features.device, *model]
    return []


def stages(recipe: Recipe) -> dict[str, Stage]:
    """The stages of this recipe by name, in order. Brought activations need no model; a sweep's SAEs are compared, and
    each encoded only when it is asked for. Raises UserError where training could not run here."""
    train.require_devices(recipe)
    first: dict[str, Stage] = {"tokens": tokens.run, "collect": collect.run}
    if recipe.model is None:
        first = {"bring": import_table.run}
    if recipe.is_sweep:
        return first | {"train": train.run_all, "evaluate": sweep.run}
    return first | {
        "train": train.run,
        "encode": _with_catalog(encode.run),
        "compact": _with_catalog(encode.compact),
        "evaluate": _with_catalog(evaluate.run),
        "report": report.run,
    }


def encode_all(lineage: Lineage, progress: Progress) -> None:
    """Encode every SAE of a sweep."""
    _with_catalog(encode.run_all)(lineage, progress)


def _with_catalog(stage: Stage) -> Stage:
    """A stage that changes what questions read: `catalog.sql` follows."""

    def run_stage(lineage: Lineage, progress: Progress) -> Any:
        found = stage(lineage, progress)
        catalog.write_catalog(lineage.store)
        return found

    return run_stage


def run(lineage: Lineage, progress: Progress, place: Place = anywhere) -> dict[str, Any]:
    """Run what is missing and return the summary."""
    taken = {}
    with workers.kept_open():
        for name, stage in stages(lineage.recipe).items():
            with place(name), measure_usage() as taken[name]:
                stage(lineage, progress)
    return summary(lineage) | {
        "seconds": {name: each.seconds for name, each in taken.items()},
        "peak_bytes": {name: each.peak_bytes for name, each in taken.items()},
    }


def compact(lineage: Lineage, progress: Progress, enough: int = 2, place: Place = anywhere) -> None:
    """Remove hidden documents from the newest generation of tokens and activations, and merge the parts of every
    published run over them, where at least `enough` can be."""
    store, recipe = lineage.store, lineage.recipe
    upgrade(store)
    train.set_threads(recipe)
    try:
        with workers.kept_open():
            if recipe.model is not None:
                _without_hidden(lineage, progress, place)
            for run in encode.runs_over(store, lineage.activations):
                with nullcontext() if encode.holds_all(store, run) else place("encode"):
                    encode.refresh(store, run, progress, recipe=recipe)
                encode.add_tables(store, run, recipe, progress)
                encode.merge_parts(store, run, recipe, progress, enough, mend=True)
    finally:
        catalog.write_catalog(store)


def _without_hidden(lineage: Lineage, progress: Progress, place: Place) -> None:
    source = lineage.tokens
    forget.compact(lineage.store, source, progress)
    for stored in (a for a in lineage.store.artefacts("activations") if source.id in a.record.inputs):
        if stored != lineage.activations:
            progress.say(f"compact: {stored.id} belongs to another recipe; compact that too")
    collect_new(lineage, progress, place)


def collect_new(lineage: Lineage, progress: Progress, place: Place) -> None:
    """Store the activations of what is new; where nothing is, no place is waited for."""
    source, stored = lineage.tokens.published(), lineage.activations.generation()
    done = {part.inputs.get("tokens") for part in stored.parts} if stored else set()
    with place("collect") if {part.folder for part in source.parts} - done else nullcontext():
        collect.run(lineage, progress)


def summary(lineage: Lineage) -> dict[str, Any]:
    """Documents, tokens, bytes, quality and non-zeros of a finished recipe; of a sweep its table."""
    about = {
        "run": lineage.recipe.name,
        "store": lineage.store.name,
        **forget.seen(lineage.tokens),
        "activation_bytes": sum(part.n_bytes for part in lineage.activations.published().parts),
    }
    if lineage.recipe.is_sweep:
        return about | {"sweep": sweep.run(lineage, Progress(verbosity=-1))}
    encoded = lineage.features
    return about | {
        "feature_bytes": sum(part.n_bytes for part in encoded.published().parts),
        "n_values": encoded.published().total("n_values"),
        "quality": read_checked(encoded.path / "quality.json"),
    }
