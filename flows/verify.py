"""Flow: read back a share of the store and compare its checksums. Fails if something is damaged."""

from __future__ import annotations

from prefect import flow
from pydantic import PositiveInt

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.store import verify


@flow(name="saeflow-verify", flow_run_name="verify-{recipe.name}")
def verify_flow(recipe: Recipe, store: str | None = None, nights: PositiveInt = 7) -> int:
    """Read every byte of the next share of the store, and the sizes of the rest.

    Args:
        nights: Runs of this flow after which the whole store has been read.
    """
    opened = open_lineage(recipe, store).store
    share = verify.next_share(opened, nights)
    with reporting("verify"):
        found = in_task("verify", lambda: [str(each) for each in verify.verify(opened, False, share)])
        verify.note_share(opened, share)
    damage = {f"damage {number}": each for number, each in enumerate(found[:20], 1)}
    show_table("verify", {"share": f"{share[0] + 1} of {nights}", "damaged": len(found)} | damage)
    if found:
        shown = "\n".join(found[:20])
        raise UserError(
            f"{len(found)} damaged in {opened.name}:\n{shown}\n"
            "Mend it with `saeflow verify --full --repair`; the next ingest makes again what had to be removed."
        )
    return share[0]
