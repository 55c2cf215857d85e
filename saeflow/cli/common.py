"""What the commands of `saeflow` share: options, tables, opening a store, and ending with a message a user can act
on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from saeflow import __version__
from saeflow.recipe.load import load_recipe
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import harmless_lines, sanitise
from saeflow.store.store import Store, store_path

if TYPE_CHECKING:
    import duckdb

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (TOML).")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="Store folder; else SAEFLOW_STORE, the recipe, data/store.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say every setting too.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set sae.k=16.")
]
MemberOption = Annotated[
    str | None, typer.Option("--member", metavar="NAME", help="Only this SAE of the recipe's sweep.")
]


def _run_names(context: typer.Context, incomplete: str) -> list[str]:
    """Runs of the store that is named before, for a shell that completes words: nothing is said where there is none."""
    from saeflow.query import ask

    with contextlib.suppress(UserError, OSError):
        store = Store.open(store_path(context.params.get("store")))
        return [run.schema for run in ask.runs(store) if run.schema.startswith(incomplete)]
    return []


RunOption = Annotated[
    str | None, typer.Option("--run", help="Which run; default: the newest.", autocompletion=_run_names)
]


def a_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    return table


def read_recipe(path: Path, changes: list[str] | None, member: str | None = None) -> Recipe:
    """The recipe, or one of its sweep."""
    import tomllib

    overrides = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"--set {change}: write it as KEY=VALUE, e.g. --set sae.k=16.")
        try:
            overrides[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            overrides[key] = value
    recipe = load_recipe(path, **overrides)
    return recipe if member is None else _member(recipe, member)


def _member(recipe: Recipe, name: str) -> Recipe:
    members = {member.name: member for member in recipe.members()} if recipe.is_sweep else {}
    if name not in members:
        near = difflib.get_close_matches(name, members, n=3, cutoff=0) or ["none: the recipe has no [sweep]"]
        raise UserError(f"{recipe.name} has no SAE {name!r} in its sweep. Nearest: {', '.join(near)}.")
    return members[name]


def require_place(path: Path) -> None:
    """Refuse a file to write whose folder is not there, before any work."""
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent} for {path.name}. Make it, or choose another.")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file in it.")


def create_store(option: str | None, recipe: Recipe, quiet: bool) -> Store:
    store = Store.create(store_path(option, recipe), recipe.overlap)
    if not quiet:
        err.print(f"store: {sanitise(store.name)}", markup=False, soft_wrap=True)
    return store


def open_store(option: str | None) -> Store:
    store = Store.open(store_path(option))
    err.print(f"store: {sanitise(store.name)}", markup=False, soft_wrap=True)
    return store


def where(store: Store) -> str:
    """What a printed command needs to mean this store."""
    return sanitise(f" --store {shlex.quote(store.name)}") if "SAEFLOW_STORE" not in os.environ else ""


@contextlib.contextmanager
def connection_to(option: str | None, run: str | None) -> Iterator[duckdb.DuckDBPyConnection]:
    from saeflow.query import ask

    with contextlib.closing(ask.connect(open_store(option), run)) as connection:
        yield connection


def progress_of(quiet: bool, verbose: bool, recipe: Recipe) -> Progress:
    progress = Progress(err, -1 if quiet else int(verbose))
    progress.say(f"saeflow {__version__}, with every setting: {recipe.model_dump_json(exclude_none=True)}", 1)
    return progress


def main(commands: typer.Typer, name: str) -> None:
    """Entry point: errors a user can mend end with one message and exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, terminated)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(guarded(commands, name, arguments, debug))


_INTERRUPTED = 130
"""What a command returns after Ctrl-C or SIGTERM."""


def terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def guarded(commands: typer.Typer, name: str, arguments: list[str], debug: bool) -> int:
    command = typer.main.get_command(commands)
    try:
        code = int(command.main(arguments, name, standalone_mode=False) or 0)
        if code == _INTERRUPTED:
            again = shlex.join([*name.split(), *arguments])
            err.print(f"\nStopped. Nothing finished is lost; continue with: {again}", markup=False, soft_wrap=True)
        return code
    except UserError as error:
        if debug:
            raise
        err.print(harmless_lines(str(error)), markup=False, soft_wrap=True, style="red")
        return 2
    except Exception as error:
        if not debug and (message := _system_message(error)):
            err.print(harmless_lines(message), markup=False, soft_wrap=True, style="red")
            return 2
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the command line itself was wrong
            error.show()
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _INTERRUPTED
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _system_error(error: Exception) -> int | None:
    """The system's number of an error; libraries written in Rust give it in their text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _system_message(error: Exception) -> str | None:
    """What the system refused, where it is about the disk or names a file."""
    number = _system_error(error)
    file = error.filename if isinstance(error, OSError) else None
    what = os.strerror(number or 0) + (f" at {file}" if file else "")
    mend = "Free some space" if number in _FULL else "Make it writable" if number in _CLOSED else "Look at the disk"
    if number in (*_FULL, *_CLOSED, errno.EIO):
        return f"{what}. Finished parts are safe. {mend} or choose another --store, then run the same command again."
    return f"{what}. --debug shows where it was needed." if number and file else None
