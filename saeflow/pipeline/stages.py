"""All stages of a recipe in order, and a summary of the finished run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from saeflow.pipeline import collect, compact, encode, tokens, train
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.foreign import import_sae, import_table
from saeflow.pipeline.judge import evaluate, report, sweep
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.devices import choose_device
from saeflow.runtime.memory import measure_usage
from saeflow.runtime.progress import Progress
from saeflow.store.records import read_checked


@dataclass(frozen=True)
class Stage:
    """One step from texts to answers. Calling it does what is missing, on this machine or on the recipe's cluster."""

    does: Callable[[Lineage, Progress], Any]
    catalog: bool = False
    """True if the stage changes tables that questions read: `catalog.sql` is then written anew."""
    flow_of: str | None = None
    """The stage whose flow also does this one. None: it has a flow of its own."""
    on_request: bool = False
    """True if a run of the whole recipe leaves it out."""

    def __call__(self, lineage: Lineage, progress: Progress) -> Any:
        found = self.does(lineage, progress)
        if self.catalog:
            catalog.write_catalog(lineage.store)
        return found


Place = Callable[[str], AbstractContextManager[None]]
"""Holds a GPU, which flow runs must not share, while the stage of that name works."""


def anywhere(stage: str) -> AbstractContextManager[None]:
    return nullcontext()


def devices_of(recipe: Recipe, stage: str) -> list[str]:
    """Return the settings `device` of a stage that works on this machine. Workers of a cluster choose their own."""
    model = [recipe.model.device] if recipe.model else []
    devices = {"evaluate": model}
    if recipe.cluster is None:
        trained = [member.train.device for member in recipe.members()]
        tried = [] if recipe.activations.keep else model  # an SAE to import is tried on what the model gives
        devices |= {"collect": model, "train": trained + tried, "encode": [recipe.features.device, *model]}
    return devices.get(stage, [])


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """Return the stages of this recipe by name, in order. Raises UserError if this machine lacks a device to train on.

    Activations from a table need no model. A sweep's SAEs are compared, and encoded only on request.
    """
    for member in recipe.members() if recipe.cluster is None else ():
        choose_device("train.device", member.train.device)
    first = {"tokens": Stage(tokens.run), "collect": Stage(collect.run)}
    if recipe.model is None:
        first = {"bring": Stage(import_table.run)}
    if recipe.is_sweep:
        return first | {
            "train": Stage(train.run_all),
            "evaluate": Stage(sweep.run, flow_of="train"),
            "encode": Stage(encode.run, catalog=True, on_request=True),
        }
    return first | {
        "train": Stage(train.run),
        "encode": Stage(encode.run, catalog=True),
        "compact": Stage(compact.run, catalog=True),
        "evaluate": Stage(evaluate.run, catalog=True),
        "report": Stage(report.run, flow_of="evaluate"),
    }


def stages_of_run(recipe: Recipe) -> dict[str, Stage]:
    """Return the stages of a run of the whole recipe."""
    return {name: stage for name, stage in stages_of(recipe).items() if not stage.on_request}


def run(lineage: Lineage, progress: Progress, place: Place = anywhere) -> dict[str, Any]:
    """Do what is missing of every stage, in order, and return the summary."""
    taken = {}
    with kept_open():
        for name, stage in stages_of_run(lineage.recipe).items():
            with place(name), measure_usage() as taken[name]:
                stage(lineage, progress)
    return summary(lineage) | {
        "seconds": {name: each.seconds for name, each in taken.items()},
        "peak_bytes": {name: each.peak_bytes for name, each in taken.items()},
    }


def collect_new(lineage: Lineage, progress: Progress, place: Place) -> None:
    """Store activations of new tokens. Without new tokens, no place is waited for."""
    source, stored = lineage.tokens.published(), lineage.activations.generation()
    done = {part.inputs.get("tokens") for part in stored.parts} if stored else set()
    with place("collect") if {part.folder for part in source.parts} - done else nullcontext():
        collect.run(lineage, progress)


def summary(lineage: Lineage) -> dict[str, Any]:
    """Return documents, tokens, bytes, quality and non-zero values of a finished recipe, or the table of a sweep."""
    about = {
        "run": lineage.recipe.name,
        "store": lineage.store.name,
        **tokens.count_visible(lineage.tokens),
        "activation_bytes": sum(part.n_bytes for part in lineage.activations.published().parts),
    }
    if lineage.recipe.is_sweep:
        return about | {"sweep": sweep.run(lineage, Progress(verbosity=-1))}
    encoded, quality = lineage.features.published(), read_checked(lineage.features.path / "quality.json")
    return (
        about
        | evaluate.l0_missed(lineage, quality["l0"])
        | {
            "feature_bytes": sum(part.n_bytes for part in encoded.parts),
            "n_values": encoded.total("n_values"),
            "quality": quality,
            "doubts": import_sae.doubts_in_words(lineage.sae),
        }
    )
