"""`catalog.sql`: the same answers from DuckDB alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from saeflow.query import catalog, kept_catalog
from saeflow.query.connection import connect, connect_to_run
from saeflow.query.questions import questions
from saeflow.query.runs import runs
from saeflow.store.store import Store
from tests.support.command import Command
from tests.support.small_store import Given

ALONE = """
import json, sys
sys.path = [p for p in sys.path if "saeflow" not in p] + [sys.argv[1]]
sys.modules["saeflow"] = None
import duckdb
with open(sys.argv[2], encoding="utf-8") as file:
    script = file.read()
connection = duckdb.connect()
connection.execute(script)
print(json.dumps([repr(connection.execute(sql).fetchall()) for sql in sys.argv[3:]]))
"""
"""What a shell does that has DuckDB and nothing of ours."""

QUESTIONS = [
    "from tokens_where(0, 0.5)",
    "from top_tokens(0, 3)",
    "from context(2)",
    "from feature_summary",
    "from compare_sources('novels', 'bible')",
    "select name, schema_name, problem is null, is_current from stg_runs order by all",
    "select * from old.top_tokens(1)",
    "select run, count(*) from every_run.stg_token_major group by run order by run",
    "select current_setting('asof_loop_join_threshold'), current_schema()",
    "from src_labels",
]


def test_the_settings_reach_the_cursors_of_the_pages(tmp_path: Path):
    """A setting made without `global` would hold in one cursor only, and each page would read every footer anew."""
    with closing(connect(two_runs(tmp_path))) as connection, closing(connection.cursor()) as cursor:
        names = "current_setting('parquet_metadata_cache'), current_setting('asof_loop_join_threshold')"
        assert cursor.execute(f"select {names}").fetchall() == [(True, 0)]


def two_runs(root: Path) -> Store:
    Given(name="old", fp="f0000009", values=[(2, 1, 7.0)]).write(root)
    store = Given().write(root)
    folder = root / "labels" / "demo-f0000001"
    folder.mkdir(parents=True)
    (folder / "own.csv").write_text("feature_id,label,score\n1,'=one,0.5\n")
    return store


def alone(store: Store, *sql: str) -> list[str]:
    path = str(Path(duckdb.__file__).parent.parent)
    command = [sys.executable, "-I", "-S", "-c", ALONE, path, str(store.root / catalog.CATALOG), *sql]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "folder", ["plain", "it's; drop\u202e --\n.shell rm \x1b[2J", "a[b]* from tokens", "value=9/source=web"]
)
def test_duckdb_alone_answers_as_saeflow_does_wherever_the_store_lies(folder: str, tmp_path: Path) -> None:
    store = two_runs(tmp_path / folder)
    assert catalog.write_catalog(store) == store.root / "catalog.sql"
    with connect(store) as connection:
        assert alone(store, *QUESTIONS) == [repr(connection.execute(sql).fetchall()) for sql in QUESTIONS]


def test_every_line_of_the_file_is_harmless_to_a_terminal_and_to_the_shell_that_reads_it(tmp_path: Path) -> None:
    store = two_runs(tmp_path / "it's; drop\u202e --\n.shell rm \x1b[2J")
    text = catalog.catalog_text(store)
    assert not {"\u202e", "\x1b", "\r"} & set(text)
    assert not [line for line in text.splitlines() if line.startswith((".", "#"))]
    kinds = {statement.type for statement in duckdb.extract_statements(text)}
    assert kinds <= {duckdb.StatementType.CREATE, duckdb.StatementType.SET, duckdb.StatementType.VARIABLE_SET}


def test_the_header_says_how_it_is_used_by_what_it_was_made_and_what_it_needs(tmp_path: Path) -> None:
    store = two_runs(tmp_path)
    text = catalog.catalog_text(store)
    for phrase in (f"duckdb -init {store.root}/catalog.sql", f"with DuckDB {duckdb.__version__}", "Runs: demo, old"):
        assert phrase in text
    assert "needs DuckDB 2.0 or newer" in text


def test_it_is_written_only_where_something_changed(tmp_path: Path) -> None:
    store = two_runs(tmp_path)
    assert catalog.write_catalog(store)
    before = (store.root / "catalog.sql").stat()
    assert catalog.write_catalog(store) is None
    after = (store.root / "catalog.sql").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    Given(name="third", fp="f0000003").write(tmp_path)
    assert catalog.write_catalog(store)
    assert alone(store, "select current_schema()") == ["[('third',)]"]
    assert sorted(path.name for path in store.root.iterdir() if path.is_file()) == ["catalog.sql", "store.json"]


def test_a_run_that_cannot_be_read_is_a_comment_and_harms_no_other(tmp_path: Path) -> None:
    store = two_runs(tmp_path)
    next(tmp_path.glob("features/old-*/manifest.json")).unlink()
    Given(name="bad\n.shell rm", fp="f0000005").write(tmp_path)
    catalog.write_catalog(store)
    left_out = [line for line in catalog.catalog_text(store).splitlines() if line.startswith("-- Left out: ")]
    assert len(left_out) == 2
    assert any("features/old-f0000009" in line for line in left_out)
    assert any("bad↵.shell rm" in line for line in left_out)
    assert alone(store, "select count(*) from tokens_where(0)") == ["[(4,)]"]


def test_a_store_without_a_run_has_a_catalog_that_says_so(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    assert "Runs: none yet" in catalog.catalog_text(store)
    catalog.write_catalog(store)
    assert alone(store, "select 1") == ["[(1,)]"]


def test_a_run_of_too_many_files_is_left_out_with_what_to_do(tmp_path: Path) -> None:
    text = catalog.catalog_text(two_runs(tmp_path), most_files=3)
    assert text.count("saeflow compact makes them few") == 2
    assert "create" not in text


@pytest.mark.long
def test_it_may_be_read_twice_and_into_a_file(tmp_path: Path) -> None:
    store = two_runs(tmp_path / "store")
    with duckdb.connect(tmp_path / "mine.duckdb") as connection:
        for _ in range(2):
            connection.execute(catalog.catalog_text(store))
        assert connection.execute("select count(*) from top_tokens(0)").fetchone() == (4,)


def test_after_a_store_was_moved_the_command_mends_it(saeflow: Command, tmp_path: Path) -> None:
    store = two_runs(tmp_path / "store")
    catalog.write_catalog(store)
    shutil.move(store.root, tmp_path / "moved")
    said = saeflow("catalog", "--store", tmp_path / "moved")
    assert (said.code, said.out) == (0, f"{tmp_path}/moved/catalog.sql: written\n")
    assert saeflow("catalog", "--store", tmp_path / "moved").out.endswith("up to date\n")
    assert alone(Store.open(tmp_path / "moved"), "select count(*) from tokens") == ["[(8,)]"]


def test_it_loads_what_connect_loads(tmp_path: Path) -> None:
    store = two_runs(tmp_path)
    catalog.write_catalog(store)
    every = "select table_schema, table_name from information_schema.tables order by all"
    with connect(store) as connection:
        assert alone(store, every) == [repr(connection.execute(every).fetchall())]
    assert [run.schema for run in runs(store)] == ["demo", "old"]
    assert questions()


class WithLaterColumns(Given):
    """Documents whose metadata begins in the second part."""

    def _documents(self, index: int) -> pa.Table:
        table = super()._documents(index)
        return table if index else table.drop_columns(list(self.metadata))


@pytest.mark.parametrize("name", ["store", "a[b]* from tokens"])
def test_a_run_of_many_files_answers_as_one_of_few_does(tmp_path, name):
    years = {"year": pa.array([1815, 1611, 1612])}
    store = WithLaterColumns(n_parts=2, n_token_parts=3, n_buckets=2, metadata=years).write(tmp_path / name)
    views = ["documents", "tokens", "feature_summary", "stg_vocab_blocks", "stg_feature_major", "stg_token_major"]
    asked = [*(f"select * from {view} order by all" for view in views), "from context(2)", "from tokens_where(0, 0.5)"]
    with connect(store) as connection:
        expected = [connection.execute(sql).fetchall() for sql in asked]
    assert [row[-1] for row in expected[0]] == [None, 1611, 1612]
    with connect_to_run(store, many_files=1)[1] as connection:
        assert [connection.execute(sql).fetchall() for sql in asked] == expected


CATALOGUE = [
    "select function_name, parameters, macro_definition from duckdb_functions() where not internal "
    "and not starts_with(function_name, 'src_') order by all",
    "select view_name, sql from duckdb_views() where not internal and not starts_with(view_name, 'src_') order by all",
    "from top_tokens(0)",
    "from documents",
    "from compare_runs('demo', 'other')",
]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder of what is kept."""
    monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "catalogs"


def test_views_copied_from_an_earlier_connection_are_those_that_were_made(tmp_path: Path, kept: Path) -> None:
    answers = []
    for folder in ("first", "second", "third"):
        Given(name="other", fp="f0000002").write(tmp_path / folder)
        with connect(Given(corpus=("other", "f0000002")).write(tmp_path / folder), "demo") as connection:
            answers.append([str(connection.execute(statement).fetchall()) for statement in CATALOGUE])
    assert len([*kept.iterdir()]) == 2
    assert answers[0] == answers[1] == answers[2]
    with connect(Given(metadata={"year": pa.array([1, 2, 3])}).write(tmp_path / "another")) as connection:
        assert connection.execute("select year from documents order by key").fetchall() == [(1,), (3,), (2,)]


def made(store: Store) -> str:
    with connect(store) as connection:
        return str(connection.execute(CATALOGUE[0]).fetchall())


def test_views_are_kept_when_a_second_process_makes_them(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_catalog, "_many_follow", threading.Event())
    store, sizes = Given().write(tmp_path / "store"), []
    for _ in range(3):
        made(store)
        sizes.append([path.stat().st_size > 0 for path in kept.iterdir()])
    assert sizes == [[False], [True], [True]]


@pytest.mark.long
@pytest.mark.parametrize("damage", [b"", b"no database", None], ids=["empty", "another file", "a flipped byte"])
def test_a_damaged_file_of_kept_views_is_made_again(tmp_path: Path, kept: Path, damage: bytes | None) -> None:
    store = Given().write(tmp_path / "store")
    expected = made(store)
    (file,) = kept.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    file.write_bytes(content if damage is None else damage)
    assert made(store) == expected
    assert made(store) == expected
    assert [path.stat().st_size > 1000 for path in kept.iterdir()] == [True]


def test_kept_views_of_a_folder_that_others_may_write_are_not_read(tmp_path: Path, kept: Path) -> None:
    store = Given().write(tmp_path / "store")
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    made(store)
    assert not [*kept.iterdir()]


def test_without_a_home_and_without_a_folder_nothing_is_kept(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.parent.write_text("a file, where the cache should be")
    assert made(Given().write(tmp_path / "store"))
    monkeypatch.delenv("SAEFLOW_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert made(Store.open(tmp_path / "store"))


@pytest.mark.long
def test_only_the_newest_kept_views_stay_and_what_a_killed_process_left_goes(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_catalog, "MOST_KEPT", 2)
    kept.mkdir(parents=True, mode=0o700)
    for name, age in (("unfinished-old", 7200), ("unfinished-new", 0)):
        (kept / name).mkdir()
        os.utime(kept / name, (time.time() - age,) * 2)
    for place in range(3):  # each connection makes those of all runs
        made(Given(name=f"run_{place}").write(tmp_path / "store"))
    assert len([*kept.glob("*.duckdb")]) == 2
    assert [path.name for path in kept.glob("unfinished*")] == ["unfinished-new"]
