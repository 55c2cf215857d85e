"""Each feature against each class: `saeflow probe`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

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
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    import pyarrow as pa

probe_commands = typer.Typer()


@probe_commands.command("probe")
def probe_command(
    name: Annotated[str, typer.Argument(help="Name of the annotation: see `saeflow annotate`.")],
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="CLASS", help="Only this class; may be given several times.")
    ] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Also probes of 1, 5 and 16 features, neurons and random directions.")
    ] = False,
    best: Annotated[int, typer.Option("--best", min=0, help="Features of each class that get intervals.")] = 3,
    replicates: Annotated[
        int, typer.Option("--replicates", min=2, max=100_000, help="Resamples of the documents for the intervals.")
    ] = 500,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the resamples and of the sampled tokens.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads to use; 0: one per core.")] = 0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Wait for the exact figures; print none of a sample before them.")
    ] = False,
    store: StoreOption = None,
    run: RunOption = None,
    quiet: Quiet = False,
) -> None:
    """Score every feature of a run against every class of an annotation.

    The figures come from all values. Ask for them with `saeflow ask features_of_class CLASS`. If there are very many
    values, those of a sample of documents are printed first.

    Examples: `saeflow probe digits`, `saeflow probe names --class countries --sparse`
    """
    from saeflow.classes.probing import ProbeSettings, estimate, probe, still_shown, table_of
    from saeflow.query import catalog
    from saeflow.query.runs import pick_run, runs
    from saeflow.runtime.progress import Progress

    opened = existing_store(store)
    chosen = pick_run(opened, runs(opened), run)
    settings = ProbeSettings(tuple(sorted(set(classes or ()))), best, replicates, seed, sparse)
    if not (exact or quiet) and sys.stdout.isatty() and (found := estimate(opened, chosen, name, settings, threads)):
        print_note(_OF_SAMPLE)
        _show_best(found["class_sizes"], found["feature_classes"])
        print_note("The exact figures:")
    made = probe(opened, chosen, name, settings, threads, Progress(err, -1 if quiet else 0))
    catalog.write_catalog(opened)
    if not quiet:
        _show_best(table_of(made, "class_sizes"), table_of(made, "feature_classes"))
        if sparse:
            _show_sparse(table_of(made, "sparse_probes").to_pylist())
        print_note("More: saeflow ask features_of_class CLASS; saeflow ask classes_of_feature FEATURE")
        print_line(sanitise(f"{made.id}: published"))
        for each in still_shown(opened, made):
            print_note(sanitise(f"Still shown, because the values are the same: {each}"))


_OF_SAMPLE = (
    "Approximate: the figures of the tokens of a sample, a 64th of the documents. All values are scored next; "
    "Ctrl-C ends that."
)


def _show_best(sizes: pa.Table, pairs: pa.Table) -> None:
    """Show the best feature of each class."""
    from saeflow.classes.probing import best_of_each_class

    table = new_table("class", "tokens", "best feature", "AUROC", "95% by document", "F1", "q")
    for row in best_of_each_class(sizes, pairs):
        ends = [row["auroc_low"], row["auroc_high"]]
        interval = "-" if None in ends else " to ".join(map(_figure_in_words, ends))
        best = "none fires" if row["feature_id"] is None else str(row["feature_id"])
        table.add_row(
            sanitise(row["class"]), f"{row['n_tokens']:,}", best, _figure_in_words(row["auroc"]), interval,
            _figure_in_words(row["f1"]), "-" if row["q"] is None else f"{row['q']:.1g}",
        )  # fmt: skip
    out.print_table(table)


def _show_sparse(rows: list[dict[str, Any]]) -> None:
    table = new_table("class", "k", "features", "neurons", "random SAE")
    found = {(row["class"], row["k"], row["basis"]): row["auroc"] for row in rows}
    for name, k in dict.fromkeys((row["class"], row["k"]) for row in rows):
        each = (_figure_in_words(found.get((name, k, basis))) for basis in ("features", "neurons", "random"))
        table.add_row(sanitise(name), str(k), *each)
    print_line("")
    print_line("AUROC on held-out documents, of a logistic regression on k dimensions:")
    out.print_table(table)


def _figure_in_words(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
