"""From nothing to a nightly pipeline over one's own texts and model: the commands of README.md, typed as they stand
there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.prefect_server import ROOT, Server, environment_of, free_port, wait_for
from tests.support.small_pipeline import documents, write_model

pytestmark = pytest.mark.long

PAGE = (ROOT / "docs" / "how-to" / "schedules.md").read_text("utf-8")


def block() -> list[str]:
    """The commands below the mark <!-- newcomer -->, one a line, without their comments."""
    found = re.search(r"<!-- newcomer -->\n```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found, "the page has lost its newcomer's path"
    return [line.partition("  #")[0].strip() for line in found[1].splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A newcomer's folder: some texts and a model."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "prefect").mkdir()
    for number, row in enumerate(documents()[-20:]):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(f"{row['text']} Jerusalem.", "utf-8")
    write_model(tmp_path / "models" / "lm", n_positions=256)
    return tmp_path


@pytest.mark.timeout(600)
def test_five_commands_lead_from_nothing_to_answers_that_follow_a_folder_of_texts(place: Path) -> None:
    """The first, which installs, is only rehearsed: it must name a target of the Makefile that makes .venv."""
    setup, init, server, serve, ask = block()
    assert setup == "make ready && source .venv/bin/activate"
    rehearsed = subprocess.run(
        ["make", "--dry-run", "--always-make", "ready"], cwd=ROOT, capture_output=True, text=True
    )
    assert rehearsed.returncode == 0, rehearsed.stderr
    assert "-m venv" in rehearsed.stdout
    assert "--editable ." in rehearsed.stdout

    port = free_port()
    here = Server(f"http://127.0.0.1:{port}/api", place / "prefect", environment_of(place / "prefect", port))
    path = f"{shims(place)}{os.pathsep}{here.environment['PATH']}"
    environment = here.environment | {"PATH": path}

    def typed(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=200
        )

    begun = typed(init)
    assert begun.returncode == 0, begun.stderr
    try:
        started = typed(server)
        assert started.returncode == 0, started.stdout + started.stderr
        wait_for(lambda: here.answers(), 120, "the server answers")
        with (place / "serve.log").open("wb") as log:
            running = subprocess.Popen(
                ["bash", "-c", f"exec {serve}"], cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            published = "data/store/features/*/manifest.json"
            wait_for(lambda: any(place.glob(published)) or running.poll() is not None, 300, "a run is published")
            wait_for(lambda: typed(ask).returncode == 0 or running.poll() is not None, 60, "there are answers")
            assert running.poll() is None, (place / "serve.log").read_text()
            assert len(typed(ask).stdout.splitlines()) > 1
        finally:
            running.terminate()
            assert running.wait(60) == 0
    finally:
        typed("prefect server stop")
    wait_for(lambda: not here.answers(), 30, "the server is gone")
    assert here.processes() == []


def shims(place: Path) -> Path:
    """A folder with a `saeflow` that runs this tree, wherever it is installed."""
    folder = place / "bin"
    folder.mkdir()
    script = folder / "saeflow"
    script.write_text('#!/bin/sh\nexec python -c "from saeflow.cli.app import main; main()" "$@"\n')
    script.chmod(0o755)
    return folder
