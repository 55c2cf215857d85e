"""The few files that one question reads.

DuckDB looks at every file that a statement names: 30 microseconds each, whatever it reads of it. So the views of
values read the files that a variable of the connection lists. Before a question about known features, or a known
token, it lists those that may hold them; afterwards, all of them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from saeflow.features.schema import ends_in_name
from saeflow.query.files.quoting import identifier, literal, unglobbed

FEATURE_PARAMETERS = ("feature", "other", "features", "with_feature", "without_feature")
"""Parameters of questions that say of which features values are read."""

TOKEN = "token"
"""The parameter that says of which token values are read."""

_LISTS = "main.lists_of_files"
_KEPT = pa.schema({"name": pa.string(), "files": pa.list_(pa.string())})


class FileRanges:
    """The files of one order, each with the first and last feature, or token, that its name says it may hold."""

    def __init__(self, paths: Sequence[str]) -> None:
        found = [(path, ends) for path in paths if (ends := ends_in_name(path))]
        self.paths = [path for path, _ in found]
        self._lows, self._highs = np.array([ends for _, ends in found], np.int64).reshape(-1, 2).T

    def holding(self, numbers: Collection[int]) -> list[str]:
        """Return the files that may hold one of these features, or tokens. At least one: DuckDB reads no empty list."""
        wanted = np.zeros(len(self.paths), bool)
        for number in numbers:
            wanted |= (self._lows <= number) & (number <= self._highs)
        wanted[0] |= not wanted.any()
        return [self.paths[place] for place in np.flatnonzero(wanted)]


class FileLists:
    """SQL for the lists of files of one run's views, as its connection or another program reads them."""

    def __init__(self, number: int | None = None, in_variables: bool = False) -> None:
        """`number` is the run's in its connection; None for SQL that other programs run.

        `in_variables`: views read lists that `kept` has, from variables that `keep` sets later.
        """
        self.number, self._in_variables = number, in_variables
        self.kept: dict[str, list[str]] = {}

    def listed(self, table: str, paths: Sequence[str], may_be_few: bool = False) -> str:
        """`may_be_few`: a question may say which files it needs."""
        files = [unglobbed(path) for path in paths]
        listed = self._variable(table, files) if self._in_variables else literal(files)
        if self.number is None or not may_be_few:
            return listed
        return f"coalesce(getvariable({literal(_few(table, self.number))}), {listed})"

    def _variable(self, table: str, files: list[str]) -> str:
        name = f"files_{len(self.kept)}_of_{table}_{self.number}"
        self.kept[name] = files
        return f"getvariable({literal(name)})"

    def outline(self) -> Iterator[str]:
        """Yield SQL that lists one file of each list: enough to make views, which have its columns and types."""
        for name, files in self.kept.items():
            yield f"set variable {identifier(name)} = {literal(files[:1])}"


def keep_lists(connection: duckdb.DuckDBPyConnection, every: Iterable[FileLists]) -> None:
    """Keep lists of files where each cursor finds them, and list them here."""
    kept = {name: files for lists in every for name, files in lists.kept.items()}
    if not kept:
        return
    rows = pa.table({"name": [*kept], "files": pa.array([*kept.values()], pa.list_(pa.string()))}, _KEPT)
    connection.register("lists_to_keep", rows)
    connection.execute(f"create or replace table {_LISTS} as from lists_to_keep")
    connection.unregister("lists_to_keep")
    list_all(connection)


def list_all(cursor: duckdb.DuckDBPyConnection) -> None:
    """Let a new cursor read what its connection reads: variables are the cursor's own."""
    try:
        names = cursor.execute(f"select name from {_LISTS}").fetchall()
    except duckdb.CatalogException:  # every view names its files itself
        return
    for (name,) in names:
        kept = f"select files from {_LISTS} where name = {literal(name)}"
        cursor.execute(f"set variable {identifier(name)} = ({kept})")


@contextlib.contextmanager
def only_files_for(
    cursor: duckdb.DuckDBPyConnection, ranges: Mapping[str, FileRanges], number: int | None, values: Mapping[str, Any]
) -> Iterator[None]:
    """While open, the run's views of values read the files that these arguments of a question can be about."""
    chosen = chosen_files(ranges, number, values)
    try:
        for table, paths in chosen.items():
            files = [unglobbed(path) for path in paths]
            cursor.execute(f"set variable {identifier(_few(table, number))} = ?", [files])
        yield
    finally:
        for table in chosen:
            cursor.execute(f"reset variable {identifier(_few(table, number))}")


def chosen_files(
    ranges: Mapping[str, FileRanges], number: int | None, values: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return the files of values that these arguments can be about, by table; no entry for a table that is read whole.

    `number` is the run's in its connection; without one no file can be chosen.
    """
    features = [each for name in FEATURE_PARAMETERS for each in as_list(values.get(name))]
    wanted = {"feature_major": features, "token_major": as_list(values.get(TOKEN))}
    return {
        table: ranges[table].holding(numbers)
        for table, numbers in wanted.items()
        if number is not None and numbers and ranges[table].paths and all(isinstance(each, int) for each in numbers)
    }


def as_list(value: object) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _few(table: str, number: int | None) -> str:
    return f"few_files_of_{table}_{number}"
