"""Annotations of a store in a bucket: the objects equal the files of a folder, and another machine sees them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from saeflow.classes.annotations import Source, annotate
from saeflow.classes.listing import annotations_of, remove_annotations
from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.store.garbage import collect_garbage
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.support.s3_server import s3_server
from tests.support.small_pipeline import quiet
from tests.support.small_store import Given


@pytest.mark.long
def test_annotations_in_a_bucket_are_those_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Given().write(tmp_path / "store")
    tables = [tmp_path / name for name in ("one.csv", "two.csv")]
    for table, class_ in zip(tables, "ab", strict=True):
        table.write_text(f"class,document,start,end\n{class_},emma,0,4\n")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path / "one"))
        url, client = server.bucket("annotated"), server.client()
        for path in (path for path in local.root.rglob("*") if path.is_file() and "tmp" not in path.parts[-3:]):
            client.put_object(Bucket="annotated", Key=path.relative_to(local.root).as_posix(), Body=path.read_bytes())
        for table in (*tables, tables[0]):  # the first again: it becomes the newest
            for store in (local, Store.open(url)):
                annotate(store, None, "x", Source(table), quiet())
        found = {
            name: each for name, each in server.files("annotated", "annotations").items() if "provenance" not in name
        }
        here = {path.relative_to(local.root / "annotations").as_posix(): path.read_bytes()
                for path in (local.root / "annotations").rglob("*.*") if path.name != "provenance.json"}  # fmt: skip
        assert {name.removeprefix("annotations/").lstrip("/"): each for name, each in found.items()} == here
        monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path / "another machine"))
        store = Store.open(url)
        assert [row["class"] for row in annotations_of(store, None)] == ["a"]
        with contextlib.closing(connect(store)) as connection:
            assert (
                ask(connection, "annotated_tokens", ["x", "a"]).num_rows
                == pq.read_metadata(next((local.root / "annotations").rglob("spans.parquet"))).num_rows
            )
        assert list(verify(store, full=True)) == []
        assert (
            len([each for each in collect_garbage(store, 0, remove=True).garbage if each.path.name.startswith("x-")])
            == 1
        )
        assert len(remove_annotations(Store.open(url), None, "x")) == 1
        assert server.files("annotated", "annotations") == {}
