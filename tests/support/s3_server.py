"""A server on loopback that speaks S3 and counts requests, and a way to it that loses connections at random.

    with s3_server() as server:                 # a process of its own
        os.environ |= server.environment
        url = server.bucket("name")             # s3://name
        server.drop(0.1)                        # every tenth connection breaks, somewhere in it
        server.delay(0.02)                      # every answer comes 20 ms later
        server.requests()                       # those since the last call

By hand: `python -m tests.support.s3_server`.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

SECRET = "never-shown-secret"


@dataclass(frozen=True)
class Request:
    """A request that the server has answered: HEAD, LIST, GET, PUT, POST or DELETE."""

    kind: str
    key: str
    n_bytes: int
    """Of the answer."""


@dataclass
class Server:
    """`port` is that of the way that may lose connections."""

    s3_port: int
    share: float = 0.0
    n_dropped: int = 0
    n_connections: int = 0
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def drop(self, share: float, seed: int = 0) -> None:
        """From now on this share of pieces of data breaks its connection instead of arriving."""
        self.share, self.dice = share, random.Random(seed)

    def delay(self, seconds: float) -> None:
        """From now on each answer comes so much later."""
        self._control(f"delay/{seconds}")

    def requests(self) -> list[Request]:
        """Return the requests since the last call, in the order of their answers."""
        return [Request(*each) for each in json.loads(self._control("requests"))]

    def _control(self, what: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.s3_port}{_CONTROL}{what}") as answer:
            return str(answer.read().decode())

    def bucket(self, name: str) -> str:
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """boto3, past the way that loses connections."""
        import boto3

        settings = {"region_name": "us-east-1", "aws_access_key_id": "tester", "aws_secret_access_key": SECRET}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.s3_port}", **settings)

    def upload(self, folder: Path, bucket: str, prefix: str, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Store the files below a folder whose names in it are wanted, under the prefix."""
        client = self.client()
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

        def send(name: str) -> None:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=(folder / name).read_bytes())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send, filter(wanted, names)))

    def files(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Every object by its key below the prefix."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
        client = self.client()
        return {
            key.removeprefix(prefix).lstrip("/"): client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in keys
        }

    def copy(self, bucket: str, prefix: str, target: str) -> None:
        """Put every object below a prefix below another one, too."""
        client = self.client()
        for key, content in self.files(bucket, prefix).items():
            client.put_object(Bucket=bucket, Key=f"{target}/{key}", Body=content)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                here, _ = self.listener.accept()
                self.n_connections += 1
                threading.Thread(target=self._pass_on, args=(here,), daemon=True).start()

    def _pass_on(self, here: socket.socket) -> None:
        with contextlib.suppress(OSError), here, socket.create_connection(("127.0.0.1", self.s3_port)) as there:
            while True:
                for ready in select.select([here, there], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if self.dice.random() < self.share:
                        self.n_dropped += 1
                        return
                    (there if ready is here else here).sendall(data)


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Started in a process of its own, ended at the end of the block."""
    command = [sys.executable, "-m", "tests.support.s3_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            server = Server(int(process.stdout.readline()))
            yield server
            server.listener.close()
        finally:
            process.terminate()


_CONTROL = "/-/"
"""Paths that are no bucket's."""


class Watched:
    """A WSGI application whose requests are counted and delayed."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app, self.seconds = app, 0.0
        self.answered: list[tuple[str, str, int]] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(_CONTROL):
            return self._obey(path.removeprefix(_CONTROL), start_response)
        time.sleep(self.seconds)

        def start_counted(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            lists = environ["REQUEST_METHOD"] == "GET" and "list-type" in environ.get("QUERY_STRING", "")
            n_bytes = int(dict(headers).get("Content-Length", 0)) * (environ["REQUEST_METHOD"] != "HEAD")
            key = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0] if lists else path
            self.answered.append(("LIST" if lists else environ["REQUEST_METHOD"], key, n_bytes))
            return start_response(status, headers, *error)

        return self.app(environ, start_counted)

    def _obey(self, what: str, start_response: Callable[..., Any]) -> Iterable[bytes]:
        word, _, value = what.partition("/")
        start_response("200 OK", [("Content-Type", "application/json")])
        if word == "delay":
            self.seconds = float(value)
            return [b"{}"]
        answered, self.answered = self.answered, []
        return [json.dumps(answered).encode()]


def serve() -> None:
    """Print the port and serve S3 until terminated."""
    import logging
    from functools import cache

    from moto.core import serialize
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    serialize.parse_to_aware_datetime = cache(serialize.parse_to_aware_datetime)  # half of a listing's time
    server = make_server("127.0.0.1", 0, Watched(create_backend_app("s3")), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve()
