"""A wheel built from the tree works where there is no clone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.support.small_pipeline import SITE, Ingredients

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and the project's dependencies but not its clone."""

    environment: Path
    wheel: Path

    def run(self, program: str, *arguments: object) -> str:
        """Standard output of a program of the environment, run outside the clone."""
        command = [self.environment / "bin" / program, *map(str, arguments)]
        given = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PREFECT_", "VIRTUAL_ENV"))}
        home = {"PREFECT_HOME": str(self.environment / "prefect"), "HF_HUB_OFFLINE": "1"}
        where = self.environment.parent
        done = subprocess.run(command, cwd=where, env=given | home, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    [wheel] = folder.glob("saeflow-*.whl")
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    [packages] = (folder / "environment" / "lib").glob("python*/site-packages")
    # A path named by a .pth file is searched, but its own .pth files are not: the editable install stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "environment" / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([*pip, "--python", str(python), *install], check=True)
    return Installed(folder / "environment", wheel)


def test_the_wheel_carries_code_flows_recipes_sql_and_the_licence(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    for folder, packed in (("saeflow", "saeflow"), ("flows", "flows"), ("sql", "saeflow/_sql")):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert {f"{packed}/{path.relative_to(ROOT / folder).as_posix()}" for path in files} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "data/")) for name in names)


def test_the_wheel_is_what_runs(installed: Installed) -> None:
    where = (
        "import saeflow, flows; from saeflow.query.catalog import sql_folder; "
        "print(saeflow.__file__, flows.__file__, sql_folder())"
    )
    for path in installed.run("python", "-c", where).split():
        assert path.startswith(str(installed.environment)), path


@pytest.mark.long
def test_the_command_works_outside_the_clone(
    installed: Installed, ingredients: Ingredients, finished: Finished
) -> None:
    assert "saeflow init my.toml" in installed.run("saeflow", "--help")
    assert SITE in installed.run("saeflow", "sites", ingredients.model)
    answer = installed.run("saeflow", "ask", "runs", "-f", "csv", "--store", finished.store.root)
    assert "small" in answer
    where = "from saeflow.cli.serve import orchestrator; print(orchestrator().__file__)"
    assert installed.run("python", "-c", where).startswith(str(installed.environment)), "serve finds no flows"


@pytest.mark.long
def test_a_flow_runs_outside_the_clone(installed: Installed, tmp_path: Path) -> None:
    [recipe] = installed.environment.glob("lib/python*/site-packages/flows/recipes/toy.toml")
    small = ["--set", "train.n_tokens=800", "--set", "train.restarts=1"]
    said = installed.run("python", "-m", "flows.pipeline", recipe, "--store", tmp_path / "store", *small)
    assert said.count("$ saeflow ask") == 3
