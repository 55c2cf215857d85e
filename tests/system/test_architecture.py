"""The layout: what may import what, what lies at the top, and that every SQL file has a reader."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from saeflow.query.connection import check, connect
from tests.support.small_store import Given

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = [
    "runtime", "recipe", "store", "corpus", "model", "activations",
    "sae", "train", "features", "query", "classes", "meaning", "browser", "pipeline", "cli",
]  # fmt: skip
"""Each package imports only packages before it; those of a pair in APART do not know one another."""

APART = [{"train", "features"}, {"browser", "pipeline"}]

MOST_FILES = 14

TOP = {
    "README.md", "pyproject.toml", "Makefile", "requirements.lock", "CHANGELOG.md", "LICENSE", "docs", ".ci",
    "flows", "saeflow", "sql", "tests", "data", ".gitignore", ".git", ".mkdocs.yml",
}  # fmt: skip


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports, wherever in the file; `from a import b` gives `a` and `a.b`."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def modules() -> dict[str, Path]:
    """Files of saeflow by dotted name below it; a package by the name of its folder."""
    found = {}
    for path in sorted((ROOT / "saeflow").rglob("*.py")):
        parts = path.relative_to(ROOT / "saeflow").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def inner(path: Path) -> set[str]:
    """Modules of saeflow that a file imports, by dotted name below it."""
    names = {name.removeprefix("saeflow.") for name in imported(path) if name.startswith("saeflow.")}
    return names & modules().keys()


def test_the_packages_are_the_ones_in_the_plan():
    folders = {path.name for path in (ROOT / "saeflow").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(PACKAGES)


def test_a_package_imports_only_lower_ones():
    upward = set()
    for name, path in modules().items():
        here = name.split(".")[0]
        for other in inner(path) if here in PACKAGES else ():
            there = other.split(".")[0]
            if there not in PACKAGES:
                continue
            if PACKAGES.index(there) > PACKAGES.index(here) or {here, there} in APART:
                upward.add((name, other))
    assert not {pair for pair in upward if pair[1] not in PACKAGES}


def test_no_module_imports_itself_through_others():
    imports = {name: inner(path) - {name} for name, path in modules().items()}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_across_packages_only_public_names_are_imported():
    private = []
    for name, path in modules().items():
        for other in imported(path):
            if other.startswith("saeflow.") and other.split(".")[-1].startswith("_") and "__" not in other:
                private.append(f"{name} imports {other}")
    assert not private


@pytest.mark.parametrize("package", [name for name, path in modules().items() if path.stem == "__init__" and name])
def test_a_package_names_every_file_of_its_folder_once(package):
    path = modules()[package]
    named = re.findall(r"^(\w+)  +\S", ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "", re.M)
    files = [each.stem for each in path.parent.glob("*.py") if each.stem != "__init__"]
    folders = [each.parent.name for each in path.parent.glob("*/__init__.py")]
    assert sorted(named) == sorted(files + folders)


def test_a_folder_holds_no_more_than_can_be_seen_at_once():
    folders = Counter(path.parent for path in modules().values() if path.stem != "__init__")
    assert not {path.name: n for path, n in folders.items() if n > MOST_FILES}


HEAVY = [
    "torch", "transformers", "numba", "numpy", "duckdb", "pyarrow", "zarr", "pydantic", "prefect", "dask",
    "distributed", "obstore", "fsspec", "json", "psutil", "xxhash",
]  # fmt: skip


def test_the_help_of_the_command_loads_nothing_heavy():
    code = (
        "import sys; from saeflow.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage: saeflow" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", modules())
def test_saeflow_knows_neither_prefect_nor_the_flows(module):
    roots = {name.split(".")[0] for name in imported(modules()[module])}
    assert not roots & {"prefect", "flows", "tests"}


def test_loops_are_compiled_in_one_way_which_works_without_a_cache():
    compiles = re.compile(r"numba\.n?jit|from numba import .*jit")
    found = [path.stem for path in modules().values() if compiles.search(path.read_text("utf-8"))]
    assert found == ["compiled"]


def test_nothing_unpickles_or_runs_code_of_an_artefact():
    for path in [*modules().values(), *(ROOT / "flows").glob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "dill", "cloudpickle", "joblib"}, path
        text = path.read_text("utf-8")
        for forbidden in ("allow_pickle=True", "trust_remote_code=True"):
            assert forbidden not in text, f"{path.name} has {forbidden}"


def test_files_of_torch_are_read_in_one_place_as_tensors_alone():
    for path in [*modules().values(), *(ROOT / "flows").glob("*.py")]:
        assert "torch.load" not in imported(path), path
        text = path.read_text("utf-8")
        if not {"torch", "load"} <= set(re.findall(r"\w+", text)):
            continue
        tree = ast.parse(text)
        named = [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
        ]
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        ]
        assert len(named) == len(calls) <= (path.stem == "tensors"), f"{path.name} reads files of torch"
        for call in calls:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("weights_only") == "True", f"{path.name} would run what a file of torch holds"


def test_the_top_folder_holds_only_what_it_should():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = {path.name for path in ROOT.iterdir()}
    assert not {name for name in found - TOP if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}


def test_the_wheel_carries_the_sql_files_where_the_package_looks_for_them():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["saeflow", "flows"]
    assert wheel["force-include"] == {"sql": "saeflow/_sql"}


def test_every_sql_file_is_read(tmp_path):
    files = {path.relative_to(ROOT / "sql") for path in (ROOT / "sql").rglob("*") if path.is_file()}
    assert {path.parent.name for path in files if path.name != "sources.sql"} == {
        "functions",
        "staging",
        "marts",
        "checks",
    }
    with connect(Given().write(tmp_path)) as connection:
        views = {row[0] for row in connection.execute("select table_name from information_schema.tables").fetchall()}
        macros = {row[0] for row in connection.execute("select function_name from duckdb_functions()").fetchall()}
        checks = {name for name, _ in check(connection)}
    made = views | macros
    known = {"functions": macros, "staging": made, "marts": made, "checks": checks}
    assert not {path for path in files if path.name != "sources.sql" and path.stem not in known[path.parent.name]}
