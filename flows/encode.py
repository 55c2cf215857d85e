"""Flow: stored activations through trained SAEs to Parquet, one task a part or run of parts."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import make_parts, open_store
from saeflow.pipeline import encode
from saeflow.pipeline.dask import workers
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-encode", flow_run_name="encode {recipe.name}")
def encode_flow(recipe: Recipe, store: str | None = None) -> list[str]:
    """Encode every activation part that is not encoded yet, then publish; the SAEs of a sweep together."""
    lineage = Lineage(open_store(recipe, store), recipe)
    with reporting("encode") as progress, places(recipe)("encode"), workers.kept_open():
        for group in encode.by_site(lineage):
            with encode.encoding_together(group, progress) as job:
                n_here = job.n_calls or encode.n_at_once(recipe.features, recipe.threads)
                make_parts("encode", job, progress, n_here)
    catalog.write_catalog(lineage.store)
    made = [member.features for member in lineage.members]
    totals = [target.published() for target in made]
    show_table("encode", {count: sum(each.total(count) for each in totals) for count in ("n_tokens", "n_values")})
    return [target.id for target in made]
