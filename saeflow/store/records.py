"""Records of a store: what its JSON files and lists of parts say, each with its own checksum.

The bytes are specified in data/README.md.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar, get_args

import xxhash
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import to_json

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, json_text, read_json, replacing, write_json
from saeflow.store.links import Linked, read_bytes

Kind = Literal["tokens", "activations", "saes", "features", "annotations", "probes", "effects"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BESIDE: tuple[Kind, ...] = ("annotations", "probes", "effects")
"""Kinds that belong to tokens or to a run, and that no stage reads. The newest of a name is the one that is read."""
WHOLE_KINDS: tuple[Kind, ...] = ("saes", *BESIDE)  # kinds without parts: each appears whole, in one rename


class _Model(Protocol):
    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...


_Record = TypeVar("_Record", bound=_Model)

FORGOTTEN = "forgotten.json"
"""The store's list of documents that were forgotten, beside store.json."""

_STEP = r"([^/.\x00][^/\x00]*|\.[^/.\x00][^/\x00]*|\.\.[^/\x00]+)"
INSIDE = rf"^{_STEP}(/{_STEP})*$"
"""A path that stays in its folder: neither from the root nor with a step up. A store may come from a stranger."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a part: path inside it, size, and the 128-bit xxh3 checksum of its bytes.

    No pydantic model: a store has millions of them, and one takes a quarter of the memory so.
    """

    name: Annotated[str, Field(pattern=INSIDE)]
    n_bytes: int
    checksum: str


@dataclass(frozen=True)
class PartRecord:
    """What part.json says: enough to find, count and verify the part without opening its arrays."""

    index: int
    counts: dict[str, int]
    files: list[FileRecord]
    inputs: dict[str, str] = field(default_factory=dict)
    """What the part was made from: the folder of the part read, by kind. Empty in format 1."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def model_validate(cls, obj: Any) -> PartRecord:
        """Return the record that this JSON says. Raises ValidationError."""
        return _PART.validate_python(obj)

    @cached_property
    def folder(self) -> str:
        """`<index>-<hash>`: equal content has an equal name."""
        facts: list[Any] = [self.counts, [(f.name, f.checksum) for f in self.files]]
        if self.inputs:
            facts.append(self.inputs)
        return f"{self.index:06d}-{xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())[:8]}"

    @property
    def names_and_sizes(self) -> tuple[tuple[str, ...], list[int]]:
        """The names of the part's files, and the bytes of each."""
        return tuple(file.name for file in self.files), [file.n_bytes for file in self.files]

    def is_written_as(self, content: bytes | memoryview) -> bool:
        """True if this is the content of part.json."""
        return content == self.text.encode()

    @property
    def about(self) -> dict[str, Any]:
        """What the record says beside its files."""
        return {name: getattr(self, name) for name in ("format_version", "index", "counts", "inputs")}

    @property
    def as_json(self) -> dict[str, Any]:
        """What the record says."""
        files = [{"name": f.name, "n_bytes": f.n_bytes, "checksum": f.checksum} for f in self.files]
        about = self.about
        inputs = about.pop("inputs")
        return about | {"files": files, "inputs": inputs}

    @property
    def text(self) -> str:
        """What part.json holds: `checked_text` of the record, without Python's own slow indenting."""
        about = {
            "counts": dict(sorted(self.counts.items())),
            "files": [{"checksum": f.checksum, "n_bytes": f.n_bytes, "name": f.name} for f in self.files],
            "format_version": self.format_version,
            "index": self.index,
            "inputs": dict(sorted(self.inputs.items())),
        }
        content = to_json(about, indent=1)
        digest = xxhash.xxh3_64_hexdigest(content + b"\n")
        return f'{content.removesuffix(_END).decode()},\n "sum": "{digest}"\n}}\n'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartRecord) and self.about == other.about and self.files == other.files

    def count(self, name: str) -> int:
        """Return one of the counts; 0 if the part has none of this name."""
        return self.counts.get(name, 0)

    def made_from(self, inputs: dict[str, str]) -> bool:
        """Is the part what these inputs give? Format 1 did not say; its parts follow from their index."""
        return self.inputs == inputs or (not self.inputs and not inputs.get("hidden"))

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


_PART = TypeAdapter(PartRecord)
_END = b"\n}"

_Whole = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
_Text = Annotated[str, Field(strict=True)]
_Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class _Facts(BaseModel):
    """Facts that stages compute with, or that questions put into SQL. Other facts are only compared and shown."""

    context_length: _Whole = 1
    n_features: _Whole = 0
    skip_positions: list[_Whole] = []
    skip_special: Annotated[bool, Field(strict=True)] | list[_Whole] = False
    skip_norms_above: _Number | None = None
    median_lengths: dict[_Text, _Number] = {}
    roles: list[_Text] = []
    packing: _Text | None = None
    generation: _Whole = 0
    site: _Text = ""
    stored: list[tuple[_Text, _Whole]] = []
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    keep: Annotated[bool, Field(strict=True)] = True
    forward_batch: _Whole = 1
    sae: dict[str, Any] | str = {}


class ArtefactRecord(BaseModel, frozen=True):
    """What artefact.json says: identity, the facts behind the fingerprint, and the artefacts read."""

    format_version: int = FORMAT_VERSION
    kind: Kind
    name: str
    fp: str
    facts: dict[str, Any]
    inputs: list[str] = []
    files: list[FileRecord] = []

    @field_validator("facts")
    @classmethod
    def _have_their_types(cls, facts: dict[str, Any]) -> dict[str, Any]:
        _Facts.model_validate(facts)
        return facts

    def input(self, kind: Kind) -> str | None:
        """The artefact of this kind that was read, as `<kind>/<name>-<fp>`."""
        return next((name for name in self.inputs if name.startswith(f"{kind}/")), None)


_Digits = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{1,16}$")]


class ForgottenRecord(BaseModel, frozen=True):
    """What forgotten.json says: of each document the hash of its key, and 16 digits of its content's hash or none."""

    format_version: int = FORMAT_VERSION
    documents: list[tuple[_Digits, _Digits | Literal[""]]]


class Hidden(BaseModel, frozen=True):
    """A document that readers no longer see: forgotten, or replaced by a newer one of the same key."""

    document_id: int
    key_hash: _Digits
    reason: Literal["forgotten", "replaced"]


@dataclass(frozen=True)
class Generation:
    """The list of parts that readers see, in index order, and the documents in them that they do not see."""

    number: int
    parts: tuple[PartRecord, ...]
    hidden: Mapping[int, tuple[Hidden, ...]] = field(default_factory=dict)
    """By index of the part; tokens only."""

    def hidden_digest(self, index: int) -> str:
        """Stands for what is hidden in a part; empty where nothing is."""
        if index not in self.hidden:
            return ""
        ids = sorted(document.document_id for document in self.hidden[index])
        return xxhash.xxh3_64_hexdigest(json.dumps(ids).encode())[:8] if ids else ""

    @property
    def hidden_ids(self) -> list[int]:
        return sorted(document.document_id for each in self.hidden.values() for document in each)

    def total(self, count: str) -> int:
        return sum(part.count(count) for part in self.parts)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python would look again and again for cycles among a million objects that are being made: most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def file_records(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> list[FileRecord]:
    return [file_record(folder, path, known) for path in sorted(folder.rglob("*")) if path.is_file()]


def file_record(folder: Path, path: Path, known: Mapping[str, str] = MappingProxyType({})) -> FileRecord:
    name = path.relative_to(folder).as_posix()
    return FileRecord(name=name, n_bytes=path.stat().st_size, checksum=known.get(name) or checksum(path))


def add_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """Add to provenance.json, where that is there."""
    with contextlib.suppress(OSError, ValueError):
        write_json(folder / "provenance.json", read_json(folder / "provenance.json") | facts)


def provenance_value(folder: Path, name: str) -> str | None:
    """What provenance.json says of this name, None where it says nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(read_json(folder / "provenance.json")[name])
    return None


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """When, where and with what: the one file in which two equal runs may differ."""
    packages = ["saeflow", "torch", "transformers", "zarr", "duckdb", "pyarrow", "numpy"]
    about = {"host": platform.node(), "written": time.time(), "versions": {p: _version(p) for p in packages}}
    write_json(folder / "provenance.json", about | facts)


@cache
def _version(package: str) -> str | None:
    with contextlib.suppress(Exception):
        return version(package)
    return None


def read_checked(path: Path) -> Any:
    """Return a JSON record. It is refused if its checksum is wrong or a newer saeflow wrote it."""
    try:
        content = read_bytes(path)
    except ValueError as error:  # a name that no file can have
        raise damaged(path) from error
    return parse_checked(content, path)


def parse_checked(content: bytes, path: Path) -> Any:
    """Return a JSON record from the content of its file. Refuses as `read_checked` does, and names the path."""
    try:
        text = content.decode("utf-8")
        data = json.loads(text)
        version_found = data.get("format_version", 1)
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(path) from error
    if not isinstance(version_found, int):
        raise damaged(path)
    if version_found > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version_found}; this saeflow reads up to {FORMAT_VERSION}.\n"
            "It was written by a newer saeflow: upgrade with `pip install --upgrade saeflow`."
        )
    if text != json_text(data) or data.pop("sum", None) != (_sum(data) if version_found != 1 else None):
        raise damaged(path)
    return data


def read_or_empty(path: Path) -> dict[str, Any]:
    """A record of figures of an earlier run; none where it is missing or damaged."""
    with contextlib.suppress(Damaged, FileNotFoundError):
        return dict(read_checked(path))
    return {}


def write_checked(path: Path, data: dict[str, Any]) -> None:
    """A JSON record with its own checksum, `sum`."""
    with replacing(path) as temporary:
        temporary.write_text(checked_text(data), "utf-8")


def checked_text(data: dict[str, Any]) -> str:
    return json_text(data | {"sum": _sum(data)})


def _sum(data: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json_text(data).encode())


def read_record(path: Path, model: type[_Record]) -> _Record:
    return _validated(read_checked(path), path, model)


def parse_record(content: bytes, path: Path, model: type[_Record]) -> _Record:
    """Return a record from the content of its file. Refuses as `read_record` does, and names the path."""
    return _validated(parse_checked(content, path), path, model)


def _validated(data: Any, path: Path, model: type[_Record]) -> _Record:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise damaged(path) from error


def write_record(path: Path, record: BaseModel | PartRecord) -> None:
    write_checked(path, record.as_json if isinstance(record, PartRecord) else record.model_dump(mode="json"))


class Damaged(UserError):
    """Something of the store that is missing, or whose bytes were read and are not what was written."""


class Unreadable(UserError):
    """Something of the store that the system refused to read: nothing is known of its bytes."""


_SAYS_SOMETHING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Errors that are about the file: it is missing, of another kind, or (None) makes no sense to the library."""

_WAYS_IN = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Run this as its owner, or get the right to read it."),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit of open files (ulimit -n), then try again."),
}


def is_refusal(error: BaseException) -> bool:
    """True if the system refused to read, e.g. for a permission or a lost server: the file may well be whole."""
    return isinstance(error, Unreadable | Linked) or (isinstance(error, OSError) and error.errno not in _SAYS_SOMETHING)


def unreadable(what: object, error: OSError) -> Unreadable:
    if isinstance(error, Linked):
        return Unreadable(str(error))
    way_out = _WAYS_IN.get(error.errno or 0, "Look at the disk or the network, then try again.")
    return Unreadable(f"{what} cannot be read: {os.strerror(error.errno or 0)}. It may be whole. {way_out}")


def damaged(what: Path | str, error: BaseException | None = None) -> UserError:
    """Return the error for a file that gave this error: Damaged, unless the system refused to read it."""
    if isinstance(error, UserError) and is_refusal(error):
        return error
    if isinstance(error, OSError) and is_refusal(error):
        return unreadable(error.filename or what, error)
    return Damaged(
        f"{what} is missing or damaged. Mend it with `saeflow verify --full --repair`, then run the recipe again: "
        "finished parts are kept."
    )
