"""Explanations by rules or by a language model: `saeflow explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import Quiet, StoreOption, err, existing_store, new_table, out, print_line
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    from saeflow.meaning.token_rules.explain import Explained
    from saeflow.store.store import Store

explain_commands = typer.Typer()

_MOST_SHOWN = 20
"""Features whose rules are shown if they were asked for by number."""


@explain_commands.command("explain")
def explain_command(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Which run. Default: the newest.")] = None,
    features: Annotated[
        str | None, typer.Option("--features", metavar="LIST", help="Only these features, e.g. 1,5-9. Default: all.")
    ] = None,
    rules: Annotated[
        bool, typer.Option("--rules", help="Explain by simple rules, without a language model. This is the default.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Choose rules that are there already again.")] = False,
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Say where features fire, by simple rules that are tested on held-out documents.

    Each rule is chosen on training documents. Its precision and recall count all held-out tokens. Rules are labels of
    the source `rules`; `saeflow ask feature_rules` lists them with their figures.

    Examples: `saeflow explain`, `saeflow explain demo --features 12,40-59`
    """
    from saeflow.meaning.token_rules.explain import explain
    from saeflow.runtime.progress import Progress

    opened = existing_store(store)
    found = explain(opened, run, features, again, Progress(err, -1 if quiet else 0))
    if not quiet:
        _print_found(opened, found, features is not None)


def _print_found(store: Store, found: Explained, by_number: bool) -> None:
    from saeflow.meaning.token_rules.stored import share
    from saeflow.query.ask import query
    from saeflow.query.connection import connect

    sql = "select * from feature_rules where list_contains($1, feature_id)"
    with connect(store, found.run, names=["feature_rules"]) as connection:
        rows = query(connection, sql, [found.features]).to_pylist()
    if by_number and len(rows) <= _MOST_SHOWN:
        table = new_table("feature", "precision", "recall", "F1", "rule")
        for row in rows:
            figures = (row[name] for name in ("precision", "recall", "f1"))
            texts = ("" if figure is None else f"{figure:.2f}" for figure in figures)
            table.add_row(str(row["feature_id"]), *texts, sanitise(row["rule"] or ""))
        out.print_table(table)
    for feature in found.dead[:_MOST_SHOWN] if by_number else ():
        print_line(f"Feature {feature} never fires.")
    scores = [row["f1"] for row in rows]
    shares = ", ".join(f"{share(scores, least):.1%} a rule of F1 ≥ {least}" for least in (0.8, 0.5))
    print_line(f"{len(rows):,} live features: {shares} on held-out tokens.")
    print_line(sanitise(f"labels/{found.sae.removeprefix('saes/')}/rules.csv: {found.n_made:,} rules written"))
