"""Commands that write beside a run: labels of its features, and the catalog for DuckDB."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeflow.cli.common import RunOption, StoreOption, a_table, err, open_store, out
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import sanitise
from saeflow.store.store import Store

commands = typer.Typer()


@commands.command()
def label(
    feature: Annotated[int | None, typer.Argument(help="Number of the feature.")] = None,
    text: Annotated[
        str | None, typer.Argument(help='What it stands for; "" takes the label away; none shows it.')
    ] = None,
    score: Annotated[float | None, typer.Option("--score", help="How well the label fits, 0 to 1.")] = None,
    file: Annotated[
        Path | None, typer.Option("--import", help="Labels in CSV, JSON lines or Parquet: feature_id, label, score.")
    ] = None,
    source: Annotated[str, typer.Option("--source", help="Whose labels: names the file they are kept in.")] = "own",
    store: StoreOption = None,
    run: RunOption = None,
) -> None:
    """Name a feature. Examples: `saeflow label 123 "commas before speech" --score 0.8`,
    `saeflow label --import names.csv --source gpt`"""
    from saeflow.query import catalog, label_import, labels, runs

    opened = open_store(store)
    chosen = runs.chosen(opened, run)
    sae, n_features = runs.sae_of(chosen.artefact), chosen.shape.get("n_features")
    if sae is None:
        raise UserError(f"{chosen.artefact.id} does not say which SAE its features are of.")
    if file is not None:
        if feature is not None:
            raise UserError("--import takes all features from the file; leave out the number.")
        found = label_import.read(file, n_features)
    elif feature is None:
        raise UserError('Which feature? saeflow label 123 "what it stands for"; or --import FILE --source NAME.')
    else:
        label_import.require_feature(feature, n_features, "")
        if text is None:
            return _show(opened, chosen.schema, feature)
        found = {feature: labels.cleaned(text, score, f"feature {feature}")}
    n_labels = labels.put(opened, sae, source, found)
    catalog.write(opened)
    err.print(
        sanitise(f"labels/{sae.removeprefix('saes/')}/{source}.csv: {n_labels:,} label{'s' * (n_labels != 1)}"),
        markup=False,
        soft_wrap=True,
    )
    return None


def _show(store: Store, run: str, feature: int) -> None:
    from saeflow.query import ask

    with ask.connect(store, run) as connection:
        sql = (
            "select label, source, score from src_labels where feature_id = ? "
            "order by source, score desc nulls last, label"
        )
        rows = ask.query(connection, sql, [feature]).to_pylist()
    table = a_table("label", "source", "score")
    for row in rows:
        table.add_row(*(sanitise("" if value is None else str(value)).replace("[", r"\[") for value in row.values()))
    out.print(table if rows else f"Feature {feature} has no label.")


@commands.command("catalog")
def write_catalog(store: StoreOption = None) -> None:
    """Write the store's catalog.sql anew, e.g. after moving the store. Example: `saeflow catalog`, then
    `duckdb -init data/store/catalog.sql`"""
    from saeflow.query import catalog

    opened = open_store(store)
    changed = catalog.write(opened)
    said = "written" if changed else "up to date"
    out.print(f"{sanitise(opened.name)}/{catalog.NAME}: {said}", markup=False, soft_wrap=True)
