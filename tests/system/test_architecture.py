"""The layout: what may import what, what lies at the top, and that every SQL file has a reader."""

from __future__ import annotations

import ast
import fnmatch
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeflow.query import ask
from tests.support.small_store import Given

ROOT = Path(__file__).resolve().parents[2]

ORDER = [
    "sections",
    "swept",
    "timetable",
    "config",
    "recipe_file",
    "fingerprints",
    "harmless",
    "query_errors",
    "feature_tables",
    "relations",
    "parallel",
    "machine",
    "transfer",
    "disk",
    "objects",
    "object_files",
    "records",
    "coverage",
    "lease",
    "artefact",
    "store",
    "integrity",
    "garbage",
    "progress",
    "cluster_work",
    "cluster_start",
    "cluster",
    "remote",
    "document",
    "tables",
    "corpus",
    "model",
    "vocab",
    "ledger",
    "used",
    "tokens",
    "known",
    "rows",
    "columns",
    "labels",
    "toys",
    "superposed",
    "brought",
    "arrays",
    "writer",
    "packed",
    "norms",
    "plan",
    "activations",
    "bring",
    "feed",
    "kernels",
    "sparse_product",
    "encoding",
    "direct_path",
    "directions",
    "rules",
    "sparse_step",
    "dense_step",
    "feature_kernels",
    "token_facts",
    "marginals",
    "feature_files",
    "part_writer",
    "compaction",
    "sae",
    "run_tables",
    "sae_folders",
    "interchange",
    "resample",
    "schedule",
    "training",
    "board",
    "reading",
    "metrics",
    "imported",
    "seen",
    "train",
    "feature_labels",
    "runs",
    "checks",
    "features",
    "forget",
    "removed",
    "evaluate",
    "ground_truth",
    "report",
    "sweep",
    "label_import",
    "questions",
    "queries",
    "api",
    "catalog",
    "answers",
    "pipeline",
    "retrain",
    "ingest",
    "trial",
    "forecast",
    "recipe_text",
    "doctor",
    "terminal",
    "command_line",
    "commands_run",
    "commands_synth",
    "commands_store",
    "commands_ask",
    "commands_label",
    "commands_serve",
    "cli",
]
"""Each module imports only modules before it."""

TOP = {
    "README.md", "pyproject.toml", "Makefile", "requirements.lock", "CHANGELOG.md", "LICENSE", "docs", ".ci",
    "flows", "saeflow", "sql", "tests", "data", ".gitignore", ".git",
}  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    return {path.stem: path for path in (ROOT / "saeflow").glob("*.py") if path.stem != "__init__"}


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_before_it(module):
    names = {name.split(".")[1] for name in imported(modules()[module]) if name.startswith("saeflow.")}
    later = {name for name in names & set(ORDER) if ORDER.index(name) >= ORDER.index(module)}
    assert not later


@pytest.mark.parametrize("module", [*ORDER, "__init__"])
def test_saeflow_knows_neither_prefect_nor_the_flows(module):
    roots = {name.split(".")[0] for name in imported(ROOT / "saeflow" / f"{module}.py")}
    allowed = {"flows"} if module == "commands_serve" else set()  # which imports them when it is typed
    assert not roots & {"prefect", "flows", "tests"} - allowed


def test_nothing_unpickles_or_runs_code_of_an_artefact():
    for path in [*modules().values(), *(ROOT / "flows").glob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "dill", "cloudpickle", "joblib"}, path
        text = path.read_text("utf-8")
        for forbidden in ("allow_pickle=True", "trust_remote_code=True"):
            assert forbidden not in text, f"{path.name} has {forbidden}"


def test_files_of_torch_are_read_in_one_place_as_tensors_alone():
    for path in [*modules().values(), *(ROOT / "flows").glob("*.py")]:
        assert "torch.load" not in imported(path), path
        tree = ast.parse(path.read_text("utf-8"))
        named = [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
        ]
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        ]
        assert len(named) == len(calls) <= (path.stem == "interchange"), f"{path.name} reads files of torch"
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
    assert {path.parent.name for path in files if path.name != "sources.sql"} == {"staging", "marts", "checks"}
    with ask.connect(Given().write(tmp_path)) as connection:
        views = {row[0] for row in connection.execute("select table_name from information_schema.tables").fetchall()}
        macros = {row[0] for row in connection.execute("select function_name from duckdb_functions()").fetchall()}
        checks = {name for name, _ in ask.check(connection)}
    known = {"staging": views | macros, "marts": views | macros, "checks": checks}
    assert not {path for path in files if path.name != "sources.sql" and path.stem not in known[path.parent.name]}
