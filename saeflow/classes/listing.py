"""List the annotations of a run, and remove them."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from saeflow.classes.annotations import CLASS_COLUMNS, CLASSES
from saeflow.features.beside import can_be_read, newest_annotations
from saeflow.query import runs
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, did_you_mean
from saeflow.store.store import Store, owner_of


def tokens_id_of(store: Store, run: str | None) -> str:
    """Return the id of the tokens of a run; of the newest if it is not named. Raises UserError."""
    chosen = runs.pick_run(store, runs.runs(store), run)
    return store.input_of(chosen.artefact, "tokens").id


def annotations_of(store: Store, run: str | None) -> list[dict[str, Any]]:
    """Return a row for each annotation of a run and each of its classes, as they were published.

    Forgotten documents count until `saeflow compact`; the question `annotations` leaves them out at once. Annotations
    whose table of classes cannot be read are left out with a warning.
    """
    found = newest_annotations(store, tokens_id_of(store, run))
    return [
        {"annotation": name, **row}
        for name, each in found.items()
        if can_be_read(each, "classes", CLASS_COLUMNS)
        for row in pq.read_table(each.own_file(CLASSES)).to_pylist()
        if None not in row.values()
    ]


def remove_annotations(store: Store, run: str | None, name: str) -> list[str]:
    """Remove every annotation of this name that the run's tokens have, older ones too. Return their ids.

    Raises UserError if there is none, or if another run is writing one of them.
    """
    tokens = tokens_id_of(store, run)
    mine = [each for each in store.artefacts("annotations") if owner_of(each) == tokens]
    chosen = [each for each in mine if each.name == name]
    if not chosen:
        hint = did_you_mean(name, sorted({each.name for each in mine}))
        raise UserError(f"{tokens} has no annotations {brief(name)!r}. {hint}")
    for each in chosen:
        with each.writing():
            each.remove(each.path)
    return [each.id for each in chosen]
