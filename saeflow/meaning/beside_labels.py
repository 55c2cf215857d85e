"""The Parquet tables beside a source's file of labels: `labels/<SAE>/<source>.<table>.parquet`.

Each is small and replaced as a whole. data/README.md specifies them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.store.files import make_folder
from saeflow.store.store import Store

_ORDER = [(name, "ascending") for name in ("feature_id", "tokens", "model")]


def path_beside(store: Store, sae: str, source: str, table: str) -> Path:
    """Return where a table is. `sae` is the SAE's name and fingerprint, without its kind."""
    return store.root / "labels" / sae / f"{source}.{table}.parquet"


def changing_beside(store: Store, sae: str, source: str) -> contextlib.AbstractContextManager[None]:
    """Keep other commands from changing the tables of a source inside the block, which must be short."""
    return store.storage.locked(f"answers-{sae}-{source}")


def read_beside(store: Store, path: Path, schema: pa.Schema) -> tuple[pa.Table, str | None]:
    """Return a table of the store as it is now, and its tag for `write_beside`.

    The table is empty if there is no file or the file is of another form.
    """
    try:
        content, tag = store.storage.read(path)
    except FileNotFoundError:
        return schema.empty_table(), None
    with contextlib.suppress(pa.ArrowInvalid):
        table = pq.read_table(pa.BufferReader(content))
        if table.schema.names == schema.names:
            return table.cast(schema), tag
    return schema.empty_table(), tag


def write_beside(store: Store, path: Path, table: pa.Table, tag: str | None) -> None:
    """Put a table in the place of the file that was read with this tag; no rows, no file."""
    if not len(table):
        store.storage.remove(path)
        return
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    make_folder(path.parent)
    store.storage.put_if_unchanged(path, content.getvalue(), tag)


def replace_rows(
    store: Store, path: Path, schema: pa.Schema, features: Iterable[int], owned: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
) -> None:  # fmt: skip
    """Put rows in the place of those of these features whose columns have the values `owned`.

    Call it inside `changing_beside`. Nothing is written if nothing changes.
    """
    old, tag = read_beside(store, path, schema)
    gone = pc.is_in(old.column("feature_id"), pa.array(features, pa.int32()))
    for name, value in owned.items():
        gone = pc.and_(gone, pc.equal(old.column(name), value))
    fresh = pa.concat_tables([old.filter(pc.invert(gone)), pa.Table.from_pylist(list(rows), schema)])
    fresh = fresh.take(pc.sort_indices(fresh, _ORDER))
    if not fresh.equals(old):
        write_beside(store, path, fresh, tag)
