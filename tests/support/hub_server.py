"""A server on loopback that answers as the Hugging Face hub does, as far as data sets and gated models need.

with hub_server() as hub:
    hub.datasets["someone/texts"] = [{"a.parquet": content}]      # a list of commits; `main` is the last
    hub.models["someone/saes"] = [{"a/cfg.json": content}]
    hub.gated["someone/model"] = "token"                          # opens with HF_TOKEN=token
    environment = hub.environment
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

Commit = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """`asked` keeps every request as (method, path, Authorization)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.datasets: dict[str, list[Commit]] = {}
        self.models: dict[str, list[Commit]] = {}
        self.gated: dict[str, tuple[str, Commit]] = {}
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}", "HF_HUB_OFFLINE": "0"}

    def commit_of(self, name: str, revision: str) -> tuple[str, Commit] | None:
        """Its sha and its files; None where there is no such revision."""
        commits = {sha_of(name, number): files for number, files in enumerate((self.datasets | self.models)[name])}
        sha = list(commits)[-1] if revision == "main" else revision
        return (sha, commits[sha]) if sha in commits else None


def sha_of(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers["Authorization"]))
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "datasets", owner, name, *rest] if f"{owner}/{name}" in self.server.datasets:
                self._about(f"{owner}/{name}", rest)
            case ["datasets", owner, name, "resolve", revision, *file] if f"{owner}/{name}" in self.server.datasets:
                self._file(self.server.commit_of(f"{owner}/{name}", revision), "/".join(file))
            case ["api", "models", owner, name, *rest] if f"{owner}/{name}" in self.server.models:
                self._about(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *file] if f"{owner}/{name}" in self.server.models:
                self._file(self.server.commit_of(f"{owner}/{name}", revision), "/".join(file))
            case [owner, name, "resolve", revision, *file] if f"{owner}/{name}" in self.server.gated:
                self._gated(f"{owner}/{name}", "/".join(file))
            case ["api", "models", owner, name, "tree", *_] if f"{owner}/{name}" in self.server.gated:
                self._json([])
            case ["api", "models", owner, name, *_] if f"{owner}/{name}" in self.server.gated:
                self._json({"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": [], "gated": "auto"})
            case _:
                self._refuse(404, "RepoNotFound")

    do_HEAD = do_POST = do_GET

    def _about(self, name: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.server.commit_of(name, revision)
        if found is None:
            self._refuse(404, "RevisionNotFound")
            return
        sha, files = found
        entries = _entries(files)
        match rest:
            case ["tree", _, *folder]:
                inside = "".join(f"{part}/" for part in folder)
                below = [each for each in entries if each["path"].startswith(inside)]
                if "recursive=true" not in self.path.lower():
                    below = [each for each in below if "/" not in each["path"].removeprefix(inside)]
                self._json(below)
            case ["paths-info", _]:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._json([entry for entry in entries if entry["path"] in unquote(body)])
            case _:
                self._json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def _gated(self, name: str, file: str) -> None:
        token, files = self.server.gated[name]
        if self.headers["Authorization"] == f"Bearer {token}":
            self._file(("0" * 40, files), file)
        else:
            self._refuse(403, "GatedRepo")

    def _file(self, found: tuple[str, Commit] | None, path: str) -> None:
        if found is None or path not in found[1]:
            self._refuse(404, "EntryNotFound")
            return
        sha, content = found[0], found[1][path]
        span = (self.headers["Range"] or "").removeprefix("bytes=").split("-")
        if len(span) == 2:
            start, stop = int(span[0]), int(span[1] or len(content) - 1) + 1
            ranged = {"Content-Range": f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"}
            self._send(206, content[start:stop], {"X-Repo-Commit": sha, "ETag": _etag(content), **ranged})
        else:
            self._send(200, content, {"X-Repo-Commit": sha, "ETag": _etag(content), "Accept-Ranges": "bytes"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _entries(files: Commit) -> list[dict[str, Any]]:
    """Every folder and file, as the hub lists them."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)] + [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ]


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
