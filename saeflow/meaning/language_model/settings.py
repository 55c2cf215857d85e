"""Settings of explanations by a language model."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise

Method = Literal["explanation", "detection", "fuzzing", "simulation"]

SCORINGS: tuple[Method, ...] = ("detection", "fuzzing", "simulation")
"""Ways to score an explanation. `feature` and `scores` say how each works."""

DEFAULT_KEY = "OPENAI_API_KEY"
"""Environment variable that holds the key unless the user names another one."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a language model, and how it is asked."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    parallel: int = 8
    """Requests on their way at the same time."""
    timeout_seconds: float = 120.0
    """Longest time for one answer."""
    retries: int = 6
    """How often a request is sent again after an error that may pass."""
    first_wait_seconds: float = 1.0
    """Wait before the first retry. It doubles each time, unless the endpoint says how long to wait."""
    temperature: float = 0.0
    trust_proxies: bool = False
    """True: httpx reads HTTPS_PROXY, SSL_CERT_FILE and .netrc. False: the environment changes nothing."""

    @property
    def is_open_to_readers(self) -> bool:
        """True if texts and key travel unencrypted over a network."""
        place = urlsplit(self.url)
        return place.scheme == "http" and not _is_loopback(place.hostname or "")


@dataclass(frozen=True)
class ExampleCounts:
    """How many examples of a feature are shown to explain it, and how many to score the explanation."""

    bands: int = 10
    """Quantile bands of the feature's values."""
    explain: int = 2
    """Examples of each band that the explanation is made from."""
    score: int = 5
    """Other examples of each band that the explanation is scored on."""
    near_misses: int = 25
    """Near misses for scoring; a fifth as many more are shown to the explainer."""
    random: int = 25
    """Random silent contexts for scoring."""
    tokens: int = 32
    """Tokens of one context."""
    seed: int = 0

    @property
    def before(self) -> int:
        return self.tokens // 2

    @property
    def after(self) -> int:
        return self.tokens - 1 - self.before


@dataclass(frozen=True)
class ExplainSettings:
    """Everything but the features that decides what is asked."""

    endpoint: Endpoint
    counts: ExampleCounts = ExampleCounts()
    methods: tuple[Method, ...] = ("detection", "fuzzing")
    batch: int = 5
    """Examples in one question of detection or fuzzing (5 in Paulo et al. 2024)."""
    nonsense_retries: int = 2
    """How often a question is asked again if its answer cannot be read."""
    budget: int | None = None
    """Most tokens that one command may spend, questions and answers together."""
    score_source: str | None = None
    """Score the labels of this source instead of making new ones."""


def endpoint_url(url: str) -> str:
    """Return the address without a slash at its end. Raises UserError if it is none, or holds a password."""
    try:
        place = urlsplit(url)
        is_address = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:  # half an IPv6 address, or no number as the port
        is_address = False
    if not is_address or " " in url or not url.isprintable():
        raise UserError(
            f"--endpoint is {brief(sanitise(url))!r}, but it must be an address such as http://127.0.0.1:8000/v1."
        )
    if place.username or place.password or place.query or place.fragment:
        raise UserError(
            "--endpoint holds a password, a query or a fragment. Name the address alone.\n"
            f"Put the key into an environment variable: {DEFAULT_KEY}, or one named by --key-from."
        )
    return url.rstrip("/")


def key_from(variable: str | None) -> str | None:
    """Return the key of an environment variable; None if the default one is not set. Raises UserError."""
    found = os.environ.get(variable or DEFAULT_KEY, "").strip()
    if variable is not None and not found:
        raise UserError(f"--key-from is {brief(sanitise(variable))!r}, but there is no such environment variable.")
    if not found.isascii() or not found.isprintable():
        raise UserError(f"The key in {variable or DEFAULT_KEY} holds characters that no key has.")
    return found or None


def source_of(model: str) -> str:
    """Return the source of labels that a model makes: `llm-` and its name without what a file name may not have."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", model)[:60]
    return f"llm-{plain}".rstrip(".+- ")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
