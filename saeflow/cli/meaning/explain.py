"""Explanations by rules or by a language model: `saeflow explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import Quiet, StoreOption, err, existing_store, new_table, out, print_line
from saeflow.cli.meaning import explain_by_model as by_model
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import sanitise

if TYPE_CHECKING:
    from saeflow.meaning.token_rules.explain import ExplainedRun
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
    endpoint: by_model.Endpoint = None,
    model: by_model.Model = None,
    score: by_model.Score = None,
    methods: by_model.Methods = "detection,fuzzing",
    budget: by_model.Budget = None,
    dry_run: by_model.DryRun = False,
    prompts: by_model.PromptFolder = None,
    source: by_model.Source = None,
    key_from: by_model.KeyFrom = None,
    parallel: by_model.Parallel = 8,
    timeout: by_model.Timeout = 120.0,
    retries: by_model.Retries = 6,
    bands: by_model.Bands = 10,
    per_band: by_model.PerBand = 5,
    silent: by_model.Silent = 25,
    context: by_model.Context = 32,
    batch: by_model.Batch = 5,
    temperature: by_model.Temperature = 0.0,
    answer_tokens: by_model.AnswerTokens = None,
    seed: by_model.Seed = 0,
    use_proxies: by_model.UseProxies = False,
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Say where features fire, by simple rules that are tested on held-out documents, or by a language model.

    Each rule is chosen on training documents. Its precision and recall count all held-out tokens. Rules are labels of
    the source `rules`; `saeflow ask feature_rules` lists them with their figures, and
    `saeflow ask explanation_mistakes FEATURE` some tokens at which the rule of a feature is wrong.

    With --endpoint a language model explains, and judges each explanation on other examples; all options from there
    on are about it. `saeflow ask explanation_scores` lists the scores.

    Examples: `saeflow explain`, `saeflow explain demo --features 12,40-59`,
    `saeflow explain demo --features 12 --endpoint http://127.0.0.1:8000/v1 --model qwen3`
    """
    if endpoint is not None:
        if rules or again:
            raise UserError("--rules and --again are about rules, --endpoint is about a language model. Leave one out.")
        typed = by_model.Typed(
            endpoint, model, score, methods, budget, dry_run, prompts, source, key_from, parallel, timeout, retries,
            bands, per_band, silent, context, batch, temperature, answer_tokens, seed, use_proxies,
        )  # fmt: skip
        by_model.explain_by_model(run, features, typed, store, quiet)
        return
    _refuse_options_of_models({"--model": model, "--score": score, "--budget": budget, "--dry-run": dry_run or None})
    from saeflow.meaning.token_rules.explain import explain_run
    from saeflow.runtime.progress import Progress

    opened = existing_store(store)
    found = explain_run(opened, run, features, again, Progress(err, -1 if quiet else 0))
    if not quiet:
        _print_found(opened, found, features is not None)


def _refuse_options_of_models(given: Mapping[str, object]) -> None:
    for option in (option for option, value in given.items() if value is not None):
        raise UserError(f"{option} is about a language model: say with --endpoint where it answers, or leave it out.")


def _print_found(store: Store, found: ExplainedRun, by_number: bool) -> None:
    from saeflow.meaning.token_rules.stored import share_of_rules
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
    shares = ", ".join(f"{share_of_rules(scores, least):.1%} a rule of F1 ≥ {least}" for least in (0.8, 0.5))
    print_line(f"{len(rows):,} live features: {shares} on held-out tokens.")
    print_line(sanitise(f"labels/{found.sae.removeprefix('saes/')}/rules.csv: {found.n_made:,} rules written"))
