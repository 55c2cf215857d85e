"""An OpenAI-compatible endpoint on loopback that knows the truth of a store, and misbehaves on request.

with stub_endpoint(Truth(given)) as stub:
    stub.url                                  # for --endpoint
    stub.misbehave = lambda number: (429, {"Retry-After": "0"})   # by the number of the request, from 1; None: behaves

A label that names a feature (`… feature 17 …`) is judged by what that feature does. Run as a program it serves a store
for the commands of the documentation: `python -m tests.support.stub_endpoint STORE`.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from saeflow.query.runs import pick_run, runs
from saeflow.store.store import Store
from tests.support.small_store import Given
from tests.support.stored_run import Stored

Misbehaviour = tuple[int, Mapping[str, str]] | str | float | None
"""A status with headers, a text instead of the answer, seconds to stall before it, or nothing."""


@dataclass
class Truth:
    """Finds a text of a prompt in the store's documents, and says where features fire in it."""

    given: Given | Stored

    @cached_property
    def _fired(self) -> dict[int, dict[int, float]]:
        found: dict[int, dict[int, float]] = {}
        for token, feature, value in self.given.values:
            found.setdefault(token, {})[feature] = value
        return found

    @cached_property
    def _strongest(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for _, feature, value in self.given.values:
            found[feature] = max(value, found.get(feature, 0.0))
        return found

    @cached_property
    def _documents(self) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """Text of each document, and its tokens with the characters they stand for."""
        found: dict[int, tuple[str, list[tuple[int, int, int]]]] = {}
        for token in self.given.every_token():
            if token.document_id is not None:
                text, tokens = found.get(token.document_id, ("", []))
                piece = self.given.vocab[token.vocab_id].decode("utf-8", "replace")
                tokens.append((token.token_id, len(text), len(text) + len(piece)))
                found[token.document_id] = text + piece, tokens
        return list(found.values())

    def tokens_of(self, shown: str) -> list[int]:
        """The tokens of a text as a prompt shows it, without its marks."""
        text = re.sub(r"<<|>>", "", shown).replace("\\n", "\n")
        return self._between(text, 0, len(text))

    def marked_in(self, shown: str) -> list[int]:
        plain, spans = "", []
        for part in re.split(r"(<<.*?>>)", shown.replace("\\n", "\n")):
            if part.startswith("<<"):
                spans.append((len(plain), len(plain) + len(part) - 4))
                part = part[2:-2]
            plain += part
        return [token for first, last in spans for token in self._between(plain, first, last)]

    def _between(self, text: str, first: int, last: int) -> list[int]:
        for whole, tokens in self._documents:
            start = whole.find(text)
            if start >= 0:
                return [token for token, low, high in tokens if low < start + last and high > start + first]
        raise AssertionError(f"the prompt quotes what is nowhere: {text!r}")

    def fires(self, token: int, feature: int) -> bool:
        return feature in self._fired.get(token, {})

    def strength(self, token: int, feature: int) -> int:
        value = self._fired.get(token, {}).get(feature, 0.0)
        return min(10, -(-int(value * 1000) * 10 // int(self._strongest[feature] * 1000))) if value else 0

    def commonest(self, tokens: Sequence[int]) -> int:
        """The feature that fires at most of the tokens; of several the rarest, which knows most."""
        counts = Counter(feature for token in tokens for feature in self._fired.get(token, {}))
        sizes = Counter(feature for _, feature, _ in self.given.values)
        return min(counts, key=lambda feature: (-counts[feature], sizes[feature], feature))

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What a model would say that knows all values of the store."""
        user = next(message["content"] for message in messages if message["role"] == "user")
        examples = re.findall(r"^Example \d+: (.*)$", user, re.MULTILINE)
        said = re.search(r"^Explanation: .*?feature (\d+)", user, re.MULTILINE)
        if not user.startswith("Explanation:"):
            tokens = [token for example in examples for token in self.marked_in(example)]
            return f"They have something in common.\nExplanation: where feature {self.commonest(tokens)} fires"
        feature = int(said[1]) if said else -1
        lines = user.partition("\n\n")[2].split("\n")
        if not examples:
            tokens = self.tokens_of("".join(re.sub(r"^\d+ ", "", line) for line in lines))
            found = {i: self.strength(token, feature) for i, token in enumerate(tokens, 1)}
            return json.dumps({str(i): strength for i, strength in found.items() if strength})
        about_marks = any("<<" in example for example in examples)
        judged = [self._judged(example, feature, about_marks) for example in examples]
        return json.dumps([int(each) for each in judged])

    def _judged(self, example: str, feature: int, about_marks: bool) -> bool:
        if about_marks:
            return all(self.fires(token, feature) for token in self.marked_in(example))
        return any(self.fires(token, feature) for token in self.tokens_of(example))


def n_tokens(text: str) -> int:
    """Words, and each other character: what this endpoint calls a token."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class Stub(ThreadingHTTPServer):
    """`asked` counts the requests by their content, `answered` those that were answered whole."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Sequence[Mapping[str, str]]], str], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Answers)
        self.answer = answer
        self.misbehave: Callable[[int], Misbehaviour] = lambda number: None
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.tells_usage = True
        self.says = "not now"
        self.n_tokens = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed, or did not wait, is no fault of the endpoint."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Answers(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with self.server.lock:
            self.server.asked[body] += 1
            number = sum(self.server.asked.values())
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers["Authorization"])
        how = self.server.misbehave(number)
        if isinstance(how, float):
            time.sleep(how)
        if isinstance(how, tuple):
            key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            self._send(how[0], {"error": {"message": f"no, {key}, {self.server.says}", "code": None}}, how[1])
            return
        text = how if isinstance(how, str) else self.server.answer(json.loads(body)["messages"])
        self._send(200, self._chat(json.loads(body)["messages"], text), {})
        with self.server.lock:
            self.server.answered[body] += 1

    def _chat(self, messages: Sequence[Mapping[str, str]], text: str) -> dict[str, Any]:
        asked = sum(10 + n_tokens(message["content"]) for message in messages)
        counts = {"prompt_tokens": asked, "completion_tokens": n_tokens(text)}
        with self.server.lock:
            self.server.n_tokens += sum(counts.values())
        usage = counts | {"total_tokens": sum(counts.values())} if self.server.tells_usage else None
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [choice],
            "usage": usage,
        }

    def _send(self, status: int, content: object, headers: Mapping[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def stub_endpoint(truth: Truth, port: int = 0) -> Iterator[Stub]:
    with Stub(truth.answer, port) as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield stub
        finally:
            stub.shutdown()
            thread.join()


def truth_of(store: Store, run: str | None = None) -> Truth:
    return Truth(Stored(store, pick_run(store, runs(store), run).artefact))


if __name__ == "__main__":
    with stub_endpoint(truth_of(Store.open(Path(sys.argv[1])))) as served:
        print(served.url, flush=True)
        threading.Event().wait()
