"""The `saeflow` command. Needs no Prefect; heavy modules are loaded by the commands that use them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saeflow import __version__
from saeflow.config import Recipe, UserError, load_recipe
from saeflow.disk import human_bytes
from saeflow.progress import Progress
from saeflow.store import KINDS, Artefact, Store, read_checked, store_path

if TYPE_CHECKING:
    import duckdb

app = typer.Typer(
    name="saeflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Store activations once, train many sparse autoencoders, ask anything in SQL.\n\n"
    "Start with `saeflow init my.toml`, then `saeflow run my.toml`, then `saeflow ask`.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (TOML).")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="Store folder; else SAEFLOW_STORE, the recipe, data/store.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say every setting too.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set sae.k=16.")
]
RunOption = Annotated[str | None, typer.Option("--run", help="Which run; default: the newest.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    files: Annotated[str | None, typer.Option(help="Texts, e.g. 'texts/*.txt'.")] = None,
) -> None:
    """Write a commented recipe to start from. Example: `saeflow init my.toml --files 'texts/*.txt'`"""
    from saeflow.recipe_text import template

    if path.exists():
        raise UserError(f"{path} exists already. Choose another name, or delete it first.")
    given = {"model": {"path": model}, "corpus": {"files": files}}
    start = {s: {k: _toml_string(v, s) for k, v in keys.items() if v} for s, keys in given.items()}
    name = "".join(c if c.isalnum() else "_" for c in path.stem.lower()).strip("_") or "recipe"
    path.write_text(template(name, path.name, start), "utf-8")
    out.print(f"Wrote {path}. Set the lines without #, then: saeflow run {path}", markup=False)


def _toml_string(value: str, section: str) -> str:
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"[{quoted}]" if section == "corpus" else quoted


@app.command()
def run(
    recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Run everything that is missing, from text to SQL answers. Example: `saeflow run my.toml --set sae.k=16`"""
    settings = _recipe(recipe, set_)
    opened = _create(store, settings, quiet)
    from saeflow import pipeline  # seconds: only after what can be refused at once

    summary = pipeline.run(opened, settings, _progress(quiet, verbose, settings))
    if not quiet:
        print_summary(summary)
        _compare(opened, settings, summary)
        print_answers(opened, settings)


def _compare(store: Store, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Forecast against actual, where this recipe was planned and this run did the work."""
    from saeflow import forecast

    known = forecast.known_forecast(store, recipe)
    if known is None or summary["seconds"].get("collect", 0) < known.seconds / 20:
        return
    n_bytes = summary["activation_bytes"] + summary["feature_bytes"]
    foreseen = sum(stage.n_bytes for stage in known.stages if stage.name in ("collect", "encode"))
    seconds, peak = sum(summary["seconds"].values()), max(summary["peak_bytes"].values())
    table = _table("", "forecast", "actual")
    table.add_row("activations and features", human_bytes(foreseen), human_bytes(n_bytes))
    table.add_row("peak memory", human_bytes(known.peak_bytes), human_bytes(peak))
    table.add_row("time", forecast.duration(known.seconds), forecast.duration(seconds))
    out.print(table)


@app.command()
def plan(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Forecast tokens, bytes, memory and hours before any work, from a trial on a sample. Example: `saeflow plan my.toml`"""
    import dataclasses
    import json

    settings = _recipe(recipe, set_)
    opened = _create(store, settings, quiet)
    from saeflow import forecast

    found = forecast.plan(opened, settings, Progress(err, -1 if quiet else 0))
    if as_json:
        return typer.echo(json.dumps(dataclasses.asdict(found)))
    out.print(f"{found.n_documents:,} documents, {found.n_tokens:,} tokens in {found.n_parts:,} parts")
    table = _table("stage", "bytes", "peak memory", "time")
    for row in forecast.rows(found):
        table.add_row(*row)
    out.print(table)
    often = "the first SAE" if found.break_even <= 1 else f"{found.break_even} SAEs"
    out.print(f"Storing beats streaming from {often} on. Next: saeflow run {recipe}", markup=False, soft_wrap=True)
    return None


def _stage(name: str, does: str) -> None:
    """Add the command of one stage."""

    def command(
        recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
    ) -> None:
        settings = _recipe(recipe, set_)
        from saeflow import pipeline

        stages = pipeline.stages(settings)
        if name not in stages:
            raise UserError(f"This recipe has no stage {name}; it has: {', '.join(stages)}.")
        stages[name](_create(store, settings, quiet), settings, _progress(quiet, verbose, settings))

    app.command(name, help=f"{does} Example: `saeflow {name} my.toml`", rich_help_panel="Stages")(command)


_stage("tokens", "Turn documents into fixed-length sequences of tokens.")
_stage("collect", "Run the model and store the activations of the chosen sites.")
_stage("bring", "Store activations from a table instead of a model.")


@app.command(name="train", rich_help_panel="Stages")
def train_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="On what the store holds now, even if one is trained.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the sparse autoencoder; continues where a killed training stood. Example: `saeflow train my.toml`"""
    settings = _recipe(recipe, set_)
    from saeflow import train

    train.run(_create(store, settings, quiet), settings, _progress(quiet, verbose, settings), fresh)


_stage("encode", "Write every non-zero feature activation of the corpus to Parquet.")
_stage("evaluate", "Judge the autoencoder on held-out documents.")
_stage("report", "Draw the run's picture.")


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    pattern: Annotated[str, typer.Argument(help="Only names that match this glob.")] = "*",
) -> None:
    """List the modules of a model whose activations can be stored. Example: `saeflow sites gpt2 '*.mlp.act'`"""
    import fnmatch

    from saeflow.config import ModelConfig
    from saeflow.model import list_sites, load_model

    table = _table("site", "width")
    for site in list_sites(load_model(ModelConfig(path=model))):
        if fnmatch.fnmatch(site.name, pattern):
            table.add_row(site.name, str(site.width))
    out.print(table)


@app.command()
def ls(store: StoreOption = None) -> None:
    """List what the store holds. Example: `saeflow ls --store data/store`"""
    opened = _open(store)
    table = _table("artefact", "generation", "parts", "tokens", "size", "inputs")
    for artefact in opened.artefacts():
        table.add_row(
            artefact.id,
            *_state(artefact),
            human_bytes(artefact.footprint(artefact.path)[0]),
            ", ".join(artefact.record.inputs),
        )
    out.print(table)


def _state(artefact: Artefact) -> tuple[str, str, str]:
    if artefact.kind == "saes":
        return ("whole" if artefact.complete() else "damaged"), "-", "-"
    generation = artefact.generation()
    if generation is None:
        return "unfinished", str(len(artefact.parts())), "-"
    return str(generation.number), str(len(generation.parts)), f"{generation.total('n_tokens'):,}"


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An artefact as `saeflow ls` names it, or the name of a run.")],
    store: StoreOption = None,
) -> None:
    """Show an artefact: its settings, inputs, parts and quality. Example: `saeflow show demo`"""
    artefact = _find(_open(store), name)
    out.print(f"{artefact.id}\n{artefact.path}", markup=False)
    table = _table("setting", "value")
    for key, value in sorted(artefact.record.facts.items()):
        table.add_row(key, str(value))
    for name in artefact.record.inputs:
        table.add_row("reads", name)
    quality = artefact.path / "quality.json"
    for key, value in (read_checked(quality) if quality.is_file() else {}).items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    out.print(table)


def _find(store: Store, name: str) -> Artefact:
    import difflib

    artefacts = store.artefacts(*reversed(KINDS))
    for artefact in artefacts:
        if name in (artefact.id, artefact.name, f"{artefact.name}-{artefact.fp}"):
            return artefact
    known = [artefact.id for artefact in artefacts]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.2)
    raise UserError(f"{store.name} has no artefact {name!r}. Nearest: {', '.join(near) or 'none'}. See `saeflow ls`.")


@app.command()
def verify(
    store: StoreOption = None,
    full: Annotated[bool, typer.Option("--full", help="Read every byte, and run the SQL checks.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged parts, so that the next run makes them again.")
    ] = False,
) -> None:
    """Check that nothing published is missing or changed. Example: `saeflow verify --full`"""
    from saeflow import integrity

    opened = Store.find(store_path(store)) if repair else _open(store)
    if repair and (said := integrity.mend_marker(opened)):
        out.print(said, markup=False, soft_wrap=True)
    found = list(integrity.verify(opened, full))
    for each in found:
        out.print(f"damaged: {each}", markup=False, soft_wrap=True)
    for each in found if repair else []:
        err.print(integrity.repair(each), markup=False, soft_wrap=True)
    broken = _run_checks(opened) if full and not found else []
    for name, n_rows in broken:
        out.print(f"check {name}: {n_rows} offending rows", markup=False)
    if repair and found:
        out.print("What had to be removed is made again by the next run: saeflow run RECIPE")
    elif found:
        raise UserError("Mend it with `saeflow verify --full --repair`, then run the recipe again: the rest is kept.")
    elif broken:
        raise UserError("The feature files do not agree. Remove the run's folder and run the recipe again.")
    else:
        said = f"{len(opened.artefacts())} artefacts in {opened.name}: nothing missing, nothing changed"
        out.print(said, markup=False, soft_wrap=True)


@app.command()
def forget(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys of documents; see the view `documents`.")],
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Hide documents at once, in every view and feed. Example: `saeflow forget letters/017 letters/018`"""
    from saeflow.forget import forget as hide

    done = hide(Store.create(store_path(store)), keys, Progress(err, -1 if quiet else 0))
    for name, n in done.documents.items():
        out.print(f"{name}: {n} documents hidden", markup=False, soft_wrap=True)
    for name in done.runs:
        out.print(f"{name}: their values removed", markup=False, soft_wrap=True)
    for name, why in done.waiting.items():
        out.print(f"{name}: parts with them are left out of every answer until encoded again: {why}", markup=False)
    for name in done.saes:
        out.print(f"{name}: was trained on them; train anew with `saeflow train RECIPE --fresh`", markup=False)
    for name in done.held_out_only:
        out.print(f"{name}: was not trained on them, they were held out", markup=False, soft_wrap=True)
    out.print("Remove them from the disk: saeflow compact RECIPE, then saeflow gc --grace 0 --yes", markup=False)


@app.command()
def compact(
    recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Rewrite the parts that still hold forgotten or replaced documents. Example: `saeflow compact my.toml`"""
    settings = _recipe(recipe, set_)
    opened, progress = _create(store, settings, quiet), _progress(quiet, verbose, settings)
    from saeflow import pipeline

    pipeline.compact(opened, settings, progress)
    if not quiet:
        err.print("The old files go with: saeflow gc --yes (kept for their readers for --grace hours)", markup=False)


@app.command()
def upgrade(store: StoreOption = None) -> None:
    """Bring a store of an earlier format up to date; nothing is computed again. Example: `saeflow upgrade`"""
    from saeflow import integrity

    opened = Store.create(store_path(store))
    for line in integrity.upgrade(opened):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def gc(
    store: StoreOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    grace: Annotated[float, typer.Option(help="Hours for which a replaced generation is kept for its readers.")] = 24,
) -> None:
    """List what nobody can read any more; remove it with --yes. Example: `saeflow gc --yes`"""
    from saeflow import integrity

    found = list(integrity.garbage(_open(store), grace * 3600))
    n_bytes = sum(each.n_bytes for each in found)
    for each in found:
        out.print(f"{each.path}  {human_bytes(each.n_bytes)}  {each.why}", markup=False, soft_wrap=True)
    for each in found if yes else []:
        integrity.remove(each)
    done = "removed" if yes else "to remove" if not found else "to remove with `saeflow gc --yes`"
    out.print(f"{len(found)} files and folders, {human_bytes(n_bytes)} {done}", markup=False, soft_wrap=True)


def _run_checks(store: Store) -> list[tuple[str, int]]:
    from saeflow import queries

    broken = []
    for each in (run for run in queries.runs(store) if run.problem is None):
        with contextlib.closing(queries.connect(store, each.artefact.id)) as connection:
            broken += [(f"{each.schema}.{name}", len(rows)) for name, rows in queries.check(connection) if len(rows)]
    return broken


Format = Annotated[
    Literal["table", "csv", "json", "jsonl", "parquet"], typer.Option("--format", "-f", help="How to answer.")
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows at most.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of the terminal.")]


@app.command(context_settings={"ignore_unknown_options": True})
def ask(
    question: Annotated[str | None, typer.Argument(help="Name of a question; none lists them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its parameters, in order.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    format: Format = "table",
    limit: Limit = 20,
    output: Output = None,
) -> None:
    """Ask a named question. Examples: `saeflow ask top_tokens 123 10`, `saeflow ask tokens_where 123 0.5 -f csv`"""
    from saeflow import queries, terminal

    if question is None:
        return _list_questions()
    with _connection(store, run) as connection:
        table = queries.ask(connection, question, arguments or [], limit)
    terminal.write(table, format, output, out)
    if format == "table" and output is None and len(table) == limit:
        err.print(f"The first {limit} rows; more with --limit.")
    return None


def _list_questions() -> None:
    from saeflow import queries

    table = _table("question", "answers")
    for question in queries.questions():
        table.add_row(escape(question.usage), escape(question.answers))
    out.print(table)


@app.command()
def sql(
    query: Annotated[str | None, typer.Argument(help="A select; none opens a prompt.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    script: Annotated[bool, typer.Option("--script", help="Print the run's SQL for the duckdb shell.")] = False,
    format: Format = "table",
    limit: Limit = 1000,
    output: Output = None,
) -> None:
    """Run your own read-only SQL. Example: `saeflow sql 'select count(*) from tokens'`"""
    from saeflow import queries, terminal

    if script:
        return typer.echo(queries.script(_open(store), run))
    with _connection(store, run) as connection:
        if query is not None or not sys.stdin.isatty():
            table = queries.query(connection, query if query is not None else sys.stdin.read(), limit=limit)
            return terminal.write(table, format, output, out)
        for typed in _prompt():
            try:
                terminal.write(queries.query(connection, typed, limit=limit), format, None, out)
            except UserError as error:
                err.print(str(error), markup=False, style="red")
    return None


def _prompt() -> Iterator[str]:
    """Statements typed by a person, each ended by a semicolon."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    err.print("Type a select and end it with ; — Ctrl-D leaves.")
    typed = ""
    while True:
        try:
            typed += input("saeflow> " if not typed else "      -> ") + "\n"
        except EOFError:
            return
        if typed.rstrip().endswith(";"):
            yield typed
            typed = ""


@app.command()
def doctor(store: StoreOption = None) -> None:
    """Report versions, processor, speeds and free disk. Example: `saeflow doctor`"""
    from saeflow import doctor as examination

    table = _table("what", "here")
    for name, value in examination.facts(store_path(store)):
        table.add_row(name, value)
    out.print(table)
    for problem in examination.problems():
        out.print(problem, markup=False, style="yellow")


def print_summary(summary: dict[str, Any]) -> None:
    """What a run made, and the next commands."""
    quality = summary["quality"]
    table = _table("", "")
    table.show_header = False
    for name in ("n_documents", "n_tokens", "n_values"):
        table.add_row(name.removeprefix("n_"), f"{summary[name]:,}")
    for name in ("activation_bytes", "feature_bytes"):
        table.add_row(name.replace("_", " "), human_bytes(summary[name]))
    for name in ("variance_unexplained", "l0", "dead_share", "loss_recovered_zero", "loss_recovered_mean"):
        if name in quality:
            table.add_row(name.replace("_", " "), f"{quality[name]:.4f}")
    table.add_row("judged on", quality["judged_on"])
    for name, seconds in summary.get("seconds", {}).items():
        table.add_row(f"{name} took", f"{seconds:.1f} s")
    out.print(table)


def print_answers(store: Store, recipe: Recipe) -> None:
    """Three SQL answers, each under the command that gives it, and what to try next."""
    from saeflow import answers, features, queries, terminal

    where = f" --store {shlex.quote(store.name)}" if "SAEFLOW_STORE" not in os.environ else ""
    run = features.artefact(store, recipe).id
    with contextlib.closing(queries.connect(store, run)) as connection:
        for answer in answers.first_answers(connection):
            asked = shlex.join(["saeflow", "ask", answer.question, *answer.arguments])
            out.print(f"\n$ {asked}{where}", markup=False, soft_wrap=True, style="bold")
            terminal.render_table(answer.table, out)
    out.print("\nTry next:", style="bold")
    for line in ("ask", "ask feature_summary", "ask search_token the", "sql 'select * from runs'", "ls"):
        out.print(f"  saeflow {line}{where}", markup=False, soft_wrap=True)


def run_flow(flow: Callable[[Recipe, str | None], dict[str, Any]]) -> None:
    """The command line of a flow: `python -m flows.pipeline RECIPE [--store FOLDER] [--set KEY=VALUE]`."""

    def command(recipe: RecipePath, store: StoreOption = None, set_: Set = None) -> None:
        settings = _recipe(recipe, set_)
        opened = _create(store, settings, quiet=False)
        print_summary(flow(settings, opened.name))
        print_answers(opened, settings)

    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(help="Run what is missing of every stage through Prefect.")(command)
    main(single, f"python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    return table


def _recipe(path: Path, changes: list[str] | None) -> Recipe:
    import tomllib

    overrides = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"--set {change}: write it as KEY=VALUE, e.g. --set sae.k=16.")
        try:
            overrides[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            overrides[key] = value
    return load_recipe(path, **overrides)


def _create(option: str | None, recipe: Recipe, quiet: bool) -> Store:
    store = Store.create(store_path(option, recipe))
    if not quiet:
        err.print(f"store: {store.name}", markup=False, soft_wrap=True)
    return store


def _open(option: str | None) -> Store:
    store = Store.open(store_path(option))
    err.print(f"store: {store.name}", markup=False, soft_wrap=True)
    return store


@contextlib.contextmanager
def _connection(option: str | None, run: str | None) -> Iterator[duckdb.DuckDBPyConnection]:
    from saeflow import queries

    with contextlib.closing(queries.connect(_open(option), run)) as connection:
        yield connection


def _progress(quiet: bool, verbose: bool, recipe: Recipe) -> Progress:
    progress = Progress(err, -1 if quiet else int(verbose))
    progress.say(f"saeflow {__version__}, with every setting: {recipe.model_dump_json(exclude_none=True)}", 1)
    return progress


def main(commands: typer.Typer = app, name: str = "saeflow") -> None:
    """Entry point: errors a user can mend end with one message and exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, _terminated)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(_guarded(commands, name, arguments, debug))


_INTERRUPTED = 130
"""What a command returns after Ctrl-C or SIGTERM."""


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _guarded(commands: typer.Typer, name: str, arguments: list[str], debug: bool) -> int:
    command = typer.main.get_command(commands)
    try:
        code = int(command.main(arguments, name, standalone_mode=False) or 0)
        if code == _INTERRUPTED:
            again = shlex.join([*name.split(), *arguments])
            err.print(f"\nStopped. Nothing finished is lost; continue with: {again}", markup=False, soft_wrap=True)
        return code
    except UserError as error:
        if debug:
            raise
        err.print(str(error), markup=False, soft_wrap=True, style="red")
        return 2
    except Exception as error:
        if not debug and _system_error(error) in _DISK_ERRORS:
            err.print(_disk_message(error), markup=False, soft_wrap=True, style="red")
            return 2
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the command line itself was wrong
            error.show()
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _INTERRUPTED
        raise


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _system_error(error: Exception) -> int | None:
    """The system's number of an error; libraries written in Rust give it in their text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _disk_message(error: Exception) -> str:
    what = os.strerror(_system_error(error) or 0)
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return f"{what}{where}. Finished parts are safe. Free some space or choose another --store, then run the same command again."
