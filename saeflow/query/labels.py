"""Labels of features: CSV files in the store's `labels/`, which people and programs may edit.

A damaged file never stops a question. Lines that cannot be read are left out, with a warning that names file and
line. data/README.md specifies the bytes.
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

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.features.schema import BESIDE_LABELS
from saeflow.query.files.quoting import literal, unglobbed
from saeflow.query.files.relations import no_rows
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise
from saeflow.store.store import Store

log = logging.getLogger(__name__)

LABEL_COLUMNS = ("feature_id", "label", "score")
RULE_COLUMNS = ("rule", "kind", "precision", "recall", "state")
"""Further columns of the source `rules`."""
RULES_SOURCE = "rules"
"""The source of explanations without a language model."""
_ALIASES = {"feature": "feature_id", "index": "feature_id", "description": "label", "explanation": "label"}
_LONGEST_LABEL = 10_000
_LINES_SHOWN = 3
"""Lines of a file that warnings name; further ones are only counted."""

_LIKE_FORMULA = re.compile(r"'*[=+\-@]")
"""Text that a spreadsheet would take for a formula gets a ' in front. Reading takes it off again."""

_WHITE_SPACE = " \t\n\r\v\f\xa0"
"""Characters cut off both ends of a cell, here and in SQL."""

_UNQUOTED = r"regexp_replace({}, '^''(''*[=+\-@])', '\1')"


@dataclass(frozen=True)
class Label:
    text: str
    score: float | None = None
    """How well the label fits, 0 to 1."""
    cells: Mapping[str, str] = field(default_factory=dict)
    """Cells of RULE_COLUMNS."""


@dataclass(frozen=True)
class LabelFile:
    """A readable file of labels, and how to read it."""

    location: str
    source: str
    delimiter: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class TableBesideLabels:
    """A readable Parquet file that tells more of one source's labels: `<source>.scores.parquet`, or `.mistakes`."""

    location: str
    source: str
    table: str
    """`explanation_scores` or `explanation_mistakes`."""


@dataclass
class Sheet:
    """A CSV file of labels as a person left it."""

    header: list[str] = field(default_factory=lambda: list(LABEL_COLUMNS))
    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """The line on which each row ends."""
    delimiter: str = ","
    mark: str = ""
    """The byte order mark, by which some spreadsheets recognise UTF-8."""

    @classmethod
    def of(cls, content: bytes) -> Sheet:
        """Parse a file's bytes. Raises ValueError, which names the line, if they are not a table of labels."""
        text = _decode_utf8(content)
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
        for name in LABEL_COLUMNS[:2]:
            if sheet.columns.count(name) != 1:
                raise ValueError(f"line 1: the first line must name the columns {', '.join(LABEL_COLUMNS)}")
        return sheet

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names under which SQL reads the columns; columns without a meaning here are numbered."""
        names = column_names(self.header)
        first = {name: names.index(name) for name in (*LABEL_COLUMNS, *RULE_COLUMNS) if name in names}
        return tuple(name if first.get(name) == i else f"column{i}" for i, name in enumerate(names))

    def cell(self, row: list[str], name: str) -> str:
        place = self.columns.index(name) if name in self.columns else len(row)
        return row[place].strip(_WHITE_SPACE) if place < len(row) else ""

    def feature(self, row: list[str]) -> int | None:
        return _parse_feature(self.cell(row, "feature_id"))

    def with_labels(self, labels: Mapping[int, Label | None]) -> Sheet:
        """Return a sheet with these labels, in the features' rows or at the end. None removes a feature's rows."""
        given = {feature: label for feature, label in sorted(labels.items()) if label is not None}
        wanted = ["score"] if any(label.score is not None for label in given.values()) else []
        wanted += [name for name in RULE_COLUMNS if any(name in label.cells for label in given.values())]
        added = [name for name in wanted if name not in self.columns]
        changed = replace(self, header=[*self.header, *added], rows=[])
        for row in self.rows:
            feature = self.feature(row)
            if feature is None or feature not in labels:
                changed.rows.append(row)
            elif label := given.pop(feature, None):
                changed.rows.append(changed._row(row, feature, label))
        changed.rows += [changed._row([], feature, label) for feature, label in given.items()]
        return changed

    def _row(self, row: list[str], feature: int, label: Label) -> list[str]:
        """Return the row with this label; its other columns stay as they are."""
        score = "" if label.score is None else repr(label.score).removesuffix(".0")  # all digits
        texts = {name: _as_text(text) for name, text in {"label": label.text, **label.cells}.items()}
        cells = {"feature_id": str(feature), "score": score, **texts}
        wide = row + [""] * (len(self.header) - len(row))
        return [cells.get(name, held) for name, held in zip(self.columns, wide, strict=False)]

    def content(self) -> bytes:
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=self.delimiter, lineterminator="\n").writerows([self.header, *self.rows])
        return (self.mark + out.getvalue()).encode()


def _as_text(cell: str) -> str:
    return f"'{cell}" if _LIKE_FORMULA.match(cell) else cell


def column_names(header: list[str]) -> list[str]:
    """Return what each column of a table of labels means. Plain names count before aliases, earlier columns first."""
    plain = [name.strip().lower() for name in header]
    named = [_ALIASES.get(name, name) for name in plain]
    taken = {name: plain.index(name) if name in plain else named.index(name) for name in LABEL_COLUMNS if name in named}
    return [name if taken.get(name, i) == i else f"other {name}" for i, name in enumerate(named)]


def label_files(store: Store, sae: str) -> list[LabelFile]:
    """Return the readable label files of an SAE. Warns of files and lines that cannot be read."""
    found = []
    for path in _csv_paths(store, sae):
        try:
            sheet = Sheet.of(store.storage.fetch(path).read_bytes())
            literal(path.name).encode()
        except (ValueError, OSError) as error:
            log.warning(
                "labels: %s is left out: %s", sanitise(ascii(path.name)[1:-1]), sanitise(brief(str(error), 200))
            )
            continue
        _warn_of_lines(path.name, sheet)
        found.append(LabelFile(store.storage.location(path), path.stem, sheet.delimiter, sheet.columns))
    return found


def tables_beside_labels(store: Store, sae: str) -> list[TableBesideLabels]:
    """Return the tables of scores and mistakes of an SAE's labels. Warns of files that cannot be read."""
    folder, found = _folder_of_sae(store, sae), []
    for name in sorted(store.storage.names_below(folder)):
        source, _, ending = name.removesuffix(".parquet").rpartition(".")
        table = f"explanation_{ending}"
        if not name.endswith(".parquet") or table not in BESIDE_LABELS or "/" in name or name.startswith("."):
            continue
        try:
            literal(name).encode()
            if not pq.read_schema(store.storage.fetch(folder / name)).equals(BESIDE_LABELS[table]):
                raise ValueError("it has other columns")
        except (ValueError, OSError, pa.ArrowException) as error:
            problem = sanitise(brief(str(error), 200))
            log.warning("labels: %s is left out: %s", sanitise(ascii(name)[1:-1]), problem)
            continue
        found.append(TableBesideLabels(store.storage.location(folder / name), source, table))
    return found


def beside_labels_relation(files: Sequence[TableBesideLabels], table: str, tokens: str) -> str:
    """Return SQL for a table beside the labels, with the rows about one artefact of tokens and their source."""
    columns = ", ".join(BESIDE_LABELS[table].names)
    selected = [
        f"select {columns}, {literal(file.source)} as source from read_parquet({literal([unglobbed(file.location)])}, "
        f"hive_partitioning = false) where tokens = {literal(tokens)}"
        for file in files
        if file.table == table
    ]
    empty = f"select *, null::varchar as source from {no_rows(BESIDE_LABELS[table])}"
    return f"({' union all '.join(selected or [empty])})"


def labels_relation(files: Sequence[LabelFile]) -> str:
    """Return SQL that selects from the files. It leaves out rows that DuckDB cannot read."""
    return f"({' union all '.join(map(_select_labels, files))})"


def rules_relation(files: Sequence[LabelFile]) -> str | None:
    """Return SQL that selects the rules of the source `rules` with their figures; None if there is no such file."""
    for file in (file for file in files if file.source == RULES_SOURCE and "rule" in file.columns):
        rule = _UNQUOTED.format(_trimmed("rule"))
        kind = _trimmed("kind") if "kind" in file.columns else "null::varchar"
        figures = ", ".join(f"{_number_in(file, name)} as {name}" for name in ("precision", "recall", "score"))
        return f"(select {_FEATURE_ID} as feature_id, {rule} as rule, {kind} as kind, {figures} from {_sql_rows(file)})"
    return None


def _select_labels(file: LabelFile) -> str:
    label = _UNQUOTED.format(_trimmed("label"))
    return (
        f"select feature_id, label, {literal(file.source)} as source, score from ("
        f"select {_FEATURE_ID} as feature_id, {label} as label, {_number_in(file, 'score')} as score "
        f"from {_sql_rows(file)}) where feature_id is not null and label <> ''"
    )


def _sql_rows(file: LabelFile) -> str:
    columns = literal(dict.fromkeys(file.columns, "varchar"))
    options = (
        f"columns = {columns}, delim = {literal(file.delimiter)}, quote = '\"', escape = '\"', header = true, "
        "auto_detect = false, ignore_errors = true, null_padding = true, strict_mode = false, parallel = false, "
        "hive_partitioning = false"
    )
    return f"read_csv({literal([unglobbed(file.location)])}, {options})"


def _number_in(file: LabelFile, column: str) -> str:
    """Return SQL for a column as a finite number; null for anything else, and if the file lacks the column."""
    if column not in file.columns:
        return "null::double"
    number = f"try_cast({_trimmed(column)} as double)"
    return f"if(contains({column}, '_') or not isfinite({number}), null, {number})"


def _trimmed(column: str) -> str:
    return f"trim({column}, {literal(_WHITE_SPACE)})"


_FEATURE_ID = (
    f"case when regexp_full_match({_trimmed('feature_id')}, '[0-9]{{1,10}}') "
    f"then try_cast({_trimmed('feature_id')} as integer) end"
)


def put(store: Store, sae: str, source: str, labels: Mapping[int, Label | None], wait_seconds: float = 60) -> int:
    """Set labels of features in the file of a source; None removes one. Returns how many rows the file then has.

    Raises UserError if the file exists and cannot be read, so that a person's work is never overwritten, or if another
    command has been changing labels of this SAE all the time.
    """
    path = _folder_of_sae(store, sae) / f"{require_source(source)}.csv"
    with store.storage.locked(f"labels-{path.parent.name}", wait_seconds):
        found, tag = _current_sheet(store, path)
        sheet = found.with_labels(labels)
        if sheet.rows:
            store.storage.put_if_unchanged(path, sheet.content(), tag)
        else:
            store.storage.remove(path)
    return len(sheet.rows)


def read_cells(store: Store, sae: str, source: str, column: str) -> dict[int, str]:
    """Return the cells of a column in the file of a source, by feature; none without the file. Raises as `put` does."""
    sheet, _ = _current_sheet(store, _folder_of_sae(store, sae) / f"{require_source(source)}.csv")
    rows = ((sheet.feature(row), row) for row in sheet.rows)
    return {feature: sheet.cell(row, column) for feature, row in rows if feature is not None}


def clean_label(text: object, score: object, where: str) -> Label | None:
    """Return a label from outside, put on one line; None if the text is empty. Raises UserError."""
    line = " ".join(str("" if text is None else text).replace("\0", " ").split())
    if len(line) > _LONGEST_LABEL:
        raise UserError(f"{where}: the label has {len(line):,} characters; at most {_LONGEST_LABEL:,} are kept.")
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


def _folder_of_sae(store: Store, sae: str) -> Path:
    name = sae.removeprefix("saes/")
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{brief(sae)!r} is not the name of an SAE.")
    return store.root / "labels" / name


def _csv_paths(store: Store, sae: str) -> Iterator[Path]:
    folder = _folder_of_sae(store, sae)
    names = sorted(name for name in store.storage.names_below(folder) if name.endswith(".csv"))
    return (folder / name for name in names if "/" not in name and not name.startswith("."))


def _current_sheet(store: Store, path: Path) -> tuple[Sheet, str | None]:
    """Return the rows of a file as the store has it now, and its tag."""
    try:
        content, tag = store.storage.read(path)
        return Sheet.of(content), tag
    except FileNotFoundError:
        return Sheet(), None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {brief(str(error), 200)}.\nRepair it or move it away first.") from None


def require_source(name: str) -> str:
    """Return the name if it can be that of a source. Raises UserError."""
    if not re.fullmatch(r"\w(?:[\w .+-]{0,62}\w)?", name):
        raise UserError(f"The source is {brief(name)!r}; name it with letters, digits, spaces and . + - _, at most 64.")
    return name


def _decode_utf8(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: it is not UTF-8; save it as CSV in UTF-8") from None
    if "\0" in text:
        raise ValueError("it holds zero bytes, so it is not text")
    return text


def _parse_feature(cell: str) -> int | None:
    found = re.fullmatch(r"[0-9]{1,10}", cell)
    return int(found[0]) if found and int(found[0]) < 1 << 31 else None


def _warn_of_lines(name: str, sheet: Sheet) -> None:
    wrong = [(line, why) for line, row in zip(sheet.lines, sheet.rows, strict=True) if (why := _problem(sheet, row))]
    for line, why in wrong[:_LINES_SHOWN]:
        log.warning("labels: %s, line %d: %s", sanitise(name), line, why)
    if len(wrong) > _LINES_SHOWN:
        log.warning("labels: %s: %d more lines like these", sanitise(name), len(wrong) - _LINES_SHOWN)


def _problem(sheet: Sheet, row: list[str]) -> str | None:
    feature, score = sheet.cell(row, "feature_id"), sheet.cell(row, "score")
    if not any(map(str.strip, row)):
        return None
    if _parse_feature(feature) is None:
        return f"left out, as {brief(feature)!r} is not the number of a feature"
    with suppress(ValueError):
        if not score or ("_" not in score and math.isfinite(float(score))):
            return None
    return f"its score is left out, as {brief(score)!r} is not a number"
