"""Give classes to tokens of a run, and publish them as an artefact beside its tokens.

data/README.md says what the artefact holds. Its name follows from its content, so an equal table gives an equal name.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.classes.characters import find_characters, require_characters
from saeflow.classes.places import Unmatched, find_places, islands
from saeflow.classes.tables import Columns, opened_table, store_rows
from saeflow.features.beside import SPANS_FILE, newest_annotations
from saeflow.features.schema import SPANS as SPAN_COLUMNS
from saeflow.query.connection import connect_to_run
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.section import RECIPE_NAME
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.temporary import blaming_temporary_folder, temporary_folder
from saeflow.runtime.text import brief
from saeflow.store.artefact import Artefact
from saeflow.store.files import ROW_GROUP, checksum
from saeflow.store.store import Store

CLASSES = "classes.parquet"
"""The classes and their counts, beside SPANS_FILE."""

CLASS_COLUMNS = pa.schema({"class": pa.string(), **dict.fromkeys(("n_spans", "n_tokens", "n_documents"), pa.int64())})


@dataclass(frozen=True)
class Source:
    """A file to read, or a statement that only reads."""

    file: Path | None = None
    sql: str | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.sql is None):
            raise UserError("Give either a file or --sql 'select …': saeflow annotate NAME FILE.")

    @property
    def in_words(self) -> str:
        return str(self.file) if self.file else f"--sql {self.sql}"


@dataclass(frozen=True)
class Annotated:
    """Classes with their counts, and rows that did not match."""

    id: str
    """The artefact, as `saeflow ls` names it."""
    columns: Columns
    classes: list[dict[str, Any]]
    """Rows of CLASSES, in the order of their names."""
    unmatched: Unmatched
    is_new: bool
    """False if the same spans were published before, or if nothing was to be published."""


def annotate(
    store: Store, run: str | None, name: str, source: Source, progress: Progress, dry_run: bool = False
) -> Annotated:
    """Read a table of classes and places, and publish the tokens that have each class.

    `dry_run` publishes nothing. Raises UserError if the table cannot be read, or if none of its rows matched.
    """
    if not re.fullmatch(RECIPE_NAME, name) or len(name) > 200:
        raise UserError(f"The name is {brief(name)!r}; use small letters, digits and _, at most 200 of them.")
    began = time.monotonic()
    chosen, connection = connect_to_run(store, run)
    tokens = store.input_of(chosen.artefact, "tokens")
    with contextlib.closing(connection), temporary_folder("saeflow-annotate-") as folder, blaming_temporary_folder():
        with opened_table(connection, source.file, source.sql) as rows:
            columns = store_rows(connection, rows, name)
        if columns.place == "characters":
            require_characters(tokens)
        unmatched = find_places(connection, columns)
        find_characters(connection, tokens, unmatched, progress)
        if not unmatched.n_matched:
            raise UserError(f"None of the {unmatched.n_rows:,} rows matched a token. {_reasons(unmatched)}")
        write_annotations(connection, folder)
        unmatched.n_tokens_left_out = _count_left_out(connection)
        classes = pq.read_table(folder / CLASSES).to_pylist()
        facts = {"place": columns.place, "classes": len(classes), **unmatched.as_facts()}
        provenance = {"source": source.in_words, "run": chosen.artefact.id}
        if dry_run:
            return Annotated(_target(store, tokens, name, facts, folder).id, columns, classes, unmatched, False)
        seconds = {"seconds": round(time.monotonic() - began, 3)}
        target, is_new = publish_annotations(store, tokens, name, facts, folder, provenance | seconds)
    return Annotated(target.id, columns, classes, unmatched, is_new)


def _reasons(unmatched: Unmatched) -> str:
    counted = [f"{name.removeprefix('n_').replace('_', ' ')}: {n:,}" for name, n in unmatched.as_facts().items()]
    return f"Counts: {'; '.join(counted[1:])}. Nothing was published."


def write_annotations(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Write the spans of `annotate_found`, merged and sorted, and the counts of each class."""
    merged = islands("annotate_found", ["class_id", "document_id"], ["first_token_id", "last_token_id"])
    connection.execute(f"create table annotate_merged as {merged}")
    connection.execute("drop table annotate_found")
    _write(
        connection, folder / SPANS_FILE, SPAN_COLUMNS,
        "select class, document_id, first_token_id, last_token_id from annotate_merged join annotate_classes "
        "using (class_id) order by class_id, first_token_id",
    )  # fmt: skip
    _write(
        connection, folder / CLASSES, CLASS_COLUMNS,
        "select class, count(*), sum(last_token_id - first_token_id + 1)::bigint, count(distinct document_id) "
        "from annotate_merged join annotate_classes using (class_id) group by class_id, class order by class_id",
    )  # fmt: skip


def _write(connection: duckdb.DuckDBPyConnection, path: Path, schema: pa.Schema, sql: str) -> None:
    """Stream the rows of a select into a file. The row groups depend on the rows alone."""
    rows = connection.sql(sql).to_arrow_reader(ROW_GROUP)
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as file:
        for table in _in_groups(rows):
            file.write_table(table.rename_columns(schema.names).cast(schema), row_group_size=ROW_GROUP)


def _in_groups(rows: pa.RecordBatchReader) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in rows:
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= ROW_GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP)
            waiting = table.slice(ROW_GROUP).to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting)


def _count_left_out(connection: duckdb.DuckDBPyConnection) -> int:
    """Count tokens that have a class and that the run does not encode."""
    every = islands("(select true as every, * from annotate_merged)", ["every"], ["first_token_id", "last_token_id"])
    sql = f"""
        select count(*) from (
            from stg_tokens where mask and not is_encoded(token_id, vocab_id)
        ) as silent
        asof join ({every}) as spans on silent.token_id >= spans.first_token_id
        where silent.token_id <= spans.last_token_id
    """
    return int(connection.execute(sql).fetchall()[0][0])


def _target(store: Store, tokens: Artefact, name: str, facts: Mapping[str, Any], folder: Path) -> Artefact:
    content = [checksum(folder / file) for file in (SPANS_FILE, CLASSES)]
    return store.artefact("annotations", name, fingerprint({"tokens": tokens.id, "content": content, **facts}))


def publish_annotations(
    store: Store, tokens: Artefact, name: str, facts: Mapping[str, Any], folder: Path, provenance: Mapping[str, Any]
) -> tuple[Artefact, bool]:
    """Publish the tables in a folder as the newest annotations of a name. Return them, and whether they are new."""
    target = _target(store, tokens, name, facts, folder)
    with target.writing():
        if target.complete():
            if newest_annotations(store, tokens.id).get(name) != target:
                target.renew()
            return target, False
        with target.publish_folder(dict(facts), [tokens.id], dict(provenance)) as whole:
            for file in (SPANS_FILE, CLASSES):
                shutil.copyfile(folder / file, whole / file)
    return target, True


def erase_hidden_spans(store: Store, tokens: Artefact, progress: Progress) -> None:
    """Publish the annotations of these tokens anew without spans of hidden documents. `gc` removes the old ones."""
    hidden = tokens.published().hidden_ids
    for name, old in newest_annotations(store, tokens.id).items() if hidden else ():
        with temporary_folder("saeflow-annotate-") as folder:
            if n := _write_without(old, hidden, folder):
                facts = {**old.record.facts, "n_spans_removed": old.record.facts.get("n_spans_removed", 0) + n}
                publish_annotations(
                    store, tokens, name, facts, folder, {"source": f"{old.id}, without hidden documents"}
                )
                progress.say(f"compact: {n} spans of hidden documents removed from annotations/{name}")


def _write_without(old: Artefact, hidden: Sequence[int], folder: Path) -> int:
    """Return how many spans the documents have. If they have any, write both tables without these."""
    gone = pa.array(hidden, pa.int64())
    with contextlib.closing(duckdb.connect(config={"temp_directory": str(folder / "spill")})) as connection:
        connection.execute("create table annotate_merged (class varchar, document_id bigint, a bigint, b bigint)")
        n = 0
        for batch in pq.ParquetFile(old.own_file(SPANS_FILE)).iter_batches(ROW_GROUP):
            kept = batch.filter(pc.invert(pc.is_in(batch.column("document_id"), gone)))
            n += batch.num_rows - kept.num_rows
            connection.register("annotate_batch", pa.Table.from_batches([kept]))
            connection.execute("insert into annotate_merged from annotate_batch")
        if n:
            _write(connection, folder / SPANS_FILE, SPAN_COLUMNS, "from annotate_merged order by class, a")
            counts = "class, count(*), sum(b - a + 1)::bigint, count(distinct document_id)"
            _write(
                connection,
                folder / CLASSES,
                CLASS_COLUMNS,
                f"select {counts} from annotate_merged group by class order by class",
            )
    return n
