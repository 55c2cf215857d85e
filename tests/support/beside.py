"""What is known beside a run, written by hand: scores of labels, and effects of features on the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.features.schema import BESIDE_LABELS, EFFECTS
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store

Rows = Iterable[Mapping[str, Any]]


def put_scores(store: Store, run: Artefact, source: str, scores: Rows, mistakes: Rows) -> None:
    """Write what a language model said of the labels of a source. A column that a row lacks has a value of its own."""
    tokens, sae = run.record.input("tokens"), run.record.input("saes")
    folder = store.root / "labels" / str(sae).partition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "model": "judge",
        "tokens": tokens,
        "method": "detection",
        "stratum": "all",
        "n_unusable": 0,
        "settings": "{}",
    }
    for ending, rows in (("scores", scores), ("mistakes", mistakes)):
        schema = BESIDE_LABELS[f"explanation_{ending}"]
        table = pa.Table.from_pylist(
            [{name: (common | dict(row)).get(name) for name in schema.names} for row in rows], schema
        )
        pq.write_table(table, folder / f"{source}.{ending}.parquet")


def put_effects(store: Store, run: Artefact, effects: Rows, direct: Rows, name: str = "zeroed") -> None:
    """Publish a measurement of effects. Entries that moved are given as `up` and `down`: (vocab_id, before, after)."""
    artefact = store.artefact("effects", name, "0f0f0f0f")
    with artefact.writing(), artefact.publish_folder({}, [run.id], {}) as folder:
        rows = [
            _moved({"effect": name, "change": "zero", "ahead": 0, "band": 1, "set_to": 0.0, "loss": 1.0} | dict(row))
            for row in effects
        ]
        pq.write_table(pa.Table.from_pylist(rows, EFFECTS["effects"]), folder / "effects.parquet")
        rows = [{"effect": name} | dict(row) for row in direct]
        pq.write_table(pa.Table.from_pylist(rows, EFFECTS["direct_effects"]), folder / "direct_effects.parquet")


def _moved(row: dict[str, Any]) -> dict[str, Any]:
    for way in ("up", "down"):
        entries = row.pop(way, ())
        for place, what in enumerate(("ids", "before", "after")):
            row[f"{way}_{what}"] = [entry[place] for entry in entries]
    return row
