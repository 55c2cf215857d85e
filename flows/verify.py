"""Flow: a share of the store read back and compared with its checksums. It fails where something is damaged."""

from __future__ import annotations

from prefect import flow
from pydantic import PositiveInt

from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.store import verify as integrity


@flow(name="saeflow-verify", flow_run_name="verify-{recipe.name}")
def verify_flow(recipe: Recipe, store: str | None = None, nights: PositiveInt = 7) -> int:
    """Read every byte of the next share of the store, and the sizes of the rest.

    Args:
        nights: After so many runs, whenever they are, the whole store has been read.
    """
    opened = open_store(recipe, store)
    share = integrity.next_share(opened, nights)
    with reporting("verify"):

        @part_task("verify")
        def read_back() -> list[str]:
            return [str(each) for each in integrity.verify(opened, False, share)]

        found = list(read_back())
        integrity.note_share(opened, share)
    show_table("verify", {"share": f"{share[0] + 1} of {nights}", "damaged": len(found)} | _named(found))
    if found:
        shown = "\n".join(found[:20])
        raise UserError(
            f"{len(found)} damaged in {opened.name}:\n{shown}\n"
            "Mend it with `saeflow verify --full --repair`; the next ingest makes again what had to be removed."
        )
    return share[0]


def _named(found: list[str]) -> dict[str, str]:
    return {f"damage {number}": each for number, each in enumerate(found[:20], 1)}
