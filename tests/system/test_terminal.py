"""A terminal obeys no text of a corpus, a store or a file: one place prints, and it makes all text harmless."""

from __future__ import annotations

import ast
import importlib
import io
import logging
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from saeflow.runtime.errors import UserError
from saeflow.runtime.terminal import Terminal, printing_logs
from tests.conftest import Finished
from tests.support.command import SAEFLOW, Command
from tests.support.hostile_text import ACTS, HOSTILE
from tests.support.small_pipeline import Ingredients, documents, recipe_data, write_recipe

ROOT = Path(__file__).resolve().parents[2]
THE_PLACE = ROOT / "saeflow" / "runtime" / "terminal.py"
SOURCES = [path for folder in ("saeflow", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]

PRINTS = {"print", "pprint"}
PRINTING_METHODS = {"echo", "secho", "echo_via_pager", "from_markup", "from_ansi", "print_exc", "print_exception",
                    "print_tb", "basicConfig", "StreamHandler", "RichHandler", "print_json"}  # fmt: skip
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
CONSOLES = {"rich.console.Console", "rich.get_console", "rich.print", "rich.print_json", "rich.logging.RichHandler"}


def other_ways_of_printing(tree: ast.Module) -> Iterator[int]:
    """Yield lines that print without the terminal module, or that read a text as markup."""
    asked = {id(node.func.value) for node in ast.walk(tree) if is_call_of(node, "isatty")}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in PRINTS:
                yield node.lineno
            case ast.Call(func=ast.Name(id="input"), args=[argument, *_]) if not is_literal(argument):
                yield node.lineno
            case ast.Call(func=ast.Attribute(attr=name)) if name in PRINTING_METHODS:
                yield node.lineno
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="write"), args=[ast.Constant(), *_]):
                yield node.lineno
            case ast.Attribute(value=ast.Name(id="sys"), attr=name) if name in STREAMS and id(node) not in asked:
                yield node.lineno
            case ast.ImportFrom(module=module, names=names) if any(f"{module}.{n.name}" in CONSOLES for n in names):
                yield node.lineno
            case ast.ImportFrom(module="sys", names=names) if any(n.name in STREAMS for n in names):
                yield node.lineno
            case ast.keyword(arg="markup" | "emoji", value=ast.Constant(value=True)):
                yield node.value.lineno


def is_call_of(node: ast.AST, method: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method


def is_literal(node: ast.expr) -> bool:
    return all(isinstance(each, ast.Constant | ast.IfExp | ast.UnaryOp | ast.Not | ast.Name | ast.Load)
               for each in ast.walk(node))  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_prints(path: Path) -> None:
    if path != THE_PLACE:
        assert list(other_ways_of_printing(ast.parse(path.read_text("utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    ["print(x)", "typer.echo(x)", "sys.stdout.write(x)", "sys.stderr.buffer.write(x)", "print(x, file=sys.stderr)",
     "os.write(1, x)", "from rich.console import Console", "from rich import print", "out.print(x, markup=True)",
     "Text.from_markup(x)", "logging.basicConfig()", "traceback.print_exc()", "from sys import stdout", "input(x + y)",
     "stream = sys.stdout"],
)  # fmt: skip
def test_each_other_way_of_printing_is_found(line: str) -> None:
    assert list(other_ways_of_printing(ast.parse(line)))


@given(text=st.text(st.characters(codec="utf-8")) | st.just(HOSTILE))
def test_a_terminal_obeys_no_text_in_any_shape(text: str) -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, color_system=None, width=60)
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    table.add_row(Text(text))
    for shape in (text, Text(text), table):
        terminal.print(shape)
    terminal.print(text, soft_wrap=True)
    assert not ACTS.search(file.getvalue())


def test_a_terminal_reads_no_markup() -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, width=60)
    table = Table()
    table.add_row("[bold red]x[/]")
    terminal.print("[bold red]x[/] :smiley: 12", table)
    assert file.getvalue().count("[bold red]x[/]") == 2
    assert ":smiley: 12" in file.getvalue()


def test_warnings_and_logs_of_any_library_are_harmless() -> None:
    file = io.StringIO()
    with warnings.catch_warnings(), printing_logs(Terminal(file=file, force_terminal=True, color_system=None)):
        warnings.simplefilter("always")
        logging.getLogger("some.library").warning("read %s", HOSTILE)
        warnings.warn(HOSTILE, stacklevel=1)
    assert file.getvalue().count("owned") >= 2
    assert not ACTS.search(file.getvalue())


def hostile_corpus(path: Path) -> None:
    """Documents whose key, source, title, and the name of another column act on a terminal."""
    rows = [
        row | {"key": f"{HOSTILE}/{n}", "source": (HOSTILE, "other")[n % 2], "title": HOSTILE, HOSTILE: HOSTILE,
               "text": row["text"] + HOSTILE}
        for n, row in enumerate(documents())
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    "command", [["sql", f"select '{HOSTILE}' from nowhere"], ["label", "--import", HOSTILE]], ids=["sql", "label"]
)
def test_a_traceback_is_harmless(command: list[str], saeflow: Command, finished: Finished) -> None:
    said = saeflow(*command, "--store", finished.store.root, "--debug")
    assert said.code == 1
    assert "Traceback" in said.err
    assert not ACTS.search(said.out + said.err)


@pytest.mark.parametrize("logger", ["prefect.flow_runs", "prefect.task_runs"])
@pytest.mark.parametrize(
    "error", [OSError(HOSTILE), KeyError(HOSTILE), UserError(HOSTILE)], ids=lambda e: type(e).__name__
)
def test_a_traceback_in_prefects_log_is_harmless(logger: str, error: Exception) -> None:
    importlib.import_module("flows.support.reporting")
    record = logging.LogRecord(logger, logging.ERROR, "", 0, "failed: %r", (error,), (type(error), error, None))
    assert logging.getLogger(logger).filter(record)
    assert not ACTS.search(logging.Formatter().format(record))


@pytest.fixture(scope="module")
def hostile_folder(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name, and whose every file's, acts on a terminal: with a model, a corpus and a recipe."""
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "|")
    folder.mkdir()
    shutil.copytree(ingredients.model, folder / "model")
    corpus = folder / f"corpus{HOSTILE[:12]}.parquet"
    hostile_corpus(corpus)
    made = Ingredients(folder / "model", corpus)
    for name, changes in {"r": {}, "sweep": {"sweep": {"grid": {"sae.k": [2, 4]}}}}.items():
        write_recipe(folder / f"{name}.toml", recipe_data(made, **changes))
    return folder


@pytest.mark.long
def test_no_command_lets_a_corpus_act_on_the_terminal(saeflow: Command, hostile_folder: Path) -> None:
    recipe, store = hostile_folder / "r.toml", hostile_folder / "store"
    key, place = f"{HOSTILE}/7", ["--store", store]
    labels = hostile_folder / f"labels{HOSTILE[:12]}.csv"
    labels.write_text(f'feature_id,label\n3,"{HOSTILE.strip()}"\n', newline="")
    commands = [
        ["run", recipe],
        ["run", recipe, "-v"],
        ["ls"],
        ["show", "small"],
        ["label", "--import", labels],
        ["label", 3],
        ["label", "3", HOSTILE, "--source", HOSTILE],
        ["ask", "sources"],
        ["ask", "documents"],
        ["ask", "top_tokens", 3],
        ["ask", "search_token", HOSTILE],
        ["ask", "compare_sources", HOSTILE, "other"],
        ["ask", HOSTILE],
        ["ask", "compare_sources", HOSTILE, "nobody"],
        ["ask", "feature_labels"],
        ["ask", "top_tokens", 3, "--sql"],
        ["sql", "select * from documents"],
        ["sql", f"select '{HOSTILE}' from nowhere"],
        ["sql", "from runs", "-f", "json"],
        ["sql", f"""select 1 as "{HOSTILE}" """],
        ["show", HOSTILE],
        ["verify", "--full"],
        ["ask", "runs", "--run", HOSTILE],
        ["evaluate", recipe],
        ["report", recipe],
        ["export", "--features", 2],
        ["export", HOSTILE, "-o", HOSTILE],
        ["tokens", recipe],
        ["forget", key],
        ["forget", key, HOSTILE],
        ["compact", recipe],
        ["gc"],
        ["gc", "--yes", "--grace", "0"],
        ["catalog"],
        ["upgrade"],
        ["run", recipe],
        ["train", hostile_folder / "sweep.toml"],
        ["run", recipe, "--set", f"sae.k={HOSTILE}"],
        [HOSTILE],
        ["run", hostile_folder / HOSTILE],
        ["run", recipe, "--set", f"{HOSTILE}=1"],
        ["sites", hostile_folder],
        ["run", recipe, "--member", HOSTILE],
        ["import", hostile_folder, recipe],
        ["import", hostile_folder / "model", recipe],
        ["init", hostile_folder / f"{HOSTILE[:9]}.toml"],
        ["init", hostile_folder / "r.toml"],
        ["run", f"--{HOSTILE}"],
        ["bring", recipe],
        ["synth", recipe],
    ]
    for command in commands:
        said = saeflow(*command, *([] if command[0] in ("init", "sites", HOSTILE) else place))
        assert said.code in (0, 2), (command, said.err)
        for stream in (said.out, said.err):
            assert not ACTS.search(stream), (command, ACTS.search(stream), stream)


def long_ones(*commands: list[str]) -> list[Any]:
    """Commands that only `make test-long` tries: each is a process of its own."""
    return [pytest.param(each, marks=pytest.mark.long) for each in commands]


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        ["ls"],
        *long_ones(["ask", "top_tokens", "3"], ["sql", "from documents", "-f", "csv"]),
        *long_ones(["ask", "top_tokens", "3", "--sql"], ["sql", "from tokens", "-f", "json"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "streams", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "| head -c 1", "2>&1 | true"], ids=lambda text: text
)
def test_streams_that_are_closed_stop_no_command(command: list[str], streams: str, finished: Finished) -> None:
    script = f'"$@" {streams}; for code in "${{PIPESTATUS[@]}}"; do [ $code = 0 ] || exit $code; done'
    environment = os.environ | {"SAEFLOW_STORE": str(finished.store.root)}
    done = subprocess.run(["bash", "-c", script, "-", *SAEFLOW, *command], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
@pytest.mark.parametrize(
    "command", [["ask", "top_tokens", "3"], *long_ones(["--help"], ["ls"], ["ask", "nö"])], ids=" ".join
)
def test_a_terminal_of_ascii_loses_a_sign_not_the_command(
    command: list[str], locale: dict[str, str], finished: Finished
) -> None:
    environment = os.environ | {"SAEFLOW_STORE": str(finished.store.root), "PYTHONCOERCECLOCALE": "0"} | locale
    done = subprocess.run([*SAEFLOW, *command], capture_output=True, env=environment)
    assert done.returncode == (2 if command[1:] == ["nö"] else 0), done.stderr.decode()
    assert b"Traceback" not in done.stderr
