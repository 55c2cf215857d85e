"""A flow for each stage of a pipeline that has one, in the order in which they run."""

from __future__ import annotations

from typing import Any

from prefect import Flow, flow

from flows.support.reporting import counted, name_run, reporting, show_picture, show_rows, show_table
from flows.support.tasks import as_tasks, in_task, open_lineage, places
from saeflow.pipeline import collect, compact, encode, evaluate, import_table, report, sweep, tokens, train
from saeflow.pipeline.lineage import last_log_row
from saeflow.pipeline.parts import Through, directly
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe, require_one
from saeflow.runtime.progress import Progress


@flow(name="saeflow-tokens", flow_run_name="tokens {recipe.name}")
def tokens_flow(recipe: Recipe, store: str | None = None) -> str:
    """Tokenise the recipe's corpus and publish the tokens."""
    lineage = open_lineage(recipe, store)
    with reporting("tokens") as progress:
        made = in_task("tokenise", lambda: tokens.run(lineage, progress).id)
    generation = lineage.tokens.published()
    show_table("tokens", {count: generation.total(count) for count in ("n_documents", "n_tokens", "n_sequences")})
    name_run("tokens", counted(generation.total("n_tokens"), "token"))
    return made


@flow(name="saeflow-bring", flow_run_name="bring {recipe.name}")
def import_table_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the recipe's table, or its synthetic activations."""
    lineage = open_lineage(recipe, store)
    with reporting("bring") as progress:
        made = in_task("bring", lambda: import_table.run(lineage, progress)[1].id)
    show_table("bring", {"n_rows": lineage.activations.published().total("n_tokens")})
    return made


@flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
def collect_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the activations of every token part that has none yet, then publish."""
    return collect_as_tasks(recipe, store)


def collect_as_tasks(recipe: Recipe, store: str | None, around: Through = directly) -> str:
    """Do the work of the flow. `around`: put around the executor that the tasks call."""
    lineage = open_lineage(recipe, store)
    with reporting("collect") as progress, places(recipe)("collect"), as_tasks("collect", around) as through:
        target = collect.run(lineage, progress, through)
    made = target.published()
    n_bytes = sum(part.n_bytes for part in made.parts)
    show_table("collect", {"n_tokens": made.total("n_tokens"), "bytes": n_bytes})
    return target.id


@flow(name="saeflow-train", flow_run_name="train {recipe.name}")
def train_flow(recipe: Recipe, store: str | None = None) -> str:
    """Train on the stored activations, or continue where a killed training stood; a sweep is also judged and drawn."""
    lineage = open_lineage(recipe, store)
    one = "imported" if recipe.sae.source else f"{recipe.sae.architecture}, {counted(recipe.sae.n_features, 'feature')}"
    with reporting("train") as progress:
        name_run("train", counted(len(recipe.members()), "SAE") if recipe.is_sweep else one)
        with places(recipe)("train"):
            made = in_task("train", lambda: [target.id for target in train.run_all(lineage, progress)])
            if recipe.is_sweep:
                in_task("judge", lambda: len(sweep.run(lineage, progress)["saes"]))
    if recipe.is_sweep:
        show_rows("sweep", sweep.run(lineage, Progress(verbosity=-1))["saes"])
        show_picture("sweep", sweep.picture_of(lineage))
    else:
        show_table("train", last_log_row(lineage.sae))
    return made[0]


@flow(name="saeflow-encode", flow_run_name="encode {recipe.name}")
def encode_flow(recipe: Recipe, store: str | None = None) -> list[str]:
    """Encode every activation part that is not encoded yet, then publish; the SAEs of a sweep together."""
    return encode_as_tasks(recipe, store)


def encode_as_tasks(recipe: Recipe, store: str | None, around: Through = directly) -> list[str]:
    """Do the work of the flow. `around`: put around the executor that the tasks call."""
    lineage = open_lineage(recipe, store)
    with reporting("encode") as progress, places(recipe)("encode"), as_tasks("encode", around) as through:
        encode.run(lineage, progress, through)
    catalog.write_catalog(lineage.store)
    made = [member.features for member in lineage.members]
    totals = [target.published() for target in made]
    show_table("encode", {count: sum(each.total(count) for each in totals) for count in ("n_tokens", "n_values")})
    return [target.id for target in made]


@flow(name="saeflow-compact", flow_run_name="compact {recipe.name}")
def compact_flow(recipe: Recipe, store: str | None = None) -> int:
    """Merge what can be merged; returns the number of parts that are left."""
    lineage = open_lineage(recipe, store)
    with reporting("compact") as progress:
        compact.run(lineage, progress)
    n_parts = len(lineage.features.published().parts)
    catalog.write_catalog(lineage.store)
    show_table("compact", {"n_parts": n_parts})
    return n_parts


@flow(name="saeflow-evaluate", flow_run_name="evaluate {recipe.name}")
def evaluate_flow(recipe: Recipe, store: str | None = None) -> dict[str, float]:
    """Write the figures of quality and the picture beside the run's features."""
    require_one(recipe, "evaluate")
    lineage = open_lineage(recipe, store)
    with reporting("evaluate") as progress, places(recipe)("evaluate"):

        def judge() -> dict[str, Any]:
            quality = evaluate.run(lineage, progress)
            report.run(lineage, progress)
            return quality

        quality = in_task("evaluate", judge)
    catalog.write_catalog(lineage.store)
    show_table("evaluate", quality)
    return quality


FLOWS: dict[str, Flow[..., Any]] = {
    "tokens": tokens_flow, "collect": collect_flow, "bring": import_table_flow, "train": train_flow,
    "encode": encode_flow, "compact": compact_flow, "evaluate": evaluate_flow,
}  # fmt: skip
"""The flow of each stage that has its own."""
