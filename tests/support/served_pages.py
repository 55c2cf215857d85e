"""`saeflow browse` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_COMMAND = [sys.executable, "-c", "from saeflow.cli.app import main; main()", "browse", "--no-open", "--store"]


@contextmanager
def served(store: Path, said: Path | None = None, **environment: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address of the pages of a store, and their process. Its errors go to the file `said`, if there is one."""
    with (said or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(
            [*_COMMAND, str(store)],
            stdout=subprocess.PIPE,
            stderr=errors if said else None,
            text=True,
            env=os.environ | environment,
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip().rstrip("/"), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()
