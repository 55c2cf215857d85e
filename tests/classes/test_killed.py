"""`saeflow annotate` or `saeflow probe` is killed, and typed again: the store equals that of an undisturbed run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saeflow.classes.annotations import Source, annotate
from saeflow.classes.probing import ProbeSettings, probe
from saeflow.query.catalog import write_catalog
from saeflow.query.runs import pick_run, runs
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.support.small_pipeline import quiet
from tests.support.small_store import Given

KILLED = """
import os, signal, sys
event, name = sys.argv[1:3]
def hook(happened, about):
    if happened == event and any(name in str(each) for each in about[:2]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv[:3] = ["saeflow"]
from saeflow.cli.app import main
main()
"""
KILLED_AFTER_A_TABLE = """
import os, signal, sys
import pyarrow.parquet as pq
write = pq.write_table
def write_and_die(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
pq.write_table = write_and_die
sys.argv[:1] = ["saeflow"]
from saeflow.cli.app import main
main()
"""
POINTS = {
    "before the folder is renamed": ("os.rename", "words-"),
    "before the tables are in the work folder": ("open", "whole/classes.parquet"),
    "before the catalog is written": ("os.rename", "catalog.sql"),
}


def content(root: Path) -> dict[str, bytes]:
    """What lies in the store, without locks and what may differ between equal stores."""
    files = (path for path in root.rglob("*") if path.is_file())
    names = {path.relative_to(root).as_posix(): path for path in files}
    left_out = ("tmp/locks", "catalog.sql")
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not name.startswith(left_out) and not name.endswith("provenance.json")
    }


@pytest.mark.parametrize(
    "point", [each if each.endswith("renamed") else pytest.param(each, marks=pytest.mark.long) for each in POINTS]
)
def test_a_killed_annotation_is_finished_by_the_same_command(tmp_path: Path, point: str) -> None:
    (tmp_path / "words.csv").write_text("class,document,start,end\nname,emma,0,4\nverb,emma,4,10\n")
    store = Given().write(tmp_path / "store")
    shutil.rmtree(store.root / "tmp")
    undisturbed = Store.open(shutil.copytree(store.root, tmp_path / "undisturbed"))
    annotate(undisturbed, None, "words", Source(tmp_path / "words.csv"), quiet())
    words = ["annotate", "words", str(tmp_path / "words.csv"), "--store", str(store.root)]
    done = subprocess.run([sys.executable, "-c", KILLED, *POINTS[point], *words], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert list(verify(Store.open(store.root), full=True)) == []
    again = annotate(Store.open(store.root), None, "words", Source(tmp_path / "words.csv"), quiet())
    assert again.is_new == (point != "before the catalog is written")
    write_catalog(Store.open(store.root))
    assert content(store.root) == content(undisturbed.root)
    assert [row["class"] for row in again.classes] == ["name", "verb"]


@pytest.mark.long
def test_a_killed_probe_is_made_by_the_same_command_with_equal_bytes(tmp_path: Path) -> None:
    """It is killed when its first table is written."""
    (tmp_path / "words.csv").write_text("class,token_id\nlove,1\nlove,5\nname,0\n")
    store = Given().write(tmp_path / "store")
    annotate(store, None, "words", Source(tmp_path / "words.csv"), quiet())
    shutil.rmtree(store.root / "tmp")
    undisturbed = Store.open(shutil.copytree(store.root, tmp_path / "undisturbed"))
    settings = ProbeSettings(replicates=20)
    probe(undisturbed, pick_run(undisturbed, runs(undisturbed), None), "words", settings, 1)
    words = ["probe", "words", "--replicates", "20", "--threads", "1", "--store", str(store.root)]
    done = subprocess.run([sys.executable, "-c", KILLED_AFTER_A_TABLE, *words], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in (store.root / "tmp").rglob("*.parquet")] == ["feature_classes.parquet"]
    assert list(verify(Store.open(store.root), full=True)) == []
    again = Store.open(store.root)
    probe(again, pick_run(again, runs(again), None), "words", settings, 1)
    assert content(store.root) == content(undisturbed.root)
