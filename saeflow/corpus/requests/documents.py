"""Requests as documents: each has the key and metadata of the index or the corpus, and the engine's token ids."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus.document import Corpus, Document, in_share
from saeflow.corpus.files import shown
from saeflow.corpus.requests.files import PROMPT, Request, digest_of, vocab_ids_of
from saeflow.corpus.requests.folder import RequestFolder, some_of
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError, first_line

REQUEST = "request_id"
"""Column of an index or a corpus that names the request of a document. Default: the document's key."""
_SOURCE = "requests"
_log = logging.getLogger(__name__)

Pairs = Iterator[tuple[Document, str]]
"""Documents without their tokens, each with the id of its request."""


def request_documents(config: CorpusConfig, open_listed: Callable[[CorpusConfig], Corpus]) -> Corpus:
    """Open the requests of a folder as documents of vocabulary ids, in the order of their keys.

    The documents are those of the corpus, else of the folder's index, else the files. Raises UserError if a document
    has no request, if a request has two, or if a file is cut.
    """
    assert config.requests is not None
    folder = RequestFolder.of(config.requests)
    about = _listing(config, folder)
    _require_one_each(_documents_with_requests(config, folder, about, open_listed)[0], folder, config.share)
    pairs, metadata = _documents_with_requests(config, folder, about, open_listed)
    has_prompts = PROMPT not in metadata.names and any(each.n_prompt is not None for each in folder.requests.values())
    if has_prompts:
        metadata = metadata.append(pa.field(PROMPT, pa.int64()))
    return Corpus((_with_ids(each, folder.requests[name], has_prompts) for each, name in pairs), metadata)


def _with_ids(document: Document, request: Request, has_prompts: bool) -> Document:
    metadata = document.metadata | ({PROMPT: request.n_prompt} if has_prompts else {})
    return replace(document, content=vocab_ids_of(request), metadata=metadata, beside=digest_of(request.path))


def _listing(config: CorpusConfig, folder: RequestFolder) -> CorpusConfig | None:
    """Return the settings of the corpus that lists the documents: the recipe's, or the folder's index, or None."""
    if config.files or config.sql or folder.index is None:
        return config if config.files or config.sql else None
    columns = _columns_of_index(folder.index)
    if REQUEST not in columns:
        raise UserError(
            f"corpus.requests: {shown(str(folder.index))} has no column {REQUEST}, which names the file of a document."
        )
    update = {
        "files": [glob.escape(str(folder.index))],
        "text": "text" if "text" in columns else REQUEST,
        "key": "key" if "key" in columns else REQUEST,
    }
    return config.model_copy(update=update)


def _columns_of_index(index: Path) -> list[str]:
    try:
        if index.suffix == ".parquet":
            return list(pq.read_schema(index).names)
        with index.open(encoding="utf-8-sig") as file:
            return list(json.loads(next((line for line in file if line.strip()), "{}")))
    except (pa.ArrowException, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"corpus.requests: {shown(str(index))} cannot be read: {first_line(error)}.") from error


def _documents_with_requests(
    config: CorpusConfig,
    folder: RequestFolder,
    about: CorpusConfig | None,
    open_listed: Callable[[CorpusConfig], Corpus],
) -> tuple[Pairs, pa.Schema]:
    if about is None:
        chosen = in_share(sorted(folder.requests), str, config.share)
        return ((Document(name, "", _SOURCE), name) for name in chosen), pa.schema([])
    opened = open_listed(about)
    if about.text != REQUEST or about.key == REQUEST:
        return ((each, str(each.metadata.get(REQUEST) or each.key)) for each in opened.documents), opened.metadata
    named = (replace(each, metadata=each.metadata | {REQUEST: each.text}) for each in opened.documents)
    return ((each, each.text) for each in named), opened.metadata.append(pa.field(REQUEST, pa.string()))


def _require_one_each(pairs: Pairs, folder: RequestFolder, share: float) -> None:
    """Raise UserError that names documents without a request, and requests or documents that are named twice."""
    known = folder.requests  # before the corpus is read: what raises here must leave no reader open
    keys, named, twice, missing = set[str](), set[str](), list[str](), list[str]()
    for document, request_id in pairs:
        if document.key in keys or request_id in named:
            twice.append(document.key)
        keys.add(document.key)
        named.add(request_id)
        if request_id not in known:
            missing.append(request_id)
    if twice:
        raise UserError(
            f"corpus.requests: {len(twice):,} documents are named twice, or share a request: {some_of(twice)}.\n"
            "Keep one entry for each document, with a request of its own."
        )
    if missing:
        raise UserError(
            f"corpus.requests: {len(missing):,} requests have no file in {shown(str(folder.path))}: "
            f"{some_of(missing)}.\nRun them again, or leave their documents out of the index or the "
            "corpus. A request is called as its file: ID.safetensors."
        )
    if share == 1 and (left := known.keys() - named):
        _log.warning("corpus.requests: left out: %s files of no document, e.g. %s", f"{len(left):,}", min(left))
