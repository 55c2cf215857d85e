"""Requests of every kind to the pages: known and unknown paths, parameters with values of every kind, odd methods,
headers and forms.
"""

from __future__ import annotations

import json
import random
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from starlette.types import ASGIApp

from saeflow.browser.address import FILTER, WINDOW
from saeflow.browser.answers import FORMATS
from saeflow.browser.connections import QUERY_SECONDS, Connections
from saeflow.browser.pages import PAGES, PAGES_OF_STORE
from saeflow.browser.pages.features import SEARCH
from saeflow.browser.server import LOOPBACK, Application
from saeflow.query.questions import questions
from saeflow.store.store import Store
from tests.fuzz.oracle import Ground, Judged
from tests.support.asgi import HOST, Answered, Headers, ask

ROUTES = [path.replace(":path}", "}") for path, _ in [*PAGES_OF_STORE, *PAGES]]
ROUTES += ["/static/charts.js", "/static/{file}", "/{anything}", "/runs/{run}/{anything}"]
LABEL = "/runs/{run}/features/{feature}/label"
MARK = "zq9"
"""No page has it: only the request."""

HOSTILE = [
    f"<{MARK} onload=x>", f"'\"><{MARK}>", f"</script><{MARK}>", f'"}}]<!--<{MARK}>', f"javascript:{MARK}", "{{7*7}}",
    "\0", "a\0b", "\x1b[31m", "\u202e", "\r\nset-cookie: a=b", "\ud800", "é" * 40, "\U0001f600", "=1+1", "' or 1=1 --",
    "'; copy (select 1) to 'x'; --", "../../etc/passwd", "..%2f..", "%", "%zz", "%00", "%25", "\\", "", " ", ",", "[]",
    '["a"]', "[[1]]", "{}", "null", "None", "true",
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "3", "7", "-1", "-0", "1.5", "1e3", "1e400", "nan", "inf", "-inf", "0x10", "1_000", "٣", "²", "+1",
    "9223372036854775807", "9223372036854775808", "-9223372036854775808", "9" * 400, "1,2", "1,2,3,x", "[1,2]",
]  # fmt: skip
PLAUSIBLE = {
    "run": ["small"], "feature": ["0", "1", "3", "31"], "panel": ["strongest", "bands", "random", "entries"],
    "doc": ["tales/000", "tales/001"], "key": ["tales/000"], "document_key": ["tales/000"], "vocab": ["5", "30"],
    "token": ["0", "17", "200"], "tokens": ["3", "3,17,200"],
    "source": ["tales"], "since": ["2020-01-01"], "until": ["2030-01-01"],
    "annotation": ["none"], "class": ["none"],
    "features": ["1,2", "3"], "thresholds": ["0,0", "0.1"], "sort": ["interesting", "id"], "file": ["browser.css"],
    "kind": ["dead", "other"], "by": ["pca", "umap"], "text": ["a", "the sea"], "a": ["small", "1"], "b": ["2"],
}  # fmt: skip
METHODS = ["HEAD", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", MARK.upper()]
OWN_WORDS = [
    *FILTER, *WINDOW, *SEARCH, "n", "all", "breaks", "sort", "after_sort", "after_id", "a", "b", "run", "match", "key",
    "feature", "at", "first", "by", "text", "model", "tokens",
]  # fmt: skip
"""What pages, beside the questions, read from an address."""


@dataclass(frozen=True)
class Asking:
    """A request."""

    address: str
    method: str = "GET"
    headers: Headers = ()
    body: bytes = b""


def some_asking(dice: random.Random, token: str) -> Asking:
    """Return a request that the dice make; `token` is that of the forms."""
    if dice.random() < 0.06:
        return _some_form(dice, token)
    path = dice.choice(ROUTES)
    given = {name: _word(dice, name, 0.96 if name == "run" else 0.88) for name in _names_in(path)}
    if "question" in given:
        given["question"] = _question(dice)
    address = path.format(**{name: _quoted(dice, word) for name, word in given.items()})
    address += dice.choice(["", "", ".json", *(f".{each}" for each in FORMATS), ".xml", "."])
    method = "GET" if dice.random() < 0.93 else dice.choice(METHODS)
    return Asking(address + _query(dice, given.get("question")), method, _headers(dice))


def _some_form(dice: random.Random, token: str) -> Asking:
    address = LABEL.format(run="small", feature=_quoted(dice, _word(dice, "feature"))) + _query(dice, None)
    fields = {"token": dice.choice([token, token, "x", "é", ""]), "label": dice.choice([*HOSTILE, "l" * 10_001])}
    form = urllib.parse.urlencode(fields, errors="replace").encode()
    body = dice.choice([form, form, form, b"", b"\0\xff%", b"&" * 5000, b"a" * 100_000, b"token=%ff&label=%ed%a0%80"])
    kind = dice.choice(["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json", ""])
    origin = dice.choice([f"http://{HOST}"] * 4 + ["null", "http://evil.example", f"http://{HOST}.evil.example"])
    return Asking(address, "POST", [("host", HOST), ("origin", origin), ("content-type", kind)], body)


def _headers(dice: random.Random) -> Headers:
    if dice.random() < 0.95:
        return [("host", HOST), ("origin", f"http://{HOST}")]
    host = dice.choice(
        [HOST, "localhost", "[::1]:1", "evil.example", "", ":", f"<{MARK}>", "127.0.0.1.evil.example", "é"]
    )
    site = dice.choice(["cross-site", "same-origin", "none", MARK])
    more = dice.choice(
        [("range", "bytes=0-1"), ("if-modified-since", MARK), ("accept", "x" * 5000), ("cookie", "a=\x01")]
    )
    return [
        ("host", host),
        ("sec-fetch-site", site),
        more,
        *([("host", "evil.example")] if dice.random() < 0.1 else []),
    ]


def _query(dice: random.Random, question: str | None) -> str:
    names = list(_parameters().get(question or "", ())) or OWN_WORDS
    few = [name for name in names if dice.random() < min(1.0, 3 / len(names))]
    pairs = [(name, _word(dice, name)) for name in few]
    needed = [name for name in _parameters(needed=True).get(question or "", ()) if name not in few]
    pairs += [(name, dice.choice(PLAUSIBLE.get(name, NUMBERS[:4]))) for name in needed if dice.random() < 0.9]
    if dice.random() < 0.15:
        pairs += [(dice.choice([*(name for name, _ in pairs), MARK, "", "n"]), _word(dice, "n"))]
    if dice.random() < 0.03:
        pairs += [("text", "x" * 100_001)]
    query = "&".join(f"{name}={_quoted(dice, word)}" for name, word in pairs)
    return (f"?{query}" if query else "") + dice.choice([""] * 12 + ["?", "&", "&&==", "&%", "#x", f"&<{MARK}>"])


def _word(dice: random.Random, name: str, plausible: float = 0.75) -> str:
    if dice.random() < plausible:
        return dice.choice(PLAUSIBLE.get(name, NUMBERS[:5]))
    return dice.choice(NUMBERS if dice.random() < 0.6 else HOSTILE)


def _quoted(dice: random.Random, word: str) -> str:
    how = dice.random()
    if how < 0.8:
        return urllib.parse.quote(word, safe="", errors="surrogatepass")
    return urllib.parse.quote(word, safe="/", errors="replace") if how < 0.9 else word.replace("?", "").replace("#", "")


def _question(dice: random.Random) -> str:
    return dice.choice([*_parameters()]) if dice.random() < 0.95 else dice.choice(HOSTILE)


@cache
def _parameters(needed: bool = False) -> dict[str, tuple[str, ...]]:
    """The parameters of each question; only those without a default if `needed`. No model is run."""
    return {
        question.name: tuple(each.name for each in question.parameters if not needed or each.default is None)
        for question in questions()
        if not question.runs_model
    }


def _names_in(path: str) -> list[str]:
    return [part.partition("}")[0].partition(":")[0] for part in path.split("{")[1:]]


class _Tags(HTMLParser):
    """Collects the tags and attributes that a request put into a page, and what the pages' policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [given["href"] or ""] if tag == "a" and "href" in given else []
        data = tag == "script" and given.get("type") == "application/json"
        inline = tag == "style" or "style" in given or (tag == "script" and not data and "src" not in given)
        active = any(name.startswith("on") for name in given) or (given.get("href") or "").startswith("javascript:")
        if inline or active or MARK in tag or any(MARK in name for name in given):
            self.wrong.append(self.get_starttag_text() or tag)


def problems_of(asking: Asking, answer: Answered, seconds: float) -> Iterator[str]:
    """Say what is wrong with an answer."""
    if answer.error is not None or answer.status >= 500 or not answer.status:
        yield f"{answer.status}: {type(answer.error).__name__}: {answer.error}"
        return
    if seconds > QUERY_SECONDS + 10:
        yield f"took {seconds:.0f} seconds"
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if "default-src 'none'" not in answer.headers.get("content-security-policy", "") or "set-cookie" in answer.headers:
        yield f"its headers are {answer.headers}"
    if asking.method == "HEAD" or not answer.body:
        return
    if kind == "text/html":
        yield from _problems_of_html(asking, answer)
    elif kind == "application/json":
        try:
            json.loads(answer.text, parse_constant=_no_constant)
        except ValueError as error:
            yield f"its JSON: {error}"
    elif kind == "text/plain" and MARK in answer.text:
        yield "plain text repeats the request"


def _problems_of_html(asking: Asking, answer: Answered) -> Iterator[str]:
    tags = _Tags()
    tags.feed(answer.text)
    yield from (f"the page has {tag[:200]}" for tag in tags.wrong)
    if set(tags.text) & set("\0\x1b\u202e"):
        yield "the page has characters that act"
    if "/" not in tags.links:
        yield "the page does not lead to the runs"
    if asking.address.startswith("/runs/small/") and "/runs/small" not in tags.links:
        yield "the page does not lead to its run"


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


class Pages:
    """The pages of a store, asked in this process."""

    def __init__(self, store: Store, seconds: float = QUERY_SECONDS) -> None:
        application = Application(store, LOOPBACK, Connections(store, seconds))
        self.app: ASGIApp = application.app
        self.token = application.token

    def judged(self, asking: Asking) -> Judged:
        """Send a request, and judge the answer."""
        began = time.monotonic()
        answer = ask(self.app, asking.address, asking.method, asking.headers, asking.body)
        problems = list(problems_of(asking, answer, time.monotonic() - began))
        return Judged([asking.method, asking.address], answer.status, repr(asking)[:2000], problems)


@cache
def _pages_of(root: Path) -> Pages:
    return Pages(Store.open(root))


def fuzz(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    """Ask the pages of the finished store ten times. Labels are written there: no other case reads them."""
    pages = _pages_of(ground.store)
    for _ in range(10):
        yield pages.judged(some_asking(dice, pages.token))
