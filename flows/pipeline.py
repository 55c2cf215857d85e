"""Flow: everything, from text to SQL answers.

python -m flows.pipeline flows/recipes/demo.toml
"""

from __future__ import annotations

import os
import time
from typing import Any

if __name__ == "__main__":  # the terminal shows saeflow's own lines; a served flow keeps Prefect's
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

from prefect import flow

from flows.bring import bring_flow
from flows.collect import collect_flow
from flows.common import open_store, show_table
from flows.compact import compact_flow
from flows.encode import encode_flow
from flows.evaluate import evaluate_flow
from flows.tokens import tokens_flow
from flows.train import train_flow
from saeflow import cluster, pipeline, train
from saeflow.config import Recipe


@flow(name="saeflow-pipeline", flow_run_name="pipeline-{recipe.name}")
def pipeline_flow(recipe: Recipe, store: str | None = None) -> dict[str, Any]:
    """Run what is missing of every stage, in order, and return the summary."""
    train.require_devices(recipe)
    first: dict[str, Any] = {"tokens": tokens_flow, "collect": collect_flow} if recipe.model else {"bring": bring_flow}
    stages = first | {"train": train_flow}
    if not recipe.is_sweep:  # its SAEs are judged where they are trained, and encoded when one is asked for
        stages |= {"encode": encode_flow, "compact": compact_flow, "evaluate": evaluate_flow}
    seconds = {}
    with cluster.kept_open():
        for stage, stage_flow in stages.items():
            began = time.monotonic()
            stage_flow(recipe, store)
            seconds[stage] = time.monotonic() - began
    summary = pipeline.summary(open_store(recipe, store), recipe) | {"seconds": seconds}
    show_table("pipeline", {name: value for name, value in summary.items() if not isinstance(value, dict)})
    return summary


if __name__ == "__main__":
    from saeflow.commands_run import run_flow

    run_flow(pipeline_flow)
