"""The pipeline with a pause at each batch of one stage, so that there is a middle to be cancelled in.

python -m tests.slow_flows    serves it as the deployment `slow-pipeline/slow`
"""

from __future__ import annotations

import time

from prefect import flow, serve
from prefect.types.entrypoint import EntrypointType

from flows.pipeline import pipeline_flow
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Bar

PAUSE = 1.0


@flow(name="slow-pipeline")
def slow_pipeline(recipe: Recipe, store: str, bar: str) -> None:
    """Run the pipeline, pausing at each batch that the bar of this name counts."""
    advance = Bar.advance

    def slowly(self: Bar, n: int, note: str = "") -> None:
        if self.stage == bar:
            time.sleep(PAUSE)
        advance(self, n, note)

    Bar.advance = slowly  # type: ignore[method-assign]
    pipeline_flow(recipe, store)


if __name__ == "__main__":
    from tests.support import slow_flows

    deployment = slow_flows.slow_pipeline.to_deployment("slow", entrypoint_type=EntrypointType.MODULE_PATH)
    serve(deployment, query_seconds=1, pause_on_shutdown=False, print_starting_message=False)  # type: ignore[arg-type]
