"""A request to an ASGI application in this process, byte by byte as it is given: no client mends or refuses it."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp

HOST = "127.0.0.1:8417"
Headers = Sequence[tuple[str, str]]


@dataclass
class Answered:
    """What came back. `error` is what the application raised, even if it answered too."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: BaseException | None = None

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(app: ASGIApp, address: str, method: str = "GET", headers: Headers = (), body: bytes = b"") -> Answered:
    """Send a request. The path of the address is decoded as uvicorn does it."""
    path, _, query = address.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": urllib.parse.unquote(path), "raw_path": path.encode("utf-8", "replace"), "root_path": "",
        "query_string": query.encode("utf-8", "replace"), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8417),
        "headers": [(name.encode(), value.encode()) for name, value in headers or [("host", HOST)]],
    }  # fmt: skip
    answered, sent = Answered(), [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not sent:
            await asyncio.Event().wait()  # the client stays until it has everything
        return sent.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        answered.body += message.get("body", b"")

    try:
        asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    except Exception as error:
        answered.error = error
    return answered
