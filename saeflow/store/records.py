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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import to_json

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, json_text, read_json, replacing, write_json
from saeflow.store.links import Linked, open_unlinked, read_bytes

Kind = Literal["tokens", "activations", "saes", "features", "annotations", "probes", "effects"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BESIDE: tuple[Kind, ...] = ("annotations", "probes", "effects")
"""Kinds that belong to tokens or to a run, and that no stage reads. The newest of a name is the one that is read."""
WHOLE_KINDS: tuple[Kind, ...] = ("saes", *BESIDE)  # kinds without parts: each appears whole, in one rename
_Record = TypeVar("_Record", bound=BaseModel)

FORGOTTEN = "forgotten.json"
"""The store's list of documents that were forgotten, beside store.json."""

_STEP = r"([^/.\x00][^/\x00]*|\.[^/.\x00][^/\x00]*|\.\.[^/\x00]+)"
_INSIDE = rf"^{_STEP}(/{_STEP})*$"
"""A path that stays in its folder: neither from the root nor with a step up. A store may come from a stranger."""

_FOLDER = r"\A[0-9]{6,}-[0-9a-f]{8}\z"  # what parts are called


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a part: path inside it, size, and the 128-bit xxh3 checksum of its bytes.

    No pydantic model: a store has millions of them, and one takes a quarter of the memory so.
    """

    name: Annotated[str, Field(pattern=_INSIDE)]
    n_bytes: int
    checksum: str


class PartRecord(BaseModel, frozen=True):
    """What part.json says: enough to find, count and verify the part without opening its arrays."""

    format_version: int = FORMAT_VERSION
    index: int
    counts: dict[str, int]
    files: list[FileRecord]
    inputs: dict[str, str] = {}
    """What the part was made from: the folder of the part read, by kind. Empty in format 1."""

    @cached_property
    def folder(self) -> str:
        """`<index>-<hash>`: equal content has an equal name."""
        facts: list[Any] = [self.counts, [(f.name, f.checksum) for f in self.files]]
        if self.inputs:
            facts.append(self.inputs)
        return f"{self.index:06d}-{xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())[:8]}"

    @property
    def text(self) -> str:
        """What part.json holds: `checked_text` of the record, without Python's own slow indenting."""
        files = [{"checksum": f.checksum, "n_bytes": f.n_bytes, "name": f.name} for f in self.files]
        about = {
            "counts": dict(sorted(self.counts.items())),
            "files": files,
            "format_version": self.format_version,
            "index": self.index,
            "inputs": dict(sorted(self.inputs.items())),
        }
        digest = xxhash.xxh3_64_hexdigest(to_json(about, indent=1) + b"\n")
        return to_json(about | {"sum": digest}, indent=1).decode() + "\n"

    def made_from(self, inputs: dict[str, str]) -> bool:
        """Is the part what these inputs give? Format 1 did not say; its parts follow from their index."""
        return self.inputs == inputs or (not self.inputs and not inputs.get("hidden"))

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


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
        ids = sorted(document.document_id for document in self.hidden.get(index, ()))
        return xxhash.xxh3_64_hexdigest(json.dumps(ids).encode())[:8] if ids else ""

    @property
    def hidden_ids(self) -> list[int]:
        return sorted(document.document_id for each in self.hidden.values() for document in each)

    def total(self, count: str) -> int:
        return sum(part.counts.get(count, 0) for part in self.parts)


def generation_table(generation: Generation) -> pa.Table:
    """Return the table of a generation: one row a part."""
    parts = generation.parts
    document = pa.struct([("document_id", pa.int64()), ("key_hash", pa.string()), ("reason", pa.string())])
    with no_collection():
        hidden = [[each.model_dump() for each in generation.hidden.get(part.index, ())] for part in parts]
        return pa.table({
            "part_index": [part.index for part in parts],
            "folder": [part.folder for part in parts],
            "n_bytes": pa.array([part.n_bytes for part in parts], pa.int64()),
            "record": [part.model_dump_json() for part in parts],
            "hidden": pa.array(hidden, pa.list_(document)),
        })  # fmt: skip


_NOT_A_LIST = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)  # of a table that is none


def read_generation(path: Path, number: int) -> Generation:
    """A generation from its table. Raises Damaged."""
    try:
        with open_unlinked(path) as file:
            table = pq.read_table(file)
        with no_collection():
            parts = tuple(map(PartRecord.model_validate_json, table.column("record").to_numpy()))
        for part, folder in zip(parts, _folders(table), strict=True):
            part.__dict__["folder"] = folder  # known: it need not be computed
        return Generation(number, parts, dict(_hidden(table, parts)))
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def _hidden(table: pa.Table, parts: Sequence[PartRecord]) -> Iterator[tuple[int, tuple[Hidden, ...]]]:
    if "hidden" in table.column_names:
        column = table.column("hidden")
        for row in np.flatnonzero(pc.fill_null(pc.list_value_length(column), 0)).tolist():
            yield parts[row].index, tuple(Hidden(**each) for each in column[row].as_py())


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


def read_part_folders(path: Path) -> list[str]:
    """Folders of the parts in a list, without their records. Raises Damaged."""
    try:
        with open_unlinked(path) as file:
            return list(_folders(pq.read_table(file, columns=["folder"])))
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def read_forgotten_keys(path: Path) -> list[str]:
    """Return the hashes of the keys that a list of parts hides for good. Raises Damaged."""
    try:
        with open_unlinked(path) as file:
            table = pq.read_table(file)
        if "hidden" not in table.column_names:  # format 1
            return []
        hidden = [Hidden(**each) for each in pc.list_flatten(table.column("hidden")).to_pylist()]
        return [each.key_hash for each in hidden if each.reason == "forgotten"]
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def _folders(table: pa.Table) -> np.ndarray:
    """Raises ValueError where one is no name of a part: it could lead anywhere."""
    column = table.column("folder")
    if not pc.all(pc.fill_null(pc.match_substring_regex(column, _FOLDER), False), min_count=0).as_py():
        raise ValueError("a folder is not called as parts are")
    return np.asarray(column.to_numpy())


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
    """A JSON record; refused where its checksum is wrong or a newer saeflow wrote it."""
    try:
        text = read_bytes(path).decode("utf-8")
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
    try:
        return model.model_validate(read_checked(path))
    except ValidationError as error:
        raise damaged(path) from error


def write_record(path: Path, record: BaseModel) -> None:
    write_checked(path, record.model_dump(mode="json"))


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


def damaged(what: Path, error: BaseException | None = None) -> UserError:
    """Return the error for a file that gave this error: Damaged, unless the system refused to read it."""
    if isinstance(error, UserError) and is_refusal(error):
        return error
    if isinstance(error, OSError) and is_refusal(error):
        return unreadable(error.filename or what, error)
    return Damaged(
        f"{what} is missing or damaged. Mend it with `saeflow verify --full --repair`, then run the recipe again: "
        "finished parts are kept."
    )
