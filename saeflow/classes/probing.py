"""The artefact `probes/NAME-FP`: every feature of a run against every class of the annotations NAME.

It is computed whole and appears in one rename. Equal inputs and settings give equal bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.classes.best import BestEntries
from saeflow.classes.intervals import FIGURES_WITH_INTERVALS, N_REPLICATES, Intervals, draw_documents, intervals
from saeflow.classes.membership import Membership, Spans, membership, require_spans
from saeflow.classes.scores import Scores, score_classes
from saeflow.classes.values import ValueFiles
from saeflow.features.beside import has_table, newest_annotations, require_table
from saeflow.features.schema import PROBE_TABLES, SPANS, holding
from saeflow.query.connection import connect
from saeflow.query.outside.approximation import FEWEST_DOCUMENTS, READ_TO_COUNT_SAMPLE, sampled_documents
from saeflow.query.runs import Run
from saeflow.recipe.fingerprint import fingerprint
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import require_share_of_memory
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import brief, did_you_mean
from saeflow.store.artefact import Artefact
from saeflow.store.files import ROW_GROUP
from saeflow.store.store import Store, classes_of

_PAIR_BYTES = 320
"""Memory that a feature and a class take: their counts, their figures and their row."""

QUICK_VALUES = 100_000_000
"""Values that two cores score in about fifteen seconds: a probe of no more is not estimated before."""

TABLES = {name: f"{name}.parquet" for name in PROBE_TABLES}


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe. Equal settings give equal bytes."""

    classes: tuple[str, ...] = ()
    """Classes to probe; empty for all."""
    n_best: int = 3
    """Features of each class, those with the largest AUROC, that get bootstrap intervals."""
    replicates: int = N_REPLICATES
    seed: int = 0
    sparse: bool = False
    """True: k-sparse probes too."""


def find_annotations(store: Store, run: Run, name: str) -> Artefact:
    """Return the annotations of this name of the run's tokens. Raises UserError."""
    tokens = store.input_of(run.artefact, "tokens")
    there = newest_annotations(store, tokens.id)
    if name not in there:
        known = did_you_mean(name, there) if there else "There are none yet: saeflow annotate NAME FILE."
        raise UserError(f"The tokens of {run.schema} have no annotations {brief(name)!r}. {known}")
    return there[name]


def probe(
    store: Store, run: Run, name: str, settings: ProbeSettings, threads: int = 0, progress: Progress | None = None
) -> Artefact:
    """Return the probe of a run with these annotations, computed if there is none yet. Raises UserError."""
    annotations = find_annotations(store, run, name)
    spans = read_spans(annotations, settings.classes)
    facts = facts_of(run, annotations, settings)
    target = store.artefact("probes", name, fingerprint(facts))
    with target.writing():
        if target.complete():
            target.renew()
            return target
        began, progress = time.monotonic(), progress or Progress(verbosity=-1)
        _require_room_for_scores(int(run.artefact.fact("n_features")), len(spans.classes))
        members = members_of(store, run, spans)
        tables = {**score_tables(run, name, members, settings, threads, progress)}
        if settings.sparse:
            from saeflow.classes.sparse_probes import sparse_table

            tables["sparse_probes"] = sparse_table(store, run, name, members, settings.seed, threads, progress)
        inputs = [run.artefact.id, annotations.id]
        with target.publish_folder(facts, inputs, {"seconds": time.monotonic() - began}) as folder:
            write_probe_tables(folder, tables)
    return target


def _require_room_for_scores(n_features: int, n_classes: int) -> None:
    what = f"{n_features:,} features and {n_classes:,} classes take"
    remedy = "Name fewer classes with --class, or use a larger machine."
    require_share_of_memory(_PAIR_BYTES * n_features * n_classes, what, remedy)


def still_shown(store: Store, made: Artefact) -> list[str]:
    """Return in words what readers see of earlier probes beside this one: other classes, and sparse probes."""
    found = []
    for each in store.shown_of("probes", made.record.input("features") or "").get(made.name, [])[1:]:
        sparse = has_table(each, "sparse_probes") and not has_table(made, "sparse_probes")
        others = bool(classes_of(made)) and classes_of(each) != classes_of(made)
        found.append(f"{' and '.join(['other classes'] * others + ['sparse probes'] * sparse)} of {each.id}")
    return found


def facts_of(run: Run, annotations: Artefact, settings: ProbeSettings) -> dict[str, Any]:
    """Return what a probe follows from: run and annotations, the values that are shown, and the settings."""
    values = fingerprint(holding(run.artefact.published().parts), list(run.left_out), [*map(int, run.hidden)])
    chosen = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {"run": run.artefact.id, "annotations": annotations.id, "values": values, **chosen}


def read_spans(annotations: Artefact, wanted: Sequence[str] = ()) -> Spans:
    """Return the spans of annotations, of all classes or of the wanted ones.

    Raises UserError for unknown classes, if no span is left, and for a table that is not as saeflow writes it.
    """
    remedy = f"Make them again: saeflow annotate {annotations.name} FILE."
    path = require_table(annotations, "spans", SPANS, remedy)
    table = pq.read_table(path, columns=["class", "first_token_id", "last_token_id"])
    if any(column.null_count for column in table.columns):
        raise UserError(f"{annotations.id} cannot be read: a span lacks its class or a token.\n{remedy}")
    column = table.column("class").combine_chunks().dictionary_encode()
    names = column.dictionary.to_pylist()
    for each in wanted:
        if each not in names:
            raise UserError(f"{annotations.id} has no class {brief(each)!r}. {did_you_mean(each, names)}")
    if not names:
        raise UserError(
            f"{annotations.id} has no span left: its documents are forgotten.\n"
            f"Annotate other tokens: saeflow annotate {annotations.name} FILE."
        )
    kept = {name: number for number, name in enumerate(sorted(set(wanted) or names))}
    places = np.array([kept.get(name, -1) for name in names], np.int64)
    numbers = places[column.indices.to_numpy()]
    firsts, lasts = (table.column(name).to_numpy() for name in ("first_token_id", "last_token_id"))
    spans = Spans(tuple(kept), numbers[numbers >= 0], firsts[numbers >= 0], lasts[numbers >= 0])
    try:
        require_spans(spans)
    except ValueError as error:
        raise UserError(f"{annotations.id} cannot be read: {error}.\n{remedy}") from error
    return spans


def members_of(store: Store, run: Run, spans: Spans, sampled: bool = False) -> Membership:
    """Return the classes and documents of the run's encoded tokens, or of those of its sample.

    Raises UserError if there is none.
    """
    with connect(store, run.schema, names=("stg_tokens", "is_encoded", "stg_sample_documents")) as connection:
        found = connection.sql(_SAMPLED_TOKENS if sampled else _ENCODED_TOKENS).to_arrow_table()
    if not len(found):
        raise UserError(f"{run.schema} has no encoded tokens.")
    token_ids, document_ids = (found.column(name).to_numpy() for name in ("token_id", "document_id"))
    return membership(spans, token_ids.astype(np.int64), document_ids.astype(np.int64))


_ENCODED_TOKENS = """
select token_id, document_id
from stg_tokens
where mask and is_encoded(token_id, vocab_id)
order by token_id
"""
_SAMPLED_TOKENS = """
select token_id, document_id
from stg_tokens
where mask and is_encoded(token_id, vocab_id) and document_id in (select document_id from stg_sample_documents)
order by token_id
"""


def estimate(
    store: Store, run: Run, name: str, settings: ProbeSettings, threads: int = 0
) -> dict[str, pa.Table] | None:  # fmt: skip
    """Return the tables that a probe of the sampled documents alone would have.

    None if the exact figures are quick, or there already, or if there is no sample, or one of few documents. Raises
    UserError as `probe` does.
    """
    annotations = find_annotations(store, run, name)
    made = store.artefact("probes", name, fingerprint(facts_of(run, annotations, settings)))
    n_values = sum(part.count("n_values") for part in run.artefact.published().parts)
    if n_values <= QUICK_VALUES or not run.shape["has_sample"] or made.complete():
        return None
    with connect(store, run.schema, names=READ_TO_COUNT_SAMPLE) as connection:
        if sampled_documents(connection) < FEWEST_DOCUMENTS:
            return None
    spans = read_spans(annotations, settings.classes)
    _require_room_for_scores(int(run.artefact.fact("n_features")), len(spans.classes))
    members = members_of(store, run, spans, sampled=True)
    if members.n_documents < FEWEST_DOCUMENTS:
        return None
    return score_tables(run, name, members, settings, threads, values="sample")


def score_tables(
    run: Run, name: str, members: Membership, settings: ProbeSettings, threads: int = 0,
    progress: Progress | None = None, values: str = "feature_major",
) -> dict[str, pa.Table]:  # fmt: skip
    """Return the tables of the figures, by name. `values` is the table they are counted from."""
    files = ValueFiles.of(run, values)
    held = BestEntries(settings.n_best)
    scores = score_classes(files, members, threads, held=held, progress=progress)
    weights = draw_documents(members.n_documents, settings.seed, settings.replicates)
    found = intervals(files, members, scores, settings.n_best, weights, threads, held, progress)
    return {
        "feature_classes": _pair_table(name, members, scores, found),
        "class_sizes": _class_table(name, members),
    }


def _pair_table(name: str, members: Membership, scores: Scores, found: Intervals) -> pa.Table:
    """One row for each class and feature that fires, sorted by class, then feature. NaN becomes null."""
    live, n_classes = np.flatnonzero(scores.fires > 0), len(members.classes)
    arrays: dict[str, np.ndarray] = {"n_both": scores.n_both}
    for figure in FIGURES_WITH_INTERVALS:
        arrays[figure] = getattr(scores, figure)
        arrays |= {f"{figure}_low": found.low[figure], f"{figure}_high": found.high[figure]}
    others = ("average_precision", "threshold", "precision", "recall", "lift", "correlation", "t", "p", "q")
    arrays |= {figure: getattr(scores, figure) for figure in others}
    columns: dict[str, pa.Array] = {
        "annotation": _repeated([name], len(live) * n_classes),
        "class": _repeated(members.classes, len(live)),
        "feature_id": pa.array(np.tile(live.astype(np.int32), n_classes)),
        "n_fires": pa.array(np.tile(scores.fires[live], n_classes)),
    }
    columns |= {key: pa.array(array[live].T.ravel(), from_pandas=True) for key, array in arrays.items()}
    names = PROBE_TABLES["feature_classes"].names
    return pa.table({name: columns[name] for name in names})


def _class_table(name: str, members: Membership) -> pa.Table:
    columns = {
        "annotation": [name] * len(members.classes),
        "class": list(members.classes),
        "n_tokens": members.class_tokens,
        "n_documents": (members.document_classes > 0).sum(0),
        "share": members.class_tokens / members.n_tokens,
    }
    return pa.table(columns, PROBE_TABLES["class_sizes"])


def _repeated(names: Sequence[str], each: int) -> pa.DictionaryArray:
    indices = np.repeat(np.arange(len(names), dtype=np.int32), each)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(list(names), pa.string()))


def write_probe_tables(folder: Path, tables: dict[str, pa.Table]) -> None:
    for name, table in tables.items():
        split = [field.name for field in table.schema if pa.types.is_floating(field.type)]
        others = [field.name for field in table.schema if field.name not in split and field.name != "dimensions"]
        pq.write_table(
            table.replace_schema_metadata(), folder / TABLES[name], compression="zstd", row_group_size=ROW_GROUP,
            use_dictionary=others, column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"), store_schema=False,
        )  # fmt: skip


def table_of(made: Artefact, name: str) -> pa.Table:
    """Return a table of a probe."""
    return pq.read_table(made.own_file(TABLES[name]))


def best_of_each_class(sizes: pa.Table, pairs: pa.Table) -> list[dict[str, Any]]:
    """Return for each class its size and the figures of the feature with the largest AUROC, the lower of equal ones.

    The figures are None if no feature fires in the class.
    """
    rows = []
    for size in sizes.to_pylist():
        found = pairs.filter((pc.field("class") == size["class"]) & (pc.field("n_both") > 0))
        order = [("auroc", "descending"), ("feature_id", "ascending")]
        best = found.sort_by(order).slice(0, 1).to_pylist() if len(found) else []
        nothing = dict.fromkeys(PROBE_TABLES["feature_classes"].names)
        rows.append(nothing | (best[0] if best else {}) | size)
    return rows
