"""Tokens that questions will take, forecast from the questions themselves and from answers that were counted before."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from saeflow.meaning.language_model.cache import CachedAnswer
from saeflow.meaning.language_model.prompts import Prompt
from saeflow.meaning.language_model.settings import Method

_CHARS_PER_TOKEN = 4.0
"""A guess for English, used until the endpoint has counted the tokens of a question."""

_ANSWER_TOKENS: dict[Method, float] = {"explanation": 40.0, "detection": 3.0, "fuzzing": 3.0, "simulation": 1.0}
"""Guesses of the tokens of an answer, for each example or token that it counts; of an explanation as a whole."""


@dataclass(frozen=True)
class Rates:
    """Tokens for each character of a question, and for each thing that an answer counts."""

    per_char: Mapping[str, float]
    per_item: Mapping[str, float]

    @classmethod
    def counted(cls, answers: Iterable[CachedAnswer]) -> Rates:
        """Return the rates of answers whose tokens the endpoint has counted."""
        sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for answer in answers:
            if answer.n_prompt_tokens is not None and answer.n_answer_tokens is not None:
                sums[answer.method].update(
                    chars=answer.n_prompt_chars, asked=answer.n_prompt_tokens, said=answer.n_answer_tokens,
                    items=_items(answer.method, answer.n),
                )  # fmt: skip
        per_char = {method: each["asked"] / each["chars"] for method, each in sums.items() if each["chars"]}
        return cls(per_char, {method: each["said"] / each["items"] for method, each in sums.items() if each["items"]})

    def knows(self, methods: Iterable[Method]) -> bool:
        return all(method in self.per_char for method in methods)

    def tokens(self, prompt: Prompt) -> float:
        """Return the tokens that a question and its answer take."""
        others = [*self.per_char.values()]
        usual = sum(others) / len(others) if others else 1 / _CHARS_PER_TOKEN
        answer = self.per_item.get(prompt.method, _ANSWER_TOKENS[prompt.method]) * _items(prompt.method, prompt.n)
        return self.per_char.get(prompt.method, usual) * prompt.n_chars + answer


def _items(method: str, n: int) -> int:
    return 1 if method == "explanation" else n


@dataclass(frozen=True)
class CostForecast:
    """Questions and tokens that the features which are left will take."""

    n_features: int
    questions: Mapping[str, int]
    tokens: int
    is_counted: bool
    """True if the endpoint has counted tokens of such questions; False if they are guessed from characters."""

    @property
    def n_questions(self) -> int:
        return sum(self.questions.values())

    def __str__(self) -> str:
        each = ", ".join(f"{n:,} {method}" for method, n in self.questions.items())
        basis = "" if self.is_counted else " (guessed: four characters a token)"
        return f"{self.n_features:,} features, {self.n_questions:,} questions ({each}): {self.tokens:,} tokens{basis}"


def forecast(
    left: Sequence[Sequence[Prompt]], n_features: int, rates: Rates, methods: Iterable[Method]
) -> CostForecast:
    """Return the forecast for `n_features`; `left` has the questions of some of them that are not answered yet."""
    counts = Counter(prompt.method for prompts in left for prompt in prompts)
    tokens = sum(rates.tokens(prompt) for prompts in left for prompt in prompts)
    scale = n_features / len(left) if left else 0.0
    questions: dict[str, int] = {method: round(n * scale) for method, n in counts.items()}
    return CostForecast(n_features, questions, round(tokens * scale), rates.knows(methods))
