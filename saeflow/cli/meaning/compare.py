"""Which features of one run are found again in another: `saeflow compare`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.answers.reply import FormatOption, Limit, Output, Reply
from saeflow.cli.common import StoreOption, existing_store, print_note, require_place, whole_file
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    from saeflow.meaning.matching import Matched

compare_commands = typer.Typer()

PICTURES = (".png", ".svg", ".pdf")


@compare_commands.command("compare")
def compare_command(
    run: Annotated[str, typer.Argument(help="Run whose features are looked for: its name, or NAME-FP.")],
    other: Annotated[str, typer.Argument(help="Run in which they are looked for.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Picture of the cosines to write: .png, .svg or .pdf.")
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Correlate the values of matched features, which takes longer.")
    ] = True,
    store: StoreOption = None,
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Find the features of one run again in another, by the cosine of their directions.

    Example: `saeflow compare my demo -o again.csv`
    """
    from saeflow.meaning.matching import QUESTIONS, draw_matches, match_runs
    from saeflow.query.connection import connect_to_run
    from saeflow.query.runs import pick_run, runs

    if picture is not None:
        if picture.suffix.lower() not in PICTURES:
            raise UserError(f"--picture is {picture.name!r}, but it must end in {', '.join(PICTURES)}.")
        require_place(picture)
    reply = Reply(format, output, limit)
    opened = existing_store(store)
    partner = pick_run(opened, runs(opened), other)
    current, connection = connect_to_run(opened, run, names=QUESTIONS)
    with contextlib.closing(connection):
        matched = match_runs(opened, connection, current, partner, values)
    reply.write(lambda most: matched.table.slice(0, most), 20)
    _say(matched, sanitise(current.schema), sanitise(partner.schema))
    if picture is not None:
        with whole_file(picture) as temporary:
            draw_matches(matched, current.schema, partner.schema, temporary, picture.suffix.lower().removeprefix("."))


def _say(matched: Matched, run: str, other: str) -> None:
    from saeflow.meaning.matching import FOUND_AGAIN

    print_note(f"{matched.n_live:,} live features of {run}, looked for among {matched.n_other_live:,} of {other}:")
    for cosine in FOUND_AGAIN:
        print_note(
            f"  cosine ≥ {cosine}: {matched.share_found(cosine):.1%} found again one to one "
            f"(they have {matched.share_of_values(cosine):.1%} of the values), "
            f"{matched.share_near(cosine):.1%} near some feature"
        )
    for column, name in (("match_cosine", "cosine"), ("correlation", "correlation of values")):
        if (mean := matched.mean(column)) is not None:
            print_note(f"  mean {name} of the matches: {mean:.3f}")
