"""`saeflow serve`: keep pipelines going on a schedule. The only command that needs Prefect."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from saeflow.cli.common import Set, StoreOption, err, new_table, out, print_line, print_note, read_recipe
from saeflow.runtime.errors import UserError

if TYPE_CHECKING:
    from saeflow.recipe.recipe import Recipe

serve_commands = typer.Typer()

_SCHEDULED = ("ingest", "train", "compact", "verify", "gc")
_ENTRY_POINTS = "saeflow.orchestrators"


class Orchestrator(Protocol):
    """Starts flows when they are due. An installed package offers one as an entry point of saeflow.orchestrators."""

    def found(self) -> AbstractContextManager[str]:
        """Use the server inside the block. The block gets the URL of its API. Raises UserError if none answers."""

    def deployments(self, recipes: Sequence[Recipe], stores: Sequence[str]) -> Sequence[Any]:
        """The deployments of these recipes, each for its store."""

    def prepare_server(self) -> None:
        """Set on the server what all deployments share."""

    def others(self, wanted: Sequence[Any]) -> list[str]:
        """Names of other deployments of saeflow that are on the server."""

    def hand_to_workers(self, wanted: Sequence[Any], pool: str) -> None:
        """Create or refresh the deployments for the workers of a pool."""

    def page_url(self, url: str) -> str:
        """Where people see the server with this API."""

    def work(
        self, wanted: Sequence[Any], at_once: Iterable[str], limit: int | None, say: Callable[[str], None]
    ) -> None:
        """Start the runs that are due until SIGTERM or Ctrl-C; deployments named in `at_once` also run now."""


def orchestrator(installed: Callable[..., Iterable[Any]] | None = None) -> Orchestrator:
    """Return the orchestrator that is installed with saeflow. Raises UserError if there is none."""
    from importlib.metadata import entry_points

    for entry in (installed or entry_points)(group=_ENTRY_POINTS):
        found: Orchestrator = entry.load()
        return found
    raise UserError(
        f"saeflow serve needs the flows of saeflow, but this installation names none (entry point {_ENTRY_POINTS}).\n"
        "Install saeflow again: `pip install --no-deps --editable .` in a clone, or `make ready`."
    )


@serve_commands.command("serve")
def serve_command(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files (TOML).")],
    store: StoreOption = None,
    set_: Set = None,
    limit: Annotated[int, typer.Option(min=1, help="Most runs at once.")] = 4,
    work_pool: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only create or refresh the deployments for this pool's workers, then end."),
    ] = None,
) -> None:
    """Run recipes on their [schedule] through Prefect until Ctrl-C.

    Example: `saeflow serve nightly.toml`
    """
    from saeflow.recipe.schedule import interval_of
    from saeflow.store.store import Store, store_path

    settings = [read_recipe(path, set_) for path in recipes]
    stores = [Store.create(store_path(store, each)).name for each in settings]
    server = orchestrator()
    with server.found() as url:
        wanted = server.deployments(settings, stores)
        server.prepare_server()
        _name_strangers(server.others(wanted))
        if work_pool is not None:
            server.hand_to_workers(wanted, work_pool)
            out.print(
                f"{len(wanted)} deployments; their runs wait for a worker: prefect worker start --pool {work_pool}"
            )
            return
        _print_schedule(recipes, settings, stores, server.page_url(url))
        at_once = {f"saeflow-ingest/{each.name}" for each in settings if interval_of(each.schedule.ingest)}
        server.work(wanted, at_once, limit, err.print)
    err.print("Stopped, and its runs with it. Start it again to go on with the schedule.")


def _name_strangers(names: Sequence[str]) -> None:
    """Print deployments on the server that nobody serves here, such as those of recipes no longer named."""
    if names:
        err.print(
            "Also on the server, and not served here. Their runs pile up if nobody else serves them; to delete them:"
        )
    for name in names:
        print_note(f"  prefect deployment delete {shlex.quote(name)}")


def _print_schedule(paths: Sequence[Path], recipes: Sequence[Recipe], stores: Sequence[str], page: str) -> None:
    """Print what happens when, and where to watch it."""
    from saeflow.recipe.schedule import interval_of, next_time, once_a_store

    table = new_table("recipe", "what", "when", "next")
    now = datetime.now(UTC)
    for recipe, about in zip(recipes, once_a_store([each.schedule for each in recipes], stores), strict=True):
        for stage in _SCHEDULED:
            when = getattr(about, stage)
            following = next_time(when, about.timezone, now)
            if stage == "ingest" and interval_of(when):
                shown = "now"
            else:
                shown = f"{following:%Y-%m-%d %H:%M %Z}" if following else ""
            more = f", or grown by {about.train_growth:.0%}" if stage == "train" and about.train_growth else ""
            once = "" if when == getattr(recipe.schedule, stage) else " here: once a store"
            table.add_row(recipe.name, stage, f"{when}{once}{more}", shown)
    out.print_table(table, may_go=("when",))
    for path, place in zip(paths, stores, strict=True):
        print_line(f"{path}: store {place}")
    ask = f"saeflow ask --store {shlex.quote(stores[0])}"
    print_line(f"Watch it at {page}. Ask it with `{ask}`. Ctrl-C ends it.")
