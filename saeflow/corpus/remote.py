"""Files of a corpus by URL: s3://, gs://, az:// through obstore, hf:// through huggingface_hub, others through fsspec.

Credentials come from the usual environment variables (AWS_…, GOOGLE_…, AZURE_…, HF_TOKEN); they are not logged.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from obstore.exceptions import BaseError, GenericError
from obstore.fsspec import register

from saeflow.runtime.errors import UserError
from saeflow.store.storage import RETRIES, allow_http, is_url, tries

_OBJECT_STORES = ("s3", "gs", "az", "abfs")


def matches(pattern: str) -> dict[str, str | None]:
    """The URLs that a URL with globs stands for, in order, each with what changes when the object does, if that is
    listed."""
    _require_no_secret(pattern)
    with _said(pattern):
        filesystem, path = fsspec.core.url_to_fs(pattern, **_options(pattern))
        found = tries(GenericError)(filesystem.glob, path, detail=True)
        if len(found) == 1 and _is_folder(next(iter(found.values()))):
            found = tries(GenericError)(filesystem.find, path, detail=True)
        listed = {filesystem.unstrip_protocol(n): _listed(about) for n, about in found.items() if not _is_folder(about)}
        return dict(sorted(listed.items()))


def _is_folder(about: dict[str, Any]) -> bool:
    return about.get("type") == "directory"


def _listed(about: dict[str, Any]) -> str | None:
    """Of object stores the tag, of the hub the blob; other listings do not tell two contents of one size apart."""
    content = about.get("e_tag") or about.get("blob_id")
    return f"{about.get('size')} {content}" if content else None


def _require_no_secret(url: str) -> None:
    """Recipes, records and messages name the files of a corpus, so a URL must not hold a password or a signature."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ftp", "sftp") and (parts.query or parts.password):
        raise UserError(
            f"corpus.files: {parts.scheme}://{parts.hostname}{parts.path} comes with a query or a password, which "
            "would be written into the store.\n"
            "Download the file first, or name it in an object store (s3://, gs://, az://)."
        )


def content(path: str) -> bytes:
    """What a file or URL holds, decompressed as its ending says."""
    with _said(path):
        return tries(GenericError)(_content, path) if is_url(path) else _content(path)


def _content(path: str) -> bytes:
    with fsspec.open(path, "rb", compression="infer", **_options(path)) as file:
        return bytes(file.read())


def copy(path: str, target: Path, *, unpack: bool) -> None:
    """Copy a file or object to a local file, as it is or decompressed; asked for again where the answer breaks off."""
    with _said(path):
        tries(GenericError, ConnectionError, TimeoutError)(_copy, path, target, unpack) if is_url(path) else _copy(
            path, target, unpack
        )


def _copy(path: str, target: Path, unpack: bool) -> None:
    compression = "infer" if unpack else None
    with fsspec.open(path, "rb", compression=compression, **_options(path)) as source, target.open("wb") as copied:
        shutil.copyfileobj(source, copied, 4 << 20)


def state(url: str) -> str:
    """Changes when the object does; for what no listing tells."""
    with _said(url):
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
        return str(sorted((name, str(value)) for name, value in tries(GenericError)(filesystem.info, path).items()))


def pinned(pattern: str) -> str:
    """The pattern at one commit: `hf://datasets/owner/name/…` names the commit that its branch or tag is at now."""
    if not pattern.startswith("hf://"):
        return pattern
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    with _said(pattern):
        found = HfFileSystem().resolve_path(pattern)
        if not isinstance(found, HfFileSystemResolvedRepositoryPath):
            return pattern  # a bucket, which has no commits
        commit = HfApi().repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
    kind = "" if found.repo_type == "model" else f"{found.repo_type}s/"
    return f"hf://{kind}{found.repo_id}@{commit}/{found.path_in_repo}"


def _options(path: str) -> dict[str, Any]:
    """What fsspec hands to the filesystem of this URL."""
    if not is_url(path) or path.partition("://")[0] not in _OBJECT_STORES:
        return {}
    _know_object_stores()
    return {"retry_config": RETRIES, "client_options": {"allow_http": allow_http()}}


@cache
def _know_object_stores() -> None:
    register(_OBJECT_STORES)


@cache
def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub refuses or cannot be reached: its own errors and its HTTP library's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError, *(base for base in HfHubHTTPError.__bases__ if base is not OSError))


@contextlib.contextmanager
def _said(path: str) -> Iterator[None]:
    """Any failure of a URL as the user's to mend."""
    failures: tuple[type[Exception], ...] = (OSError, BaseError, *hub_errors(), ImportError, ValueError)
    try:
        yield
    except failures as error:
        if not is_url(path):
            raise
        raise UserError(f"corpus.files: {path} cannot be read ({_reason(error)}).\n{_way_out(path)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _way_out(path: str) -> str:
    protocol = path.partition("://")[0]
    if protocol == "hf":
        return (
            "Check the name, hf://datasets/OWNER/NAME/FILES. A private or gated data set needs HF_TOKEN, "
            "and its conditions accepted on its page; HF_HUB_OFFLINE=1 forbids the hub."
        )
    if protocol in _OBJECT_STORES:
        return "Check the URL and the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on)."
    return f"Check the URL; some need another package (for {protocol}://, see fsspec's list of filesystems)."
