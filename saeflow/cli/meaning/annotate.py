"""Classes given to tokens, spans and documents: `saeflow annotate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import (
    Quiet,
    RunOption,
    StoreOption,
    err,
    existing_store,
    new_table,
    out,
    print_line,
    print_note,
)
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    from saeflow.classes.annotations import Annotated as Done
    from saeflow.store.store import Store

annotate_commands = typer.Typer()


@annotate_commands.command("annotate")
def annotate_command(
    name: Annotated[str | None, typer.Argument(help="Name of the annotation; without one, all are listed.")] = None,
    file: Annotated[
        Path | None,
        typer.Argument(help="Parquet, CSV or .sql file. Columns: class, and document, start, end; or token_id."),
    ] = None,
    sql: Annotated[
        str | None, typer.Option("--sql", metavar="SELECT", help="A statement that reads, instead of a file.")
    ] = None,
    store: StoreOption = None,
    run: RunOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would match, and publish nothing.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the annotation of this name.")] = False,
    quiet: Quiet = False,
) -> None:
    """Give classes to tokens, spans of characters, or documents.

    `start` and `end` count characters from 0, and `end` is not included. `end_token_id` is not included either, but
    `last_token_id` is. A table without the column `class` gives everything the class NAME.

    Examples: `saeflow annotate names names.csv`,
    `saeflow annotate digits --sql "select token_id from tokens where regexp_full_match(trim(piece), '[0-9]+')"`
    """
    opened = existing_store(store)
    if remove:
        return _remove(opened, run, name)
    if name is None:
        return _list(opened, run)
    from saeflow.classes.annotations import Source, annotate
    from saeflow.query import catalog
    from saeflow.runtime.progress import Progress

    done = annotate(opened, run, name, Source(file, sql), Progress(err, -1 if quiet else 0), dry_run)
    if not dry_run:
        catalog.write_catalog(opened)
    if not quiet:
        _show_annotations(done, dry_run)
    return None


def _show_annotations(done: Done, dry_run: bool) -> None:
    table = new_table("class", "tokens", "spans", "documents")
    for row in done.classes:
        table.add_row(sanitise(row["class"]), *(f"{row[name]:,}" for name in ("n_tokens", "n_spans", "n_documents")))
    out.print_table(table)
    for line in _described(done):
        print_note(sanitise(line))
    state = "nothing was written (--dry-run)" if dry_run else "published" if done.is_new else "published before"
    print_line(sanitise(f"{done.id}: {state}"))


_REASONS = {
    "n_unknown_documents": "rows that name a document which the store does not show",
    "n_unknown_tokens": "rows that name a token which no document of the store has",
    "n_unreadable": "rows that lack a whole number for start, end or token_id",
    "n_empty": "rows that end before they begin, or name a document without tokens",
    "n_outside": "rows that lie outside of their document's text",
    "n_between": "rows that hold only characters for which no token stands",
    "n_cut": "matched rows that reach beyond the text or the tokens; the rest of each counts",
    "n_tokens_left_out": "tokens that this run does not encode, so that no feature can fire there",
}


def _described(done: Done) -> Iterator[str]:
    """Yield lines that say which columns were read, and how many rows did not match, and why."""
    columns, lost = done.columns, done.unmatched
    unread = f"; not read: {', '.join(columns.unread)}" if columns.unread else ""
    yield f"Columns read: {', '.join(columns.read)}{unread}"
    yield f"{lost.n_matched:,} of {lost.n_rows:,} rows matched"
    yield from (f"{why}: {n:,}" for name, why in _REASONS.items() if (n := getattr(lost, name)))


def _list(store: Store, run: str | None) -> None:
    from saeflow.classes.listing import annotations_of

    rows = annotations_of(store, run)
    table = new_table("annotation", "class", "tokens", "spans", "documents")
    for row in rows:
        counts = (f"{row[name]:,}" for name in ("n_tokens", "n_spans", "n_documents"))
        table.add_row(sanitise(row["annotation"]), sanitise(row["class"]), *counts)
    if rows:
        out.print_table(table)
    else:
        print_line("No annotations yet. Make some: saeflow annotate NAME FILE, or --sql 'select token_id …'")


def _remove(store: Store, run: str | None, name: str | None) -> None:
    from saeflow.classes import listing
    from saeflow.query import catalog

    if name is None:
        raise UserError("Which annotation is to be removed? saeflow annotate NAME --remove")
    removed = listing.remove_annotations(store, run, name)
    catalog.write_catalog(store)
    for each in removed:
        print_line(sanitise(f"removed {each}"))
