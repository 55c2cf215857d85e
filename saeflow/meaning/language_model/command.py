"""Explain many features at a time by a language model, and go on where a killed command stopped.

Features are read one at a time from DuckDB, in order, while questions about others are on their way. Every answer is
kept at once. Labels and scores are written in the order of the features, so that a command that was killed and run
again leaves what an undisturbed one leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import duckdb

from saeflow.meaning.language_model.cache import AnswerCache
from saeflow.meaning.language_model.cost import CostForecast, Rates, forecast
from saeflow.meaning.language_model.endpoint import Asker, BudgetReached, Meter
from saeflow.meaning.language_model.examples import READ, Examples, draw_examples
from saeflow.meaning.language_model.feature import ExplainedFeature, Explainer, gather, questions_left
from saeflow.meaning.language_model.forgetting import drop_forgotten_of
from saeflow.meaning.language_model.prompts import Prompts
from saeflow.meaning.language_model.results import Results
from saeflow.meaning.language_model.settings import ExplainSettings, Method, source_of
from saeflow.query import catalog
from saeflow.query.connection import connect_to_run
from saeflow.query.runs import Run
from saeflow.recipe.fingerprint import fingerprint
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.store import Store

_WRITE_SECONDS = 30.0
"""Time between two writings of finished features. A kill in between loses no answer, only their scores."""

_FORECAST_FEATURES = 32
"""Features whose questions are made for the forecast."""


@dataclass
class Outcome:
    """Results of a command."""

    source: str
    n_finished_before: int
    explained: list[ExplainedFeature] = field(default_factory=list)
    forecast: CostForecast | None = None
    """Tokens that the whole command was expected to take; None if nothing was left to do."""
    meter: Meter | None = None
    n_left: int = 0
    """Features that the budget left undone."""

    @property
    def n_nonsense(self) -> int:
        return sum(each.n_nonsense for each in self.explained)


def explain_features(
    store: Store,
    run: str | None,
    features: Sequence[int],
    settings: ExplainSettings,
    prompts: Prompts,
    progress: Progress,
    source: str | None = None,
    dry_run: bool = False,
) -> Outcome:
    """Explain features, or score the labels of `settings.score_source`, and keep labels, scores and mistakes.

    `source` names the labels; by default it is `llm-` and the model's name. `dry_run` asks nothing. Raises UserError if
    the run or a label is missing, or if the endpoint fails; every answer before that is kept.
    """
    chosen, connection = connect_to_run(store, run, names=READ)
    with contextlib.closing(connection), contextlib.ExitStack() as stack:
        work = _Explaining.begin(store, chosen, connection, settings, prompts, progress, source)
        if not dry_run:
            stack.enter_context(work.alone())
            drop_forgotten_of(work.cache)
        wanted = work.wanted(features)
        todo = work.left(wanted)
        work.cache.load(todo)
        outcome = Outcome(work.results.source, len(wanted) - len(todo))
        if todo and dry_run:
            outcome.forecast = work.forecast(todo)
        elif todo:
            with asyncio.Runner() as runner:
                runner.run(work.explain(todo, outcome))
    return outcome


@dataclass
class _Explaining:
    store: Store
    connection: duckdb.DuckDBPyConnection
    settings: ExplainSettings
    prompts: Prompts
    progress: Progress
    cache: AnswerCache
    results: Results
    n_features: int
    labels: Mapping[int, str]
    """Labels to score; none if explanations are made."""
    waiting: dict[int, ExplainedFeature] = field(default_factory=dict)
    """Finished features that others, in front of them, still keep from being written."""
    drawn: dict[int, Examples] = field(default_factory=dict)
    """Examples that the forecast has read, until they are used."""
    written_at: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls, store: Store, run: Run, connection: duckdb.DuckDBPyConnection, settings: ExplainSettings, prompts: Prompts,
        progress: Progress, source: str | None,
    ) -> _Explaining:  # fmt: skip
        sae, tokens = run.artefact.record.input("saes"), run.artefact.record.input("tokens")
        if sae is None or tokens is None:
            raise UserError(f"{run.artefact.id} does not say which SAE its features belong to.")
        model, scored = settings.endpoint.model, settings.score_source
        name = scored or source or source_of(model)
        plain = sae.removeprefix("saes/")
        labels = _labels_of(connection, scored) if scored else {}
        return cls(
            store, connection, settings, prompts, progress, AnswerCache(store, plain, name),
            Results(store, plain, name, model, tokens, makes_labels=scored is None),
            run.shape.get("n_features") or 0, labels,
        )  # fmt: skip

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second command of the same source out."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.store.storage.locked(f"explain-{self.cache.sae}-{self.cache.source}", 0.5))
            except UserError:
                raise UserError(
                    f"Another command explains features as {self.cache.source!r} now. Wait for it, or name another "
                    "--source."
                ) from None
            yield

    def wanted(self, features: Sequence[int]) -> list[int]:
        """Return the features, ascending; only those with a label if labels are scored. Raises UserError."""
        for feature in features:
            if not 0 <= feature < self.n_features:
                raise UserError(f"There is no feature {feature}; features go from 0 to {self.n_features - 1}.")
        if self.settings.score_source is not None:
            features = [feature for feature in features if feature in self.labels]
            if not features:
                raise UserError(f"None of these features has a label of {self.settings.score_source!r}.")
        return sorted(set(features))

    def left(self, features: Sequence[int]) -> list[int]:
        """Return the features that are not finished under these settings."""
        finished = self.results.finished()
        return [each for each in features if finished.get(each) != self.settings_of(each)]

    def settings_of(self, feature: int) -> str:
        """Return a digest of all that decides what is asked about a feature, but for the corpus."""
        about, endpoint = self.settings, self.settings.endpoint
        return fingerprint(
            endpoint.model, endpoint.temperature, asdict(about.counts), about.methods, about.batch,
            about.nonsense_retries, self.prompts.texts, self.prompts.answer_tokens, self.labels.get(feature),
        )  # fmt: skip

    def examples(self, feature: int) -> Examples:
        return self.drawn.pop(feature, None) or draw_examples(self.connection, feature, self.settings.counts)

    def forecast(self, features: Sequence[int]) -> CostForecast:
        """Forecast what these features take, from the questions about some of them and the answers that are kept."""
        step = max(1, len(features) // _FORECAST_FEATURES)
        looked_at = list(features[::step])[:_FORECAST_FEATURES]
        self.drawn |= {feature: self.examples(feature) for feature in looked_at}
        left = [
            list(questions_left(self.drawn[each], self.prompts, self.settings, self.cache, self.labels.get(each)))
            for each in looked_at
        ]
        made: tuple[Method, ...] = () if self.settings.score_source else ("explanation",)
        rates = Rates.counted(answer for answer in self.cache.every() if answer.model == self.settings.endpoint.model)
        return forecast(left, len(features), rates, (*made, *self.settings.methods))

    async def explain(self, todo: Sequence[int], outcome: Outcome) -> None:
        """Explain one feature, forecast the others by what it took, then explain them many at a time.

        The first feature is one that takes a question: features whose answers are all kept tell nothing of the cost.
        """
        meter = outcome.meter = Meter(self.settings.budget)
        order = iter(todo)
        try:
            with self.progress.bar("explain", len(todo), "features") as bar:
                async with Asker(self.settings.endpoint, meter) as asker:
                    explainer = Explainer(self.settings, self.prompts, asker, self.cache, self.results.tokens)
                    while not meter.spent and len(outcome.explained) < len(todo):
                        await self._one(next(order), explainer, outcome, bar, todo)
                    self._forecast_rest(todo, outcome, meter)
                    lock, n = asyncio.Lock(), self.settings.endpoint.parallel
                    await gather([self._several(order, explainer, outcome, bar, todo, lock) for _ in range(n)])
        except BudgetReached:
            outcome.n_left = len(todo) - len(outcome.explained)
        finally:
            self._write(outcome, todo)
            self.cache.fold()
            drop_forgotten_of(self.cache)
            catalog.write_catalog(self.store)

    def _forecast_rest(self, todo: Sequence[int], outcome: Outcome, meter: Meter) -> None:
        """Forecast the others, with as many repeated questions as the first feature needed."""
        first, others = outcome.explained[-1], todo[len(outcome.explained) :]
        rest = self.forecast(others) if others else CostForecast(0, {}, 0, True)
        again = first.n_nonsense / max(1, first.n_questions)
        rest = replace(rest, tokens=round(rest.tokens * (1 + again)))
        outcome.forecast = replace(rest, n_features=len(todo), tokens=meter.spent + rest.tokens)
        if others:
            self.progress.say(f"forecast, after {meter.spent:,} tokens for the first feature: {rest}")

    async def _several(
        self, order: Iterator[int], explainer: Explainer, outcome: Outcome, bar: Bar, todo: Sequence[int],
        lock: asyncio.Lock,
    ) -> None:  # fmt: skip
        for feature in order:
            if explainer.asker.failure is not None:
                return
            async with lock:  # one thread at a time uses the connection
                examples = await asyncio.to_thread(self.examples, feature)
            await self._one(feature, explainer, outcome, bar, todo, examples)

    async def _one(
        self, feature: int, explainer: Explainer, outcome: Outcome, bar: Bar, todo: Sequence[int],
        examples: Examples | None = None,
    ) -> None:  # fmt: skip
        found = self.examples(feature) if examples is None else examples
        done = await explainer.explain(found, self.labels.get(feature))
        self.waiting[feature] = done
        outcome.explained.append(done)
        bar.advance(1)
        if time.monotonic() - self.written_at > _WRITE_SECONDS:
            self._write(outcome, todo)
            self.cache.fold()

    def _write(self, outcome: Outcome, todo: Sequence[int]) -> None:
        """Write finished features up to the first that is not."""
        self.written_at = time.monotonic()
        finished = {each.feature for each in outcome.explained}
        ready = []
        for feature in todo:
            if feature not in finished:
                break
            if feature in self.waiting:
                ready.append(self.waiting.pop(feature))
        if ready:
            with self.cache.locked():
                self.results.write([(done, self.settings_of(done.feature)) for done in ready])
        for done in ready:
            done.judged.clear()  # those of thousands of features would fill the memory


def _labels_of(connection: duckdb.DuckDBPyConnection, source: str) -> dict[int, str]:
    """Return the first label that a source gives to each feature. Raises UserError if the source has none."""
    sql = "select feature_id, min(label) from stg_labels as given where given.source = ? group by feature_id"
    found = dict(connection.execute(sql, [source]).fetchall())
    if not found:
        sql = "select distinct given.source from stg_labels as given order by 1"
        known = ", ".join(str(row[0]) for row in connection.execute(sql).fetchall()) or "none"
        raise UserError(
            f"--score is {source!r}, but no feature has a label of that source. Sources with labels: {known}."
        )
    return found
