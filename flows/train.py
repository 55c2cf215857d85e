"""Flow: train the recipe's SAE, or all of a sweep. One task, which continues from its checkpoints when retried."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import counted, name_run, reporting, show_picture, show_rows, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline import sweep, train
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress


@flow(name="saeflow-train", flow_run_name="train {recipe.name}")
def train_flow(recipe: Recipe, store: str | None = None) -> str:
    """Train on the stored activations, or continue where a killed training stood; a sweep is also judged and drawn."""
    lineage = Lineage(open_store(recipe, store), recipe)
    one = "imported" if recipe.sae.source else f"{recipe.sae.architecture}, {counted(recipe.sae.n_features, 'feature')}"
    with reporting("train") as progress:
        name_run("train", counted(len(recipe.members()), "SAE") if recipe.is_sweep else one)

        @part_task("train")
        def train_saes() -> list[str]:
            return [target.id for target in train.run_all(lineage, progress)]

        with places(recipe)("train"):
            made = [str(each) for each in train_saes()]
            if recipe.is_sweep:
                _compare(lineage, progress)
    if not recipe.is_sweep:
        show_table("train", train.last_row(lineage.sae))
    return made[0]


def _compare(lineage: Lineage, progress: Progress) -> None:
    """Judge the SAEs of a sweep, all in one task, and show their table and picture."""

    @part_task("judge")
    def judge() -> int:
        return len(sweep.run(lineage, progress)["saes"])

    judge()
    table = sweep.run(lineage, Progress(verbosity=-1))  # what the task has written
    show_rows("sweep", table["saes"])
    show_picture("sweep", sweep.picture_of(lineage))
