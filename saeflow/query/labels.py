"""Names that people and models give to features: CSV files in the store's `labels/`, which anybody may edit.

What a person or a spreadsheet did to a file never stops a question: what cannot be read is left out, with a warning
that names file and line. The bytes are specified in data/README.md.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from saeflow.query.relations import literal, unglobbed
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import replacing
from saeflow.store.lease import FileSlot
from saeflow.store.store import Store

log = logging.getLogger(__name__)

COLUMNS = ("feature_id", "label", "score")
_ALIASES = {"feature": "feature_id", "index": "feature_id", "description": "label", "explanation": "label"}
_LONGEST = 10_000
_SAID = 3
"""Lines of a file that are named before the rest are only counted."""

_FORMULA = re.compile(r"'*[=+\-@]")
_BLANK = " \t\n\r\v\f\xa0"
"""What is cut off both ends of a cell, here and in SQL."""

_UNQUOTED = r"regexp_replace({}, '^''(''*[=+\-@])', '\1')"


@dataclass(frozen=True)
class Label:
    text: str
    score: float | None = None
    """How well it fits, 0 to 1."""


@dataclass(frozen=True)
class LabelFile:
    """A file of labels that can be read, and how."""

    location: str
    source: str
    delimiter: str
    columns: tuple[str, ...]


@dataclass
class Sheet:
    """A CSV file as a person left it."""

    header: list[str] = field(default_factory=lambda: list(COLUMNS))
    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """Where each row ends."""
    delimiter: str = ","
    mark: str = ""
    """The byte order mark that some spreadsheets need to find UTF-8."""

    @classmethod
    def of(cls, content: bytes) -> Sheet:
        """Raises ValueError, which says the line, where the content is not a table of labels."""
        text = _decoded(content)
        first = text.lstrip("\ufeff\r\n").partition("\n")[0]
        delimiter = max(",;\t", key=first.count)
        sheet = cls([], delimiter=delimiter, mark="\ufeff" if text.startswith("\ufeff") else "")
        reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), delimiter=delimiter, strict=True)
        try:
            for row in (row for row in reader if row):
                if sheet.header:
                    sheet.rows.append(row)
                    sheet.lines.append(reader.line_num)
                else:
                    sheet.header = row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
        for name in COLUMNS[:2]:
            if sheet.columns.count(name) != 1:
                raise ValueError(f"line 1: the first line must name the columns {', '.join(COLUMNS)}")
        return sheet

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names by which the columns are read; those that mean nothing here are numbered."""
        names = column_names(self.header)
        return tuple(name if name in COLUMNS else f"column{i}" for i, name in enumerate(names))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.columns)}

    def cell(self, row: list[str], name: str) -> str:
        place = self._places.get(name, len(row))
        return row[place].strip(_BLANK) if place < len(row) else ""

    def feature(self, row: list[str]) -> int | None:
        return _feature(self.cell(row, "feature_id"))

    def with_labels(self, labels: Mapping[int, Label | None]) -> Sheet:
        """One label for each of these features, where it has been, or at the end; None takes it away."""
        given = {feature: label for feature, label in sorted(labels.items()) if label is not None}
        needs_score = "score" not in self.columns and any(label.score is not None for label in given.values())
        changed = replace(self, header=[*self.header, "score"] if needs_score else self.header, rows=[])
        for row in self.rows:
            feature = self.feature(row)
            if feature is None or feature not in labels:
                changed.rows.append(row)
            elif label := given.pop(feature, None):
                changed.rows.append(changed._filled(row, feature, label))
        changed.rows += [changed._filled([], feature, label) for feature, label in given.items()]
        return changed

    def _filled(self, row: list[str], feature: int, label: Label) -> list[str]:
        """The other columns keep what they hold."""
        cells = {"feature_id": str(feature), "label": _guarded(label.text), "score": _digits(label.score)}
        wide = row + [""] * (len(self.header) - len(row))
        return [cells.get(name, held) for name, held in zip(self.columns, wide, strict=False)]

    def content(self) -> bytes:
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=self.delimiter, lineterminator="\n").writerows([self.header, *self.rows])
        return (self.mark + out.getvalue()).encode()


def column_names(header: list[str]) -> list[str]:
    """What the columns of a table of labels mean; the first that means something does, the plain names before
    others."""
    plain = [name.strip().lower() for name in header]
    named = [_ALIASES.get(name, name) for name in plain]
    taken = {name: plain.index(name) if name in plain else named.index(name) for name in COLUMNS if name in named}
    return [name if taken.get(name, i) == i else f"other {name}" for i, name in enumerate(named)]


def label_files(store: Store, sae: str) -> list[LabelFile]:
    """The files of an SAE's labels that can be read; warns of the others, and of lines that cannot."""
    found = []
    for path in _paths(store, sae):
        try:
            sheet = Sheet.of(_bytes(store, path))
            literal(path.name).encode()
        except (ValueError, OSError) as error:
            log.warning(
                "labels: %s is left out: %s", sanitise(ascii(path.name)[1:-1]), sanitise(brief(str(error), 200))
            )
            continue
        _warn_of_lines(path.name, sheet)
        location = f"{store.objects.url}/{store.objects.key(path)}" if store.objects else str(path)
        found.append(LabelFile(location, path.stem, sheet.delimiter, sheet.columns))
    return found


def labels_relation(files: Sequence[LabelFile]) -> str:
    """The files as something to select from. What DuckDB cannot read in them is left out, whatever happened to them."""
    return f"({' union all '.join(map(_one_file, files))})"


def _one_file(file: LabelFile) -> str:
    columns = literal(dict.fromkeys(file.columns, "varchar"))
    options = (
        f"columns = {columns}, delim = {literal(file.delimiter)}, quote = '\"', escape = '\"', header = true, "
        "auto_detect = false, ignore_errors = true, null_padding = true, strict_mode = false, parallel = false, "
        "hive_partitioning = false"
    )
    feature_id, label = _trimmed("feature_id"), _trimmed("label")
    score = (
        f"if(contains(score, '_'), null, try_cast({_trimmed('score')} as double))"
        if "score" in file.columns
        else "null::double"
    )
    return (
        f"select feature_id, label, {literal(file.source)} as source, if(isfinite(score), score, null) as score from ("
        f"select case when regexp_full_match({feature_id}, '[0-9]{{1,10}}') then try_cast({feature_id} as integer) end "
        f"as feature_id, {_UNQUOTED.format(label)} as label, {score} as score "
        f"from read_csv({literal([unglobbed(file.location)])}, {options})"
        ") where feature_id is not null and label <> ''"
    )


def _trimmed(column: str) -> str:
    return f"trim({column}, {literal(_BLANK)})"


def put(store: Store, sae: str, source: str, labels: Mapping[int, Label | None]) -> int:
    """Set the labels of features in the file of a source, None to remove; returns how many it then holds.

    Raises UserError where the file is there and cannot be read: what a person wrote is not overwritten; or where
    another command has been changing labels of this SAE for a minute.
    """
    path = _folder(store, sae) / f"{_known_source(source)}.csv"
    with FileSlot(store.root / "tmp" / "locks" / f"labels-{path.parent.name}.lease").guard():
        sheet = _present(store, path)
        sheet = sheet.with_labels(labels)
        _replace(store, path, sheet)
    return len(sheet.rows)


def _replace(store: Store, path: Path, sheet: Sheet) -> None:
    if not sheet.rows:
        if store.objects is not None:
            store.objects.remove(path)
        return path.unlink(missing_ok=True)
    content = sheet.content()
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    if store.objects is not None:
        store.objects.switch(path, content)
    return None


def cleaned(text: object, score: object, where: str) -> Label | None:
    """A label from outside on one line; None where the text is empty. Raises UserError."""
    line = " ".join(str("" if text is None else text).replace("\0", " ").split())
    if len(line) > _LONGEST:
        raise UserError(f"{where}: the label has {len(line):,} characters; at most {_LONGEST:,} are kept.")
    try:
        line.encode()
        number = None if score is None or score == "" else float(str(score))
    except UnicodeEncodeError:
        raise UserError(f"{where}: the label is not text.") from None
    except ValueError:
        number = math.nan
    if number is not None and not 0 <= number <= 1:
        raise UserError(
            f"{where}: the score is {brief(str(score))!r}, but it must be a number from 0 to 1, or nothing."
        )
    return Label(line, number) if line else None


def _folder(store: Store, sae: str) -> Path:
    name = sae.removeprefix("saes/")
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{brief(sae)!r} is not the name of an SAE.")
    return store.root / "labels" / name


def _paths(store: Store, sae: str) -> Iterator[Path]:
    folder = _folder(store, sae)
    if store.objects is None:
        found = [path for path in folder.glob("*.csv") if path.is_file()]
    else:
        keys = store.objects.listing(store.root / "labels")
        found = [store.root / key for key in keys if key.endswith(".csv")]
    return iter(sorted(path for path in found if path.parent == folder and not path.name.startswith(".")))


def _bytes(store: Store, path: Path) -> bytes:
    return (store.objects.fetch(path) if store.objects else path).read_bytes()


def _present(store: Store, path: Path) -> Sheet:
    try:
        if store.objects is not None:
            store.objects.fetch(path, fresh=True)
        return Sheet.of(path.read_bytes())
    except FileNotFoundError:
        return Sheet()
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {brief(str(error), 200)}.\nMend it or move it away first.") from None


def _known_source(name: str) -> str:
    if not re.fullmatch(r"\w(?:[\w .+-]{0,62}\w)?", name):
        raise UserError(f"The source is {brief(name)!r}; name it with letters, digits, spaces and . + - _, at most 64.")
    return name


def _decoded(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: it is not UTF-8; save it as CSV in UTF-8") from None
    if "\0" in text:
        raise ValueError("it holds zero bytes, as no text does")
    return text


def _feature(cell: str) -> int | None:
    found = re.fullmatch(r"[0-9]{1,10}", cell)
    return int(found[0]) if found and int(found[0]) < 1 << 31 else None


def _warn_of_lines(name: str, sheet: Sheet) -> None:
    wrong = [(line, said) for line, row in zip(sheet.lines, sheet.rows, strict=True) if (said := _wrong(sheet, row))]
    for line, said in wrong[:_SAID]:
        log.warning("labels: %s, line %d: %s", sanitise(name), line, said)
    if len(wrong) > _SAID:
        log.warning("labels: %s: %d more lines like these", sanitise(name), len(wrong) - _SAID)


def _wrong(sheet: Sheet, row: list[str]) -> str | None:
    feature, score = sheet.cell(row, "feature_id"), sheet.cell(row, "score")
    if not any(map(str.strip, row)):
        return None
    if _feature(feature) is None:
        return f"left out, as {brief(feature)!r} is not the number of a feature"
    with suppress(ValueError):
        if not score or ("_" not in score and math.isfinite(float(score))):
            return None
    return f"its score is left out, as {brief(score)!r} is not a number"


def _guarded(text: str) -> str:
    """No spreadsheet takes it for a formula: a leading ' is taken off when it is read."""
    return f"'{text}" if _FORMULA.match(text) else text


def _digits(score: float | None) -> str:
    """All of them, so that it comes back as it was."""
    return "" if score is None else repr(score).removesuffix(".0")
