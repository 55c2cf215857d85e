"""Documents of tables, sorted in bounded memory: Parquet files and a select by DuckDB, CSV and JSON row by row."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import ColumnExpression, DuckDBPyConnection, DuckDBPyRelation, Expression, FunctionExpression

from saeflow.corpus import remote
from saeflow.corpus.document import Corpus, Document, in_share
from saeflow.corpus.files import is_packed, open_unpacked, require_format, shown
from saeflow.corpus.parquet_types import require_like_columns
from saeflow.corpus.sorting import (
    BATCH_DOCUMENTS,
    CONTENT,
    FILE,
    KEY,
    SOURCE,
    Scratch,
    SortedRows,
    contents_of,
    document_key,
    file_name,
)
from saeflow.corpus.text_tables import (
    RESERVED,
    TextTables,
    folder_columns,
    no_column,
    require_unlike_names,
    say_left_out,
)
from saeflow.corpus.tokenise.messages import TOOLS, TOOLS_ALIAS, with_conversations
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.sql_errors import QUERY_ERRORS, is_of_system, message
from saeflow.runtime.sql_judge import only_reads
from saeflow.runtime.temporary import blaming_temporary_folder

_STORED_AS_TEXT = re.compile(r"\b(U?HUGEINT|BIGNUM|INTERVAL|UNION|TIMESTAMP_NS|BIT|TIME)\b(?! ZONE)")
"""Types that Python or Parquet cannot hold. Metadata of these types is stored as text."""


class _Columns(NamedTuple):
    content: str
    key: str | None
    extra: list[str]


def from_files(paths: list[str], reader: str, config: CorpusConfig, memory_bytes: int | None = None) -> Corpus:
    """Read one document per row of Parquet, CSV or JSON files. Raises UserError if they cannot be read."""
    with ExitStack() as stack:
        scratch = Scratch.opened(stack, memory_bytes)
        local = {_local_copy(path, scratch.folder, reader): shown(path) for path in paths}
        if all(Path(path).stat().st_size == 0 for path in local):
            raise UserError(f"The corpus is empty: {', '.join(paths[:3])} gives no documents.")
        names = {local_path: Path(path).name for local_path, path in local.items()}
        if reader == "parquet":
            return _from_parquet(local, names, config, scratch, stack)
        tables = TextTables(local, reader, config)
        rows = SortedRows(scratch, names, config.share, stack)
        rows.take(tables.batches())
        say_left_out(tables.others, config)
        metadata = tables.metadata()
        batches = map(tables.with_metadata, rows.batches())
        return Corpus(_as_documents(batches, names, metadata.names, bool(config.token_ids), stack.pop_all()), metadata)


def _from_parquet(
    paths: dict[str, str], names: dict[str, str], config: CorpusConfig, scratch: Scratch, stack: ExitStack
) -> Corpus:
    content = config.content
    schemas = {path: _columns_of(path, names[path], content) for path in paths}
    require_like_columns(schemas, {content, config.key or "key", "source"})
    connection = stack.enter_context(_connect_to_read(scratch))
    with _query_failures("corpus.files cannot be read as parquet"):
        relation = connection.from_parquet([glob.escape(path) for path in paths], filename=True, union_by_name=True)
        folders = folder_columns(paths, {*map(str.casefold, relation.columns)}, {config.key or "key", "source"})
        if folders:
            named = pa.table({"filename": list(paths), **folders})
            relation = relation.join(connection.from_arrow(named), "filename", how="left")
    return _stream(relation, config, names, False, scratch, stack)


def _columns_of(path: str, name: str, column: str) -> pa.Schema:
    """Return the columns of a Parquet file. Raises UserError if one lacks: joined, its rows would be empty texts."""
    with open(path, "rb") as file:
        require_format(name, file.read(512), b"PAR1")
    try:
        found = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"corpus.files: {name} cannot be read as parquet: {first_line(error).rstrip('.')}.") from error
    if column not in found.names:
        raise no_column(f"{name} has", column, found.names)
    return found.remove_metadata()


def from_query(config: CorpusConfig, memory_bytes: int | None = None) -> Corpus:
    """Read one document per row of a select, in its own order if it has one. Raises UserError if it fails."""
    with ExitStack() as stack:
        scratch, sql = Scratch.opened(stack, memory_bytes), config.sql or ""
        if "," in (config.folder or ""):
            raise UserError(
                f"corpus.folder is {config.folder!r}, but DuckDB cannot search a folder with a comma. Rename it."
            )
        connection = stack.enter_context(_connect_to_read(scratch, file_search_path=config.folder or ""))
        with _query_failures("corpus.sql cannot be run"):
            if not only_reads(connection, sql):
                raise UserError(
                    "corpus.sql must be one select statement that returns a `text` column, and only reads: no COPY, no "
                    "INSERT, no setting, and of DuckDB's functions only those that read files."
                )
            relation = connection.sql(sql)
            return _stream(relation, config, {}, _is_ordered(connection, sql), scratch, stack)


def _connect_to_read(scratch: Scratch, **settings: str) -> DuckDBPyConnection:
    """Connect to read documents that may together be longer than 2 GiB."""
    settings |= {"arrow_large_buffer_size": "true", "python_enable_replacements": "false"}
    connection = scratch.connect("read", **settings)
    connection.execute("set TimeZone = 'UTC'")  # the same bytes on every machine
    return connection


def _is_ordered(connection: DuckDBPyConnection, sql: str) -> bool:
    """True if the outermost select has an `order by`."""
    ((text,),) = connection.execute("select json_serialize_sql(?::varchar)", [sql]).fetchall()
    node = json.loads(text)["statements"][0]["node"]
    return any(each["type"] == "ORDER_MODIFIER" for each in node.get("modifiers", []))


def _local_copy(path: str, folder: Path, reader: str) -> str:
    """Return a local path that every reader takes: a copy of a URL or of packed Parquet, or a link to an odd name."""
    unpacks = reader == "parquet" and is_packed(path)
    if not remote.is_remote(path) and shown(path) == path and not unpacks:
        return path
    digest = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
    target = folder / f"{digest}{''.join(Path(path).suffixes[-2:])}"
    if unpacks:
        with open_unpacked(path) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 4 << 20)
    elif remote.is_remote(path):
        remote.download(path, target)
    else:
        target.symlink_to(os.path.abspath(path))
    return str(target)


def _stream(
    relation: DuckDBPyRelation, config: CorpusConfig, names: dict[str, str], ordered: bool, scratch: Scratch,
    stack: ExitStack,
) -> Corpus:  # fmt: skip
    columns = _choose_columns(relation, config, bool(names))
    with _query_failures("The corpus cannot be read", files=names):
        reader = _select(relation, columns, names, config).to_arrow_reader(BATCH_DOCUMENTS)
    batches: Iterator[pa.RecordBatch] = iter(reader)
    if config.messages:
        batches = with_conversations(batches, names)
    if not ordered:
        batches = _sorted(batches, SortedRows(scratch, names, config.share, stack))
    fields = [(name, _with_small_offsets(reader.schema.field(name).type)) for name in columns.extra]
    keep = stack.pop_all()  # the scratch folder and the connection live as long as the documents are read
    documents = _as_documents(batches, names, columns.extra, bool(config.token_ids), keep)
    if ordered:
        documents = in_share(documents, lambda document: document.key, config.share)
    return Corpus(documents, pa.schema(fields))


def _sorted(batches: Iterator[pa.RecordBatch], rows: SortedRows) -> Iterator[pa.RecordBatch]:
    rows.take(batches)
    yield from rows.batches()


def _with_small_offsets(kind: pa.DataType) -> pa.DataType:
    """Return the type with 32-bit offsets, as metadata is stored."""
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_map(kind):
        return pa.map_(_with_small_offsets(kind.key_type), _with_small_offsets(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_small_offsets(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_small_offsets(kind.value_type)))
    return kind


def _choose_columns(relation: DuckDBPyRelation, config: CorpusConfig, has_files: bool) -> _Columns:
    kinds = {name: str(kind) for name, kind in zip(relation.columns, relation.types, strict=True)}
    if has_files:
        kinds.pop("filename")
    require_unlike_names(relation.columns)
    content = config.content
    if content not in kinds:
        raise no_column("The corpus has", content, list(kinds))
    key = config.key or ("key" if "key" in kinds else None)
    if key is not None and key not in kinds:
        raise UserError(f"corpus.key is {key!r}, but the corpus has only: {', '.join(kinds)}.")
    _require_type(content, kinds[content], config)
    if key is not None and _is_nested(kinds[key]):
        raise UserError(
            f"The key of the corpus is {key!r}, a column of type {kinds[key]}, but it must be single values."
        )
    say_left_out(kinds, config)
    own = {config.text, content, key} | ({TOOLS} if config.messages else set())
    return _Columns(content, key, [name for name in kinds if name not in own | RESERVED])


def _is_nested(kind: str) -> bool:
    return kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))


def _require_type(name: str, kind: str, config: CorpusConfig) -> None:
    if config.messages:
        if not (kind.endswith("]") or kind in ("VARCHAR", "JSON")):
            raise UserError(
                f"corpus.messages is {name!r}, a column of type {kind}, but it must be lists of {{role, content}}, or "
                "such lists in JSON."
            )
    elif config.token_ids:
        if not re.fullmatch(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?\[\d*\]", kind):
            raise UserError(
                f"corpus.token_ids is {name!r}, a column of type {kind}, but it must be a list of integers: the "
                "vocabulary ids of each document."
            )
    elif _is_nested(kind):
        raise UserError(
            f"corpus.text is {name!r}, a column of type {kind}, but it must be text.\n"
            'Extract the text with corpus.sql, or name a column of ids with token_ids = "...".'
        )


def _select(
    relation: DuckDBPyRelation, columns: _Columns, names: dict[str, str], config: CorpusConfig
) -> DuckDBPyRelation:
    kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
    if config.messages:
        tools = [_json(TOOLS, kinds).alias(TOOLS_ALIAS)] if TOOLS in kinds else []
        chosen = [_json(columns.content, kinds).alias(CONTENT), *tools]
    else:
        chosen = [_content_expression(columns.content, kinds).alias(CONTENT)]
    if columns.key is not None:
        key = ColumnExpression(columns.key)
        is_bytes = kinds[columns.key] == "BLOB"
        as_stored = _metadata_expression(columns.key, kinds[columns.key])
        chosen.append((FunctionExpression("decode", key) if is_bytes else as_stored).alias(KEY))
    if names:
        chosen.append(ColumnExpression("filename").alias(FILE))
    if "source" in kinds:
        chosen.append(ColumnExpression("source").cast("VARCHAR").alias(SOURCE))
    chosen += [_metadata_expression(name, kinds[name]).alias(name) for name in columns.extra]
    return relation.select(*chosen)


def _json(name: str, kinds: dict[str, str]) -> Expression:
    column = ColumnExpression(name)
    return (FunctionExpression("to_json", column) if _is_nested(kinds[name]) else column).cast("VARCHAR")


def _content_expression(name: str, kinds: dict[str, str]) -> Expression:
    column = ColumnExpression(name)
    if kinds[name].endswith("]"):
        return column.cast("BIGINT[]")
    return column if kinds[name] == "BLOB" else column.cast("VARCHAR")


def _metadata_expression(name: str, kind: str) -> Expression:
    column = ColumnExpression(name)
    return column.cast("VARCHAR") if _STORED_AS_TEXT.search(kind) else column


def _as_documents(
    batches: Iterator[pa.RecordBatch], names: dict[str, str], extra: list[str], is_ids: bool, keep: ExitStack
) -> Iterator[Document]:
    with keep, _query_failures("The corpus cannot be read", files=names):
        for batch in batches:
            metadata = _metadata_rows(batch.select(extra)) if extra else [{} for _ in range(len(batch))]
            for row, content in enumerate(contents_of(batch.column(CONTENT))):
                source = batch.column(SOURCE)[row].as_py() if SOURCE in batch.schema.names else None
                key = document_key(batch, row, names, content)
                yield Document(
                    key=key,
                    content=tuple(np.frombuffer(content, "<i8").tolist())
                    if is_ids
                    else _text_of_document(content, key),
                    source=source or file_name(batch, row, names),
                    metadata=metadata[row],
                )


def _text_of_document(content: bytes, key: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is {content[error.start]:#04x}"
        raise UserError(f"The text of document {key} is not UTF-8: {place}. Convert it with corpus.sql.") from error


def _metadata_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows with dates and times as whole numbers, for Python's own end with the year 9999."""
    for place, field in enumerate(batch.schema):
        if pa.types.is_date32(field.type) or pa.types.is_timestamp(field.type):
            whole = pa.int32() if pa.types.is_date32(field.type) else pa.int64()
            batch = batch.set_column(place, field.name, batch.column(place).view(whole))
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


@contextlib.contextmanager
def _query_failures(what: str, files: Iterable[str] = ()) -> Iterator[None]:
    """Turn errors of DuckDB, and values that Python cannot hold, into a UserError of one message.

    It names the first of the Parquet files that cannot be read.
    """
    try:
        with blaming_temporary_folder():
            yield
    except (*QUERY_ERRORS, OverflowError, ValueError) as error:
        if is_of_system(error):
            raise
        text, hint = message(error), ""
        if "Out of Memory" in text:
            text = first_line(error)  # the other lines name settings of DuckDB
            hint = 'Leave out long columns that you do not need, e.g. sql = "select key, text from ..." under [corpus].'
        elif "Binder Error" in text and what.startswith("corpus.files"):
            hint = "corpus.sql can rename, cast or leave out columns."
        elif damaged := next(filter(_is_damaged, files), None):
            what, hint = f"corpus.files: {shown(damaged)} cannot be read", "Is it whole? Fetch it again."
        elif not isinstance(error, QUERY_ERRORS):
            hint = "Cast the odd column x to text, e.g. sql = \"select * replace (x::varchar as x) from 'f.parquet'\"."
        raise UserError(f"{what}: {text}" + (f"\n{hint}" if hint else "")) from error


def _is_damaged(path: str) -> bool:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_DOCUMENTS):
                batch.validate(full=True)
    except (pa.ArrowException, OSError):
        return Path(path).suffix.lower() == ".parquet"
    return False
