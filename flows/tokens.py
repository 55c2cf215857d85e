"""Flow: documents to token sequences. One task streams a run of parts; finished parts are not made again."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import counted, name_run, reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline import tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-tokens", flow_run_name="tokens {recipe.name}")
def tokens_flow(recipe: Recipe, store: str | None = None) -> str:
    """Tokenise the recipe's corpus and publish the tokens."""
    opened = open_store(recipe, store)
    with reporting("tokens") as progress:

        @part_task("tokenise")
        def tokenise() -> str:
            return tokens.run(Lineage(opened, recipe), progress).id

        made = str(tokenise())
    generation = opened.by_id(made).published()
    show_table("tokens", {count: generation.total(count) for count in ("n_documents", "n_tokens", "n_sequences")})
    name_run("tokens", counted(generation.total("n_tokens"), "token"))
    return made
