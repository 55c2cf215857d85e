"""All stages of a recipe in order, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from saeflow.pipeline import collect, encode, evaluate, import_table, report, sweep, tokens, train
from saeflow.pipeline import compact as merging
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.memory import measure_usage
from saeflow.runtime.progress import Progress
from saeflow.store.records import read_checked
from saeflow.store.upgrade import upgrade


@dataclass(frozen=True)
class Stage:
    """One step from texts to answers. Calling it does what is missing, on this machine or on the recipe's cluster."""

    does: Callable[[Lineage, Progress], Any]
    catalog: bool = False
    """True if the stage changes what questions read: `catalog.sql` is then written anew."""
    flow_of: str | None = None
    """The stage whose flow does this one as well. None: it has a flow of its own."""
    on_request: bool = False
    """True if a run of the whole recipe leaves it out."""

    def __call__(self, lineage: Lineage, progress: Progress) -> Any:
        found = self.does(lineage, progress)
        if self.catalog:
            catalog.write_catalog(lineage.store)
        return found


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
    """The stages of this recipe by name, in order. Raises UserError if this machine is to train, but lacks the device.

    Activations from a table need no model. A sweep's SAEs are compared, and encoded only on request.
    """
    train.require_devices(recipe)
    first = {"tokens": Stage(tokens.run), "collect": Stage(collect.run)}
    if recipe.model is None:
        first = {"bring": Stage(import_table.run)}
    if recipe.is_sweep:
        return first | {
            "train": Stage(train.run_all),
            "evaluate": Stage(sweep.run, flow_of="train"),
            "encode": Stage(encode.run_all, catalog=True, on_request=True),
        }
    return first | {
        "train": Stage(train.run),
        "encode": Stage(encode.run, catalog=True),
        "compact": Stage(merging.run, catalog=True),
        "evaluate": Stage(evaluate.run, catalog=True),
        "report": Stage(report.run, flow_of="evaluate"),
    }


def stages_of_run(recipe: Recipe) -> dict[str, Stage]:
    """The stages that a run of the whole recipe goes through."""
    return {name: stage for name, stage in stages(recipe).items() if not stage.on_request}


def run(lineage: Lineage, progress: Progress, place: Place = anywhere) -> dict[str, Any]:
    """Run what is missing and return the summary."""
    taken = {}
    with kept_open():
        for name, stage in stages_of_run(lineage.recipe).items():
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
        with kept_open():
            if recipe.model is not None:
                _without_hidden(lineage, progress, place)
            for run in encode.runs_over(store, lineage.activations):
                with nullcontext() if encode.holds_all(store, run) else place("encode"):
                    encode.refresh(store, run, progress, recipe=recipe)
                encode.add_tables(store, run, recipe, progress)
                merging.merge_parts(store, run, recipe, progress, enough, mend=True)
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
