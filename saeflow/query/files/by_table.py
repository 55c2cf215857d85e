"""The files of a run by table, as the records of its parts, and of the parts of its tokens, name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import filterfalse

from saeflow.corpus.token_parts import has_marks
from saeflow.features.schema import LEFT_OUT_TABLE, ORDERS, PART_TABLES, RUN_TABLES, SAMPLE_TABLES
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

LARGEST_FIRST = frozenset({*LEFT_OUT_TABLE, *SAMPLE_TABLES})
"""Tables that are empty in some parts. DuckDB takes all files of a table to have as many rows as the first.

If that one is empty, a join reads the whole table into memory, although it wants a few of its rows.
"""


def files_by_table(
    artefact: Artefact, shown: Sequence[PartRecord], tokens: Artefact, token_parts: Sequence[PartRecord]
) -> dict[str, Sequence[str]]:
    """Return a run's files by table: those of its parts, of the token parts, and those beside the parts."""
    for each in (artefact, tokens):
        each.storage.note_recorded(each.path, each.record.files)
    own = {file.name for file in artefact.record.files}
    beside = (table for table in RUN_TABLES if f"{table}.parquet" in own)
    return {
        **_files_of_parts(artefact, shown, [*ORDERS, *PART_TABLES, *LEFT_OUT_TABLE, *SAMPLE_TABLES]),
        **_files_of_parts(tokens, token_parts, ["tokens", "documents", "vocab_blocks"]),
        "unmarked_tokens": _files_of_parts(tokens, filterfalse(has_marks, token_parts), ["tokens"])["tokens"],
        "vocab": [tokens.storage.location(tokens.path / "vocab.parquet")],
        **{table: [artefact.storage.location(artefact.path / f"{table}.parquet")] for table in beside},
    }


def _files_of_parts(artefact: Artefact, parts: Iterable[PartRecord], tables: Iterable[str]) -> dict[str, Sequence[str]]:
    """Return the parts' files by table: `table.parquet`, or the files in a folder `table/`."""
    found: dict[str, list[str]] = {table: [] for table in tables}
    largest = dict.fromkeys(LARGEST_FIRST, -1)
    for part in parts:
        path = artefact.part_path(part)
        artefact.storage.note_recorded(path, part.files)
        folder = artefact.storage.location(path)  # there are millions of files: no Path for each
        for file in part.files:
            table = file.name.partition("/")[0].removesuffix(".parquet")
            if table in found and file.name.endswith(".parquet"):
                found[table].append(f"{folder}/{file.name}")
                if table in largest and largest[table] < file.n_bytes:
                    largest[table] = file.n_bytes
                    found[table].insert(0, found[table].pop())
    return dict(found)
