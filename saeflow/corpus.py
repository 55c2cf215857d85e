"""Documents out of files or a SQL select: streamed, in a fixed order, in bounded memory."""

from __future__ import annotations

import glob
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb import ColumnExpression, FunctionExpression

from saeflow import remote
from saeflow.config import CorpusConfig, UserError
from saeflow.objects import is_url

BATCH_DOCUMENTS = 512
MEMORY_LIMIT = "1GB"
"""What DuckDB may hold while it orders documents; the rest goes to a temporary folder."""

_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
_DUCKDB_COMPRESSION = {".gz", ".zst"}
_OTHER_COMPRESSION = {".bz2", ".xz", ".lzma"}
RESERVED = {"document_id", "key", "source", "content_hash", "held_out", "n_tokens", "first_token_id"}


@dataclass(frozen=True)
class Document:
    """One text, or its vocabulary ids, with its name; `metadata` holds the corpus's other columns."""

    key: str
    content: str | tuple[int, ...]
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        assert isinstance(self.content, str)
        return self.content

    @property
    def vocab_ids(self) -> tuple[int, ...]:
        return () if isinstance(self.content, str) else self.content

    @property
    def content_hash(self) -> str:
        written = self.content.encode() if isinstance(self.content, str) else np.array(self.content, "<i8").tobytes()
        return hashlib.sha256(written).hexdigest()[:32]


@dataclass(frozen=True)
class Corpus:
    """A stream of documents and the Arrow fields of their metadata."""

    documents: Iterator[Document]
    metadata: pa.Schema


def is_held_out(key: str, seed: int, share: float) -> bool:
    """Is this document kept for evaluation? Depends on its key alone, so it never changes on append."""
    return _hashed(f"{seed}:{key}") < share


def _hashed(text: str) -> float:
    """A number in [0, 1) that is the same for the same text, evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open the documents in key order (a query's own order is kept).

    Raises UserError for missing files, a missing text column and unreadable text, naming each.
    """
    if bool(config.files) == bool(config.sql):
        raise UserError('[corpus] needs either files = [...] or sql = "select ...", and not both.')
    config = pinned(config)
    corpus = _from_query(config) if config.sql else _from_files(config)
    return Corpus(_checked(corpus.documents, config), corpus.metadata)


def pinned(config: CorpusConfig) -> CorpusConfig:
    """The same corpus with every hub data set at the commit it is at now."""
    return config.model_copy(update={"files": [remote.pinned(pattern) for pattern in config.files]})


def signature(config: CorpusConfig) -> str | None:
    """Changes when a file of the corpus does: by name, size and time. None for a query, which has to be run."""
    if config.sql:
        return None
    found = []
    for path in (path for pattern in pinned(config).files for path in _matches(pattern)):
        if is_url(path):
            found.append((path, remote.state(path)))
        else:
            about = Path(path).stat()
            found.append((path, f"{about.st_size} {about.st_mtime_ns}"))
    seen = repr(sorted(found)) + (f" {config.share}" if config.share < 1 else "")
    return hashlib.blake2b(seen.encode(), digest_size=8).hexdigest()


def _checked(documents: Iterator[Document], config: CorpusConfig) -> Iterator[Document]:
    """Drop repeated texts where asked, turn DuckDB's errors into the user's, refuse an empty corpus."""
    seen: set[str] = set()
    n_documents = 0
    try:
        for document in documents:
            n_documents += 1
            if config.share < 1 and _hashed(f"share:{document.key}") >= config.share:
                continue
            if config.dedup:
                if document.content_hash in seen:
                    continue
                seen.add(document.content_hash)
            yield document
    except duckdb.Error as error:
        raise UserError(f"The corpus cannot be read: {_first_line(error)}") from error
    if n_documents == 0:
        raise UserError(f"The corpus is empty: {config.sql or ', '.join(config.files)} gives no documents.")


def _from_files(config: CorpusConfig) -> Corpus:
    paths = [path for pattern in config.files for path in _matches(pattern)]
    readers = {_reader(path) for path in paths}
    if len(readers) > 1:
        raise UserError(f"corpus.files mixes formats ({', '.join(sorted(readers))}). Name files of one format.")
    if readers == {"text"} and config.token_ids:
        raise UserError(
            "corpus.token_ids names a column, but corpus.files are plain texts. Name Parquet or JSON files."
        )
    if readers == {"text"}:
        return Corpus(_text_files(config.files), pa.schema([]))
    return _tables(paths, readers.pop(), config)


def _matches(pattern: str) -> list[str]:
    if is_url(pattern):
        found = remote.matches(pattern)
    elif Path(pattern).is_file():
        found = [pattern]
    elif Path(pattern).is_dir():
        found = sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file())
    else:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise UserError(f"corpus.files: nothing matches {pattern}. Check the path; globs such as texts/**/*.txt work.")
    return found


def _reader(path: str) -> str:
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in _DUCKDB_COMPRESSION | _OTHER_COMPRESSION:
        suffixes = suffixes[:-1]
    return _READERS.get(suffixes[-1].lower() if suffixes else "", "text")


def _text_files(patterns: list[str]) -> Iterator[Document]:
    """One document a file; its key is the path below the fixed beginning of the pattern."""
    named = {}
    for pattern in patterns:
        base = _fixed_folder(pattern)
        for path in _matches(pattern):
            named[path.removeprefix(base).lstrip("/")] = path
    for key in sorted(named):
        content = remote.content(named[key])
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{named[key]} is not UTF-8: byte {error.start} is {content[error.start]:#04x}.\n"
                f"Convert it, for instance with `iconv -f latin1 -t utf-8 {Path(key).name}`, or leave it out."
            ) from error
        yield Document(key, text, key.split("/")[0] if "/" in key else "files")


def _fixed_folder(pattern: str) -> str:
    if not is_url(pattern) and Path(pattern).is_dir():
        return pattern
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    return fixed.rpartition("/")[0]


def _tables(paths: list[str], reader: str, config: CorpusConfig) -> Corpus:
    connection = _connection()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saeflow-corpus-")))
        local = {_readable(path, folder): path for path in paths}
        try:
            relation = getattr(connection, f"from_{reader}" if reader == "parquet" else f"read_{reader}")(
                list(local), filename=True, union_by_name=True
            )
        except duckdb.Error as error:
            raise UserError(f"corpus.files cannot be read as {reader}: {_first_line(error)}") from error
        names = {local_path: Path(path).name for local_path, path in local.items()}
        corpus = _from_relation(connection, relation, config, names, ordered=False)
        keep = stack.pop_all()  # the folder lives as long as the documents are read
    return Corpus(_closing(corpus.documents, keep), corpus.metadata)


def _closing(documents: Iterator[Document], stack: ExitStack) -> Iterator[Document]:
    with stack:
        yield from documents


def _readable(path: str, folder: Path) -> str:
    """A file that DuckDB can read: the same, or a copy of what is elsewhere or compressed in another way.

    Sorting writes the texts to the same disk once more, so that a copy at most doubles what is needed.
    """
    packed = Path(path).suffix in _OTHER_COMPRESSION
    if not is_url(path) and not packed:
        return path
    name = Path(path).stem if packed else Path(path).name
    target = folder / f"{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}-{name}"
    remote.copy(path, target, unpack=packed)
    return str(target)


def _from_query(config: CorpusConfig) -> Corpus:
    connection = _connection()
    try:
        statements = connection.extract_statements(config.sql or "")
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UserError("corpus.sql must be one select statement that gives a `text` column.")
        relation = connection.sql(config.sql or "")
    except duckdb.Error as error:
        raise UserError(f"corpus.sql cannot be run: {_first_line(error)}") from error
    ordered = "order by" in (config.sql or "").lower()
    return _from_relation(connection, relation, config, {}, ordered)


def _connection() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "threads": "2"})


def _from_relation(
    connection: duckdb.DuckDBPyConnection,
    relation: duckdb.DuckDBPyRelation,
    config: CorpusConfig,
    file_names: dict[str, str],
    ordered: bool,
) -> Corpus:
    columns = [column for column in relation.columns if column != "filename" or not file_names]
    content = config.token_ids or config.text
    if content not in columns:
        raise UserError(
            f"The corpus has no column {content!r}; it has: {', '.join(columns)}.\n"
            'Name the one that holds the text, e.g. text = "content" under [corpus], or token_ids = "input_ids".'
        )
    key = config.key or ("key" if "key" in columns else None)
    if key is not None and key not in columns:
        raise UserError(f"corpus.key is {key!r}, but the corpus has only: {', '.join(columns)}.")
    if not ordered:
        file = [ColumnExpression("filename")] if file_names else []
        hashed = FunctionExpression("sha256", ColumnExpression(content).cast("VARCHAR"))
        relation = relation.sort(*([ColumnExpression(key), *file, hashed] if key else [*file, hashed]))
    extra = [column for column in columns if column not in {config.text, content, key} | RESERVED]
    reader = relation.to_arrow_reader(BATCH_DOCUMENTS)
    if config.token_ids:
        _require_ids(reader.schema.field(content))
    metadata = pa.schema([reader.schema.field(name) for name in extra])
    return Corpus(_rows(connection, reader, content, key, extra, file_names), metadata)


def _require_ids(column: pa.Field) -> None:
    lists = (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    )
    if not lists or not pa.types.is_integer(column.type.value_type):
        raise UserError(
            f"corpus.token_ids is {column.name!r}, a column of type {column.type}; a list of integers is needed, the "
            "vocabulary ids of each document."
        )


def _rows(
    connection: duckdb.DuckDBPyConnection,  # kept alive while its result is read
    batches: Iterable[pa.RecordBatch],
    content: str,
    key: str | None,
    extra: list[str],
    file_names: dict[str, str],
) -> Iterator[Document]:
    for batch in batches:
        for row in batch.to_pylist():
            file = file_names.get(row.get("filename", ""), "query")
            document = Document(
                key="" if key is None else str(row[key]),
                content=_content(row[content]),
                source=str(row.get("source") or file),
                metadata={name: row[name] for name in extra},
            )
            if key is None:
                document = replace(document, key=f"{file}#{document.content_hash}")
            yield document


def _content(value: str | list[int] | None) -> str | tuple[int, ...]:
    return tuple(-1 if i is None else i for i in value) if isinstance(value, list) else value or ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
