"""Commands about what a store holds: list, show, check, forget, clear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import (
    Quiet,
    RecipePath,
    Set,
    StoreOption,
    Verbose,
    create_store,
    err,
    existing_store,
    new_table,
    out,
    print_line,
    print_note,
    progress_of,
    read_recipe,
    store_argument,
)
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import human_bytes, sanitise

if TYPE_CHECKING:
    from saeflow.pipeline.lifecycle.forget import Forgotten
    from saeflow.store.artefact import Artefact
    from saeflow.store.records import PartRecord
    from saeflow.store.store import Store

store_commands = typer.Typer()

GRACE_HOURS = 24
"""Hours to keep a replaced generation for readers that still use it."""


@store_commands.command("ls")
def ls_command(store: StoreOption = None) -> None:
    """List what the store holds.

    Example: `saeflow ls --store data/store`
    """
    opened = existing_store(store)
    table = new_table("artefact", "generation", "parts", "tokens", "size", "inputs")
    artefacts = opened.artefacts()
    for artefact in artefacts:
        table.add_row(sanitise(artefact.id), *state_in_words(artefact), sanitise(", ".join(artefact.record.inputs)))
    out.print_table(table, may_go=("inputs", "parts", "generation", "tokens", "size"))
    for artefact in artefacts:
        if engine := artefact.record.facts.get("engine"):
            print_line(f"{sanitise(artefact.id)} was made by {sanitise(str(engine))}")


def state_in_words(artefact: Artefact) -> tuple[str, str, str, str]:
    """Return generation, parts, tokens, and the size of what readers see.

    Only records are read, because a store may hold millions of files.
    """
    from saeflow.store.records import WHOLE_KINDS

    if artefact.kind in WHOLE_KINDS:
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


@store_commands.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="An artefact, named as in `saeflow ls`, or the name of a run.")],
    store: StoreOption = None,
) -> None:
    """Show an artefact: its settings, inputs, parts and quality.

    Example: `saeflow show demo`
    """
    from saeflow.store.records import read_checked

    opened = existing_store(store)
    artefact = _find_artefact(opened, name)
    print_line(f"{sanitise(artefact.id)}\n{sanitise(str(artefact.path))}")
    table = new_table("setting", "value")
    for key, value in sorted(artefact.record.facts.items()):
        table.add_row(sanitise(key), sanitise(str(value)))
    for name in artefact.record.inputs:
        table.add_row("reads", sanitise(name))
    if left_out := _left_out(opened, artefact):
        table.add_row("left out", sanitise(left_out))
    quality = artefact.path / "quality.json"
    for key, value in (read_checked(quality) if quality.is_file() else {}).items():
        table.add_row(sanitise(key), f"{value:.4f}" if isinstance(value, float) else sanitise(str(value)))
    out.print_table(table)
    for doubt in _doubts_of_import(opened, artefact):
        out.print(sanitise(doubt), style="yellow")


def _left_out(store: Store, artefact: Artefact) -> str:
    """Return how many tokens a run leaves out; empty for other artefacts, and if its records cannot be read."""
    from saeflow.features.left_out import left_out_in_words

    with contextlib.suppress(UserError, OSError):
        if artefact.kind == "features":
            return left_out_in_words(artefact, store.input_of(artefact, "tokens"))
    return ""


def _doubts_of_import(store: Store, artefact: Artefact) -> list[str]:
    """Return what was odd about an imported SAE, or about that of a run; empty for others."""
    from saeflow.pipeline.foreign.import_sae import doubts_in_words

    with contextlib.suppress(UserError, OSError):
        if artefact.kind in ("saes", "features"):
            return doubts_in_words(artefact if artefact.kind == "saes" else store.input_of(artefact, "saes"))
    return []


def _find_artefact(store: Store, name: str) -> Artefact:
    from saeflow.runtime.text import nearest
    from saeflow.store.records import BESIDE, KINDS

    kinds = sorted(KINDS, key=lambda kind: kind not in BESIDE)
    artefacts = store.artefacts(*kinds)[::-1]  # runs before what they read and what belongs to them, the newest first
    for artefact in artefacts:
        full_names = (f"{artefact.name}{sign}{artefact.fp}" for sign in "-_")
        if name in (artefact.id, artefact.name, *full_names):
            return artefact
    ids = {artefact.id: artefact for artefact in artefacts}
    near = nearest(name, ids) or [full for full, each in ids.items() if nearest(name, [each.name])][:3]
    raise UserError(f"{store.name} has no artefact {name!r}. Nearest: {', '.join(near) or 'none'}. See `saeflow ls`.")


@store_commands.command("verify")
def verify_command(
    store: StoreOption = None,
    full: Annotated[bool, typer.Option("--full", help="Read every byte, and run the SQL checks.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move damaged parts aside, so that the next run makes them again.")
    ] = False,
    share: Annotated[
        str | None,
        typer.Option(metavar="1/N", help="Read every byte of a share that changes daily: the whole store in N days."),
    ] = None,
) -> None:
    """Check that nothing published is missing or changed.

    Example: `saeflow verify --full`
    """
    today = _share_of_today(share)
    from saeflow.store import verify as integrity
    from saeflow.store.store import Store, store_path

    opened = Store.find(store_path(store)) if repair else existing_store(store)
    for mend in (integrity.repair_marker, integrity.repair_forgotten) if repair else ():
        if line := mend(opened):
            print_line(sanitise(line))
    found = list(integrity.verify(opened, full, today))
    for each in found:
        print_line(sanitise(f"{'not read' if each.refused else 'damaged'}: {each}"))
    for line in integrity.repair_all(found) if repair else []:
        print_note(sanitise(line))
    broken = _run_checks(opened) if full and not found else []
    for name, n_rows in broken:
        out.print(sanitise(f"check {name}: {n_rows} offending rows"))
    if repair and found:
        out.print("The next run makes again what was moved into damaged/: saeflow run RECIPE")
    elif found and all(each.refused for each in found):
        raise UserError("Not everything could be read, so nobody knows whether it is whole. Nothing was changed.")
    elif found:
        raise UserError("Repair it with `saeflow verify --full --repair`, then run the recipe again: the rest is kept.")
    elif broken:
        raise UserError("The feature files do not agree. Remove the run's folder and run the recipe again.")
    else:
        print_line(sanitise(f"{len(opened.artefacts())} artefacts in {opened.name}: nothing missing, nothing changed"))


@store_commands.command("forget")
def forget_command(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys of documents; see the view `documents`.")],
    store: StoreOption = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let forgotten documents come in again.")] = False,
    quiet: Quiet = False,
) -> None:
    """Hide documents at once, in every view and in training. No recipe of the store takes them in again.

    Documents with the same text are hidden, too.

    Example: `saeflow forget letters/017 letters/018`
    """
    from saeflow.pipeline.lifecycle.forget import forget, remember
    from saeflow.query import catalog
    from saeflow.runtime.progress import Progress
    from saeflow.store.store import Store, store_path

    opened = Store.open(store_path(store))
    if undo:
        back = remember(opened, keys)
        for name, n in back.items():
            print_line(sanitise(f"{name}: {n} documents may come in again"))
        print_line("They are read from the corpus by the next run: saeflow run RECIPE")
        return
    done = forget(opened, keys, Progress(err, -1 if quiet else 0))
    catalog.write_catalog(opened)
    for line in [] if quiet else _describe_forgotten(done):
        print_line(sanitise(line))
    for name, why in done.waiting.items():
        print_note(
            sanitise(
                f"{name}: values of their parts are left out of every answer. Where parts are compacted, statistics of "
                "features (counts, sums, maxima, histograms, coactivation) still count them.\n"
                f"Make both new with `saeflow encode RECIPE`. It cannot be done now: {why}"
            )
        )


def _describe_forgotten(done: Forgotten) -> Iterator[str]:
    yield from (f"{key!r} is forgotten already" for key in done.already)
    yield from (f"{name}: {n} documents hidden" for name, n in done.documents.items())
    if done.same_texts:
        yield f"{done.same_texts} of them have other keys, and the text of one that was named"
    yield from (f"{name}: their values removed" for name in done.runs)
    for name in done.saes:
        yield f"{name}: was trained on them; train anew with `saeflow train RECIPE --fresh`"
    yield from (f"{name}: was not trained on them, they were held out" for name in done.held_out_only)
    if done.explanations:
        yield f"{done.explanations} explanations or scores quoted them and were removed: run saeflow explain again"
    if done.documents or done.runs:
        yield "Remove them from the disk: saeflow compact RECIPE, then saeflow gc --grace 0 --yes"


@store_commands.command("compact")
def compact_command(
    recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Take forgotten and replaced documents off the disk, and merge the parts of every run.

    Adds the sample and the statistics that parts of an earlier saeflow lack.

    Example: `saeflow compact my.toml`
    """
    settings = read_recipe(recipe, set_)
    opened, progress = create_store(store, settings, quiet), progress_of(quiet, verbose, settings)
    from saeflow.pipeline.lifecycle.tidy import compact_store
    from saeflow.pipeline.lineage import Lineage

    compact_store(Lineage(opened, settings), progress)
    if not quiet:
        later, now = "saeflow gc --yes", "saeflow gc --grace 0 --yes"
        print_note(f"The old files go after {GRACE_HOURS} hours with: {later}; now with: {now}")


@store_commands.command("upgrade")
def upgrade_command(store: StoreOption = None) -> None:
    """Bring a store of an earlier format up to date. Nothing is computed again.

    Example: `saeflow upgrade`
    """
    from saeflow.store.store import Store, store_path
    from saeflow.store.upgrade import upgrade

    for line in upgrade(Store.open(store_path(store))):
        print_line(sanitise(line))


@store_commands.command("gc")
def gc_command(
    store: StoreOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Hours to keep a replaced generation for readers that still use it.")
    ] = GRACE_HOURS,
) -> None:
    """List files that nobody can read any more; with --yes, remove them.

    Example: `saeflow gc --yes`
    """
    from saeflow.query import catalog
    from saeflow.store import garbage

    opened = existing_store(store)
    done = garbage.collect_garbage(opened, grace * 3600, remove=yes)
    for each in done.garbage:
        print_line(sanitise(f"{each.path}  {human_bytes(each.n_bytes)}  {each.why}"))
    if yes and done.garbage:
        catalog.write_catalog(opened)
    again = f"saeflow gc{'' if grace == GRACE_HOURS else f' --grace {grace:g}'} --yes{store_argument(opened)}"
    fate = "removed" if yes else "to remove" if not done.garbage else f"to remove with `{again}`"
    print_line(f"{len(done.garbage)} files and folders, {human_bytes(done.n_bytes)} {fate}")
    if done.n_bytes_kept:
        print_line(f"{human_bytes(done.n_bytes_kept)} more after {grace:g} hours; now with --grace 0")
    if done.n_bytes_aside:
        print_line(f"{human_bytes(done.n_bytes_aside)} that repair moved aside stay in damaged/ until you remove them")
    for why in done.left_alone:
        print_note(sanitise(f"left alone: {why}"))


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
    from saeflow.query.connection import check, connect
    from saeflow.query.runs import runs

    broken = []
    for each in (run for run in runs(store) if run.problem is None):
        with contextlib.closing(connect(store, each.artefact.id)) as connection:
            broken += [(f"{each.schema}.{name}", len(rows)) for name, rows in check(connection) if len(rows)]
    return broken
