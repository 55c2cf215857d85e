"""A real Prefect server in a process of its own, on loopback, with its own home, for tests; and PostgreSQL under it.

with prefect_server(folder) as server:
    server.api                     # http://127.0.0.1:PORT/api
    server.environment             # for processes that use it
    server.processes()             # those that do, the server left out
"""

from __future__ import annotations

import contextlib
import glob
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
SAEFLOW = [sys.executable, "-c", "from saeflow.cli.app import main; main()"]
"""The `saeflow` command of this tree."""


def free_port() -> int:
    """A port that stays free until it is used: below those that the system gives to connections and to servers that
    ask for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port


def wait_for(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises AssertionError where it does not become true in that time."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.3)


def environment_of(home: Path, port: int, **more: str) -> dict[str, str]:
    """Variables for processes that use a server at that port, and nothing of any other Prefect."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SAEFLOW_"))}
    search = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))
    programs = os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", "")])
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    return given | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "PYTHONPATH": search,
        "PATH": programs,
        "TMPDIR": str(home / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@dataclass
class Server:
    """A running server, or the place for one."""

    api: str
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its pages."""
        return self.api.removesuffix("/api")

    @property
    def env(self) -> dict[str, str]:
        """Variables for processes that use it."""
        return self.environment | {"PREFECT_API_URL": self.api}

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.api}/health", timeout=5).is_success
        return False

    def processes(self) -> list[psutil.Process]:
        """Processes with this PREFECT_HOME, but for this one and the server."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("PREFECT_HOME") == str(self.home) and not _is_server(process):
                    found.append(process)
        return found

    def get(self, path: str) -> dict[str, object]:
        return dict(httpx.get(f"{self.api}/{path}", timeout=30).raise_for_status().json())

    def find(self, path: str, **filters: object) -> list[dict[str, object]]:
        return list(httpx.post(f"{self.api}/{path}/filter", json=filters, timeout=30).raise_for_status().json())


def _is_server(process: psutil.Process) -> bool:
    line = process.cmdline()
    return process.pid == os.getpid() or "server" in line or any("uvicorn" in word for word in line)


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends a process when the block does, by SIGTERM; what is left of it and its children then, by SIGKILL."""
    try:
        yield
    finally:
        family = children(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for each in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()
        process.wait()


@contextlib.contextmanager
def running(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this tree that prints into a file, and is ended after the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    with ended(process):
        yield process


@contextlib.contextmanager
def prefect_server(home: Path, pages: bool = False, **more: str) -> Iterator[Server]:
    """`prefect server start` with its database in `home`, ready when the block begins; `pages`: those for a browser,
    too."""
    port = free_port()
    environment = environment_of(
        home, port, PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false", DO_NOT_TRACK="1", **more
    )
    server = Server(f"http://127.0.0.1:{port}/api", home, environment)
    command = [sys.executable, "-m", "prefect", "server", "start", *([] if pages else ["--no-ui"])]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT)
    server.process = process
    with ended(process):
        wait_for(lambda: server.answers() or process.poll() is not None, 150, "the server answers")
        assert process.poll() is None, (home / "server.log").read_text()
        yield server


def postgres_folder() -> Path | None:
    """Where PostgreSQL's programs are on this machine."""
    found = shutil.which("initdb") or next(iter(sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))[::-1]), None)
    return Path(found).resolve().parent if found else None


@contextlib.contextmanager
def postgres(programs: Path) -> Iterator[str]:
    """The URL of an empty database on loopback. PostgreSQL refuses to run as root: there it is the user `postgres`."""
    folder, port = Path(tempfile.mkdtemp(prefix="saeflow-pg-")), free_port()
    owner = {"user": "postgres", "group": "postgres", "extra_groups": ()} if os.geteuid() == 0 else {}
    try:
        if owner:
            shutil.chown(folder, "postgres", "postgres")
        quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, **owner}
        init = [programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "prefect", "--no-sync"]
        subprocess.run(init, check=True, **quiet)  # type: ignore[call-overload]
        settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off"]
        command = [programs / "postgres", "-D", folder / "data", *(word for each in settings for word in ("-c", each))]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)  # type: ignore[call-overload]
        with ended(process):
            ready = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"]
            wait_for(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 60, "PostgreSQL answers")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
