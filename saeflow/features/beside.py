"""What was found out beside a run: annotations of its tokens, probes, and effects of its features on the model.

A store may come from a stranger. A table whose columns are not those that saeflow writes is left out with a warning, so
that the run can still be asked everything else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.features.schema import EFFECTS, PROBE_TABLES, SPANS
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import HOSTILE, brief, sanitise
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store, classes_of

log = logging.getLogger(__name__)

_REMEDIES = {"annotations": "annotate {} FILE", "probes": "probe {}", "effects": "effects RUN --name {} --features …"}

SPANS_FILE = "spans.parquet"
"""The spans of annotations, in their artefact."""


@dataclass(frozen=True)
class ProbeFile:
    """A table of a probe that readers see."""

    location: str
    table: str
    without: tuple[str, ...]
    """Classes whose rows are not read, because a newer probe has them."""


def newest_annotations(store: Store, tokens: str) -> dict[str, Artefact]:
    """Return the annotations that questions about these tokens see, by name: the newest whole artefact of each name.

    `tokens` is an id such as `tokens/demo-0123abcd`. A name that holds characters a terminal obeys is left out.
    """
    found = store.newest_of("annotations", tokens)
    return {name: each for name, each in found.items() if name.isprintable() and not HOSTILE.search(name)}


def span_files(store: Store, tokens: str) -> dict[str, str]:
    """Return where the spans of each of the newest annotations lie, by name."""
    found = newest_annotations(store, tokens)
    return {name: _location(each, "spans") for name, each in found.items() if can_be_read(each, "spans", SPANS)}


def probe_files(store: Store, run: str) -> list[ProbeFile]:
    """Return the tables that readers see of the probes of a run. `run` is the id of its artefact.

    A table or class that the newest probe of a name lacks comes from an earlier one of the same values.
    """
    found = []
    for shown in store.shown_of("probes", run).values():
        for table, schema in PROBE_TABLES.items():
            newer = list[str]()
            for each in (each for each in shown if has_table(each, table)):
                if can_be_read(each, table, schema):
                    found.append(ProbeFile(_location(each, table), table, tuple(newer)))
                classes = classes_of(each)
                if not classes:
                    break
                newer += classes
    return found


def effect_files(store: Store, run: str) -> dict[str, list[str]]:
    """Return where the tables of the newest effects of each name lie, by table. `run` is the id of its artefact."""
    newest = store.newest_of("effects", run).values()
    return {
        table: [_location(each, table) for each in newest if can_be_read(each, table, schema)]
        for table, schema in EFFECTS.items()
    }


def has_table(artefact: Artefact, table: str) -> bool:
    return f"{table}.parquet" in {file.name for file in artefact.record.files}


def require_table(artefact: Artefact, table: str, schema: pa.Schema, remedy: str) -> Path:
    """Return the path of a table, to be read. Raises UserError if it has other columns than saeflow writes."""
    if problem := _problem_of_table(artefact, table, schema):
        raise UserError(f"{artefact.id} cannot be read: {problem}.\n{remedy}")
    return artefact.own_file(f"{table}.parquet")


def can_be_read(artefact: Artefact, table: str, schema: pa.Schema) -> bool:
    """True if a table has the columns that saeflow writes. Warns if it has not."""
    problem = _problem_of_table(artefact, table, schema) if has_table(artefact, table) else "it is missing"
    if problem:
        remedy = _REMEDIES[artefact.kind].format(artefact.name)
        log.warning(
            "%s: %s.parquet is left out: %s. Make it again: saeflow %s",
            sanitise(artefact.id), table, problem, sanitise(remedy),
        )  # fmt: skip
    return not problem


def _problem_of_table(artefact: Artefact, table: str, schema: pa.Schema) -> str | None:
    try:
        found = _read_schema(artefact, f"{table}.parquet")
    except (OSError, pa.ArrowException) as error:
        return sanitise(brief(str(error), 200))
    for wanted in schema:
        if wanted.name not in found.names:
            return f"it has no column {wanted.name}"
        if found.field(wanted.name).type != wanted.type:
            kind = sanitise(brief(str(found.field(wanted.name).type), 40))
            return f"its column {wanted.name} is {kind}, but it must be {wanted.type}"
    return None


def _read_schema(artefact: Artefact, name: str) -> pa.Schema:
    """Read the columns of a table from its end alone: in a bucket the table is not fetched."""
    with artefact.storage.open(artefact.path / name) as file:
        n_bytes = int.from_bytes(file.read(max(file.n_bytes - 8, 0), 8)[:4], "little") + 8
        n_bytes = min(n_bytes, file.n_bytes)
        return pq.read_schema(pa.BufferReader(file.read(file.n_bytes - n_bytes, n_bytes)))


def _location(artefact: Artefact, table: str) -> str:
    return artefact.storage.location(artefact.path / f"{table}.parquet")
