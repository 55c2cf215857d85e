"""Stores as a stranger could hand them over: links that lead out, forged records with right checksums, odd tables.

`HOSTILE[name](store, outside)` changes a finished store in the folder `store`. `outside` is somebody's folder with
files that no command may change, read into an answer, or add to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.classes.annotations import CLASS_COLUMNS
from saeflow.features.schema import EFFECTS, PROBE_TABLES, SPANS
from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.store.artefact import Artefact
from saeflow.store.files import checksum
from saeflow.store.lease_slot import Owner
from saeflow.store.records import FORGOTTEN, Kind, checked_text
from saeflow.store.store import Store
from tests.support.beside import publish

Change = Callable[[Path, Path], object]
HOSTILE: dict[str, Change] = {}
HIDDEN: dict[str, Any] = {"document_id": 1, "key_hash": "0123456789abcdef", "reason": "forgotten"}
EVIL = "0)); COPY (select 'pwned' as x) TO '{outside}/PWNED.csv'; select ((0"


def write_outside(folder: Path) -> Path:
    """Make somebody's folder."""
    for name in ("thesis.txt", "photos/p.jpg", "cluster-backup/b", "000000-0123abcd/part.json", "data.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    for path in (folder / "cluster-backup", folder / "cluster-backup/b", folder / "000000-0123abcd"):
        os.utime(path, (0, 0))
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything in a folder: names, and what files hold."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def only(store: Path, pattern: str) -> Path:
    return sorted(store.glob(pattern))[0]


def moved_out(name: str, pattern: str) -> None:
    """A folder or file lies outside, among the other files there, and a link leads to it."""

    def change(store: Path, outside: Path) -> None:
        path = only(store, pattern)
        target = outside
        if path.is_dir():
            shutil.copytree(path, outside, dirs_exist_ok=True)
            shutil.rmtree(path)
        else:
            target = outside / path.name
            shutil.move(path, target)
        path.symlink_to(target)

    HOSTILE[name] = change


def planted(name: str, place: Callable[[Path], Path], target: str = "thesis.txt") -> None:
    """A link lies where a command may write."""

    def change(store: Path, outside: Path) -> None:
        path = place(store)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(outside / target)

    HOSTILE[name] = change


def fifo(name: str, pattern: str) -> None:
    """A file is a pipe: whoever opens it waits for ever."""

    def change(store: Path, outside: Path) -> None:
        path = only(store, pattern)
        path.unlink()
        os.mkfifo(path)

    HOSTILE[name] = change


def forged(name: str, kind: str, change: Callable[[dict[str, Any], str], object]) -> None:
    """A record of an artefact says something else, with a right checksum."""

    def forge(store: Path, outside: Path) -> None:
        path = only(store, f"{kind}/*/artefact.json")
        about = json.loads(path.read_text())
        about.pop("sum", None)
        change(about, str(outside))
        path.write_text(checked_text(about))

    HOSTILE[name] = forge


def with_fact(name: str, kind: str, key: str, value: Any) -> None:
    def change(about: dict[str, Any], outside: str) -> None:
        about["facts"][key] = json.loads(json.dumps(value).replace("{outside}", outside))

    forged(name, kind, change)


def retabled(name: str, kind: str, file: str, change: Callable[[pa.Table, str], pa.Table]) -> None:
    """A table of a part, or beside the parts, holds something else; records and lists fit it."""

    def forge(folder: Path, outside: Path) -> None:
        store = Store.open(folder)
        artefact = store.artefacts(kind)[0]  # type: ignore[arg-type]
        if (artefact.path / file).exists():
            write(artefact.path / file, change, outside)
            record = json.loads((artefact.path / "artefact.json").read_text())
            record.pop("sum", None)
            for each in record["files"]:
                path = artefact.path / each["name"]
                each.update(n_bytes=path.stat().st_size, checksum=checksum(path))
            (artefact.path / "artefact.json").write_text(checked_text(record))
            return
        parts = list(artefact.published().parts)
        with artefact.writing():
            old = parts[0]
            with artefact.new_part(old.index, dict(old.counts), old.inputs) as work:
                shutil.copytree(artefact.part_path(old), work, dirs_exist_ok=True)
                (work / "part.json").unlink()
                for path in work.glob(file):
                    write(path, change, outside)
            artefact.publish([artefact.made[old.index], *parts[1:]])

    HOSTILE[name] = forge


def write(path: Path, change: Callable[[pa.Table, str], pa.Table], outside: Path) -> None:
    pq.write_table(change(pq.ParquetFile(path).read(), str(outside)), path)


def as_text(column: str) -> Callable[[pa.Table, str], pa.Table]:
    """Put text that is SQL in the place of a column."""

    def change(table: pa.Table, outside: str) -> pa.Table:
        texts = pa.array([EVIL.format(outside=outside)] * len(table), pa.string())
        if column not in table.column_names:
            return table.append_column(column, texts)
        return table.set_column(table.column_names.index(column), column, texts)

    return change


BESIDE: dict[Kind, dict[str, pa.Schema]] = {
    "annotations": {"spans": SPANS, "classes": CLASS_COLUMNS}, "probes": PROBE_TABLES, "effects": EFFECTS,
}  # fmt: skip
_USUAL = {pa.string(): "marks", pa.float32(): 0.5, pa.float64(): 0.5}
_ODD: dict[str, dict[pa.DataType, Any]] = {
    "nulls": dict.fromkeys([pa.string(), pa.float64(), pa.float32(), pa.int64(), pa.int32(), pa.int16()]),
    "huge numbers": {pa.int64(): 2**63 - 1, pa.int32(): 2**31 - 1, pa.int16(): 2**15 - 1, pa.float64(): 1e308},
    "negative numbers": {pa.int64(): -(2**63), pa.int32(): -(2**31), pa.int16(): -1, pa.float64(): float("nan")},
    "letters that act": {pa.string(): "\x1b]0;x\x07\x00\n=1+1<b>'; copy (select 1) to 'z'; --"},
}


def beside(name: str, kind: Kind, table_of: Callable[[pa.Schema], pa.Table]) -> None:
    """A stranger's annotations, probe or effects `marks` belong to the store's own tokens or run."""

    def forge(folder: Path, outside: Path) -> None:
        store = Store.open(folder)
        run = store.artefacts("features")[0]
        owner = store.by_id(str(run.record.input("tokens"))) if kind == "annotations" else run
        publish(store, kind, "marks", owner, {table: table_of(schema) for table, schema in BESIDE[kind].items()})

    HOSTILE[f"beside: {kind}, {name}"] = forge


def rows_of(values: dict[pa.DataType, Any]) -> Callable[[pa.Schema], pa.Table]:
    """Make two equal rows of a table: what `values` says by type, something usual otherwise."""

    def make(schema: pa.Schema) -> pa.Table:
        cells = _USUAL | values
        usual = {field.name: cells.get(field.type, [1] if pa.types.is_list(field.type) else 0) for field in schema}
        return pa.Table.from_pylist([usual] * 2, schema)

    return make


def relisted(name: str, change: Callable[[dict[str, Any], str], object]) -> None:
    """A published list of parts names something else; the manifest fits it. Changes one row, as a dict of columns."""

    def forge(folder: Path, outside: Path) -> None:
        artefact: Artefact = Store.open(folder).artefacts("tokens")[0]
        path = artefact.list_path(artefact.current_number())
        table = pq.read_table(path)
        rows = table.to_pylist()
        change(rows[0], str(outside))
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
        manifest = json.loads((artefact.path / "manifest.json").read_text())
        manifest.pop("sum", None)
        manifest["checksum"] = checksum(path)
        (artefact.path / "manifest.json").write_text(checked_text(manifest))

    HOSTILE[name] = forge


def in_record(change: Callable[[dict[str, Any], str], object]) -> Callable[[dict[str, Any], str], None]:
    def apply(row: dict[str, Any], outside: str) -> None:
        record = json.loads(row["record"])
        change(record, outside)
        row["record"] = json.dumps(record)

    return apply


def written(name: str, place: Callable[[Path], Path], content: str) -> None:
    """A file that a person or a program may edit says something else."""

    def change(store: Path, outside: Path) -> None:
        path = place(store)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("{outside}", str(outside)))

    HOSTILE[name] = change


def lease(store: Path, ending: str) -> Path:
    artefact = only(store, "tokens/*/artefact.json").parent
    return store / "tmp" / "locks" / f"tokens-{artefact.name}.{ending}"


for _name, _pattern in {
    "link: parts of tokens": "tokens/*/parts", "link: parts of activations": "activations/*/parts",
    "link: parts of features": "features/*/parts", "link: a part": "tokens/*/parts/*",
    "link: a part of features": "features/*/parts/*", "link: a table": "tokens/*/parts/*/tokens.parquet",
    "link: values": "features/*/parts/*/feature_major*", "link: vocabulary": "tokens/*/vocab.parquet",
    "link: record": "features/*/artefact.json", "link: manifest": "tokens/*/manifest.json",
    "link: lists": "tokens/*/generations", "link: a list": "features/*/generations/*.parquet",
    "link: tokens": "tokens", "link: features": "features", "link: saes": "saes", "link: an artefact": "tokens/*",
    "link: an SAE": "saes/*", "link: weights": "saes/*/sae_weights.safetensors", "link: store.json": "store.json",
    "link: part.json": "tokens/*/parts/*/part.json", "link: provenance": "tokens/*/provenance.json",
}.items():  # fmt: skip
    moved_out(_name, _pattern)

planted("planted: tmp", lambda s: s / "tmp", ".")
planted("planted: labels", lambda s: s / "labels", "photos")
planted("planted: damaged", lambda s: s / "damaged", "photos")
planted("planted: locks", lambda s: s / "tmp/locks", "photos")
planted("planted: catalog.sql", lambda s: s / "catalog.sql")
planted("planted: next catalog.sql", lambda s: s / ".catalog.sql.new")
planted("planted: next manifest", lambda s: only(s, "tokens/*/manifest.json").with_name(".manifest.json.new"))
planted("planted: next record", lambda s: only(s, "features/*/artefact.json").with_name(".artefact.json.new"))
planted("planted: lock", lambda s: lease(s, "lock"))
planted("planted: lease", lambda s: lease(s, "lease"))
planted("planted: next lease", lambda s: lease(s, "new"))
planted("planted: work", lambda s: s / "tmp" / f"tokens-{only(s, 'tokens/*').name}", ".")
planted("planted: checkpoint", lambda s: s / "tmp" / f"saes-{only(s, 'saes/*').name}.checkpoint", ".")
planted("planted: labels of an SAE", lambda s: s / "labels" / only(s, "saes/*").name, "photos")
planted("planted: verified", lambda s: s / "tmp/verified.json")
fifo("pipe: quality", "features/*/quality.json")
fifo("pipe: manifest", "tokens/*/manifest.json")
fifo("pipe: provenance", "features/*/provenance.json")

with_fact("fact: skip_positions", "features", "skip_positions", [EVIL])
with_fact("fact: context_length", "tokens", "context_length", EVIL)
with_fact("fact: long context", "tokens", "context_length", 10**30)
with_fact("fact: n_features", "features", "n_features", EVIL)
with_fact("fact: site", "features", "site", {"x": ["../../../thesis.txt"]})
with_fact("fact: stored", "activations", "stored", [["../../../../thesis.txt", 32]])
with_fact("fact: sae", "saes", "sae", {"architecture": EVIL, "k": EVIL})
with_fact("fact: nested", "features", "more", json.loads("[" * 400 + "]" * 400))
forged("record: inputs", "features", lambda r, o: r.update(inputs=[f"tokens/../../{Path(o).name}/x-00000000"]))
forged("record: a file above", "tokens", lambda r, o: r["files"][0].update(name="../../../outside/thesis.txt"))
forged("record: a file elsewhere", "saes", lambda r, o: r["files"][0].update(name=f"{o}/thesis.txt"))
forged("record: name", "features", lambda r, o: r.update(name="../../x", fp="00000000"))
relisted("list: folder above", lambda row, o: row.update(folder="../../../../outside"))
relisted("list: folder elsewhere", lambda row, o: row.update(folder=o))
relisted("list: file above", in_record(lambda r, o: r["files"][0].update(name="../../../../../outside/thesis.txt")))
relisted("list: counts", in_record(lambda r, o: r["counts"].update(n_sequences=EVIL.format(outside=o))))
relisted("list: huge counts", in_record(lambda r, o: r["counts"].update(n_sequences=10**17, n_tokens=-5)))
relisted("list: hash of a hidden key", lambda row, o: row.update(hidden=[HIDDEN | {"key_hash": "\x1b[31m"}]))
relisted("list: reason of a hidden key", lambda row, o: row.update(hidden=[HIDDEN | {"reason": EVIL}]))
relisted("list: a hidden nothing", lambda row, o: row.update(hidden=[dict.fromkeys(HIDDEN)]))
retabled("table: vocab_id", "tokens", "vocab.parquet", as_text("vocab_id"))
retabled("table: piece", "tokens", "vocab.parquet", as_text("piece"))
retabled("table: token_id", "tokens", "tokens.parquet", as_text("token_id"))
retabled("table: source", "tokens", "documents.parquet", as_text("source"))
retabled("table: a column's name", "tokens", "documents.parquet", as_text("x\") as y; copy (select 1) to 'z'; --"))
retabled("table: feature_id", "features", "feature_stats.parquet", as_text("feature_id"))
written(
    "labels: SQL", lambda s: s / "labels" / only(s, "saes/*").name / "x'); drop.csv", f"feature_id,label\n1,{EVIL}\n"
)
written(
    "manifest: no number", lambda s: only(s, "tokens/*/manifest.json"), checked_text({"format_version": FORMAT_VERSION})
)
for _kind in ("tokens", "activations", "saes", "features"):
    forged(f"record: no facts of {_kind}", _kind, lambda r, o: r["facts"].clear())
with_fact("fact: dtype", "activations", "dtype", "load")
with_fact("fact: generation", "saes", "generation", "newest")
written("quality: nested", lambda s: only(s, "features/*/quality.json"), "[" * 100_000)
for _name, _documents in {
    "nothing": None,
    "a number": [1],
    "half a pair": [["ab"]],
    "no hash": [["x' or 1", {}]],
}.items():
    written(
        f"forgotten: {_name}", lambda s: s / FORGOTTEN,
        checked_text({"format_version": FORMAT_VERSION, "documents": _documents}),
    )  # fmt: skip
for _kind in BESIDE:
    beside("other columns", _kind, lambda schema: pa.table({"x": [EVIL]}))
    beside("numbers as text", _kind, lambda schema: pa.table({name: [EVIL] for name in schema.names}))
    for _name, _values in _ODD.items():
        beside(_name, _kind, rows_of(_values))
fifo("pipe: list", "tokens/*/generations/*")
fifo("pipe: vocabulary", "tokens/*/vocab.parquet")
fifo("pipe: a table", "tokens/*/parts/*/tokens.parquet")
fifo("pipe: a shard", "activations/*/parts/*/*.zarr/c.*")
fifo("pipe: zarr.json", "activations/*/parts/*/*.zarr/zarr.json")
written("catalog: SQL", lambda s: s / "catalog.sql", EVIL)
written("lease: above", lambda s: lease(s, "lease"), Owner("../../../x", "m", 1, 0.0, "\x1b]0;x\x07", 1.0).text)
