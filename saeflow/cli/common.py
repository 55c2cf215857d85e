"""Options, tables and errors that the commands share."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saeflow.runtime.errors import ToldElsewhere, UserError, first_line
from saeflow.runtime.temporary import NO_SPACE
from saeflow.runtime.terminal import Terminal, prepare_streams, printing_logs
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    from rich.table import Table

    from saeflow.recipe.recipe import Recipe
    from saeflow.runtime.progress import Progress
    from saeflow.runtime.ranks import Ranks
    from saeflow.store.store import Store

out = Terminal()
err = Terminal(stderr=True)


def print_line(text: str, style: str | None = None) -> None:
    """Print text to standard output. Long lines are not wrapped."""
    out.print(text, soft_wrap=True, style=style)


def print_note(text: str, style: str | None = None) -> None:
    """Print text to standard error. Long lines are not wrapped."""
    err.print(text, soft_wrap=True, style=style)


Format = Literal["table", "csv", "json", "jsonl", "parquet"]

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (TOML).")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Store folder. Default: SAEFLOW_STORE, else the recipe's, else data/store."),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print every setting too.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set sae.k=16.")
]
MemberOption = Annotated[
    str | None, typer.Option("--member", metavar="NAME", help="Only this SAE of the recipe's sweep.")
]


def _complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Return runs of the store named earlier on the line, for a shell that completes words. Prints nothing."""
    from saeflow.query.runs import runs
    from saeflow.store.store import Store, store_path

    with contextlib.suppress(UserError, OSError):
        store = Store.open(store_path(context.params.get("store")))
        return [run.schema for run in runs(store) if run.schema.startswith(incomplete)]
    return []


RunOption = Annotated[
    str | None, typer.Option("--run", help="Which run. Default: the newest.", autocompletion=_complete_run)
]


def new_table(*columns: str) -> Table:
    """Return an empty table with these columns, for `Terminal.print_table`. Only the last column may wrap."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number < len(columns) - 1)
    return table


def read_recipe(path: Path, changes: list[str] | None, member: str | None = None) -> Recipe:
    """Read a recipe with settings changed as KEY=VALUE, or one SAE of its sweep."""
    import tomllib

    from saeflow.recipe.recipe import load_recipe

    overrides = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"--set {change}: write it as KEY=VALUE, e.g. --set sae.k=16.")
        try:
            overrides[key] = tomllib.loads(f"v = {value}")["v"]
        except (ValueError, RecursionError):
            overrides[key] = value
    recipe = load_recipe(path, **overrides)
    return recipe if member is None else _sweep_member(recipe, member)


def _sweep_member(recipe: Recipe, name: str) -> Recipe:
    from saeflow.runtime.text import nearest

    members = {member.name: member for member in recipe.members()} if recipe.is_sweep else {}
    if name not in members:
        near = nearest(name, members) or list(members)[:3] or ["none: the recipe has no [sweep]"]
        raise UserError(f"{recipe.name} has no SAE {name!r} in its sweep. Nearest: {', '.join(near)}.")
    return members[name]


def require_place(path: Path) -> None:
    """Refuse an output file whose folder does not exist, before any work."""
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent} for {path.name}. Make it, or choose another.")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file in it.")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file beside `path` that takes its place once it is written whole: an answer never is half of one.

    A device or pipe is written itself.
    """
    from saeflow.store.files import replacing

    target = path.resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(target))
        try:
            yield temporary
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if target.exists():
            shutil.copymode(target, temporary)


def create_store(option: str | None, recipe: Recipe, quiet: bool) -> Store:
    """Open the store of the option or the recipe, and make it if there is none."""
    from saeflow.store.store import Store, store_path

    store = Store.create(store_path(option, recipe), recipe.overlap)
    if not quiet:
        print_note(f"store: {sanitise(store.name)}")
    return store


def existing_store(option: str | None) -> Store:
    """Open a store that exists, and print which one."""
    from saeflow.store.store import Store, store_path

    store = Store.open(store_path(option))
    print_note(f"store: {sanitise(store.name)}")
    return store


def store_argument(store: Store) -> str:
    """Return what a printed command needs to mean this store: ` --store …`, or nothing if SAEFLOW_STORE is set."""
    return sanitise(f" --store {shlex.quote(store.name)}") if "SAEFLOW_STORE" not in os.environ else ""


def progress_of(quiet: bool, verbose: bool, recipe: Recipe) -> Progress:
    from saeflow import __version__
    from saeflow.runtime.progress import Progress

    progress = Progress(err, -1 if quiet else int(verbose))
    progress.say(f"saeflow {__version__}, with every setting: {recipe.model_dump_json(exclude_none=True)}", 1)
    return progress


def are_several() -> bool:
    """True if `torchrun` has started several processes of this command."""
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys() and os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks | None]:
    """Join the processes of this command that `torchrun` has started, for the block; None if there is only this one."""
    if not are_several():
        yield None
        return
    from saeflow.runtime.ranks import joined

    with joined() as ranks:
        yield ranks


def _require_shareable_command(arguments: list[str]) -> None:
    if are_several() and arguments[:1] != ["train"]:
        raise UserError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, but they can share only `saeflow train`.\n"
            "Run this command without torchrun."
        )


def run_command_line(commands: typer.Typer, name: str) -> None:
    """Run the command that `sys.argv` names, and exit. An error that a user can fix is one message and exit code 2."""
    prepare_streams()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with printing_logs(err):
        try:
            code = exit_code_of(commands, name, arguments, debug)
        except Exception as error:  # with --debug
            print_note("".join(traceback.format_exception(error)).rstrip())
            code = 1
    sys.exit(code)


_INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def exit_code_of(commands: typer.Typer, name: str, arguments: list[str], debug: bool) -> int:
    """Run a command and return its exit code. Prints the message of an error that a user can fix."""
    command = typer.main.get_command(commands)
    try:
        _require_shareable_command(arguments)
        code = int(command.main(arguments, name, standalone_mode=False) or 0)
        if code == _INTERRUPTED:
            again = shlex.join([*name.split(), *arguments])
            print_note(f"\nStopped. Nothing finished is lost; continue with: {again}")
        return code
    except ToldElsewhere:
        return 2
    except UserError as error:
        if debug:
            raise
        print_note(str(error), style="red")
        return 2
    except Exception as error:
        if not debug and (message := _system_message(error)):
            print_note(message, style="red")
            return 2
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the command line itself was wrong
            shown = io.StringIO()
            error.show(shown)
            print_note(shown.getvalue().rstrip())
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _INTERRUPTED
        if debug:
            raise
        print_note(_fault_message(error), style="red")
        return 1


_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _fault_message(error: Exception) -> str:
    """Return a message for an error that nobody foresaw, with the innermost place of saeflow that it came from."""
    places = [f"{Path(each.filename).name}, line {each.lineno}" for each in traceback.extract_tb(error.__traceback__)]
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"saeflow failed, and it is not your fault: {what} ({places[-1]}).\n--debug shows more. Please report it."


def _system_message(error: Exception) -> str | None:
    """Return a message for an error that is about the disk or memory, or names a file."""
    if isinstance(error, RecursionError):
        return "A file or value is nested too deeply to be read."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        what = f"Memory does not suffice: {first_line(error)}."
        return f"{what}\nLower the sizes in the recipe, or take a larger machine."
    by_arrow = type(error).__module__ == "pyarrow.lib" or (isinstance(error, OSError) and error.errno is None)
    if isinstance(error, FileNotFoundError) or by_arrow:
        mend = "If it is the store's, mend it with `saeflow verify --full --repair`, then run the recipe again."
        return f"A file is missing or damaged: {first_line(error)}.\n{mend}"
    if isinstance(error, OSError):
        number, file = error.errno, error.filename
    else:  # libraries written in Rust give the number in their text
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, file = int(found[1]) if found else None, None
    what = os.strerror(number or 0) + (f" at {file}" if file else "")
    mend = "Free some space" if number in NO_SPACE else "Make it writable" if number in _CLOSED else "Look at the disk"
    if number in (*NO_SPACE, *_CLOSED, errno.EIO):
        return f"{what}. Finished parts are safe. {mend} or choose another --store, then run the same command again."
    return f"{what}. --debug shows where it was needed." if number and file else None
