"""Commands that work: a recipe from text to SQL answers, or one stage of it."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from saeflow.cli.common import (
    MemberOption,
    Quiet,
    RecipePath,
    Set,
    StoreOption,
    Verbose,
    a_table,
    create_store,
    err,
    main,
    out,
    progress_of,
    read_recipe,
    require_place,
    where,
)
from saeflow.recipe.recipe import Recipe, require_one
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import human_bytes
from saeflow.store.store import Store

commands = typer.Typer()


@commands.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    files: Annotated[str | None, typer.Option(help="Texts, e.g. 'texts/*.txt'.")] = None,
    sites: Annotated[str | None, typer.Option(help="Modules to read, e.g. '*.6.mlp.act'; see `saeflow sites`.")] = None,
) -> None:
    """Write a commented recipe to start from. Example: `saeflow init my.toml --files 'texts/*.txt'`"""
    from saeflow.recipe.template import DEFAULT_MODEL, template

    require_place(path)
    if path.exists():
        raise UserError(f"{path} exists already. Choose another name, or delete it first.")
    given = {"model": {"path": model}, "corpus": {"files": files}, "activations": {"sites": sites}}
    start = {s: {k: _toml_string(v, s) for k, v in keys.items() if v} for s, keys in given.items()}
    name = "".join(c if c.isalnum() else "_" for c in path.stem.lower()).strip("_") or "recipe"
    other = model if model != DEFAULT_MODEL and not sites else None
    path.write_text(template(name, path.name, start, other), "utf-8")
    sites = f"Choose activations.sites (saeflow sites {shlex.quote(other)}), set" if other else "Set"
    out.print(f"Wrote {path}. {sites} the lines without #, then: saeflow run {path}", markup=False, soft_wrap=True)


def _toml_string(value: str, section: str) -> str:
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"[{quoted}]" if section in ("corpus", "activations") else quoted


@commands.command()
def run(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run everything that is missing, from text to SQL answers. Example: `saeflow run my.toml --set sae.k=16`"""
    settings = read_recipe(recipe, set_, member)
    opened = create_store(store, settings, quiet)
    from saeflow.pipeline import run as pipeline  # seconds: only after what can be refused at once

    summary = pipeline.run(opened, settings, progress_of(quiet, verbose, settings))
    if not quiet and settings.is_sweep:
        print_sweep(summary["sweep"], recipe, opened)
    elif not quiet:
        print_summary(summary)
        _compare(opened, settings, summary)
        print_answers(opened, settings)


def _compare(store: Store, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Forecast against actual, where this recipe was planned and this run did the work."""
    from saeflow.pipeline import forecast

    known = forecast.known_forecast(store, recipe)
    if known is None or summary["seconds"].get("collect", 0) < known.seconds / 20:
        return
    n_bytes = summary["activation_bytes"] + summary["feature_bytes"]
    foreseen = sum(stage.n_bytes for stage in known.stages if stage.name in ("collect", "encode"))
    seconds, peak = sum(summary["seconds"].values()), max(summary["peak_bytes"].values())
    table = a_table("", "forecast", "actual")
    table.add_row("activations and features", human_bytes(foreseen), human_bytes(n_bytes))
    table.add_row("peak memory", human_bytes(known.peak_bytes), human_bytes(peak))
    table.add_row("time", forecast.duration(known.seconds), forecast.duration(seconds))
    out.print(table)


@commands.command()
def plan(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Forecast tokens, bytes, memory and hours before any work, from a trial on a sample.
    Example: `saeflow plan my.toml`"""
    import dataclasses
    import json

    settings = read_recipe(recipe, set_)
    opened = create_store(store, settings, quiet)
    from saeflow.pipeline import forecast

    found = forecast.plan(opened, settings, Progress(err, -1 if quiet else 0))
    if as_json:
        return typer.echo(json.dumps(dataclasses.asdict(found)))
    out.print(f"{found.n_documents:,} documents, {found.n_tokens:,} tokens in {found.n_parts:,} parts")
    table = a_table("stage", "bytes", "peak memory", "time")
    for row in forecast.rows(found):
        table.add_row(*row)
    out.print(table)
    often = "the first SAE" if found.break_even <= 1 else f"{found.break_even} SAEs"
    out.print(f"Storing beats streaming from {often} on. Next: saeflow run {recipe}", markup=False, soft_wrap=True)
    return None


def _stage(name: str, does: str) -> None:
    """Add the command of one stage that all SAEs of a recipe share."""

    def command(
        recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
    ) -> None:
        _run_stage(name, read_recipe(recipe, set_), store, quiet, verbose)

    commands.command(name, help=f"{does} Example: `saeflow {name} my.toml`", rich_help_panel="Stages")(command)


def _stage_of_one(name: str, does: str) -> None:
    """Add the command of one stage that is about one SAE."""

    def command(
        recipe: RecipePath,
        store: StoreOption = None,
        set_: Set = None,
        member: MemberOption = None,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        settings = read_recipe(recipe, set_, member)
        if name == "report":
            require_one(settings, name)
        table = _run_stage(name, settings, store, quiet, verbose)
        if settings.is_sweep and not quiet and name == "evaluate":
            print_sweep(table, recipe, create_store(store, settings, quiet=True))

    commands.command(name, help=f"{does} Example: `saeflow {name} my.toml`", rich_help_panel="Stages")(command)


def _run_stage(name: str, settings: Recipe, store: str | None, quiet: bool, verbose: bool) -> Any:
    from saeflow.pipeline import run as pipeline

    stages = pipeline.stages(settings) | ({"encode": pipeline.encode_all} if settings.is_sweep else {})
    if name not in stages:
        raise UserError(f"This recipe has no stage {name}; it has: {', '.join(stages)}.")
    return stages[name](create_store(store, settings, quiet), settings, progress_of(quiet, verbose, settings))


_stage("tokens", "Turn documents into fixed-length sequences of tokens.")
_stage("collect", "Run the model and store the activations of the chosen sites.")
_stage("bring", "Store activations from a table instead of a model.")


@commands.command(name="train", rich_help_panel="Stages")
def train_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="On what the store holds now, even if one is trained; a killed training goes on first."
        ),
    ] = False,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the sparse autoencoder, or all of a sweep; continues where a killed training stood.
    Example: `saeflow train my.toml`"""
    settings = read_recipe(recipe, set_, member)
    from saeflow.pipeline import sweep, train

    opened, progress = create_store(store, settings, quiet), progress_of(quiet, verbose, settings)
    train.run(opened, settings, progress, fresh)
    if settings.is_sweep:
        table = sweep.run(opened, settings, progress)
        if not quiet:
            print_sweep(table, recipe, opened)


@commands.command(name="import", rich_help_panel="Stages")
def import_command(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a trained SAE: of saeflow, SAELens or dictionary_learning.", metavar="FOLDER"),
    ],
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take an SAE trained elsewhere in the place of one trained here. Example: `saeflow import saes/gemma my.toml`"""
    settings = read_recipe(recipe, [*(set_ or []), f"sae.source={folder.resolve()}"], member)
    require_one(settings, "import")
    from saeflow.pipeline import import_sae, train

    opened = create_store(store, settings, quiet)
    made = train.run(opened, settings, progress_of(quiet, verbose, settings))
    if not quiet:
        out.print(import_sae.in_words(settings, made), markup=False, soft_wrap=True)
        lines = f"In {recipe}, section [sae], write:\n\n  source = {_toml_string(str(folder.resolve()), '')}\n"
        out.print(
            f"{lines}\nNext: saeflow encode {shlex.quote(str(recipe))}{where(opened)}", markup=False, soft_wrap=True
        )


_stage_of_one(
    "encode",
    "Write every non-zero feature activation of the corpus to Parquet; of a sweep for all SAEs in one reading.",
)
_stage_of_one("evaluate", "Judge the autoencoder on held-out documents; those of a sweep together.")
_stage_of_one("report", "Draw the run's picture.")


@commands.command()
def sites(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    pattern: Annotated[str, typer.Argument(help="Only names that match this glob.")] = "*",
) -> None:
    """List the modules of a model whose activations can be stored. Example: `saeflow sites gpt2 '*.mlp.act'`"""

    from saeflow.model.sites import list_sites, load_model
    from saeflow.recipe.settings import ModelConfig

    every = list_sites(load_model(ModelConfig(path=model)))
    found = [site for site in every if fnmatch.fnmatch(site.name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, [site.name for site in every], n=3, cutoff=0)
        raise UserError(f"{model} has no site {pattern!r}. Nearest: {', '.join(near)}. All: saeflow sites {model}")
    table = a_table("site", "width")
    for site in found:
        table.add_row(site.name, str(site.width))
    out.print(table)


_WIDE = 160
"""Columns that the table of a sweep may take."""


def print_sweep(table: dict[str, Any], recipe: Path, store: Store) -> None:
    """The SAEs of a sweep, and the next command."""
    from saeflow.pipeline import sweep

    shown = a_table("SAE", "architecture", "sparsity", "features", "L0", "unexplained", "silent", "on the front")
    for row in table["saes"]:
        share = row["silent"] / row["n_features"]
        shown.add_row(
            row["member"], row["architecture"], row["sparsity"], f"{row['n_features']:,}", f"{row['l0']:.1f}",
            f"{row['variance_unexplained']:.4f}", f"{share:.1%}", "yes" if row["on_front"] else "",
        )  # fmt: skip
    Console(file=out.file, width=max(out.width, _WIDE), highlight=False).print(shown)  # each SAE on one line
    out.print(f"judged on {table['saes'][0]['n_tokens']:,} tokens of {table['saes'][0]['judged_on']}", markup=False)
    name = sweep.recommended(table["saes"])
    again = f"saeflow run {shlex.quote(str(recipe))} --member {name}{where(store)}"
    out.print(f"Encode the corpus with one of them: {again}", markup=False, soft_wrap=True)


def print_summary(summary: dict[str, Any]) -> None:
    """What a run made, and the next commands."""
    quality = summary["quality"]
    table = a_table("", "")
    table.show_header = False
    for name in ("n_documents", "n_tokens", "n_values"):
        table.add_row(name.removeprefix("n_"), f"{summary[name]:,}")
    for name in ("activation_bytes", "feature_bytes"):
        table.add_row(name.replace("_", " "), human_bytes(summary[name]))
    shares = "loss_recovered_zero", "loss_recovered_mean", "kl_recovered_mean"
    for name in ("variance_unexplained", "l0", "shrinkage", "dead_share", *shares):
        if name in quality:
            table.add_row(name.replace("_", " "), f"{quality[name]:.4f}")
    table.add_row("judged on", quality["judged_on"])
    for name, seconds in summary.get("seconds", {}).items():
        table.add_row(f"{name} took", f"{seconds:.1f} s")
    out.print(table)


def print_answers(store: Store, recipe: Recipe) -> None:
    """Three SQL answers, each under the command that gives it, and what to try next."""
    from saeflow.cli import render
    from saeflow.pipeline import encode
    from saeflow.query import ask
    from saeflow.query import first_answers as answers

    run = encode.artefact(store, recipe).id
    which = answers.which_run(store, run)
    with contextlib.closing(ask.connect(store, run)) as connection:
        for answer in answers.first_answers(connection):
            asked = shlex.join(["saeflow", "ask", answer.question, *answer.arguments])
            out.print(f"\n$ {asked}{which}{where(store)}", markup=False, soft_wrap=True, style="bold")
            render.render_table(answer.table, out)
    out.print("\nTry next:", style="bold")
    for line in answers.next_commands(store, run, where(store)):
        out.print(f"  {line}", markup=False, soft_wrap=True)


def run_flow(flow: Callable[[Recipe, str | None], dict[str, Any]]) -> None:
    """The command line of a flow: `python -m flows.pipeline RECIPE [--store FOLDER] [--set KEY=VALUE]`."""

    def command(recipe: RecipePath, store: StoreOption = None, set_: Set = None, member: MemberOption = None) -> None:
        settings = read_recipe(recipe, set_, member)
        opened = create_store(store, settings, quiet=False)
        summary = flow(settings, opened.name)
        if settings.is_sweep:
            print_sweep(summary["sweep"], recipe, opened)
        else:
            print_summary(summary)
            print_answers(opened, settings)

    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(help="Run what is missing of every stage through Prefect.")(command)
    main(single, f"python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}")
