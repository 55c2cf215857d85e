"""What can be read is read, and what cannot ends in a message that names the way out."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.activations.tables.source import open_table
from saeflow.corpus.sources import open_corpus
from saeflow.query import label_import
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.recipe.recipe import load_recipe
from saeflow.recipe.template import recipe_name_of
from saeflow.runtime.errors import UserError
from saeflow.runtime.temporary import temporary_folder
from saeflow.sae.kernels import compiled
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.small_pipeline import Ingredients, brought_data, recipe_data, write_recipe, write_table

RECIPE = 'name = "r"\n[activations]\nsource = "t.npy"\n'


@pytest.mark.parametrize(
    "content",
    [codecs.BOM_UTF8 + RECIPE.encode(), RECIPE.encode("utf-16"), codecs.BOM_UTF16_BE + RECIPE.encode("utf-16-be"),
     RECIPE.replace("\n", "\r\n").encode()],
    ids=["UTF-8 with a mark", "UTF-16", "UTF-16, big end first", "CRLF"],
)  # fmt: skip
def test_a_recipe_is_read_in_the_encoding_that_its_mark_tells(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    assert load_recipe(tmp_path / "r.toml").name == "r"


@pytest.mark.parametrize(
    ("lines", "phrase"),
    [
        ("x = " + "[" * 100_000, "not valid TOML"),
        ("x = " + "9" * 5000, "not valid TOML"),
        ("threads = " + "9" * 30, "threads is 9999"),
        ("[feed]\nseed = -1", "feed.seed is -1"),
        ("[train]\nlr = inf", "train.lr is inf"),
        ("[sae]\nl1_weight = nan", "sae.l1_weight is nan"),
        ('[corpus]\nfiles = ["a\\u0000b"]', "zero byte"),
        ('[corpus]\ntext = "\\u0000"', "corpus.text"),
    ],
    ids=["deep", "digits", "too large", "negative", "infinite", "nan", "zero byte in a list", "zero byte"],
)
def test_a_value_that_nothing_can_hold_is_refused_by_its_name(lines: str, phrase: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"{lines}\n{RECIPE}" if not lines.startswith("[") else RECIPE + lines)
    with pytest.raises(UserError, match=phrase):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("change", ["sae.k.x=7", "name.x=1", "activations.source.0=a", "train.lr.a.b=1"])
def test_set_below_a_value_names_what_holds_it(change: str, saeflow: Command, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"{RECIPE}[sae]\nk = 4\n[train]\nlr = 0.1\n")
    said = saeflow("run", "r.toml", "--set", change)
    assert said.code == 2
    assert f"{change.rpartition('.')[0].removesuffix('.a')} holds a value" in said.err


@pytest.mark.parametrize(
    ("recipe", "files", "model"),
    [
        ("sub/my.toml", "d*.txt", "model"),
        ("Über-uns.toml", "d*.txt", "model"),
        ("-.toml", "./d1.txt", "./model"),
        ("sub/2024 (new).toml", "~/d*.txt", "~/model"),
        ("sub/日本.toml", "sub/../d*.txt", "sub/../model"),
        ('"quoted"\n.toml', "d*.txt", "model"),
    ],
)
def test_init_writes_a_recipe_that_run_takes(
    recipe: str, files: str, model: str, saeflow: Command, ingredients: Ingredients, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "model").symlink_to(ingredients.model)
    for number in range(3):
        (tmp_path / f"d{number}.txt").write_text(f"the cat sees the dog {number} times")
    said = saeflow("init", "--files", files, "--model", model, "--sites", "*.0.mlp.act", "--", recipe)
    assert said.code == 0, said.err
    made = load_recipe(tmp_path / recipe)
    assert made.model
    assert made.corpus
    assert Path(made.model.path).resolve() == ingredients.model.resolve()
    assert list(open_corpus(made.corpus).documents)


@pytest.mark.parametrize("stem", ["Über-uns", "日本", "2024", "_x_", "a.b c", "ÆØÅ", "-"])
def test_the_name_of_any_file_gives_a_name_that_a_recipe_may_have(stem: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.replace('"r"', f'"{recipe_name_of(stem)}"'))
    assert load_recipe(tmp_path / "r.toml").name


LABELS = [{"index": "3", "description": "the sea"}, {"index": "4", "description": "größer"}]
AS_LINES = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in LABELS)
AS_CSV = "feature_id,label\n3,the sea\n4,größer\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.jsonl.gz", gzip.compress(AS_LINES.encode())),
        ("l.jsonl.bz2", bz2.compress(AS_LINES.encode())),
        ("l.csv.xz", lzma.compress(AS_CSV.encode())),
        ("l.csv.zst", pa.compress(AS_CSV.encode(), "zstd", asbytes=True)),
        ("l.csv", gzip.compress(AS_CSV.encode())),
        ("l.csv", AS_CSV.encode("utf-16")),
        ("l.jsonl", AS_LINES.encode("utf-16")),
        ("l.json.gz", gzip.compress(json.dumps(LABELS).encode("utf-16"))),
    ],
    ids=["gzip", "bzip2", "xz", "Zstandard", "gzip by its bytes", "CSV in UTF-16", "JSON in UTF-16", "packed UTF-16"],
)
def test_labels_are_read_packed_and_in_utf_16(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = {feature: label and label.text for feature, label in label_import.read(tmp_path / name, 64).items()}
    assert found == {3: "the sea", 4: "größer"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.jsonl.gz", gzip.compress(AS_LINES.encode())[:-9]),
        ("l.csv.zst", b"\x28\xb5\x2f\xfdxx"),
        ("l.csv", b"\xff\xfea"),
    ],
    ids=["gzip", "Zstandard", "UTF-16"],
)
def test_labels_that_are_cut_off_are_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        label_import.read(tmp_path / name, 64)


def as_parquet(path: Path, columns: dict[str, Any], index: list[Any] | None = None) -> None:
    table = pa.table(columns)
    if index is not None:
        about = {"index_columns": index, "columns": [], "column_indexes": []}
        table = table.replace_schema_metadata({b"pandas": json.dumps(about).encode()})
    pq.write_table(table, path)


NEURONS = {f"n{i}": np.arange(5, dtype=np.float32) + i for i in range(3)}
COUNT = {"first": np.arange(5)}


@pytest.mark.parametrize(
    ("write", "index"),
    [
        (lambda path: as_parquet(path, NEURONS | {"__index_level_0__": np.arange(5)}, ["__index_level_0__"]), 1),
        (lambda path: as_parquet(path, NEURONS | {"row": np.arange(5)}, ["row"]), 1),
        (lambda path: as_parquet(path, {"Unnamed: 0": np.arange(5)} | NEURONS), 1),
        (lambda path: as_parquet(path, {"index": np.arange(5)} | NEURONS, [{"kind": "range", "start": 0}]), 1),
        (lambda path: as_parquet(path, NEURONS, [{"kind": "range", "start": 0}]), 0),
        (lambda path: as_parquet(path, NEURONS | {"row": ["a"] * 5}, ["row"]), 0),
    ],
    ids=["level", "named", "unnamed", "reset", "range", "texts"],
)
def test_an_index_of_pandas_is_no_neuron(write: Callable[[Path], None], index: int, tmp_path: Path) -> None:
    write(tmp_path / "t.parquet")
    rows = open_table(str(tmp_path / "t.parquet"))
    assert (rows.width, len(rows.index)) == (3, index)


@pytest.mark.parametrize(
    ("header", "width", "index"),
    [(",a,b", 2, 1), ('"","a","b"', 2, 1), ("Unnamed: 0,a,b", 2, 1), ("x,a,b", 3, 0), ("index,a,b", 2, 1)],
)
def test_a_csv_column_that_numbers_the_rows_is_no_neuron(header: str, width: int, index: int, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n" + "".join(f"{n},{n / 2},{n / 3}\n" for n in range(9)))
    rows = open_table(str(tmp_path / "t.csv"))
    assert (rows.width, len(rows.index)) == (width, index)


def test_a_run_says_which_column_is_no_neuron(saeflow: Command, tmp_path: Path) -> None:
    as_parquet(tmp_path / "t.parquet", {"index": np.arange(5)} | NEURONS)
    write_recipe(tmp_path / "r.toml", brought_data(tmp_path / "t.parquet"))
    assert "t.parquet: index numbers the rows and is no neuron" in saeflow("bring", "r.toml").err


ODD = """select 'k' || i as key, 'text ' || i as text, date '99999-01-01' as far, 'infinity'::timestamp as never,
date '0044-03-15 (BC)' as ides, timestamptz '2024-01-01 00:00:00+05' as zoned from range(3) r(i)"""


def test_dates_that_python_lacks_are_kept(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    duckdb.sql(f"copy ({ODD}) to '{tmp_path}/m.parquet'")
    write_recipe(tmp_path / "r.toml", recipe_data(ingredients, corpus={"files": ["m.parquet"]}))
    assert saeflow("tokens", "r.toml", "--store", "s").code == 0
    [documents] = (tmp_path / "s").glob("tokens/*/parts/*/documents.parquet")
    kept = duckdb.sql(f"select far::varchar, never::varchar, ides::varchar from '{documents}' limit 1").fetchall()
    assert kept == [("99999-01-01", "infinity", "0044-03-15 (BC)")]


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def change(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield change
    monkeypatch.delenv("TZ", raising=False)
    time.tzset()


def test_what_is_stored_does_not_depend_on_the_zone_of_the_machine(
    saeflow: Command, ingredients: Ingredients, tmp_path: Path, zone: Callable[[str], None]
) -> None:
    duckdb.sql(f"copy ({ODD}) to '{tmp_path}/m.parquet'")
    write_recipe(tmp_path / "r.toml", recipe_data(ingredients, corpus={"files": ["m.parquet"]}))
    stored = set()
    for name in ("UTC", "America/New_York", "Nowhere/Land"):
        zone(name)
        assert saeflow("tokens", "r.toml", "--store", name[:2]).code == 0
        [documents] = (tmp_path / name[:2]).glob("tokens/*/parts/*/documents.parquet")
        stored.add(documents.read_bytes())
    assert len(stored) == 1


def test_a_column_called_star_is_refused_by_name(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "*": [1]}), tmp_path / "star.parquet")
    write_recipe(tmp_path / "r.toml", recipe_data(ingredients, corpus={"files": ["star.parquet"]}))
    said = saeflow("tokens", "r.toml")
    assert (said.code, "called *" in said.err) == (2, True)


def test_a_store_in_a_folder_that_is_not_utf_8_is_refused(saeflow: Command, tmp_path: Path) -> None:
    write_recipe(tmp_path / "r.toml", brought_data(write_table(tmp_path / "t.npy", np.eye(9, 3))))
    said = saeflow("run", "r.toml", "--store", os.fsdecode(b"bad\xff"))
    assert (said.code, "not UTF-8" in said.err) == (2, True)


def test_stray_files_beside_the_generations_stop_nothing(saeflow: Command, finished: Finished, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", finished.store.root, tmp_path / "s"], check=True)
    for folder in (tmp_path / "s").glob("*/*/generations"):
        for name in ("9abc.parquet", "one.parquet", "1 (copy).parquet"):
            (folder / name).touch()
    for command in (["ask", "runs"], ["forget", "tales/000"], ["gc"], ["verify"]):
        assert saeflow(*command, "--store", "s").code == 0


def test_a_kernel_is_compiled_where_no_cache_can_be_written() -> None:
    made: dict[str, Any] = {}
    exec(compile("def twice(x): return 2 * x", "/no/such/folder/kernel.py", "exec"), made)
    assert compiled(made["twice"])(21) == 42


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet.gz"])
def test_a_full_temporary_folder_is_not_blamed_on_the_store(kind: str, small_disk: Path, tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    rows = [{"key": f"k{n}", "text": dice.bytes(9000).hex()} for n in range(200)]
    path = tmp_path / f"c.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("key,text\n" + "".join(f"{row['key']},{row['text']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
        path.write_bytes(gzip.compress((tmp_path / "c.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"temporary folder .*small is full.*\n?.*TMPDIR"):
        list(open_corpus(CorpusConfig(files=[str(path)])).documents)


def test_a_full_temporary_folder_names_the_variable(small_disk: Path) -> None:
    with pytest.raises(UserError, match="TMPDIR"), temporary_folder("x-") as folder:
        (folder / "x").write_bytes(bytes(2 << 20))
