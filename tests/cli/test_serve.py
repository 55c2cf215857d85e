"""How `saeflow serve` finds the flows: by what is installed, never by an import."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from saeflow.cli.serve import Orchestrator, orchestrator
from saeflow.runtime.errors import UserError

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def named_in_the_project(group: str) -> list[EntryPoint]:
    found: dict[str, Any] = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["entry-points"]
    return [EntryPoint(name, value, group) for name, value in found[group].items()]


@pytest.mark.filterwarnings("default")  # Prefect's own
def test_the_entry_point_of_the_project_offers_all_that_serve_asks_for() -> None:
    found = orchestrator(named_in_the_project)
    wanted = [name for name in vars(Orchestrator) if not name.startswith("_")]
    assert len(wanted) == 7
    assert all(callable(getattr(found, name)) for name in wanted)


def test_an_installation_without_flows_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"Install saeflow again: `pip install"):
        orchestrator(lambda group: [])
