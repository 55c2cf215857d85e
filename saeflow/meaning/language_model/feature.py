"""Explain one feature from its examples, and score an explanation on others.

Detection (Paulo et al. 2024, arXiv 2410.13928): does a whole context contain the feature? Fuzzing (the same paper): are
the marked tokens the right ones? Simulation (Bills et al. 2023): how strong is the feature at each token?
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from saeflow.meaning.language_model.answers import read_explanation, read_judgements, read_strengths
from saeflow.meaning.language_model.cache import AnswerCache, CachedAnswer, key_of_prompt
from saeflow.meaning.language_model.endpoint import Asker
from saeflow.meaning.language_model.examples import Examples, Window
from saeflow.meaning.language_model.prompts import Prompt, Prompts, plain, with_marks, wrong_places
from saeflow.meaning.language_model.scores import (
    JudgedExample,
    Score,
    Simulated,
    judged_scores,
    simulated_scores,
)
from saeflow.meaning.language_model.settings import ExplainSettings, Method

Read = TypeVar("Read")
Reader = Callable[[str, int], Read | None]
"""Reads an answer about `n` examples or tokens; None if it cannot be read."""

EXPECTED_EXPLANATION = "x" * 60
"""Stands for an explanation that is not made yet where questions are only counted."""


@dataclass(frozen=True)
class ExampleQuestion:
    """A prompt and the windows that it is about."""

    prompt: Prompt
    windows: tuple[Window, ...]


@dataclass
class ExplainedFeature:
    """An explanation with its scores. `explanation` is None if the model's answers could not be read."""

    feature: int
    explanation: str | None
    n_explaining: int = 0
    n_questions: int = 0
    n_nonsense: int = 0
    """Answers that could not be read, also those that a second question made good."""
    scores: dict[Method, list[Score]] = field(default_factory=dict)
    judged: dict[Method, list[JudgedExample]] = field(default_factory=dict)

    def score(self, method: Method) -> float | None:
        """Return the score of all examples."""
        return next((each.score for each in self.scores.get(method, ()) if each.stratum == "all"), None)


@dataclass
class Explainer:
    """Explains and scores features one by one; several may be on their way at once."""

    settings: ExplainSettings
    prompts: Prompts
    asker: Asker
    cache: AnswerCache
    tokens: str
    """The artefact of tokens that examples come from."""

    async def explain(self, examples: Examples, explanation: str | None = None) -> ExplainedFeature:
        """Make an explanation, or take the one that is given, and score it by every method of the settings."""
        done = ExplainedFeature(examples.feature, explanation, len(examples.explaining))
        if explanation is None and examples.explaining:
            question = ExampleQuestion(self.prompts.explanation(examples), examples.explaining)
            done.explanation = await self._read(question, done, lambda text, n: read_explanation(text))
        if done.explanation is not None:
            for method in self.settings.methods:
                if method == "simulation":
                    done.scores[method] = await self._simulate(examples, done.explanation, done)
                else:
                    done.judged[method] = await self._judge(method, examples, done.explanation, done)
                    done.scores[method] = judged_scores(done.judged[method])
        return done

    async def _judge(
        self, method: Method, examples: Examples, explanation: str, done: ExplainedFeature
    ) -> list[JudgedExample]:
        questions = judgements(method, self.prompts, examples, explanation, self.settings)
        answers = await gather([self._read(question, done, read_judgements) for question in questions])
        found = []
        for question, answered in zip(questions, answers, strict=True):
            said: Sequence[bool | None] = answered or [None] * len(question.windows)
            pairs = zip(question.windows, said, strict=True)
            found += [JudgedExample(window.stratum, window.token_id, window.fires, answer) for window, answer in pairs]
        return found

    async def _simulate(self, examples: Examples, explanation: str, done: ExplainedFeature) -> list[Score]:
        questions = simulations(self.prompts, examples, explanation)
        answers = await gather([self._read(question, done, read_strengths) for question in questions])
        found = [
            Simulated(question.windows[0].stratum, question.windows[0].token_id, question.windows[0].strengths, said)
            for question, said in zip(questions, answers, strict=True)
        ]
        return simulated_scores(found, self.settings.counts.seed)

    async def _read(self, question: ExampleQuestion, done: ExplainedFeature, read: Reader[Read]) -> Read | None:
        """Return what the answer says. A question whose answer cannot be read is asked again, with a reminder."""
        prompt = question.prompt
        done.n_questions += 1
        for _ in range(self.settings.nonsense_retries + 1):
            text = await self._answer(prompt, question, done.feature)
            if text is None:
                return None
            if (found := read(text, prompt.n)) is not None:
                return found
            done.n_nonsense += 1
            prompt = question.prompt.again(text)
        return None

    async def _answer(self, prompt: Prompt, question: ExampleQuestion, feature: int) -> str | None:
        """Return the kept answer, or ask and keep it. None if the endpoint refuses this question."""
        about = self.settings.endpoint
        key = key_of_prompt(about.model, about.temperature, prompt)
        if (known := self.cache.known.get(key)) is not None:
            return known.text
        found = await self.asker.ask(prompt)
        if found is None:
            return None
        documents = tuple(sorted({window.document_id for window in question.windows}))
        self.cache.keep(
            CachedAnswer(
                key, feature, prompt.method, about.model, found.text, prompt.n, prompt.n_chars, found.n_prompt_tokens,
                found.n_answer_tokens, self.tokens, documents,
            )
        )  # fmt: skip
        return found.text


async def gather(asks: Sequence[Coroutine[Any, Any, Read]]) -> list[Read]:
    """Return the results in order. If one fails, the others that are on their way still end: their answers are kept."""
    found = await asyncio.gather(*asks, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return [each for each in found if not isinstance(each, BaseException)]


def questions_left(
    examples: Examples, prompts: Prompts, settings: ExplainSettings, cache: AnswerCache, explanation: str | None
) -> Iterator[Prompt]:
    """Yield the questions about a feature that have no answer yet. A stand-in takes the place of its explanation."""

    def answer_to(prompt: Prompt) -> CachedAnswer | None:
        return cache.known.get(key_of_prompt(settings.endpoint.model, settings.endpoint.temperature, prompt))

    if explanation is None:
        if not examples.explaining:
            return
        prompt = prompts.explanation(examples)
        answer = answer_to(prompt)
        explanation = read_explanation(answer.text) if answer else None
        if answer is None:
            yield prompt
    for question in _scoring_questions(examples, prompts, settings, explanation or EXPECTED_EXPLANATION):
        if answer_to(question.prompt) is None:
            yield question.prompt


def _scoring_questions(
    examples: Examples, prompts: Prompts, settings: ExplainSettings, explanation: str
) -> Iterator[ExampleQuestion]:
    for method in settings.methods:
        if method == "simulation":
            yield from simulations(prompts, examples, explanation)
        else:
            yield from judgements(method, prompts, examples, explanation, settings)


def judgements(
    method: Method, prompts: Prompts, examples: Examples, explanation: str, settings: ExplainSettings
) -> list[ExampleQuestion]:
    """Return the questions of detection or fuzzing. Each mixes firing and silent examples, in an order by chance."""
    seed = settings.counts.seed
    dice = random.Random(f"{seed}:{method}:{examples.feature}")
    windows = list(examples.scoring)
    dice.shuffle(windows)
    if method == "fuzzing":
        n_marked = [len(window.active) for window in windows if window.fires] or [1]
        shown = {
            window.token_id: with_marks(
                window, window.active if window.fires else wrong_places(window, dice.choice(n_marked), seed)
            )
            for window in windows
        }
    else:
        shown = {window.token_id: plain(window) for window in windows}
    chunks = (windows[start : start + settings.batch] for start in range(0, len(windows), settings.batch))
    return [
        ExampleQuestion(
            prompts.judgement(method, explanation, [shown[window.token_id] for window in chunk]), tuple(chunk)
        )
        for chunk in chunks
    ]


def simulations(prompts: Prompts, examples: Examples, explanation: str) -> list[ExampleQuestion]:
    """Return the questions of simulation: one context of each band, and half as many silent ones at random."""
    firing = list({window.stratum: window for window in reversed(examples.scoring) if window.fires}.values())[::-1]
    silent = [window for window in examples.scoring if window.stratum == "random"]
    chosen = firing + silent[: -(-len(firing) // 2)]
    return [ExampleQuestion(prompts.simulation(explanation, window), (window,)) for window in chosen]
