"""Run another checkout of saeflow in a process of its own, before or after its modules moved into packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path


def entry(checkout: Path) -> tuple[str, str]:
    """Return the module and the function that pyproject.toml gives the `saeflow` command."""
    scripts = tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, name = scripts["saeflow"].partition(":")
    return module, name


def command(checkout: Path, *words: str) -> list[str]:
    """Return the words that start `saeflow ...` of a checkout."""
    module, name = entry(checkout)
    program = f"import sys; sys.argv[0] = 'saeflow'; from {module} import {name}; {name}()"
    return [sys.executable, "-P", "-c", program, *words]


def output(checkout: Path, words: list[str], cwd: Path | None = None, **environment: str) -> str:
    """Run a command with the modules of a checkout and return what it prints. Raises RuntimeError if it fails."""
    surroundings: Mapping[str, str] = {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(words, cwd=cwd, env=os.environ | surroundings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(words[-4:])}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout
