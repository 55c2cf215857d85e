"""Ask an OpenAI-compatible endpoint: many questions at a time, with retries, within a budget.

Texts of the corpus and the key go to this address and nowhere else: redirects are not followed, and proxies of the
environment are used only on request. The key is taken out of every error and every answer.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saeflow.meaning.language_model.prompts import Prompt
from saeflow.meaning.language_model.settings import DEFAULT_KEY, Endpoint
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletion

LONGEST_WAIT = 900.0
"""Seconds that a Retry-After may ask for. The command stops at a longer one, and goes on when it is run again."""

_MOST_DOUBLED_WAIT = 60.0
_FRAME_TOKENS = 64
"""Tokens that a chat template may add to the messages."""

_SHORTEST_SECRET = 8
"""Shorter keys are stand-ins such as `none` or `0`, for endpoints that need none: they may be words of an answer."""

_MAY_PASS = {408, 409, 425, 429}
_THIS_QUESTION = {400, 413, 422}
"""Errors that may be about one question, e.g. a text that is too long for the model."""


class BudgetReached(Exception):
    """The next question could go over the budget."""


@dataclass(frozen=True)
class Completion:
    """A whole answer. Token counts are None if the endpoint does not tell them."""

    text: str
    n_prompt_tokens: int | None
    n_answer_tokens: int | None


@dataclass
class Meter:
    """Tokens spent by this command, and those that questions on their way could still spend."""

    budget: int | None = None
    spent: int = 0
    reserved: int = 0
    n_requests: int = 0
    n_retries: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reserve(self, most: int) -> None:
        """Wait until `most` tokens fit into the budget. Raises BudgetReached once nothing can make room for them."""
        async with self.changed:
            while self.budget is not None and self.spent + self.reserved + most > self.budget:
                if not self.reserved:
                    raise BudgetReached
                await self.changed.wait()
            self.reserved += most

    async def settle(self, most: int, spent: int) -> None:
        """Put what a question has spent in the place of what was reserved for it."""
        async with self.changed:
            self.reserved -= most
            self.spent += spent
            self.changed.notify_all()


@dataclass
class Asker:
    """Sends questions. Use it inside one event loop, in an `async with` block."""

    endpoint: Endpoint
    meter: Meter
    has_answered: bool = False
    failure: Exception | None = None
    """Why nothing more is sent. Questions that are on their way still end."""
    quiet_until: float = 0.0
    """No question is sent before, as the endpoint asked (in the seconds of time.monotonic)."""
    options: dict[str, Any] = field(default_factory=dict)

    async def __aenter__(self) -> Asker:
        import httpx2
        from openai import AsyncOpenAI

        about = self.endpoint
        self.slots = asyncio.Semaphore(about.parallel)
        self.client: AsyncOpenAI = AsyncOpenAI(
            base_url=about.url,
            api_key=about.key or "none",
            max_retries=0,
            timeout=about.timeout_seconds,
            http_client=httpx2.AsyncClient(
                follow_redirects=False, trust_env=about.trust_proxies, timeout=about.timeout_seconds
            ),
        )
        self.options = {"limit": "max_tokens", "temperature": about.temperature}
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()

    async def ask(self, prompt: Prompt) -> Completion | None:
        """Return the answer; None if the endpoint refuses this question while it has answered others.

        Raises BudgetReached, and UserError if the endpoint cannot be used or does not answer after all retries.
        """
        most = prompt.n_bytes + _FRAME_TOKENS + prompt.most_answer_tokens  # a token has at least one byte
        async with self.slots:
            try:
                self._require_no_failure()
                return await self._within_budget(prompt, most)
            except (UserError, BudgetReached) as error:
                self.failure = self.failure or error
                raise

    async def _within_budget(self, prompt: Prompt, most: int) -> Completion | None:
        await self.meter.reserve(most)
        spent = 0
        try:
            found = await self._with_retries(prompt)
            spent = _spent(found, prompt) if found else 0
        finally:
            await asyncio.shield(self.meter.settle(most, spent))
        return found

    def _require_no_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def _with_retries(self, prompt: Prompt) -> Completion | None:
        import httpx2
        from openai import APIConnectionError, APIError, APIStatusError

        for attempt in range(self.endpoint.retries + 1):
            await self._wait_for_quiet()
            self._require_no_failure()
            wait = None
            try:
                return await self._send(prompt)
            except APIStatusError as error:
                if not _may_pass(error):
                    self._require_only_this(error)
                    return None
                wait = _retry_after(error.response.headers)
                last = f"HTTP {error.status_code}: {self._plain(error.message)}"
            except (APIConnectionError, TimeoutError, httpx2.HTTPError) as error:
                late = isinstance(error, TimeoutError) or "timed out" in str(error)
                last = f"no answer within {self.endpoint.timeout_seconds:g} s" if late else "no connection"
            except (APIError, ValueError, TypeError, AttributeError, IndexError) as error:
                last = f"its answer is not that of a chat: {self._plain(str(error))}"
            if attempt < self.endpoint.retries:
                self.meter.n_retries += 1
                await self._pause(attempt, wait, last)
        raise UserError(
            f"{self.endpoint.url} failed {self.endpoint.retries + 1} times in a row: {last}.\n"
            "Every answer so far is kept. Run the same command again to go on."
        )

    async def _send(self, prompt: Prompt) -> Completion:
        """Send a question, and again if the model wants other options."""
        from openai import BadRequestError

        while True:
            sent = dict(self.options)
            try:
                return await self._send_once(prompt, sent)
            except BadRequestError as error:
                if not self._changes_options(error, sent):
                    raise

    async def _send_once(self, prompt: Prompt, options: Mapping[str, Any]) -> Completion:
        given: Any = {options["limit"]: prompt.most_answer_tokens}
        if options["temperature"] is not None:
            given["temperature"] = options["temperature"]
        messages: Any = [{"role": role, "content": content} for role, content in prompt.messages]
        self.meter.n_requests += 1
        async with asyncio.timeout(self.endpoint.timeout_seconds):
            answer = await self.client.chat.completions.create(model=self.endpoint.model, messages=messages, **given)
        found = _completion(answer)
        self.has_answered = True
        return Completion(self._without_key(found.text), found.n_prompt_tokens, found.n_answer_tokens)

    def _changes_options(self, error: APIStatusError, sent: Mapping[str, Any]) -> bool:
        """Adapt to models that have another name for the limit of tokens, or take no temperature. True: send again.

        `sent` are the options that were refused. Another question may have changed `options` in the meantime.
        """
        said = error.message.lower()
        if "max_completion_tokens" in said and sent["limit"] == "max_tokens":
            self.options["limit"] = "max_completion_tokens"
            return True
        if "temperature" in said and sent["temperature"] is not None:
            self.options["temperature"] = None
            return True
        return False

    def _require_only_this(self, error: APIStatusError) -> None:
        """Raise UserError unless the error may be about this one question, while others were answered."""
        if error.status_code in _THIS_QUESTION and self.has_answered:
            return
        hint = {401: _key_hint(self.endpoint), 403: _key_hint(self.endpoint), 404: "Is the address right, with /v1 at "
                "its end, and does the endpoint have this model?"}.get(error.status_code, "")  # fmt: skip
        if 300 <= error.status_code < 400:
            hint = "It redirects to another address. Texts are sent only where you name: name that address instead."
        raise UserError(
            f"{self.endpoint.url} refuses the model {brief(sanitise(self.endpoint.model))}: HTTP {error.status_code}: "
            f"{self._plain(error.message)}\n{hint}".rstrip()
        ) from None  # the endpoint's own words may repeat the key

    async def _wait_for_quiet(self) -> None:
        while (left := self.quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _pause(self, attempt: int, told: float | None, last: str) -> None:
        """Wait as the endpoint told everybody, or twice as long each time, with some chance in it."""
        if told is not None and told > LONGEST_WAIT:
            raise UserError(
                f"{self.endpoint.url} asks to wait {told:,.0f} s: {last}.\n"
                "Every answer so far is kept. Run the same command again later to go on."
            )
        if told is not None:
            self.quiet_until = max(self.quiet_until, time.monotonic() + told)
            return
        doubled = min(_MOST_DOUBLED_WAIT, self.endpoint.first_wait_seconds * 2**attempt)
        await asyncio.sleep(doubled * random.uniform(0.5, 1.0))

    def _plain(self, text: str) -> str:
        return brief(sanitise(self._without_key(" ".join(text.split()))), 300)

    def _without_key(self, text: str) -> str:
        key = self.endpoint.key or ""
        return text.replace(key, "(key)") if len(key) >= _SHORTEST_SECRET else text


def _completion(answer: ChatCompletion) -> Completion:
    """Return what is used of an answer. Raises ValueError or AttributeError if it is none."""
    if isinstance(answer, str) or not answer.choices:
        raise ValueError("there is no choice in it")
    usage = answer.usage
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    told = [n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in counts]
    text = answer.choices[0].message.content
    said = text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""
    return Completion(said, told[0], told[1])


def _spent(found: Completion, prompt: Prompt) -> int:
    asked = found.n_prompt_tokens if found.n_prompt_tokens is not None else -(-prompt.n_chars // 4)
    return asked + (found.n_answer_tokens if found.n_answer_tokens is not None else -(-len(found.text) // 4))


def _may_pass(error: APIStatusError) -> bool:
    spent = error.code == "insufficient_quota"
    return (error.status_code in _MAY_PASS or error.status_code >= 500) and not spent


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that Retry-After asks for, as a number or a date; None if it asks for nothing."""
    said = headers.get("retry-after", "").strip()
    if not said:
        return None
    try:
        return max(0.0, float(said)) if said.replace(".", "", 1).isdigit() else _seconds_until(said)
    except (ValueError, TypeError, OverflowError):
        return None


def _seconds_until(date: str) -> float:
    return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())


def _key_hint(endpoint: Endpoint) -> str:
    if endpoint.key is None:
        return f"No key was sent: set {DEFAULT_KEY}, or name another variable with --key-from."
    return "Check the key in the environment variable. It was sent and is shown nowhere."
