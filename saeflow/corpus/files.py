"""Files of a corpus: which ones a pattern means, in which format they are, and their unpacked bytes and text."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
from fsspec.utils import glob_translate

from saeflow.corpus import remote
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import decoded_text, encoding_of

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
"""The reader of a file by its ending. Files with other endings are texts."""
_PASSED_OVER = re.compile(
    r"(\..*|_SUCCESS|_(common_)?metadata|_(committed|started)_.*|(?i:(eh)?thumbs\.db|desktop\.ini)|Icon\r)\Z", re.DOTALL
)
"""Names that other programs leave in a folder of data. A file that is named itself is read whatever its name."""
_ARCHIVES = {".zip": "zip", ".tar": "tar", ".tgz": "tar", ".7z": "7-Zip", ".rar": "RAR"}
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKS = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "packed by gzip", b"BZh[1-9][1\x17][Ar][YE]": "packed by bzip2",
          b"\xfd7zXZ": "packed by xz", b"\\(\xb5/\xfd": "packed by Zstandard", b"PAR1\x15": "a Parquet file",
          b"%PDF-": "a PDF", b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive", b"SQLite format 3\0": "an SQLite database",
          b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"ARROW1\0": "an Arrow file",
          b"\xff\xff\xff\xff": "an Arrow file", b"\x89HDF": "an HDF5 file", b"Obj\x01": "an Avro file",
          b"ORC\n?[\0-\x08\x0e-\x1f]": "an ORC file", b"\x93NUMPY": "a NumPy array", b"\x80[\x02-\x05]": "a pickle",
          b"\xd0\xcf\x11\xe0": "a document of Office"}  # fmt: skip
"""First bytes of files that are no text, as a pattern that no text fits, and what such a file is."""
_PACKED_BYTES = 1 << 16
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


class _Streams(io.RawIOBase):
    """Packed streams that follow one another, as one. Python's own readers end without a word at a damaged one."""

    def __init__(self, file: BinaryIO, unpacker: Callable[[], Any]) -> None:
        self.file, self.unpacker, self.stream = file, unpacker, unpacker()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content:
            packed = self.stream.unused_data.lstrip(b"\0") if self.stream.eof else b""  # zeros may lie between streams
            while not packed and (self.stream.eof or self.stream.needs_input):
                read = self.file.read(_PACKED_BYTES)
                packed = read.lstrip(b"\0") if self.stream.eof else read
                if not read and self.stream.eof:
                    return 0
                if not read:
                    raise EOFError("it ends within a packed stream")
            if self.stream.eof:
                self.stream = self.unpacker()
            content = self.stream.decompress(packed, len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _streams(unpacker: Callable[[], Any]) -> Callable[[BinaryIO], BinaryIO]:
    return lambda file: io.BufferedReader(_Streams(file, unpacker), _PACKED_BYTES)


def _zstandard(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))


_UNPACKERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),  # type: ignore[dict-item,return-value]
    ".bz2": _streams(bz2.BZ2Decompressor),
    ".xz": _streams(lzma.LZMADecompressor),
    ".lzma": _streams(lzma.LZMADecompressor),
    ".zst": _zstandard,
}
_PACKED_BY = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
"""First bytes of packed files, and their endings."""


def matching_files(pattern: str) -> dict[str, str | None]:
    """Return the files in order, each with a text that changes with it, or None if the listing does not tell."""
    listed = _matching_urls(pattern) if remote.is_remote(pattern) else dict.fromkeys(_matching_local_files(pattern))
    if not listed:
        raise UserError(f"corpus.files: nothing matches {pattern}. Check the path. Globs such as texts/**/*.txt work.")
    return listed


def _matching_urls(pattern: str) -> dict[str, str | None]:
    above = folder_before_globs(pattern) if re.search(r"[*?[]", pattern) else pattern
    n_above = len(_names_in(above))
    listed = remote.list_urls(pattern).items()
    return {url: tag for url, tag in listed if not any(map(_is_passed_over, _names_in(url)[n_above:]))}


def _names_in(url: str) -> list[str]:
    return url.partition("://")[2].strip("/").split("/")


def _matching_local_files(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    if Path(pattern).is_dir():
        return _files_below([pattern])
    if "**" not in pattern:
        return sorted(path for path in glob.glob(pattern) if not _is_passed_over(path) and _is_file(path))
    try:
        fits = re.compile(glob_translate(pattern))
    except ValueError as error:
        raise UserError(f"corpus.files: {pattern}: ** stands for folders, as in texts/**/*.txt.") from error
    return _files_below(glob.glob(pattern.partition("**")[0]), fits)


def _files_below(folders: list[str], fits: re.Pattern[str] | None = None) -> list[str]:
    """Return the files in order of their paths. Each folder is read once, by a link only if no other path leads there.

    Raises UserError if a folder cannot be read: its files would be lost.
    """
    found: list[str] = []
    seen: set[str] = set()
    waiting = sorted(folders, key=lambda folder: os.path.islink(folder.rstrip("/")))
    while waiting:
        for path, names, files in os.walk(waiting.pop(0), onerror=_refuse_folder):
            real = os.path.realpath(path)
            names[:] = sorted(name for name in names if real not in seen and not _is_passed_over(name))
            below = [os.path.join(path, name) for name in files if real not in seen and not _is_passed_over(name)]
            found += [file for file in below if (not fits or fits.match(file)) and _is_file(file)]
            waiting += filter(os.path.islink, (os.path.join(path, name) for name in names))
            seen.add(real)
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise UserError(
        f"corpus.files: the folder {shown(str(error.filename))} cannot be read: {error.strerror}."
    ) from error


def _is_file(path: str) -> bool:
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(
            f"corpus.files: {shown(path)} is a link to a file that is not there. Fetch the file, e.g. with "
            "`git annex get`, or remove the link."
        )
    return os.path.isfile(path)


def _is_passed_over(path: str) -> bool:
    return bool(_PASSED_OVER.match(os.path.basename(path)))


def folder_before_globs(pattern: str) -> str:
    """Return the folder that a pattern names before its first `*`, `?` or `[`; escaped signs are no globs."""
    if not remote.is_remote(pattern) and Path(pattern).exists():
        return pattern if Path(pattern).is_dir() else os.path.dirname(pattern)
    plain = re.sub(r"\[([*?[])\]", lambda found: chr(0xE000 + ord(found[1])), pattern)
    fixed = re.split(r"[*?[]", plain)[0].rpartition("/")[0]
    return re.sub("[\ue000-\ue0ff]", lambda found: chr(ord(found[0]) - 0xE000), fixed)


def shown(path: str) -> str:
    """Return a path as UTF-8; bytes of a file's name that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def format_of(path: str) -> str:
    """Return the reader of a file: parquet, csv, json or text. Raises UserError for an archive of several files."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    archive = next((_ARCHIVES[suffix] for suffix in suffixes[-2:] if suffix in _ARCHIVES), None)
    if archive and (suffixes[-1] in _ARCHIVES or suffixes[-1] in _UNPACKERS):
        raise UserError(f"corpus.files: {shown(path)} is a {archive} archive. Unpack it, and name the files in it.")
    if suffixes and suffixes[-1] in _UNPACKERS:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1] if suffixes else "", "text")


def is_packed(path: str) -> bool:
    return Path(path).suffix.lower() in _UNPACKERS


def unpacked(content: bytes) -> bytes:
    """Return a file's bytes, unpacked if the first of them say that they are packed. Raises one of UNREADABLE."""
    ending = next((ending for mark, ending in _PACKED_BY.items() if content.startswith(mark)), None)
    return _UNPACKERS[ending](io.BytesIO(content)).read() if ending else content


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[BinaryIO]:
    """Open a file to be read as unpacked bytes. Raises UserError that names the file, also while it is being read."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(remote.open_file(path))
        try:
            unpack = _UNPACKERS.get(Path(path).suffix.lower())
            if unpack and not file.read(1):
                raise EOFError("it is empty")
            file.seek(0)
            yield stack.enter_context(unpack(file)) if unpack else file
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(
                f"corpus.files: {shown(path)} cannot be unpacked: {first_line(error)}.\nIs it whole? Fetch it again."
            ) from error


@contextlib.contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """Open a file to be read as text with the line ends it has. Raises UserError that names the first bad line."""
    try:
        with open_unpacked(path) as file:
            buffered = file if hasattr(file, "peek") else io.BufferedReader(file)  # type: ignore[type-var]
            first = buffered.peek(512)[:512]
            require_format(path, first)
            yield io.TextIOWrapper(buffered, encoding_of(first), newline="")
    except UnicodeDecodeError as error:
        raise _not_decoded(path, f"line {_undecodable_line(path, error.encoding)}", error) from error


def read_text(path: str) -> str:
    """Return the text of a file as it is written. Raises UserError if it is no text."""
    with open_unpacked(path) as file:
        content = file.read()
    require_format(path, content)
    try:
        return decoded_text(content)
    except UnicodeDecodeError as error:
        raise _not_decoded(path, f"byte {error.start} is {content[error.start]:#04x}", error) from error


def _undecodable_line(path: str, encoding: str) -> int:
    """Return the first line with bytes that are no text. Its end may be such a byte, so that lines are found by LF."""
    with open_unpacked(path) as file:
        before = io.TextIOWrapper(file, encoding, errors="surrogateescape" if encoding == "utf-8" else "replace")
        odd = re.compile("[\udc80-\udcff]" if encoding == "utf-8" else "\ufffd")
        return next((number for number, line in enumerate(before, 1) if odd.search(line)), 1)


def _not_decoded(path: str, place: str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{shown(path)} is not {error.encoding.upper()[:6].rstrip('-')}: {place}.\n"
        f"Convert it, e.g. with `iconv -f latin1 -t utf-8 {shown(Path(path).name)}`, or leave it out."
    )


def is_lfs_pointer(path: Path) -> bool:
    """True if git put a pointer where the file should be, as it does without git-lfs."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def require_format(path: str, first: bytes, expected: bytes = b"") -> None:
    """Raises UserError if the first bytes of a file show another format than that of these `expected`, or of text."""
    if first.startswith(_LFS):
        raise UserError(
            f"corpus.files: {shown(path)} is a pointer of git-lfs, not the file itself. Fetch it with `git lfs pull`."
        )
    kind = "a tar archive" if first[257:262] == b"ustar" else None
    kind = next((kind for mark, kind in _MARKS.items() if re.match(mark, first)), kind)
    kind = None if expected and first.startswith(expected) else kind
    if not (kind or expected) and b"\0" in first[:512] and encoding_of(first) == "utf-8-sig":
        raise UserError(
            f"corpus.files: {shown(path)} is no text: byte {first.index(0)} is 0. Leave it out. Or convert "
            f"it, if it is UTF-16, e.g. with `iconv -f utf-16le -t utf-8 {shown(Path(path).name)}`."
        )
    if kind:
        raise UserError(
            f"corpus.files: {shown(path)} is {kind}, and its name does not say so. Unpack or convert it, or leave it "
            "out."
        )
