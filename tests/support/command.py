"""The `saeflow` command as a test runs it: in this process, or in one of its own (`SAEFLOW`)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest

from saeflow.cli import app as cli
from saeflow.query.connection import connect_to_run
from saeflow.query.runs import Run
from saeflow.store.store import Store

SAEFLOW = [sys.executable, "-c", "from saeflow.cli.app import main; main()"]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def saeflow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs the command in a folder of its own, as `main` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["saeflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@dataclass
class Shared:
    """A connection that stays open when a command closes it."""

    connection: duckdb.DuckDBPyConnection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def close(self) -> None: ...


Connected = tuple[Run, Shared]


@contextmanager
def one_connection(store: Store) -> Iterator[Connected]:
    """What `saeflow.query.connection.connect_to_run` may give to many commands instead of a connection for each."""
    run, connection = connect_to_run(store)
    with connection:
        yield run, Shared(connection)
