"""What is known beside a run, written by hand: labels' scores, classes of tokens, effects of features on the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.features.schema import BESIDE_LABELS, EFFECTS, PROBE_TABLES, SPANS
from saeflow.store.artefact import Artefact
from saeflow.store.records import Kind
from saeflow.store.store import Store

Rows = Iterable[Mapping[str, Any]]

SCORED = {"model": "judge", "method": "detection", "stratum": "all", "n_unusable": 0, "settings": "{}"}
CHANGED = {"change": "zero", "ahead": 0, "band": 1, "set_to": 0.0, "loss": 1.0}
"""What rows have that do not say otherwise."""


def put_scores(store: Store, run: Artefact, source: str, scores: Rows, mistakes: Rows) -> None:
    """Write what a language model said of the labels of a source."""
    folder = store.root / "labels" / str(run.record.input("saes")).partition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    common = {**SCORED, "tokens": run.record.input("tokens")}
    for ending, rows in (("scores", scores), ("mistakes", mistakes)):
        schema = BESIDE_LABELS[f"explanation_{ending}"]
        table = pa.Table.from_pylist([{**common, **row} for row in rows], schema)
        pq.write_table(table, folder / f"{source}.{ending}.parquet")


def put_effects(store: Store, run: Artefact, effects: Rows, direct: Rows, name: str = "zeroed") -> None:
    """Publish a measurement of effects. Entries that moved are given as `up` and `down`: (vocab_id, before, after)."""
    rows = [_moved({"effect": name, **CHANGED, **row}) for row in effects]
    tables = {
        "effects": pa.Table.from_pylist(rows, EFFECTS["effects"]),
        "direct_effects": pa.Table.from_pylist([{"effect": name, **row} for row in direct], EFFECTS["direct_effects"]),
    }
    publish(store, "effects", name, run, tables)


def put_spans(store: Store, tokens: Artefact, name: str, spans: Iterable[tuple[str, int, int, int]]) -> None:
    """Publish an annotation: (class, document_id, first_token_id, last_token_id), in this order."""
    rows = [dict(zip(SPANS.names, span, strict=True)) for span in sorted(spans, key=lambda span: (span[0], span[2]))]
    publish(store, "annotations", name, tokens, {"spans": pa.Table.from_pylist(rows, SPANS)})


def put_classes(store: Store, run: Artefact, name: str, rows: Rows) -> None:
    """Publish a probe of an annotation. A figure that a row lacks is missing."""
    schema = PROBE_TABLES["feature_classes"]
    found = sorted(({"annotation": name, **row} for row in rows), key=lambda row: (row["class"], row["feature_id"]))
    tables = {table: schema.empty_table() for table, schema in PROBE_TABLES.items()}
    publish(store, "probes", name, run, {**tables, "feature_classes": pa.Table.from_pylist(found, schema)})


def publish(store: Store, kind: Kind, name: str, owner: Artefact, tables: Mapping[str, pa.Table]) -> None:
    """Publish tables, whatever they hold, as an artefact that belongs to tokens or to a run."""
    artefact = store.artefact(kind, name, "0f0f0f0f")
    with artefact.writing(), artefact.publish_folder({}, [owner.id], {}) as folder:
        for stem, table in tables.items():
            pq.write_table(table, folder / f"{stem}.parquet")


def _moved(row: dict[str, Any]) -> dict[str, Any]:
    for way in ("up", "down"):
        entries = row.pop(way, ())
        for place, what in enumerate(("ids", "before", "after")):
            row[f"{way}_{what}"] = [entry[place] for entry in entries]
    return row
