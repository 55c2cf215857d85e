"""Files of a corpus by URL: s3://, gs:// and az:// by obstore, hf:// by huggingface_hub, others by fsspec.

Credentials come from the usual environment variables (AWS_…, GOOGLE_…, AZURE_…, HF_TOKEN). They are never logged.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
from obstore.exceptions import BaseError, GenericError
from obstore.fsspec import register

from saeflow.runtime.errors import UserError, first_line
from saeflow.store.storage.objects import RETRIES, allow_http, tries

_OBJECT_STORES = ("s3", "gs", "az", "abfs")


def is_remote(path: str) -> bool:
    """True if a file of a corpus is named by a URL."""
    return "://" in path


def list_urls(pattern: str) -> dict[str, str | None]:
    """Return the URLs that match, in order, each with a text that changes with its content, or None if unlisted."""
    _require_no_secret(pattern)
    with _url_errors(pattern):
        filesystem, path = fsspec.core.url_to_fs(pattern, **_filesystem_options(pattern))
        found = tries(GenericError)(filesystem.glob, path, detail=True)
        if [about.get("type") for about in found.values()] == ["directory"]:
            found = tries(GenericError)(filesystem.find, path, detail=True)
        files = {name: about for name, about in found.items() if about.get("type") != "directory"}
        urls = {filesystem.unstrip_protocol(name): _content_tag(about) for name, about in files.items()}
        return dict(sorted(urls.items()))


def _content_tag(about: dict[str, Any]) -> str | None:
    """Return the size with the object store's tag or the hub's blob; None if the listing has neither."""
    tag = about.get("e_tag") or about.get("blob_id")
    return f"{about.get('size')} {tag}" if tag else None


def _require_no_secret(url: str) -> None:
    """Refuse URLs with a password or a signature: recipes, records and messages would show them."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ftp", "sftp") and (parts.query or parts.password):
        raise UserError(
            f"corpus.files: {parts.scheme}://{parts.hostname}{parts.path} comes with a query or a password, which "
            "would be written into the store.\n"
            "Download the file first, or put it into an object store (s3://, gs://, az://)."
        )


def open_file(path: str) -> BinaryIO:
    """Open a file, or the whole content of a URL in memory, to be read as it is. Raises UserError for a bad URL."""
    if not is_remote(path):
        return Path(path).open("rb")
    with _url_errors(path):
        return io.BytesIO(tries(GenericError)(_read_file, path))


def _read_file(path: str) -> bytes:
    with fsspec.open(path, "rb", **_filesystem_options(path)) as file:
        return bytes(file.read())


def download(path: str, target: Path) -> None:
    """Copy an object to a local file, as it is. A download that breaks off is tried again."""
    with _url_errors(path):
        tries(GenericError, ConnectionError, TimeoutError)(_download, path, target)


def _download(path: str, target: Path) -> None:
    with fsspec.open(path, "rb", **_filesystem_options(path)) as source, target.open("wb") as copied:
        shutil.copyfileobj(source, copied, 4 << 20)


def object_state(url: str) -> str:
    """Return a text that changes with the object. Needed only if its listing has no tag."""
    with _url_errors(url):
        filesystem, path = fsspec.core.url_to_fs(url, **_filesystem_options(url))
        return str(sorted((name, str(value)) for name, value in tries(GenericError)(filesystem.info, path).items()))


def at_commit(pattern: str) -> str:
    """Return `hf://datasets/owner/name/…` with the commit that its branch or tag points to now; others unchanged."""
    if not pattern.startswith("hf://"):
        return pattern
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    with _url_errors(pattern):
        found = HfFileSystem().resolve_path(pattern)
        if not isinstance(found, HfFileSystemResolvedRepositoryPath):
            return pattern  # a bucket has no commits
        commit = HfApi().repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
    kind = "" if found.repo_type == "model" else f"{found.repo_type}s/"
    return f"hf://{kind}{found.repo_id}@{commit}/{found.path_in_repo}"


def _filesystem_options(path: str) -> dict[str, Any]:
    """Return the options of fsspec's filesystem for this URL."""
    if not is_remote(path) or path.partition("://")[0] not in _OBJECT_STORES:
        return {}
    _register_object_stores()
    return {"retry_config": RETRIES, "client_options": {"allow_http": allow_http()}}


@cache
def _register_object_stores() -> None:
    register(_OBJECT_STORES)


@cache
def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises if the hub refuses or is out of reach: its errors and its HTTP library's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError, *(base for base in HfHubHTTPError.__bases__ if base is not OSError))


@contextlib.contextmanager
def _url_errors(path: str) -> Iterator[None]:
    """Turn any failure of a URL into a UserError."""
    failures: tuple[type[Exception], ...] = (OSError, BaseError, *hub_errors(), ImportError, ValueError)
    try:
        yield
    except failures as error:
        if not is_remote(path):
            raise
        raise UserError(f"corpus.files: {path} cannot be read ({first_line(error)}).\n{_remedy(path)}") from error


def _remedy(path: str) -> str:
    protocol = path.partition("://")[0]
    if protocol == "hf":
        return (
            "Check the name: hf://datasets/OWNER/NAME/FILES. For a private or gated data set, set HF_TOKEN and accept "
            "the conditions on its page. HF_HUB_OFFLINE=1 forbids the hub."
        )
    if protocol in _OBJECT_STORES:
        return "Check the URL and the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on)."
    return f"Check the URL. {protocol}:// may need another package: see fsspec's list of filesystems."
