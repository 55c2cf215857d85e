"""A server on loopback that speaks S3, and a way to it that loses connections at random.

    with s3_server() as server:                 # a process of its own
        os.environ |= server.environment
        url = server.bucket("name")             # s3://name
        server.drop(0.1)                        # every tenth connection breaks, somewhere in it

By hand: `python -m tests.s3_server`.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SECRET = "never-shown-secret"


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

    def bucket(self, name: str) -> str:
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """boto3, past the way that loses connections."""
        import boto3

        settings = {"region_name": "us-east-1", "aws_access_key_id": "tester", "aws_secret_access_key": SECRET}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.s3_port}", **settings)

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


def serve() -> None:
    """Print the port and serve S3 until terminated."""
    import logging
    from functools import cache

    from moto.core import serialize
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    serialize.parse_to_aware_datetime = cache(serialize.parse_to_aware_datetime)  # half of a listing's time
    server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve()
