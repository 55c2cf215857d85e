"""The pages as a web application, and what it refuses.

A page only reads, but for labels. It answers this machine alone: other names of hosts are refused, because a page of a
stranger could have its own name lead here (DNS rebinding), and so are requests that another site started.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saeflow.browser import charts
from saeflow.browser.address import Asked
from saeflow.browser.answers import FORMATS, Page, respond
from saeflow.browser.connections import SIDE_BY_SIDE, Connections, OpenedRun, TooSlow
from saeflow.browser.pages import PAGES, PAGES_OF_STORE, feature
from saeflow.query.catalog import OF_EVERY_RUN
from saeflow.query.runs import pick_run, runs
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store

log = logging.getLogger(__name__)

LONGEST_FORM = 64 << 10
"""Bytes of a form."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Application:
    """The pages of a store. `app` is what a server runs."""

    def __init__(self, store: Store, hosts: Sequence[str] = LOOPBACK, connections: Connections | None = None) -> None:
        self.connections = connections or Connections(store)
        self.store = store
        self.token = secrets.token_urlsafe(16)
        """Has to come back with every form that changes something."""
        routes = [
            Route("/static/charts.js", self.chart_script),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
            *(Route(path, self._endpoint(make)) for path, make in PAGES_OF_STORE),
            *(Route(path, self._endpoint(self._of_run(make))) for path, make in PAGES),
            Route("/runs/{run}/features/{feature}/label", self.label, methods=["POST"]),
        ]
        errors: dict[Any, Any] = {HTTPException: self.no_such_page, Exception: self.fault}
        self.app: ASGIApp = PageGuard(Starlette(routes=routes, exception_handlers=errors), hosts)

    def _of_run(self, make: Callable[[Asked, OpenedRun], Page]) -> Callable[[Asked, Connections], Page]:
        def of_run(asked: Asked, connections: Connections) -> Page:
            several = "run" not in asked.path or asked.path.get("question") in OF_EVERY_RUN
            return connections.ask(partial(make, asked), asked.path.get("run"), SIDE_BY_SIDE if several else None)

        return of_run

    def _endpoint(self, make: Callable[[Asked, Connections], Page]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            return self.answered(asked_of(request), make)

        return endpoint

    def answered(self, asked: Asked, make: Callable[[Asked, Connections], Page]) -> Response:
        """Make a page and return it in the format that the address asks for."""
        if "%00" in asked.address:
            return self.problem(asked, "An address of these pages holds no NUL character.", 404)
        try:
            return respond(make(asked, self.connections), asked.format, asked, **self._common())
        except TooSlow as error:
            return self.problem(asked, str(error), 503)
        except UserError as error:
            return self.problem(asked, str(error), 404)

    def _common(self) -> dict[str, Any]:
        return {"store_name": self.store.name, "token": self.token}

    def problem(self, asked: Asked, message: str, status: int) -> Response:
        """Return a page that says what is wrong, with ways back: to the run, if there is one, and to all."""
        about = {"message": message, "data": {"problem": message}}
        page = Page("problem.html", "Not found" if status == 404 else "Not answered", (), self._run_of(asked), about)
        response = respond(page, "json" if asked.format else "", asked, **self._common())
        response.status_code = status
        return response

    def _run_of(self, asked: Asked) -> str | None:
        """Return the schema of the run that the address names, whether or not its page is one of ours."""
        words = urllib.parse.unquote(asked.address.partition("?")[0]).split("/")
        with contextlib.suppress(UserError, OSError):
            return (
                pick_run(self.store, runs(self.store), words[2]).schema
                if words[1:2] == ["runs"] and words[2:]
                else None
            )
        return None

    def no_such_page(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        said = "This address is not asked in that way." if status == 405 else "There is no such page."
        return self.problem(asked_of(request), said, status)

    def fault(self, request: Request, error: Exception) -> Response:
        log.error("a page failed", exc_info=error)
        return self.problem(asked_of(request), "This page failed. The terminal that runs saeflow browse says why.", 500)

    def chart_script(self, request: Request) -> Response:
        return FileResponse(charts.chart_script(), media_type="text/javascript")

    async def label(self, request: Request) -> Response:
        """Change the label of a feature, then show its page."""
        form = await read_form(request)
        if not secrets.compare_digest(form.get("token", "").encode(), self.token.encode()):
            return self.problem(asked_of(request), "This form is out of date. Open the feature's page again.", 403)
        asked = asked_of(request, form)
        try:
            back = await run_in_threadpool(self._put_label, asked)
        except UserError as error:
            return self.problem(asked, str(error), 503 if isinstance(error, TooSlow) else 404)
        return RedirectResponse(back, 303)

    def _put_label(self, asked: Asked) -> str:
        with self.connections.opened(asked.path["run"]) as opened:
            return feature.put_label(asked, opened)


def asked_of(request: Request, form: dict[str, str] | None = None) -> Asked:
    query = {name: ",".join(request.query_params.getlist(name)) for name in request.query_params}
    address = urllib.parse.quote(request.scope["path"]) + (f"?{urllib.parse.urlencode(query)}" if query else "")
    return Asked(request.path_params, query, form or {}, address, request.scope.get("saeflow.format", ""))


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form. A longer form than any of ours is cut off."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_FORM:
            return {}
    return dict(urllib.parse.parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


class PageGuard:
    """Refuses what did not come from these pages, and gives every answer its headers."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].decode().lower() not in HEADERS]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        why = self._why_refused(scope)
        if why:
            return await Response(why, 403, media_type="text/plain")(scope, receive, send_with_headers)
        return await self.app(_without_format(scope), receive, send_with_headers)

    def _why_refused(self, scope: Scope) -> str:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
            return f"These pages answer to {', '.join(self.hosts)} only."
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") not in (
            f"http://{host}",
            f"https://{host}",
        ):
            return "This form was sent from elsewhere."
        if headers.get("sec-fetch-site") == "cross-site" and not scope["path"].startswith("/static/"):
            return "Another site led here. Type the address yourself."
        return ""


def _without_format(scope: Scope) -> Scope:
    """Take the format off the end of the path."""
    path, _, ending = scope["path"].rpartition(".")
    if ending not in FORMATS or scope["path"].startswith("/static/"):
        return scope
    return {**scope, "path": path or "/", "saeflow.format": ending}


def application(store: Store, hosts: Sequence[str] = LOOPBACK) -> ASGIApp:
    """Return the pages of a store as an ASGI application."""
    return Application(store, hosts).app
