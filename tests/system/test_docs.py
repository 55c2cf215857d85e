"""README.md and the site: what can be typed is run or parsed, and what is named is there."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from saeflow.cli import app as cli
from saeflow.cli import common
from saeflow.query.questions import questions
from saeflow.recipe.recipe import parse_recipe
from saeflow.store.store import Store
from tests.support.notebook import cells
from tests.support.small_pipeline import Ingredients, a_table, documents, recipe_data, write_corpus, write_recipe
from tests.support.stub_endpoint import stub_endpoint, truth_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]

NOT_RUN = {
    "saeflow sites openai-community/gpt2 *.mlp.act": "needs the hub; tests/cli lists the sites of a local model",
    "saeflow run my.toml --store s3://bucket/path": "needs a bucket; tests/store/test_storage.py runs one",
    "saeflow ask top_tokens 1234 --store s3://bucket/path": "needs a bucket; tests/store/test_storage.py asks one",
    "saeflow ask tokens_where 1234 0.5 --store s3://bucket/path --explain": "by tests/query/test_buckets.py",
    "saeflow run my.toml --set cluster=tcp://127.0.0.1:8786": "needs a scheduler; tests/system/test_cluster.py has one",
    "saeflow init nightly.toml --files texts/*.txt --model models/lm --sites *.0.mlp.act": "by test_newcomer.py",
    "saeflow init published.toml --files texts/*.txt --model models/lm --sae saes/gemma": "by test_published_sae.py",
    "saeflow run published.toml": "by test_published_sae.py",
    "saeflow ask features_of_text The old sailor writes to a robot.": "by test_published_sae.py",
    "saeflow serve nightly.toml": "needs Prefect's server; test_newcomer.py types it",
    "saeflow collect my.toml --from requests": "needs an engine's files; tests/pipeline/test_engines.py makes them",
    "saeflow browse": "serves until it is stopped; tests/browser asks its pages",
    "saeflow plan my.toml": "takes half a minute; tests/pipeline/test_forecast.py",
    "saeflow run flows/recipes/demo_transcoder.toml": "minutes; tests/system/test_transcoder.py runs a small one",
    "saeflow synth flows/recipes/synth.toml": "ten minutes; tests/cli/test_synth.py runs a small one",
    "saeflow run flows/recipes/toy.toml": "tests/flows/test_flows.py runs it as a flow",
    "saeflow run flows/recipes/superposition.toml": "minutes; tests/benchmarks/toys.py",
    "saeflow run flows/recipes/five_neurons.toml": "minutes; tests/benchmarks/toys.py",
}
"""Commands of saeflow that are only parsed, with the reason."""

OTHER_PROGRAMS = {
    "make": "installs, or takes minutes: its targets are looked up in the Makefile",
    "python": "benchmarks, faults, flows and tests: their modules and files are looked up",
    "source": "of the shell",
    "export": "of the shell",
    "prefect": "needs a server; test_newcomer.py types it",
    "createdb": "needs PostgreSQL; tests/flows/test_serve.py has one",
    "torchrun": "needs GPUs; tests/train/test_ranks.py runs it on the processor",
    "dask": "serves until it is stopped; tests/system/test_cluster.py has a scheduler and workers",
    "duckdb": "DuckDB's shell is not installed; tests/query/test_catalog.py reads the same file",
}
"""Programs that are not run here, with the reason."""


ENDPOINT = "http://127.0.0.1:8000/v1"
"""The address of a language model on the pages. The tests put that of a stub in its place."""


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    def fences(self, language: str) -> list[str]:
        found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", self.text, re.MULTILINE | re.DOTALL)
        return [textwrap.dedent(code) for _, code in found]

    def typed(self, program: str | None = None) -> list[list[str]]:
        """The words of every command line, or of those that begin with `program`."""
        lines = [line for fence in self.fences("sh") for line in fence.splitlines() if line.strip()]
        words = [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]
        return [each for each in words if each and program in (None, each[0])]


README = Page(ROOT / "README.md")
SITE = [Page(path) for path in sorted(DOCS.rglob("*.md"))]
PAGES = [README, *SITE]
WITH_COMMANDS = [page for page in PAGES if page.typed("saeflow")]
NAMES = [page.name for page in PAGES]


def typed(program: str) -> list[list[str]]:
    """What begins with `program` on any page, once each."""
    return [list(words) for words in dict.fromkeys(tuple(each) for page in PAGES for each in page.typed(program))]


def generator() -> Any:
    """The module that makes pages from the code."""
    if str(DOCS) not in sys.path:
        sys.path.append(str(DOCS))
    from _generate import hook

    return hook


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.text.splitlines()) <= 200


@pytest.mark.parametrize("words", typed("saeflow"), ids=" ".join)
def test_a_documented_command_parses(words: list[str]) -> None:
    _, name, *arguments = words
    with COMMANDS[name].make_context(name, arguments) as context:
        assert context.params


@pytest.mark.parametrize("words", [w for w in typed("saeflow") if w[1] == "ask" and len(w) > 2], ids=" ".join)
def test_a_documented_question_is_one(words: list[str]) -> None:
    known = {question.name: question for question in questions()}
    question, arguments = known[words[2]], list(itertools.takewhile(lambda word: not word.startswith("-"), words[3:]))
    for parameter, word in zip(question.parameters, arguments, strict=False):
        parameter.parse(word)
    explained = not arguments  # a question alone says what it needs
    assert explained or all(parameter.default is not None for parameter in question.parameters[len(arguments) :])


def test_every_command_is_run_or_listed_with_a_reason() -> None:
    programs = {words[0] for page in PAGES for words in page.typed()}
    assert programs - {"saeflow"} == OTHER_PROGRAMS.keys()
    assert NOT_RUN.keys() <= {" ".join(words) for words in typed("saeflow")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: texts, recipes, an SAE from elsewhere, a store with the runs `demo` and `my`."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "flows" / "recipes").mkdir(parents=True)
    rows = [row | {"text": f"{row['text']} Jerusalem."} for row in documents() if row["source"] != "scripts"]
    for row in rows:
        row["source"] = {"tales": "kjv", "letters": "austen"}[row["source"]]
    made = Ingredients.write(folder)
    write_corpus(made.corpus, rows)
    sweep = {"grid": {"sae.architecture": ["batchtopk"], "sae.k": [32, 4]}}
    data = recipe_data(made, name="demo", sae={"n_features": 3200}, train={"n_tokens": 3_000})
    write_recipe(folder / "flows/recipes/demo.toml", data)
    write_recipe(folder / "my.toml", {"name": "my", "data": "demo"} | {k: v for k, v in data.items() if k != "name"})
    write_recipe(
        folder / "flows/recipes/demo_sweep.toml", data | {"name": "demo_sweep", "data": "demo", "sweep": sweep}
    )
    table = a_table(200, 6)
    header = ",".join(f"n{i}" for i in range(table.shape[1]))
    (folder / "table.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in table.tolist())]))
    (folder / "names.jsonl").write_text('{"feature_id": 738, "label": "a comma"}\n')
    (folder / "people.csv").write_text("class,document,start,end\nperson,tales/000,0,5\nplace,letters/000,2,9\n")
    shutil.copytree(ROOT / "flows/recipes/annotations", folder / "flows/recipes/annotations")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe in ("flows/recipes/demo.toml", "my.toml"):
            assert run(["run", recipe, "--quiet"]) == 0
    [sae] = (folder / "data" / "store" / "saes").glob("demo-*")
    (folder / "sae-folder").mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(sae / name, folder / "sae-folder" / name)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    copy = shutil.copytree(prepared, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def folder_of_chats(folder: Path) -> Path:
    """The same folder, whose run `demo` is of conversations."""
    shutil.rmtree(folder / "data" / "store")
    rows = [
        {"key": row["key"], "messages": [{"role": r, "content": row["text"][:99]} for r in ("user", "assistant")]}
        for row in documents()
        if row["text"]
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "chats.parquet")
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}")
    data = recipe_data(
        Ingredients.at(folder),
        name="demo",
        corpus={"files": ["chats.parquet"], "messages": "messages"},
        tokens={"chat_template": "template.jinja"},
        train={"n_tokens": 3_000},
    )
    write_recipe(folder / "chats.toml", data)
    assert run(["run", "chats.toml", "--quiet"]) == 0
    return folder


def run(arguments: list[str]) -> int:
    return common.exit_code_of(cli.app, "saeflow", arguments, debug=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page is README else pytest.mark.long, id=page.name) for page in WITH_COMMANDS],
)
def test_the_commands_of_a_page_run_in_its_order(
    page: Page, folder: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if page.name == "docs/how-to/chats.md":
        request.getfixturevalue("folder_of_chats")
    if ENDPOINT not in page.text:
        run_commands(page, folder, capfd)
        return
    with stub_endpoint(truth_of(Store.open(folder / "data" / "store"), "demo")) as stub:
        run_commands(page, folder, capfd, stub.url)


def run_commands(page: Page, folder: Path, capfd: pytest.CaptureFixture[str], endpoint: str = "") -> None:
    for fence in page.fences("toml"):
        if 'name = "table"' in fence:
            (folder / "table.toml").write_text(f"{fence}\n[train]\nn_tokens = 2_000\n")  # by default two million
    for words in page.typed("saeflow"):
        if " ".join(words) in NOT_RUN:
            continue
        kept = (folder / "my.toml").read_bytes()
        if words[1] == "init":
            (folder / "my.toml").unlink()
        explains = words == ["saeflow", "ask", "tokens_where"]  # which then says what is missing
        typed = [endpoint if word == ENDPOINT else word for word in words[1:]]
        assert run(typed) == (2 if explains else 0), f"{' '.join(words)}: {capfd.readouterr().err}"
        (folder / "my.toml").write_bytes(kept)


@pytest.mark.parametrize("page", [page for page in PAGES if page.fences("python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Page, folder: Path) -> None:
    for fence in page.fences("python"):
        exec(compile(fence.replace(".to_pandas()", ""), page.name, "exec"), {})  # pandas is not required


@pytest.mark.parametrize("page", [page for page in PAGES if page.fences("sql")], ids=lambda page: page.name)
def test_the_sql_of_a_page_runs_in_duckdb_alone(page: Page, folder: Path) -> None:
    with duckdb.connect() as connection:
        connection.execute((folder / "data" / "store" / "catalog.sql").read_text("utf-8"))
        for fence in page.fences("sql"):
            connection.execute(fence)


def test_the_table_of_questions_is_complete() -> None:
    text = generator().made(Page(DOCS / "reference" / "questions.md").text)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| [`")]
    written = {found for row in rows for found in re.findall(r"`(\w+)(?:\(([\w, ]*)\))?`", row)}
    known = {(q.name, ", ".join(p.name for p in q.parameters)) for q in questions()}
    assert known == written


def test_documented_recipes_modules_and_tests_are_there() -> None:
    for words in typed("saeflow") + typed("python"):
        for word in words:
            if word.startswith(("flows/recipes/", "tests/")):
                assert (ROOT / word).exists(), word
    for words in typed("python"):
        assert words[1] == "-m"
        module = ROOT / words[2].replace(".", "/")
        assert words[2] == "pytest" or module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words


def test_the_readme_counts_the_tasks() -> None:
    n_tasks = len(re.findall(r"^- \[", Page(DOCS / "how-to" / "index.md").text, re.MULTILINE))
    assert f"{n_tasks} tasks" in README.text
    assert n_tasks == len(list((DOCS / "how-to").glob("*.md"))) - 1


def test_documented_make_targets_are_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in typed("make"):
        assert words[1] in targets


def fragments(page: Page) -> list[str]:
    return page.fences("toml")


@pytest.mark.parametrize("page", [page for page in PAGES if fragments(page)], ids=lambda page: page.name)
def test_documented_settings_are_those_of_a_recipe(page: Page) -> None:
    """A fence without a name goes on where the first one of the README, a whole recipe, ends."""
    whole = tomllib.loads(fragments(README)[0])
    for fence in fragments(page):
        data = tomllib.loads(fence)
        recipe = parse_recipe(data if "name" in data else whole | data)
        assert recipe.members()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Page) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"`[^`\n]+`", "", page.text)):
        assert (page.path.parent / target).exists(), target


def navigation(entry: Any) -> list[str]:
    """The pages below an entry of `nav`."""
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry
    return [page for each in inside for page in navigation(each)]


def test_every_page_of_the_site_is_in_its_navigation_once() -> None:
    config = yaml.safe_load((ROOT / ".mkdocs.yml").read_text("utf-8"))
    assert sorted(navigation(config["nav"])) == sorted(page.path.relative_to(DOCS).as_posix() for page in SITE)
    assert config["strict"]
    assert config["theme"]["font"] is False


@pytest.mark.parametrize("page", [page for page in SITE if "<!-- made:" in page.text], ids=lambda page: page.name)
def test_a_page_is_made_from_the_code(page: Page) -> None:
    text = generator().made(page.text)
    assert "<!-- made:" not in text
    assert len(text) > len(page.text)


def described(name: str) -> str:
    return str(generator().made(Page(DOCS / "reference" / f"{name}.md").text))


def test_every_setting_and_command_is_in_the_reference() -> None:
    recipe, commands = described("recipe"), described("commands")
    for name in COMMANDS:
        assert f"## {name}\n" in commands
    sections = dict(generator().recipe.sections())
    for path, model in sections.items():
        text = recipe.partition(f"## `[{path}]`")[2].partition("\n## ")[0]
        for key in model.model_fields:
            assert f"| `{key}` |" in text or f"{path}.{key}" in sections, f"{path}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_are_there(page: Page) -> None:
    """Paths from the root in code: whoever moves a file finds the pages that name it."""
    named = re.findall(r"`((?:saeflow|flows|sql|tests|data|docs)/[\w./-]+)`", page.text)
    assert [path for path in named if not (ROOT / path).exists() and not path.startswith("data/store")] == []


NOTEBOOK = DOCS / "tutorial.ipynb"
NOTEBOOKS = (NOTEBOOK, DOCS / "dialogue.ipynb")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one_of_version_4_5_without_outputs(notebook: Path) -> None:
    found = json.loads(notebook.read_text("utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert found["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    made = generator().made(f"<!-- made: notebook docs/{notebook.name} -->")
    assert made.count("```python") == len(cells(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_of_a_notebook_installs_the_clone_with_the_pinned_torch(
    notebook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda words, check: commands.append(words))
    exec(next(iter(cells(notebook).values())), {})
    (pin,) = re.findall(r"^torch==.*$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", pin, str(ROOT)]]


@pytest.mark.long
@pytest.mark.parametrize("has_demo", [False, True], ids=["toys alone", "with a demo"])
def test_the_notebook_runs(has_demo: bool, prepared: Path, tmp_path: Path) -> None:
    store = prepared / "data" / "store" if has_demo else tmp_path / "none"
    environment = os.environ | {"SAEFLOW_STORE": str(store), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "tests.support.notebook", NOTEBOOK.name]
    done = subprocess.run(command, cwd=DOCS, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(re.findall(r"^--- ([\w-]+)\n(.*?)(?=^--- |\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    pictures = [cell for cell, text in said.items() if "picture" in text]
    assert pictures == ["neurons", "article", "article-heat-map", "sql", *(["density", "sources"] if has_demo else [])]
    for meaning in ("1: an animal", "2: a machine", "3: not an animal"):
        assert re.search(rf"^{meaning} +f\d", said["reading"], re.MULTILINE)
    assert ("make demo" in said["demo"]) == (not has_demo)
    for cell in ("feature", "features"):
        assert said[cell].startswith("html ") == has_demo
