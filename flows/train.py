"""Flow: activations to SAEs."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import counted, name_run, reporting, show_picture, show_rows, show_table
from flows.support.tasks import in_task, open_lineage, places
from saeflow.pipeline import train
from saeflow.pipeline.judge import sweep
from saeflow.pipeline.lineage import last_log_row
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress


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
