"""Commands that work: a whole recipe, from text to SQL answers, or one stage of it."""

from __future__ import annotations

import fnmatch
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeflow.cli.common import (
    MemberOption,
    Quiet,
    RecipePath,
    Set,
    StoreOption,
    Verbose,
    create_store,
    err,
    joined_ranks,
    new_table,
    out,
    print_line,
    progress_of,
    read_recipe,
    require_place,
    run_command_line,
    store_argument,
)
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import HOSTILE, human_bytes, is_utf8, sanitise

if TYPE_CHECKING:
    from saeflow.recipe.recipe import Recipe

run_commands = typer.Typer()


@run_commands.command("init")
def init_command(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    files: Annotated[str | None, typer.Option(help="Texts, e.g. 'texts/*.txt'.")] = None,
    sites: Annotated[str | None, typer.Option(help="Modules to read, e.g. '*.6.mlp.act'; see `saeflow sites`.")] = None,
    sae: Annotated[
        str | None,
        typer.Option(
            help="A published SAE: folder, OWNER/REPOSITORY/FOLDER or RELEASE/SAE. No activations are stored then."
        ),
    ] = None,
) -> None:
    """Write a commented recipe to start from.

    Example: `saeflow init my.toml --files 'texts/*.txt'`
    """
    from saeflow.recipe.template import DEFAULT_MODEL, Start, recipe_name_of, template

    require_place(path)
    if path.exists():
        raise UserError(f"{path} exists already. Choose another name, or delete it first.")
    given = {
        "model": {"path": model and (_from_here(model, path) if os.path.exists(model) else model)},
        "corpus": {"files": files and _from_here(files, path)},
        "activations": {"sites": sites},
        "sae": {"source": sae and (_from_here(sae, path) if os.path.exists(sae) else sae)},
    }
    start: Start = {s: {k: _toml_string(v, s) for k, v in keys.items() if v} for s, keys in given.items()}
    if sae:
        start["activations"] = {"keep": "false", "sites": None} | start["activations"]  # the SAE names its site
    name = recipe_name_of(path.stem)
    other = model if model != DEFAULT_MODEL and not sites and not sae else None
    path.write_text(template(name, sanitise(path.name), start, other), "utf-8", "replace")
    sites = f"Choose activations.sites (saeflow sites {shlex.quote(other)}), set" if other else "Set"
    print_line(f"Wrote {path}. {sites} the lines without #, then: saeflow run {shlex.quote(str(path))}")


def _from_here(value: str, recipe: Path) -> str:
    """Return a path or pattern that counts from this folder as one that counts from the recipe's."""
    folder = recipe.resolve().parent
    if "://" in value or value.startswith("~") or os.path.isabs(value) or folder == Path.cwd():
        return value
    return os.path.relpath(value, folder)


def _toml_string(value: str, section: str) -> str:
    if not is_utf8(value):
        raise UserError(f"{value!r} is not UTF-8, which a recipe must be. Rename it first.")
    plain = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = '"' + HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", plain) + '"'
    return f"[{quoted}]" if section in ("corpus", "activations") else quoted


@run_commands.command("run")
def run_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run everything that is missing, from text to SQL answers.

    Example: `saeflow run my.toml --set sae.k=16`
    """
    settings = read_recipe(recipe, set_, member)
    opened = create_store(store, settings, quiet)
    from saeflow.cli import summary as printed  # seconds: only after what can be refused at once
    from saeflow.pipeline import stages
    from saeflow.pipeline.lineage import Lineage

    lineage = Lineage(opened, settings)
    summary = stages.run(lineage, progress_of(quiet, verbose, settings))
    if not quiet and settings.is_sweep:
        printed.print_sweep(summary["sweep"], recipe, opened)
    elif not quiet:
        printed.print_summary(summary)
        printed.compare_with_forecast(opened, settings, summary)
        printed.print_answers(opened, lineage.features.id)


@run_commands.command("plan")
def plan_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Forecast tokens, bytes, memory and hours from a trial on a sample, before any work.

    Example: `saeflow plan my.toml`
    """
    import dataclasses
    import json

    settings = read_recipe(recipe, set_)
    opened = create_store(store, settings, quiet)
    from saeflow.pipeline import forecast
    from saeflow.runtime.progress import Progress

    found = forecast.plan(opened, settings, Progress(err, -1 if quiet else 0))
    if as_json:
        return print_line(json.dumps(dataclasses.asdict(found)))
    out.print(f"{found.n_documents:,} documents, {found.n_tokens:,} tokens in {found.n_parts:,} parts")
    table = new_table("stage", "bytes", "peak memory", "time")
    for row in forecast.rows(found):
        table.add_row(*row)
    out.print_table(table, may_go=("bytes", "time"))
    often = "the first SAE" if found.break_even <= 1 else f"{found.break_even} SAEs"
    print_line(f"Storing beats streaming from {often} on. Next: saeflow run {recipe}")
    when = f"takes less time from {found.keep_from} SAEs on" if found.keep_from else "never takes less time"
    print_line(
        f"Keeping activations takes {human_bytes(found.kept_bytes)}. For runs that each encode one SAE, keeping {when} "
        "than one pass (activations.keep = false)."
    )
    return None


def _add_stage(name: str, does: str) -> None:
    """Add the command of a stage that all SAEs of a recipe share."""

    def command(
        recipe: RecipePath, store: StoreOption = None, set_: Set = None, quiet: Quiet = False, verbose: Verbose = False
    ) -> None:
        run_stage(name, read_recipe(recipe, set_), store, quiet, verbose)

    _register_stage(name, does, command)


def _add_stage_of_one_sae(name: str, does: str) -> None:
    """Add the command of a stage that works on one SAE."""

    def command(
        recipe: RecipePath,
        store: StoreOption = None,
        set_: Set = None,
        member: MemberOption = None,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        from saeflow.cli.summary import print_sweep

        settings = read_recipe(recipe, set_, member)
        table = run_stage(name, settings, store, quiet, verbose)
        if settings.is_sweep and not quiet and name == "evaluate":
            print_sweep(table, recipe, create_store(store, settings, quiet=True))

    _register_stage(name, does, command)


def _register_stage(name: str, does: str, command: Callable[..., None]) -> None:
    about = f"{does}\n\nExample: `saeflow {name} my.toml`"
    run_commands.command(name, help=about, rich_help_panel="Stages")(command)


def run_stage(name: str, settings: Recipe, store: str | None, quiet: bool, verbose: bool) -> Any:
    """Do what is missing of a stage. Raises UserError if the recipe has none of this name."""
    from saeflow.pipeline.lineage import Lineage
    from saeflow.pipeline.stages import stages_of

    stages = stages_of(settings)
    if name not in stages:
        raise UserError(f"This recipe has no stage {name}; it has: {', '.join(stages)}.")
    lineage = Lineage(create_store(store, settings, quiet), settings)
    return stages[name](lineage, progress_of(quiet, verbose, settings))


_add_stage("tokens", "Turn documents into fixed-length sequences of tokens.")


@run_commands.command("collect", rich_help_panel="Stages")
def collect_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Store what an inference engine has written (vLLM, nnsight, TransformerLens) instead of running the "
            "model. Its requests are the documents. Sets corpus.requests.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the model and store the activations of the chosen sites.

    Example: `saeflow collect my.toml`
    """
    given = [f"corpus.requests={requests.resolve()}"] if requests else []
    settings = read_recipe(recipe, [*(set_ or []), *given])
    for stage in ("tokens", "collect") if requests else ("collect",):
        run_stage(stage, settings, store, quiet, verbose)
    if requests and not quiet:
        line = f"requests = {_toml_string(str(requests.resolve()), '')}"
        print_line(f"In {recipe}, section [corpus], write:\n\n  {line}\n\nNext: saeflow run {shlex.quote(str(recipe))}")


_add_stage("bring", "Store activations from a table instead of a model.")


@run_commands.command("train", rich_help_panel="Stages")
def train_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Train on what the store holds now, even if an SAE is trained already. "
            "A training that was killed is finished first.",
        ),
    ] = False,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the sparse autoencoder, or all SAEs of a sweep. Continues a training that was killed.

    `torchrun --no-python saeflow train my.toml` trains on several GPUs.

    Example: `saeflow train my.toml`
    """
    with joined_ranks() as ranks:
        quiet = quiet or not (ranks is None or ranks.is_first)
        settings = read_recipe(recipe, set_, member)
        from saeflow.cli.summary import print_sweep
        from saeflow.pipeline import train
        from saeflow.pipeline.judge import sweep
        from saeflow.pipeline.lineage import Lineage
        from saeflow.runtime.ranks import ALONE

        opened, progress = create_store(store, settings, quiet), progress_of(quiet, verbose, settings)
        lineage = Lineage(opened, settings, fresh)
        made = train.run_all(lineage, progress, ranks=ranks or ALONE)
        if settings.is_sweep and made:
            table = sweep.run(lineage, progress)
            if not quiet:
                print_sweep(table, recipe, opened)


@run_commands.command("import", rich_help_panel="Stages")
def import_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A trained SAE: its folder or file, OWNER/REPOSITORY/FOLDER on the hub, or RELEASE/SAE of SAELens' "
            "catalogue.",
            metavar="SAE",
        ),
    ],
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Use an SAE that was trained elsewhere.

    Example: `saeflow import saes/gemma my.toml`
    """
    from saeflow.recipe.recipe import require_one

    source = str(Path(source).resolve()) if Path(source).exists() else source
    settings = read_recipe(recipe, [*(set_ or []), f"sae.source={source}"], member)
    require_one(settings, "import")
    from saeflow.pipeline import train
    from saeflow.pipeline.foreign import import_sae
    from saeflow.pipeline.lineage import Lineage

    opened = create_store(store, settings, quiet)
    made = train.run(Lineage(opened, settings), progress_of(quiet, verbose, settings))
    if not quiet:
        print_line(import_sae.import_in_words(settings.sae, made))
        lines = f"In {recipe}, section [sae], write:\n\n  source = {_toml_string(source, '')}\n"
        print_line(f"{lines}\nNext: saeflow encode {shlex.quote(str(recipe))}{store_argument(opened)}")


_add_stage_of_one_sae(
    "encode",
    "Write every non-zero feature activation of the corpus to Parquet. All SAEs of a sweep share one reading.",
)
_add_stage_of_one_sae("evaluate", "Measure the autoencoder on held-out documents; all SAEs of a sweep together.")


@run_commands.command("sites")
def sites_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    pattern: Annotated[str, typer.Argument(help="Only names that match this glob.")] = "*",
) -> None:
    """List the modules of a model whose activations can be stored.

    Example: `saeflow sites gpt2 '*.mlp.act'`
    """

    from saeflow.model.load import load_model
    from saeflow.model.sites import list_sites
    from saeflow.recipe.data_settings import ModelConfig
    from saeflow.runtime.text import nearest

    every = list_sites(load_model(ModelConfig(path=model)))
    found = [site for site in every if fnmatch.fnmatch(site.name, pattern)]
    if not found:
        names = [site.name for site in every]
        near = ", ".join(nearest(pattern, names) or names[:3])
        raise UserError(f"{model} has no site {pattern!r}. Nearest: {near}. All: saeflow sites {model}")
    table = new_table("site", "width")
    for site in found:
        table.add_row(site.name, str(site.width))
    out.print_table(table)


def run_flow(flow: Callable[[Recipe, str | None], dict[str, Any]]) -> None:
    """Run a flow from its own command line: `python -m flows.pipeline RECIPE [--store FOLDER] [--set KEY=VALUE]`."""

    def command(recipe: RecipePath, store: StoreOption = None, set_: Set = None, member: MemberOption = None) -> None:
        from saeflow.cli.summary import print_answers, print_summary, print_sweep
        from saeflow.pipeline.lineage import Lineage

        settings = read_recipe(recipe, set_, member)
        opened = create_store(store, settings, quiet=False)
        summary = flow(settings, opened.name)
        if settings.is_sweep:
            print_sweep(summary["sweep"], recipe, opened)
        else:
            print_summary(summary)
            print_answers(opened, Lineage(opened, settings).features.id)

    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(help="Run what is missing of every stage through Prefect.")(command)
    run_command_line(single, f"python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}")
