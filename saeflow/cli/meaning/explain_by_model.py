"""Explanations by a language model: what `saeflow explain --endpoint` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import err, existing_store, new_table, out, print_line, print_note
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise

if TYPE_CHECKING:
    from saeflow.meaning.language_model.command import Outcome
    from saeflow.meaning.language_model.feature import ExplainedFeature
    from saeflow.meaning.language_model.settings import ExplainSettings, Method
    from saeflow.store.store import Store

_N_FEATURES = "select coalesce((select n_features from stg_shape), (select max(feature_id) + 1 from stg_feature_stats))"
_LIVE_IDS = "select feature_id from stg_feature_stats where n_tokens > 0 order by feature_id"

_SHOWN = 50
"""Features shown at the end; `saeflow ask explanation_scores` has the others."""

Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="URL", help="Explain by a model there, e.g. http://127.0.0.1:8000/v1."),
]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model's name at the endpoint.")]
Score = Annotated[
    str | None, typer.Option("--score", metavar="SOURCE", help="Score the labels of this source; make none.")
]
Methods = Annotated[str, typer.Option("--methods", help="Scores: detection, fuzzing, simulation; all; or none.")]
Budget = Annotated[
    int | None, typer.Option("--budget", metavar="TOKENS", min=1, help="Stop before going over so many tokens.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Forecast the tokens, and ask nothing.")]
PromptFolder = Annotated[Path | None, typer.Option("--prompts", metavar="FOLDER", help="Folder with edited prompts.")]
Source = Annotated[
    str | None, typer.Option("--source", help="Source of the labels. Default: llm- and the model's name.")
]
KeyFrom = Annotated[
    str | None, typer.Option("--key-from", metavar="VARIABLE", help="Environment variable with the endpoint's key.")
]
Parallel = Annotated[int, typer.Option("--parallel", min=1, max=256, help="Questions at the same time.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for one answer.")]
Retries = Annotated[int, typer.Option("--retries", min=0, max=100, help="Retries of a question that fails.")]
Bands = Annotated[int, typer.Option("--bands", min=1, max=100, help="Quantile bands of a feature's values.")]
PerBand = Annotated[int, typer.Option("-n", min=1, max=1000, help="Examples of each band for scoring.")]
Silent = Annotated[
    int, typer.Option("--silent", min=1, max=5000, help="Near misses, and as many random silent contexts.")
]
Context = Annotated[int, typer.Option("--context", min=2, max=1000, help="Tokens of one context.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=100, help="Examples in one question.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, max=2, help="Of the model's sampling.")]
AnswerTokens = Annotated[
    int | None, typer.Option("--answer-tokens", min=1, help="Most tokens of an answer, for models that think aloud.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Chooses the examples.")]
UseProxies = Annotated[
    bool, typer.Option("--use-proxies", help="Obey HTTPS_PROXY, HTTP_PROXY, SSL_CERT_FILE and .netrc.")
]


@dataclass(frozen=True)
class Typed:
    """What was typed about the model, its examples and its answers, as far as it is not the default."""

    endpoint: str
    model: str | None
    score: str | None
    methods: str
    budget: int | None
    dry_run: bool
    prompts: Path | None
    source: str | None
    key_from: str | None
    parallel: int
    timeout: float
    retries: int
    bands: int
    per_band: int
    silent: int
    context: int
    batch: int
    temperature: float
    answer_tokens: int | None
    seed: int
    use_proxies: bool

    def settings(self) -> ExplainSettings:
        """Return the settings. Raises UserError for what cannot work."""
        from saeflow.meaning.language_model import settings as about
        from saeflow.query.labels import require_source

        model = _valid_model(self.model)
        if self.score is not None and self.source is not None:
            raise UserError("--score scores labels that exist, so --source has no meaning beside it. Leave one out.")
        require_source(self.score or self.source or about.source_of(model))
        endpoint = about.Endpoint(
            about.endpoint_url(self.endpoint), model, about.key_from(self.key_from), self.parallel, self.timeout,
            self.retries, temperature=self.temperature, trust_proxies=self.use_proxies,
        )  # fmt: skip
        counts = about.ExampleCounts(
            bands=self.bands, score=self.per_band, near_misses=self.silent, random=self.silent, tokens=self.context,
            seed=self.seed,
        )  # fmt: skip
        return about.ExplainSettings(
            endpoint, counts, _methods(self.methods, self.score), self.batch, budget=self.budget,
            score_source=self.score,
        )  # fmt: skip


def explain_by_model(run: str | None, features: str | None, typed: Typed, store: str | None, quiet: bool) -> None:
    """Explain features by a language model, score each explanation, and print what was done."""
    from saeflow.meaning.language_model.command import explain_features
    from saeflow.meaning.language_model.prompts import Prompts
    from saeflow.runtime.progress import Progress

    settings = typed.settings()
    texts = Prompts.read(typed.prompts, typed.answer_tokens)
    opened = existing_store(store)
    if settings.endpoint.is_open_to_readers and not quiet:
        print_note(f"Texts and key go to {settings.endpoint.url} unencrypted.")
    chosen, progress = _features_named(opened, run, features), Progress(err, -1 if quiet else 0)
    outcome = explain_features(opened, run, chosen, settings, texts, progress, typed.source, typed.dry_run)
    if typed.dry_run:
        _print_forecast(outcome)
        return
    if not quiet:
        _print_outcome(outcome, settings)
    if outcome.n_left:
        raise UserError(
            f"The budget of {settings.budget:,} tokens leaves {outcome.n_left:,} features undone, after "
            f"{len(outcome.explained):,} that are done. Run the same command again to go on."
        )


def _valid_model(name: str | None) -> str:
    if name is None:
        raise UserError("--endpoint needs --model: the name that the endpoint gives to its model.")
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


def _features_named(store: Store, run: str | None, words: str | None) -> list[int]:
    """Return the features that a list such as 3,7,20-29 names, or `all` that fire. Raises UserError."""
    import contextlib

    from saeflow.meaning.feature_list import parse_features
    from saeflow.query.connection import connect

    if words is None:
        raise UserError(
            "--endpoint needs --features: a list such as 3,7,20-29, or all. (--dry-run says what all cost.)"
        )
    with contextlib.closing(connect(store, run, names=["stg_feature_stats", "stg_shape"])) as connection:
        if words.strip() != "all":
            return parse_features(words, connection.execute(_N_FEATURES).fetchall()[0][0])
        return [row[0] for row in connection.execute(_LIVE_IDS).fetchall()]


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
            table.add_row(
                str(each.feature), *(_score_in_words(each, method) for method in settings.methods), _said(each)
            )
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


def _score_in_words(done: ExplainedFeature, method: Method) -> str:
    score = done.score(method)
    return "" if score is None else f"{score:.2f}"


def _said(done: ExplainedFeature) -> str:
    return sanitise(done.explanation) if done.explanation is not None else "(no answer that can be read)"
