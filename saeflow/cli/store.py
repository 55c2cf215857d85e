"""Commands about what a store holds: list, show, check, forget, clear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from saeflow.cli.common import (
    Quiet,
    RecipePath,
    Set,
    StoreOption,
    Verbose,
    a_table,
    create_store,
    err,
    open_store,
    out,
    progress_of,
    read_recipe,
    where,
)
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import human_bytes, sanitise
from saeflow.store.artefact import Artefact
from saeflow.store.records import KINDS, PartRecord, read_checked
from saeflow.store.store import Store, store_path

if TYPE_CHECKING:
    from saeflow.pipeline.forget import Forgotten

commands = typer.Typer()

GRACE_HOURS = 24
"""For so long a replaced generation is kept for its readers."""


@commands.command()
def ls(store: StoreOption = None) -> None:
    """List what the store holds. Example: `saeflow ls --store data/store`"""
    opened = open_store(store)
    table = a_table("artefact", "generation", "parts", "tokens", "size", "inputs")
    for artefact in opened.artefacts():
        table.add_row(_cell(artefact.id), *_state(artefact), _cell(", ".join(artefact.record.inputs)))
    out.print(table)


def _cell(text: object) -> str:
    return escape(sanitise(str(text)))


def _state(artefact: Artefact) -> tuple[str, str, str, str]:
    """Generation, parts, tokens, and the size of what readers see, as its records say: a store has millions of
    files."""
    if artefact.kind == "saes":
        return ("whole" if artefact.complete() else "damaged"), "-", "-", _size(artefact, ())
    generation = artefact.generation()
    if generation is None:
        parts = artefact.parts().values()
        return "unfinished", str(len(parts)), "-", _size(artefact, parts)
    n_tokens = f"{generation.total('n_tokens'):,}"
    return str(generation.number), str(len(generation.parts)), n_tokens, _size(artefact, generation.parts)


def _size(artefact: Artefact, parts: Iterable[PartRecord]) -> str:
    n_bytes = sum(part.n_bytes for part in parts) + sum(file.n_bytes for file in artefact.record.files)
    return human_bytes(n_bytes)


@commands.command()
def show(
    name: Annotated[str, typer.Argument(help="An artefact as `saeflow ls` names it, or the name of a run.")],
    store: StoreOption = None,
) -> None:
    """Show an artefact: its settings, inputs, parts and quality. Example: `saeflow show demo`"""
    artefact = _find(open_store(store), name)
    out.print(f"{sanitise(artefact.id)}\n{sanitise(str(artefact.path))}", markup=False)
    table = a_table("setting", "value")
    for key, value in sorted(artefact.record.facts.items()):
        table.add_row(_cell(key), _cell(value))
    for name in artefact.record.inputs:
        table.add_row("reads", _cell(name))
    quality = artefact.path / "quality.json"
    for key, value in (read_checked(quality) if quality.is_file() else {}).items():
        table.add_row(_cell(key), f"{value:.4f}" if isinstance(value, float) else _cell(value))
    out.print(table)


def _find(store: Store, name: str) -> Artefact:
    import difflib

    artefacts = store.artefacts(*KINDS)[::-1]  # runs before what they read, the newest first
    for artefact in artefacts:
        full_names = (f"{artefact.name}{sign}{artefact.fp}" for sign in "-_")
        if name in (artefact.id, artefact.name, *full_names):
            return artefact
    known = [artefact.id for artefact in artefacts]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.2)
    raise UserError(f"{store.name} has no artefact {name!r}. Nearest: {', '.join(near) or 'none'}. See `saeflow ls`.")


@commands.command()
def verify(
    store: StoreOption = None,
    full: Annotated[bool, typer.Option("--full", help="Read every byte, and run the SQL checks.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged parts, so that the next run makes them again.")
    ] = False,
    share: Annotated[
        str | None,
        typer.Option(metavar="1/N", help="Read every byte of today's share; on N days in a row, of the whole store."),
    ] = None,
) -> None:
    """Check that nothing published is missing or changed. Example: `saeflow verify --full`"""
    today = _share_of_today(share)
    from saeflow.store import verify as integrity

    opened = Store.find(store_path(store)) if repair else open_store(store)
    if repair and (said := integrity.mend_marker(opened)):
        out.print(sanitise(said), markup=False, soft_wrap=True)
    found = list(integrity.verify(opened, full, today))
    for each in found:
        out.print(sanitise(f"damaged: {each}"), markup=False, soft_wrap=True)
    for said in integrity.mend(found) if repair else []:
        err.print(sanitise(said), markup=False, soft_wrap=True)
    broken = _run_checks(opened) if full and not found else []
    for name, n_rows in broken:
        out.print(sanitise(f"check {name}: {n_rows} offending rows"), markup=False)
    if repair and found:
        out.print("What had to be removed is made again by the next run: saeflow run RECIPE")
    elif found:
        raise UserError("Mend it with `saeflow verify --full --repair`, then run the recipe again: the rest is kept.")
    elif broken:
        raise UserError("The feature files do not agree. Remove the run's folder and run the recipe again.")
    else:
        said = f"{len(opened.artefacts())} artefacts in {opened.name}: nothing missing, nothing changed"
        out.print(sanitise(said), markup=False, soft_wrap=True)


@commands.command()
def forget(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys of documents; see the view `documents`.")],
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Hide documents at once, in every view and feed. Example: `saeflow forget letters/017 letters/018`"""
    from saeflow.pipeline.forget import forget as hide
    from saeflow.query import catalog

    opened = Store.open(store_path(store))
    done = hide(opened, keys, Progress(err, -1 if quiet else 0))
    catalog.write(opened)
    for line in [] if quiet else _told(done):
        out.print(sanitise(line), markup=False, soft_wrap=True)
    for name, why in done.waiting.items():
        said = f"{name}: parts with them are left out of every answer until encoded again: {why}"
        err.print(sanitise(said), markup=False, soft_wrap=True)


def _told(done: Forgotten) -> Iterator[str]:
    yield from (f"{key!r} is forgotten already" for key in done.already)
    yield from (f"{name}: {n} documents hidden" for name, n in done.documents.items())
    yield from (f"{name}: their values removed" for name in done.runs)
    for name in done.saes:
        yield f"{name}: was trained on them; train anew with `saeflow train RECIPE --fresh`"
    yield from (f"{name}: was not trained on them, they were held out" for name in done.held_out_only)
    if done.documents or done.runs:
        yield "Remove them from the disk: saeflow compact RECIPE, then saeflow gc --grace 0 --yes"


@commands.command()
def compact(
    recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Rewrite the parts that still hold forgotten or replaced documents. Example: `saeflow compact my.toml`"""
    settings = read_recipe(recipe, set_)
    opened, progress = create_store(store, settings, quiet), progress_of(quiet, verbose, settings)
    from saeflow.pipeline import run as pipeline

    pipeline.compact(opened, settings, progress)
    if not quiet:
        said = (
            f"The old files go after {GRACE_HOURS} hours with: saeflow gc --yes; now with: saeflow gc --grace 0 --yes"
        )
        err.print(sanitise(said), markup=False, soft_wrap=True)


@commands.command()
def upgrade(store: StoreOption = None) -> None:
    """Bring a store of an earlier format up to date; nothing is computed again. Example: `saeflow upgrade`"""
    from saeflow.store import verify as integrity

    opened = Store.open(store_path(store))
    for line in integrity.upgrade(opened):
        out.print(sanitise(line), markup=False, soft_wrap=True)


@commands.command()
def gc(
    store: StoreOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Hours for which a replaced generation is kept for its readers.")
    ] = GRACE_HOURS,
) -> None:
    """List what nobody can read any more; remove it with --yes. Example: `saeflow gc --yes`"""
    from saeflow.query import catalog
    from saeflow.store import garbage

    opened = open_store(store)
    done = garbage.collect(opened, grace * 3600, remove=yes)
    for each in done.garbage:
        out.print(sanitise(f"{each.path}  {human_bytes(each.n_bytes)}  {each.why}"), markup=False, soft_wrap=True)
    if yes and done.garbage:
        catalog.write(opened)
    again = f"saeflow gc{'' if grace == GRACE_HOURS else f' --grace {grace:g}'} --yes{where(opened)}"
    said = "removed" if yes else "to remove" if not done.garbage else f"to remove with `{again}`"
    out.print(
        f"{len(done.garbage)} files and folders, {human_bytes(done.n_bytes)} {said}", markup=False, soft_wrap=True
    )
    if done.n_bytes_kept:
        later = f"{human_bytes(done.n_bytes_kept)} more after {grace:g} hours; now with --grace 0"
        out.print(later, markup=False, soft_wrap=True)
    for why in done.left_alone:
        err.print(sanitise(f"left alone: {why}"), markup=False, soft_wrap=True)


def _share_of_today(text: str | None) -> tuple[int, int] | None:
    from saeflow.store.verify import share_of_day

    if text is None:
        return None
    one, _, n = text.partition("/")
    if one != "1" or not n.isascii() or not n.isdigit() or int(n) == 0:
        raise UserError(
            f"--share is {text!r}. Write it as 1/N, e.g. --share 1/7: a seventh today, all of it in a week."
        )
    return share_of_day(int(n), date.today())


def _run_checks(store: Store) -> list[tuple[str, int]]:
    from saeflow.query import ask

    broken = []
    for each in (run for run in ask.runs(store) if run.problem is None):
        with contextlib.closing(ask.connect(store, each.artefact.id)) as connection:
            broken += [(f"{each.schema}.{name}", len(rows)) for name, rows in ask.check(connection) if len(rows)]
    return broken
