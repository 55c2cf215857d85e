"""Documents of tables, read by DuckDB in the order of their keys and in bounded memory.

DuckDB needs more memory to sort rows with long texts than the texts take (measured: 1.6 GB of texts of 100 kB fail at a
limit of 4 GB). So the contents wait in a scratch file while DuckDB sorts the other columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from duckdb import ColumnExpression, DuckDBPyConnection, DuckDBPyRelation, Expression, FunctionExpression

from saeflow.corpus import remote
from saeflow.corpus.document import Corpus, Document, is_in_share
from saeflow.recipe.settings import CorpusConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.memory import total_memory
from saeflow.runtime.sql_errors import QUERY_ERRORS, is_of_system

BATCH_DOCUMENTS = 512
OTHER_COMPRESSION = {".bz2", ".xz", ".lzma"}
"""Endings of compressed files that DuckDB cannot read."""
LEAST_MEMORY = 1 << 30
"""Least memory that DuckDB gets; on a large machine it gets a quarter. The rest goes to the scratch folder."""
RESERVED = {"document_id", "key", "source", "content_hash", "held_out", "n_tokens", "first_token_id"}
_KEY, _FILE, _CONTENT, _SOURCE = "_saeflow_key", "_saeflow_file", "_saeflow_content", "_saeflow_source"
_CONTENT_PLACE = ("_saeflow_hash", "_saeflow_offset", "_saeflow_bytes")
_STORED_AS_TEXT = re.compile(r"\b(U?HUGEINT|BIGNUM|INTERVAL|UNION|TIMESTAMP_NS|BIT|TIME)\b(?! ZONE)")
"""Types that Python or Parquet cannot hold. Metadata of these types is stored as text."""


class _Columns(NamedTuple):
    content: str
    key: str | None
    extra: list[str]


def from_files(paths: list[str], reader: str, config: CorpusConfig, memory_bytes: int | None = None) -> Corpus:
    """Read one document per row of Parquet, CSV or JSON files. Raises UserError if they cannot be read."""
    with ExitStack() as stack:
        scratch = _Scratch.opened(stack, memory_bytes)
        local = {_local_copy(path, scratch.folder): path for path in paths}
        if all(Path(path).stat().st_size == 0 for path in local):
            raise UserError(f"The corpus is empty: {', '.join(paths[:3])} gives no documents.")
        connection = stack.enter_context(scratch.connect("read"))
        hint = "corpus.sql can rename, cast or leave out columns."
        with _query_failures(f"corpus.files cannot be read as {reader}", hint):
            read = connection.from_parquet if reader == "parquet" else getattr(connection, f"read_{reader}")
            relation = read(list(local), filename=True, union_by_name=True)
        names = {local_path: Path(path).name for local_path, path in local.items()}
        return _stream(relation, config, names, False, scratch, stack)


def from_query(config: CorpusConfig, memory_bytes: int | None = None) -> Corpus:
    """Read one document per row of a select, in its own order if it has one. Raises UserError if it fails."""
    with ExitStack() as stack:
        scratch, sql = _Scratch.opened(stack, memory_bytes), config.sql or ""
        if "," in (config.folder or ""):
            raise UserError(
                f"corpus.folder is {config.folder!r}, but DuckDB cannot search a folder with a comma. Rename it."
            )
        connection = stack.enter_context(scratch.connect("read", file_search_path=config.folder or ""))
        with _query_failures("corpus.sql cannot be run"):
            statements = connection.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UserError("corpus.sql must be one select statement that returns a `text` column.")
            relation = connection.sql(sql)
            return _stream(relation, config, {}, _is_ordered(connection, sql), scratch, stack)


class _Scratch(NamedTuple):
    """A temporary folder, and the memory that DuckDB may use before it writes there."""

    folder: Path
    memory_bytes: int

    @classmethod
    def opened(cls, stack: ExitStack, memory_bytes: int | None) -> _Scratch:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="saeflow-corpus-"))
        return cls(Path(folder), memory_bytes or max(LEAST_MEMORY, total_memory() // 4))

    def connect(self, name: str, **settings: str) -> DuckDBPyConnection:
        """Connect with one thread: the rows keep their order, and long texts take half the memory."""
        about: dict[str, Any] = {"memory_limit": f"{self.memory_bytes}B", "threads": "1"}
        return duckdb.connect(config=about | {"temp_directory": str(self.folder / name)} | settings)


def _is_ordered(connection: DuckDBPyConnection, sql: str) -> bool:
    """True if the outermost select has an `order by`."""
    ((text,),) = connection.execute("select json_serialize_sql(?::varchar)", [sql]).fetchall()
    node = json.loads(text)["statements"][0]["node"]
    return any(each["type"] == "ORDER_MODIFIER" for each in node.get("modifiers", []))


def _local_copy(path: str, folder: Path) -> str:
    """Return a file that DuckDB can read: this one, or a local copy of a URL or of another compression."""
    unreadable = Path(path).suffix in OTHER_COMPRESSION
    if not remote.is_remote(path) and not unreadable:
        return path
    name = Path(path).stem if unreadable else Path(path).name
    target = folder / f"{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}-{name}"
    remote.download(path, target, unpack=unreadable)
    return str(target)


def _stream(
    relation: DuckDBPyRelation, config: CorpusConfig, names: dict[str, str], ordered: bool, scratch: _Scratch,
    stack: ExitStack,
) -> Corpus:  # fmt: skip
    columns = _choose_columns(relation, config, bool(names))
    with _query_failures("The corpus cannot be read"):
        reader = _select(relation, columns, names).to_arrow_reader(BATCH_DOCUMENTS)
    batches: Iterator[pa.RecordBatch] = iter(reader)
    if not ordered:
        batches = _sorted_batches(batches, names, config.share, scratch)
    metadata = pa.schema([reader.schema.field(name) for name in columns.extra])
    keep = stack.pop_all()  # the scratch folder and the connection live as long as the documents are read
    return Corpus(_as_documents(batches, names, columns.extra, bool(config.token_ids), keep), metadata)


def _choose_columns(relation: DuckDBPyRelation, config: CorpusConfig, has_files: bool) -> _Columns:
    kinds = {name: str(kind) for name, kind in zip(relation.columns, relation.types, strict=True)}
    if has_files:
        kinds.pop("filename")
    twice = [name for name, n in Counter(map(str.casefold, relation.columns)).items() if n > 1]
    if twice:
        raise UserError(
            f"The corpus has several columns called {twice[0]!r} but for case. Leave out or rename all but one."
        )
    content = config.token_ids or config.text
    if content not in kinds:
        raise UserError(
            f"The corpus has no column {content!r}; it has: {', '.join(kinds)}.\n"
            'Name the column with the text, e.g. text = "content" under [corpus], or token_ids = "input_ids".'
        )
    key = config.key or ("key" if "key" in kinds else None)
    if key is not None and key not in kinds:
        raise UserError(f"corpus.key is {key!r}, but the corpus has only: {', '.join(kinds)}.")
    _require_type(content, kinds[content], config)
    return _Columns(content, key, [name for name in kinds if name not in {config.text, content, key} | RESERVED])


def _require_type(name: str, kind: str, config: CorpusConfig) -> None:
    nested = kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))
    if config.token_ids:
        if not re.fullmatch(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?\[\d*\]", kind):
            raise UserError(
                f"corpus.token_ids is {name!r}, a column of type {kind}, but it must be a list of integers: the "
                "vocabulary ids of each document."
            )
    elif nested:
        raise UserError(
            f"corpus.text is {name!r}, a column of type {kind}, but it must be text.\n"
            'Extract the text with corpus.sql, or name a column of ids with token_ids = "...".'
        )


def _select(relation: DuckDBPyRelation, columns: _Columns, names: dict[str, str]) -> DuckDBPyRelation:
    kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
    chosen = [_content_expression(columns.content, kinds).alias(_CONTENT)]
    if columns.key is not None:
        chosen.append(ColumnExpression(columns.key).alias(_KEY))
    if names:
        chosen.append(ColumnExpression("filename").alias(_FILE))
    if "source" in kinds:
        chosen.append(ColumnExpression("source").cast("VARCHAR").alias(_SOURCE))
    chosen += [_metadata_expression(name, kinds[name]).alias(name) for name in columns.extra]
    return relation.select(*chosen)


def _content_expression(name: str, kinds: dict[str, str]) -> Expression:
    column = ColumnExpression(name)
    if kinds[name].endswith("]"):
        return column.cast("BIGINT[]")
    return FunctionExpression("decode", column) if kinds[name] == "BLOB" else column.cast("VARCHAR")


def _metadata_expression(name: str, kind: str) -> Expression:
    column = ColumnExpression(name)
    return column.cast("VARCHAR") if _STORED_AS_TEXT.search(kind) else column


def _sorted_batches(
    batches: Iterator[pa.RecordBatch], names: dict[str, str], share: float, scratch: _Scratch
) -> Iterator[pa.RecordBatch]:
    """Yield the rows by key, or by file and content if there is no key. Rows outside `share` are dropped first."""
    with (
        (scratch.folder / "contents").open("wb+") as contents,
        scratch.connect("sort") as sorter,
        _query_failures("The corpus cannot be read"),
    ):
        narrow: DuckDBPyRelation | None = None
        for batch in batches:
            table = sorter.from_arrow(pa.table(_set_contents_aside(batch, names, share, contents)))
            if narrow is None:
                table.create("narrow")
                narrow = sorter.table("narrow")
            else:
                table.insert_into("narrow")
        if narrow is None:
            return
        by = [_KEY, _CONTENT_PLACE[0], _FILE] if _KEY in narrow.columns else [_FILE, _CONTENT_PLACE[0]]
        by = [name for name in by if name in narrow.columns]
        contents.flush()
        for batch in narrow.sort(*map(ColumnExpression, by)).to_arrow_reader(BATCH_DOCUMENTS):
            yield batch.append_column(_CONTENT, _read_contents(batch, contents.fileno()))


def _set_contents_aside(
    batch: pa.RecordBatch, names: dict[str, str], share: float, contents: IO[bytes]
) -> dict[str, pa.Array]:
    """Write the contents to the file. Return the other columns, with each content's sha256, offset and size."""
    written, kept, base = [], [], contents.tell()
    for row, content in enumerate(_contents(batch.column(_CONTENT))):
        digest = hashlib.sha256(content).hexdigest()
        if share >= 1 or is_in_share(_document_key(batch, row, names, content), share):
            kept.append(row)
            written.append((digest, base, len(content)))
            contents.write(content)
            base += len(content)
    rest = batch.drop_columns([_CONTENT]).take(pa.array(kept, pa.int64()))
    kinds = (pa.string(), pa.int64(), pa.int64())
    columns = list(zip(*written, strict=True)) or [(), (), ()]
    if _KEY not in rest.schema.names and _FILE in rest.schema.names:  # then files of equal name are neighbours
        shown = pa.array([names[each] for each in rest.column(_FILE).to_pylist()], pa.string())
        rest = rest.set_column(rest.schema.get_field_index(_FILE), _FILE, shown)
    named = dict(zip(rest.schema.names, rest.columns, strict=True))
    return named | {name: pa.array(c, kind) for name, c, kind in zip(_CONTENT_PLACE, columns, kinds, strict=True)}


def _contents(column: pa.Array) -> Iterator[bytes]:
    """Yield each content as bytes: UTF-8, or vocabulary ids as little-endian int64, where -1 is a missing id."""
    if pa.types.is_large_binary(column.type):
        yield from column.to_pylist()
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        yield from ((text.as_py() or "").encode() for text in column)
    else:
        for ids in column:
            yield ids.values.fill_null(-1).to_numpy().astype("<i8").tobytes() if ids.is_valid else b""


def _read_contents(batch: pa.RecordBatch, file: int) -> pa.Array:
    places = zip(*(batch.column(name).to_pylist() for name in _CONTENT_PLACE[1:]), strict=True)
    return pa.array([os.pread(file, n_bytes, offset) for offset, n_bytes in places], pa.large_binary())


def _document_key(batch: pa.RecordBatch, row: int, names: dict[str, str], content: bytes) -> str:
    key = batch.column(_KEY)[row].as_py() if _KEY in batch.schema.names else None
    if key is not None:
        return str(key)
    return f"{_file_name(batch, row, names)}#{hashlib.sha256(content).hexdigest()[:32]}"


def _file_name(batch: pa.RecordBatch, row: int, names: dict[str, str]) -> str:
    if _FILE not in batch.schema.names:
        return "query"
    found = str(batch.column(_FILE)[row].as_py())
    return names.get(found, found)


def _as_documents(
    batches: Iterator[pa.RecordBatch], names: dict[str, str], extra: list[str], is_ids: bool, keep: ExitStack
) -> Iterator[Document]:
    with keep, _query_failures("The corpus cannot be read"):
        for batch in batches:
            metadata = batch.select(extra).to_pylist() if extra else [{} for _ in range(len(batch))]
            for row, content in enumerate(_contents(batch.column(_CONTENT))):
                source = batch.column(_SOURCE)[row].as_py() if _SOURCE in batch.schema.names else None
                yield Document(
                    key=_document_key(batch, row, names, content),
                    content=tuple(np.frombuffer(content, "<i8").tolist()) if is_ids else content.decode(),
                    source=source or _file_name(batch, row, names),
                    metadata=metadata[row],
                )


@contextlib.contextmanager
def _query_failures(what: str, hint: str = "") -> Iterator[None]:
    """Turn errors of DuckDB, and values that Python cannot hold, into a UserError of one message."""
    try:
        yield
    except (*QUERY_ERRORS, OverflowError, ValueError) as error:
        if is_of_system(error):
            raise
        first = first_line(error)
        if "Out of Memory" in first:
            hint = 'Leave out long columns that you do not need, e.g. sql = "select key, text from ..." under [corpus].'
        raise UserError(f"{what}: {first}" + (f"\n{hint}" if hint else "")) from error
