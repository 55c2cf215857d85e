"""Flow: documents to tokens."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import counted, name_run, reporting, show_table
from flows.support.tasks import in_task, open_lineage
from saeflow.pipeline import tokens
from saeflow.recipe.recipe import Recipe


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
