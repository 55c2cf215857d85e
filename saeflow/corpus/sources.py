"""Documents out of files or a SQL select: streamed, in a fixed order, in bounded memory."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from saeflow.corpus import remote, tabular
from saeflow.corpus.document import Corpus, Document, is_shared
from saeflow.recipe.settings import CorpusConfig
from saeflow.runtime.errors import UserError
from saeflow.store.storage import is_url

_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
_COMMIT = re.compile("(?<=[^/])@[0-9a-f]{40}(?=/|$)")
"""In the URL of a hub data set; no part of a document's name."""
_COMPRESSION = {".gz", ".zst"} | tabular.OTHER_COMPRESSION


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open the documents in key order (a query's own order is kept).

    Raises UserError for missing files, a missing text column and unreadable text, naming each.
    """
    if bool(config.files) == bool(config.sql):
        raise UserError('[corpus] needs either files = [...] or sql = "select ...", and not both.')
    corpus = tabular.from_query(config) if config.sql else _from_files(config)
    return Corpus(_checked(corpus.documents, config), corpus.metadata)


def pinned(config: CorpusConfig) -> CorpusConfig:
    """The same corpus with every hub data set at the commit it is at now."""
    return config.model_copy(update={"files": [remote.pinned(pattern) for pattern in config.files]})


def signature(config: CorpusConfig) -> str | None:
    """Changes when a file of the corpus does: by name, size and time. None for a query, which has to be run."""
    if config.sql:
        return None
    found = [(path, at or _state(path)) for pattern in config.files for path, at in _matches(pattern).items()]
    seen = repr(sorted(found)) + (f" {config.share}" if config.share < 1 else "")
    return hashlib.blake2b(seen.encode(), digest_size=8).hexdigest()


def _state(path: str) -> str:
    if is_url(path):
        return remote.state(path)
    about = Path(path).stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _checked(documents: Iterator[Document], config: CorpusConfig) -> Iterator[Document]:
    """Leave out what `share` does, and repeated texts where asked; refuse an empty corpus."""
    seen: set[str] = set()
    n_documents = 0
    for document in documents:
        if not is_shared(document.key, config.share):
            continue
        n_documents += 1
        if config.dedup:
            if document.content_hash in seen:
                continue
            seen.add(document.content_hash)
        yield document
    if n_documents == 0:
        share = f" at corpus.share = {config.share}; raise it" if config.share < 1 else ""
        raise UserError(f"The corpus is empty: {config.sql or ', '.join(config.files)} gives no documents{share}.")


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
        return Corpus(_text_files(config), pa.schema([]))
    return tabular.from_files(paths, readers.pop(), config)


def _matches(pattern: str) -> dict[str, str | None]:
    """The files in order, each with what changes when it does, where the listing has said that."""
    listed = remote.matches(pattern) if is_url(pattern) else dict.fromkeys(_local_matches(pattern))
    if not listed:
        raise UserError(f"corpus.files: nothing matches {pattern}. Check the path; globs such as texts/**/*.txt work.")
    return listed


def _local_matches(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    if Path(pattern).is_dir():
        return sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file())
    return sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())


def _reader(path: str) -> str:
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes = suffixes[:-1]
    return _READERS.get(suffixes[-1].lower() if suffixes else "", "text")


def _text_files(config: CorpusConfig) -> Iterator[Document]:
    """One document a file; its key is the path below the fixed beginning of the pattern."""
    named = _named(config.files)
    for key in (key for key in sorted(named) if is_shared(key, config.share)):
        content = remote.content(named[key])
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{named[key]} is not UTF-8: byte {error.start} is {content[error.start]:#04x}.\n"
                f"Convert it, for instance with `iconv -f latin1 -t utf-8 {Path(key).name}`, or leave it out."
            ) from error
        yield Document(key, text, key.split("/")[0] if "/" in key else "files")


def _named(patterns: list[str]) -> dict[str, str]:
    """The files by key. Where two patterns give the same key, the later file has its folder in front of it."""
    named: dict[str, str] = {}
    seen: set[str] = set()
    for pattern in patterns:
        base = _fixed_folder(pattern)
        for path in (path for path in _matches(pattern) if path not in seen):
            seen.add(path)
            key = path.removeprefix(base).lstrip("/")
            choices = (key, f"{os.path.basename(_COMMIT.sub('', base))}/{key}", _COMMIT.sub("", path))
            named[next(choice for choice in choices if choice not in named)] = path
    return named


def _fixed_folder(pattern: str) -> str:
    if not is_url(pattern) and Path(pattern).is_dir():
        return pattern
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    return fixed.rpartition("/")[0]
