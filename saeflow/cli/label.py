"""Commands that write beside a run: labels of its features, and the catalog for DuckDB."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import RunOption, StoreOption, existing_store, new_table, out, print_line, print_note
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    from saeflow.store.store import Store

label_commands = typer.Typer()


@label_commands.command("label")
def label_command(
    feature: Annotated[int | None, typer.Argument(help="Number of the feature.")] = None,
    text: Annotated[
        str | None, typer.Argument(help='The label. "" removes the label; without a text the command shows it.')
    ] = None,
    score: Annotated[float | None, typer.Option("--score", help="How well the label fits, 0 to 1.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--import", help="File of labels in CSV, JSON lines or Parquet: feature_id, label, score."),
    ] = None,
    source: Annotated[
        str, typer.Option("--source", help="Who or what made the labels; names the file they are kept in.")
    ] = "own",
    store: StoreOption = None,
    run: RunOption = None,
) -> None:
    """Name a feature.

    Examples: `saeflow label 123 "commas before speech" --score 0.8`, `saeflow label --import names.csv --source gpt`
    """
    from saeflow.query import catalog, label_import, labels, runs

    opened = existing_store(store)
    chosen = runs.pick_run(opened, runs.runs(opened), run)
    sae, n_features = chosen.artefact.record.input("saes"), chosen.shape.get("n_features")
    if sae is None:
        raise UserError(f"{chosen.artefact.id} does not say which SAE its features belong to.")
    if file is not None:
        if feature is not None:
            raise UserError("--import takes all features from the file; leave out the number.")
        found = label_import.read(file, n_features)
    elif feature is None:
        raise UserError('Which feature? saeflow label 123 "its label"; or --import FILE --source NAME.')
    else:
        label_import.require_feature(feature, n_features, "")
        if text is None:
            return _show_labels(opened, chosen.schema, feature)
        found = {feature: labels.clean_label(text, score, f"feature {feature}")}
    n_labels = labels.put(opened, sae, source, found)
    catalog.write_catalog(opened)
    print_note(sanitise(f"labels/{sae.removeprefix('saes/')}/{source}.csv: {n_labels:,} label{'s' * (n_labels != 1)}"))
    return None


def _show_labels(store: Store, run: str, feature: int) -> None:
    from saeflow.query.ask import query
    from saeflow.query.connection import connect

    with connect(store, run, names=("src_labels",)) as connection:
        sql = (
            "select label, source, score from src_labels where feature_id = ? "
            "order by source, score desc nulls last, label"
        )
        rows = query(connection, sql, [feature]).to_pylist()
    table = new_table("label", "source", "score")
    for row in rows:
        table.add_row(*(sanitise("" if value is None else str(value)) for value in row.values()))
    if rows:
        out.print_table(table)
    else:
        out.print(f"Feature {feature} has no label.")


@label_commands.command("catalog")
def catalog_command(store: StoreOption = None) -> None:
    """Write the store's catalog.sql again, e.g. after moving the store.

    Example: `saeflow catalog`, then `duckdb -init data/store/catalog.sql`
    """
    from saeflow.query import catalog

    opened = existing_store(store)
    changed = catalog.write_catalog(opened)
    state = "written" if changed else "up to date"
    print_line(f"{sanitise(opened.name)}/{catalog.CATALOG}: {state}")
