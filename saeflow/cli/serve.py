"""The command that keeps pipelines going: `saeflow serve`. The only one that needs Prefect, which it loads when it is
typed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from saeflow.cli.common import Set, StoreOption, a_table, err, out, read_recipe
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.schedule import interval_of, next_time, once_a_store
from saeflow.store.store import Store, store_path

commands = typer.Typer()

_STAGES = ("ingest", "train", "compact", "verify", "gc")


@commands.command()
def serve(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files (TOML).")],
    store: StoreOption = None,
    set_: Set = None,
    limit: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 4,
    work_pool: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only create or refresh the deployments for this pool's workers, and end."),
    ] = None,
) -> None:
    """Run recipes on their [schedule] through Prefect until Ctrl-C. Example: `saeflow serve nightly.toml`"""
    settings = [read_recipe(path, set_) for path in recipes]
    stores = [Store.create(store_path(store, each)).name for each in settings]
    from flows import serve as server
    from flows.deployments import deployments

    with server.found() as url:
        wanted = deployments(settings, stores)
        server.prepare_server()
        _tell_others(server.others(wanted))
        if work_pool is not None:
            server.hand_to_workers(wanted, work_pool)
            out.print(
                f"{len(wanted)} deployments; their runs wait for a worker: prefect worker start --pool {work_pool}"
            )
            return
        _tell(recipes, settings, stores, server.page_url(url))
        at_once = {f"saeflow-ingest/{each.name}" for each in settings if interval_of(each.schedule.ingest)}
        server.work(wanted, at_once, limit, err.print)
    err.print("Stopped, and its runs with it. What is scheduled goes on when it is started again.")


def _tell_others(names: Sequence[str]) -> None:
    """A recipe that is no longer named leaves its deployments on the server."""
    if names:
        err.print(
            "Also on the server, and not served here. Their runs pile up if nobody else serves them; to delete them:"
        )
    for name in names:
        err.print(f"  prefect deployment delete {shlex.quote(name)}", markup=False, soft_wrap=True)


def _tell(paths: Sequence[Path], recipes: Sequence[Recipe], stores: Sequence[str], page: str) -> None:
    """What happens when, and where it can be seen."""
    table = a_table("recipe", "what", "when", "next")
    now = datetime.now(UTC)
    for recipe, about in zip(recipes, once_a_store([each.schedule for each in recipes], stores), strict=True):
        for stage in _STAGES:
            when = getattr(about, stage)
            following = next_time(when, about.timezone, now)
            if stage == "ingest" and interval_of(when):
                shown = "now"
            else:
                shown = f"{following:%Y-%m-%d %H:%M %Z}" if following else ""
            more = f", or grown by {about.train_growth:.0%}" if stage == "train" and about.train_growth else ""
            once = "" if when == getattr(recipe.schedule, stage) else " here: once a store"
            table.add_row(recipe.name, stage, f"{when}{once}{more}", shown)
    out.print(table)
    for path, place in zip(paths, stores, strict=True):
        out.print(f"{path}: store {place}", markup=False, soft_wrap=True)
    ask = f"saeflow ask --store {shlex.quote(stores[0])}"
    out.print(f"Seen at {page}, asked with `{ask}`. Ctrl-C ends it.", markup=False, soft_wrap=True)
