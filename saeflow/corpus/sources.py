"""Documents of files or of a SQL select, streamed in a fixed order and in bounded memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from saeflow.corpus import remote, tabular
from saeflow.corpus.document import Corpus, Document, in_share
from saeflow.corpus.files import folder_before_globs, format_of, matching_files, read_text, shown
from saeflow.corpus.requests.documents import request_documents
from saeflow.corpus.requests.folder import RequestFolder
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError

_COMMIT = re.compile("(?<=[^/])@[0-9a-f]{40}(?=/|$)")
"""The commit in the URL of a hub data set. It is no part of a document's key."""


def open_corpus(config: CorpusConfig, memory_bytes: int | None = None) -> Corpus:
    """Open the documents in the order of their keys, or in a query's own order.

    Tables are sorted in `memory_bytes`; the default is a quarter of the machine's memory. Raises UserError that names
    a missing file, a missing text column or an unreadable text.
    """
    if bool(config.files) == bool(config.sql) and (config.files or not config.requests):
        raise UserError('[corpus] needs either files = [...] or sql = "select ...", and not both.')
    if config.requests:
        corpus = request_documents(config, lambda about: _open_listed(about, memory_bytes))
    else:
        corpus = _open_listed(config, memory_bytes)
    return Corpus(_chosen_documents(corpus.documents, config), corpus.metadata)


def _open_listed(config: CorpusConfig, memory_bytes: int | None) -> Corpus:
    return tabular.from_query(config, memory_bytes) if config.sql else _open_files(config, memory_bytes)


def pin_to_commits(config: CorpusConfig) -> CorpusConfig:
    """Return the settings with every hub data set at its present commit."""
    return config.model_copy(update={"files": [remote.at_commit(pattern) for pattern in config.files]})


def corpus_signature(config: CorpusConfig) -> str | None:
    """Return a hash of the files' names, sizes and times; None for a query, which must be run to see a change."""
    if config.sql:
        return None
    listed = (found for pattern in config.files for found in matching_files(pattern).items())
    states: list[tuple[object, ...]] = sorted((path, state or _file_state(path)) for path, state in listed)
    if config.requests:
        states += RequestFolder.of(config.requests).states()
    share = f" {config.share}" if config.share < 1 else ""
    return hashlib.blake2b(f"{states!r}{share}".encode(), digest_size=8).hexdigest()


def _file_state(path: str) -> str:
    if remote.is_remote(path):
        return remote.object_state(path)
    about = Path(path).stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _chosen_documents(documents: Iterator[Document], config: CorpusConfig) -> Iterator[Document]:
    """Yield the documents, without repeated texts if `dedup` is set. Raises UserError if there are none."""
    seen: set[str] = set()
    n_documents = 0
    for document in documents:
        n_documents += 1
        if config.dedup:
            if document.content_hash in seen:
                continue
            seen.add(document.content_hash)
        yield document
    if n_documents == 0:
        raise UserError(
            f"The corpus is empty: {config.sql or ', '.join(config.files) or config.requests} gives no documents."
        )


def _open_files(config: CorpusConfig, memory_bytes: int | None) -> Corpus:
    paths = list({_address(path): path for pattern in config.files for path in matching_files(pattern)}.values())
    readers = {format_of(path) for path in paths}
    if len(readers) > 1:
        raise UserError(f"corpus.files mixes formats ({', '.join(sorted(readers))}). Name files of one format only.")
    if readers == {"text"} and config.messages:
        raise UserError("corpus.messages names a column, but corpus.files are plain texts. Use Parquet or JSON files.")
    if readers == {"text"} and config.token_ids:
        raise UserError("corpus.token_ids names a column, but corpus.files are plain texts. Use Parquet or JSON files.")
    if readers == {"text"}:
        return Corpus(_text_documents(config), pa.schema([]))
    return tabular.from_files(paths, readers.pop(), config, memory_bytes)


def _text_documents(config: CorpusConfig) -> Iterator[Document]:
    """Yield one document per file. Its key is the path below the part of the pattern without globs."""
    named = _files_by_key(config.files)
    for key in in_share(sorted(named), str, config.share):
        text = read_text(named[key])
        yield Document(key, text, key.split("/")[0] if "/" in key else "files")


def _address(path: str) -> str:
    """Return one name for a file, however a pattern leads to it."""
    return path if remote.is_remote(path) else os.path.abspath(path)


def _files_by_key(patterns: list[str], matching: Callable[[str], Iterable[str]] = matching_files) -> dict[str, str]:
    """Return the files by key. If two patterns give the same key, the later file's key begins with its folder."""
    named: dict[str, str] = {}
    seen: set[str] = set()
    for pattern in patterns:
        base = folder_before_globs(pattern)
        for path in (path for path in matching(pattern) if _address(path) not in seen):
            seen.add(_address(path))
            key = path.removeprefix(base).lstrip("/")
            choices = (key, f"{os.path.basename(_COMMIT.sub('', base))}/{key}", _COMMIT.sub("", path))
            named[next(choice for choice in map(shown, choices) if choice not in named)] = path
    return named
