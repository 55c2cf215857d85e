"""Explanations by a language model: what `saeflow explain --endpoint` does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import (
    Quiet,
    StoreOption,
    err,
    existing_store,
    new_table,
    out,
    print_line,
    print_note,
)
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise

if TYPE_CHECKING:
    from saeflow.meaning.language_model.command import Outcome
    from saeflow.meaning.language_model.feature import Explained
    from saeflow.meaning.language_model.settings import ExplainSettings, Method

explain_model_commands = typer.Typer()

_SHOWN = 50
"""Features shown at the end; `saeflow ask explanation_scores` has the others."""


@explain_model_commands.command("explain-by-model")
def explain_by_model(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run whose features are explained.")],
    endpoint: Annotated[
        str,
        typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible address, e.g. http://127.0.0.1:8000/v1."),
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model's name at the endpoint.")],
    features: Annotated[
        str, typer.Option("--features", metavar="LIST", help="Features: 3,7,20-29, or all that fire.")
    ] = "all",
    score: Annotated[
        str | None, typer.Option("--score", metavar="SOURCE", help="Score the labels of this source; make none.")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Scores: detection, fuzzing, simulation; all; or none.")
    ] = "detection,fuzzing",
    budget: Annotated[
        int | None, typer.Option("--budget", metavar="TOKENS", min=1, help="Stop before going over so many tokens.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forecast the tokens, and ask nothing.")] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FOLDER", help="Folder with edited prompts.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Source of the labels. Default: llm- and the model's name.")
    ] = None,
    key_from: Annotated[
        str | None, typer.Option("--key-from", metavar="VARIABLE", help="Environment variable that holds the key.")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=256, help="Questions at the same time.")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for one answer.")] = 120.0,
    retries: Annotated[int, typer.Option("--retries", min=0, max=100, help="Retries of a question that fails.")] = 6,
    bands: Annotated[int, typer.Option("--bands", min=1, max=100, help="Quantile bands of a feature's values.")] = 10,
    n: Annotated[int, typer.Option("-n", min=1, max=1000, help="Examples of each band for scoring.")] = 5,
    silent: Annotated[
        int, typer.Option("--silent", min=1, max=5000, help="Near misses, and as many random silent contexts.")
    ] = 25,
    context: Annotated[int, typer.Option("--context", min=2, max=1000, help="Tokens of one context.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, max=100, help="Examples in one question.")] = 5,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="Of the model's sampling.")] = 0.0,
    answer_tokens: Annotated[
        int | None,
        typer.Option("--answer-tokens", min=1, help="Most tokens of an answer, for models that think aloud."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Chooses the examples.")] = 0,
    use_proxies: Annotated[
        bool, typer.Option("--use-proxies", help="Obey HTTPS_PROXY, HTTP_PROXY, SSL_CERT_FILE and .netrc.")
    ] = False,
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Explain features by a language model, and score each explanation.

    Example: `saeflow explain-by-model demo --features 738,12 --endpoint http://127.0.0.1:8000/v1 --model qwen`
    """
    from saeflow.meaning.language_model.command import explain_features
    from saeflow.meaning.language_model.prompts import Prompts
    from saeflow.meaning.language_model.settings import (
        Endpoint,
        ExampleCounts,
        ExplainSettings,
        endpoint_url,
        source_of,
    )
    from saeflow.meaning.language_model.settings import key_from as read_key
    from saeflow.query.labels import require_source
    from saeflow.runtime.progress import Progress

    settings = ExplainSettings(
        endpoint=Endpoint(
            endpoint_url(endpoint), _valid_model(model), read_key(key_from), parallel, timeout, retries,
            temperature=temperature, trust_proxies=use_proxies,
        ),
        counts=ExampleCounts(bands=bands, score=n, near_misses=silent, random=silent, tokens=context, seed=seed),
        methods=_methods(methods, score), batch=batch, budget=budget, score_source=score,
    )  # fmt: skip
    if score is not None and source is not None:
        raise UserError("--score scores labels that exist, so --source has no meaning beside it. Leave one out.")
    require_source(score or source or source_of(model))
    texts = Prompts.read(prompts, answer_tokens)
    opened = existing_store(store)
    if settings.endpoint.is_open_to_readers and not quiet:
        print_note(f"Texts and key go to {settings.endpoint.url} unencrypted.")
    chosen = _features(opened, run, features)
    outcome = explain_features(opened, run, chosen, settings, texts, Progress(err, -1 if quiet else 0), source, dry_run)
    if dry_run:
        _print_forecast(outcome)
        return
    if not quiet:
        _print_outcome(outcome, settings)
    if outcome.n_left:
        raise UserError(
            f"The budget of {budget:,} tokens leaves {outcome.n_left:,} features undone, after "
            f"{len(outcome.explained):,} that are done. Run the same command again to go on."
        )


def _valid_model(name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > 200:
        raise UserError(f"--model is {brief(sanitise(name))!r}, but it must be the name of a model at the endpoint.")
    return name


def _methods(words: str, scored: str | None) -> tuple[Method, ...]:
    from saeflow.meaning.language_model.settings import SCORINGS

    named = [word.strip().lower() for word in words.split(",") if word.strip()]
    if named == ["all"]:
        return SCORINGS
    if named == ["none"] and scored is None:
        return ()
    if named == ["none"]:
        raise UserError("--score needs a method: detection, fuzzing, simulation, or all.")
    if not named or not {*named} <= {*SCORINGS}:
        raise UserError(f"--methods is {brief(sanitise(words))!r}, but it must name some of {', '.join(SCORINGS)}.")
    return tuple(method for method in SCORINGS if method in named)


def _features(store: object, run: str, words: str) -> list[int]:
    """Return the features that a list such as 3,7,20-29 names, or all that fire. Raises UserError."""
    import contextlib

    from saeflow.query.connection import connect
    from saeflow.store.store import Store

    assert isinstance(store, Store)
    if words.strip() != "all":
        return _numbers(words)
    with contextlib.closing(connect(store, run, names=["stg_feature_stats"])) as connection:
        sql = "select feature_id from stg_feature_stats where n_tokens > 0 order by feature_id"
        return [row[0] for row in connection.execute(sql).fetchall()]


def _numbers(words: str) -> list[int]:
    found: list[int] = []
    for word in words.split(","):
        first, dash, last = word.strip().partition("-")
        if not (first.isascii() and first.isdigit() and len(first) < 10):
            raise UserError(
                f"--features is {brief(sanitise(words))!r}, but it must be a list such as 3,7,20-29, or all."
            )
        if dash and not (last.isascii() and last.isdigit() and len(last) < 10 and int(last) >= int(first)):
            raise UserError(f"--features has {brief(sanitise(word.strip()))!r}, but a range is FIRST-LAST, e.g. 20-29.")
        found += range(int(first), int(last or first) + 1)
    return found


def _print_forecast(outcome: Outcome) -> None:
    if outcome.n_finished_before:
        print_line(f"{outcome.n_finished_before:,} features are finished under these settings")
    print_line(f"forecast: {outcome.forecast}" if outcome.forecast else "Nothing is left to ask.")


def _print_outcome(outcome: Outcome, settings: ExplainSettings) -> None:
    if outcome.n_finished_before:
        print_note(f"{outcome.n_finished_before:,} features were finished before under these settings")
    done = sorted(outcome.explained, key=lambda each: each.feature)
    if done:
        table = new_table("feature", *settings.methods, "explanation")
        for each in done[:_SHOWN]:
            table.add_row(str(each.feature), *(_shown(each, method) for method in settings.methods), _said(each))
        out.print_table(table)
    if len(done) > _SHOWN:
        print_note(f"and {len(done) - _SHOWN:,} more: saeflow ask explanation_scores")
    if outcome.meter is not None and outcome.forecast is not None:
        spent, expected = outcome.meter.spent, outcome.forecast.tokens
        about = f"; forecast {expected:,} ({spent / expected - 1:+.1%})" if expected and not outcome.n_left else ""
        print_note(f"{spent:,} tokens in {outcome.meter.n_requests:,} requests{about}")
        if outcome.meter.n_retries or outcome.n_nonsense:
            print_note(
                f"{outcome.meter.n_retries:,} requests were sent again, {outcome.n_nonsense:,} answers were unreadable"
            )


def _shown(done: Explained, method: Method) -> str:
    score = done.score(method)
    return "" if score is None else f"{score:.2f}"


def _said(done: Explained) -> str:
    return sanitise(done.explanation) if done.explanation is not None else "(no answer that can be read)"
