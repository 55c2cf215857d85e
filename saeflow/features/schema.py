"""The tables of a run, column by column, and which activation parts the record of a feature part says it holds.

data/README.md says what the columns mean. A part that an earlier saeflow made lacks some tables, which read as empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pyarrow as pa

from saeflow.recipe.fingerprint import fingerprint
from saeflow.store.records import PartRecord

ORDERS = ("feature_major", "token_major")
"""Every non-zero value, twice. The folders `low=<first>/high=<last>/` of a file say which values it may hold."""

TOP = 50
"""Features kept for each feature: those that fire with it, or are similar to it."""

TOP_VOCAB = 10
"""Vocabulary entries kept for each feature: those on which it fires most often."""

TOP_LOGITS = 20
"""Vocabulary entries kept for each feature: those that it raises most, and as many that it lowers most."""

MOST_SOURCES = 64
"""Sources with rows of their own in a part. All others are counted together."""

_ID, _N, _SUM = pa.int32(), pa.int64(), pa.float64()

PART_TABLES: dict[str, pa.Schema] = {
    "feature_stats": pa.schema(
        {"feature_id": _ID, "n_tokens": _N, "sum_value": _SUM, "sum_squares": _SUM, "max_value": _SUM}
    ),
    "feature_histogram": pa.schema({"feature_id": _ID, "bin": pa.int16(), "n_tokens": _N}),
    "feature_sources": pa.schema(
        {
            "feature_id": _ID, "source": pa.string(), "is_rest": pa.bool_(), "n_tokens": _N, "sum_value": _SUM,
            "sum_squares": _SUM,
        }
    ),
    "feature_positions": pa.schema({"feature_id": _ID, "band": pa.int16(), "n_tokens": _N, "sum_value": _SUM}),
    "feature_vocab": pa.schema({"feature_id": _ID, "vocab_id": _ID, "n_tokens": _N, "sum_value": _SUM}),
    "coactivation": pa.schema({"feature_id": _ID, "other_id": _ID, "n_both": _N}),
    "encoded_tokens": pa.schema({"source": pa.string(), "is_rest": pa.bool_(), "band": pa.int16(), "n_tokens": _N}),
}  # fmt: skip
"""One file each in a part, beside the two orders."""

LEFT_OUT_TABLE: dict[str, pa.Schema] = {
    "left_out": pa.schema({"token_id": _N, "vocab_id": _ID, "length": pa.float32()}),
}
"""Tokens whose vectors are too long: a file in the parts of runs with `activations.skip_norms_above`."""

RUN_TABLES: dict[str, pa.Schema] = {
    "similar": pa.schema({"feature_id": _ID, "other_id": _ID, "cosine": pa.float32()}),
    "logits": pa.schema({"feature_id": _ID, "vocab_id": _ID, "logit": pa.float32()}),
}
"""One file each beside the parts: they follow from the autoencoder and the model alone."""

RULES = pa.schema(
    {
        "feature_id": _ID, "rule": pa.string(), "kind": pa.string(), "precision": pa.float64(),
        "recall": pa.float64(), "score": pa.float64(),
    }
)  # fmt: skip

LABELS = pa.schema({"feature_id": _ID, "label": pa.string(), "source": pa.string(), "score": pa.float64()})

SPANS = pa.schema({"class": pa.string(), "document_id": _N, "first_token_id": _N, "last_token_id": _N})
"""Annotations: unbroken spans of tokens that have a class, both ends included."""

_FIGURES = (
    "auroc", "auroc_low", "auroc_high", "average_precision", "f1", "f1_low", "f1_high", "threshold", "precision",
    "recall", "lift", "correlation", "t", "p", "q",
)  # fmt: skip

PROBE_TABLES: dict[str, pa.Schema] = {
    "feature_classes": pa.schema(
        {"annotation": pa.string(), "class": pa.string(), "feature_id": _ID, "n_fires": _N, "n_both": _N}
        | dict.fromkeys(_FIGURES, pa.float64())
    ),
    "class_sizes": pa.schema(
        {"annotation": pa.string(), "class": pa.string(), "n_tokens": _N, "n_documents": _N, "share": pa.float64()}
    ),
    "sparse_probes": pa.schema(
        {
            "annotation": pa.string(), "class": pa.string(), "basis": pa.string(), "k": _ID, "auroc": pa.float64(),
            "f1": pa.float64(), "n_train": _N, "n_test": _N, "dimensions": pa.list_(_ID),
        }
    ),
}  # fmt: skip
"""One file each in a probe: each feature of a run against each class of annotations."""

_MOVED = [
    (f"{way}_{what}", pa.list_(pa.int32() if what == "ids" else pa.float32()))
    for way in ("up", "down")
    for what in ("ids", "before", "after")
]
EFFECTS: dict[str, pa.Schema] = {
    "effects": pa.schema(
        [
            ("effect", pa.string()), ("change", pa.string()), ("feature_id", _ID), ("token_id", _N),
            ("ahead", pa.int16()), ("document_id", _N), ("band", pa.int16()), ("value", pa.float32()),
            ("set_to", pa.float32()), ("loss", pa.float32()), ("loss_change", pa.float32()), ("kl", pa.float32()),
            *_MOVED,
        ]
    ),
    "direct_effects": pa.schema(
        [("effect", pa.string()), ("feature_id", _ID), ("vocab_id", _ID), ("logit", pa.float32())]
    ),
}  # fmt: skip
"""Tables of an artefact `effects/NAME-FP`: what the model does when features are changed."""
EXPLANATION_SCORES = pa.schema(
    {
        "feature_id": _ID, "model": pa.string(), "tokens": pa.string(), "method": pa.string(), "stratum": pa.string(),
        "score": _SUM, "low": _SUM, "high": _SUM, "n": _N, "n_unusable": _N, "settings": pa.string(),
    }
)  # fmt: skip
"""Scores of labels, beside the file of the labels: `<source>.scores.parquet`."""

EXPLANATION_MISTAKES = pa.schema(
    {
        "feature_id": _ID, "model": pa.string(), "tokens": pa.string(), "method": pa.string(), "stratum": pa.string(),
        "token_id": _N, "asked": pa.bool_(), "answered": pa.bool_(),
    }
)  # fmt: skip
"""Examples that were judged wrongly: `<source>.mistakes.parquet`."""

BESIDE_LABELS = {"explanation_scores": EXPLANATION_SCORES, "explanation_mistakes": EXPLANATION_MISTAKES}

VALUES: dict[str, pa.Schema] = {
    "feature_major": pa.schema({"feature_id": _ID, "token_id": _N, "value": pa.float32()}),
    "token_major": pa.schema({"token_id": _N, "feature_id": _ID, "value": pa.float32()}),
}

SAMPLE_TABLES: dict[str, pa.Schema] = {
    "sample": VALUES["feature_major"],
    "sample_documents": pa.schema({"document_id": _N, "first_token_id": _N, "n_tokens": _N}),
}
"""The values of a sample of whole documents, and these documents: one file each in a part."""

FIRST_INDEX = 10_000_000
"""The index of a compacted part is that of its first activation part plus this number."""


def indices_held(part: PartRecord) -> list[int]:
    """Return the index of each activation part whose values a part holds."""
    return [part.index] if part.index < FIRST_INDEX else [int(index) for index in part.inputs]


def covered(part: PartRecord) -> dict[int, str]:
    """Return the index of each activation part whose values a part holds, with a digest of its inputs."""
    if part.index < FIRST_INDEX:
        return {part.index: stands_for(part.inputs)}
    return {int(index): digest for index, digest in part.inputs.items()}


def stands_for(inputs: Mapping[str, str]) -> str:
    """Return a digest of the inputs of values, then the digest of the hidden documents that were left out."""
    hidden = inputs.get("hidden", "")
    return f"{fingerprint(dict(inputs))} {hidden}".strip()


def hidden_digest_of(digest: str) -> str:
    """Return the digest of hidden documents from that of all inputs; empty if there were none."""
    return digest.partition(" ")[2]


def token_ranges(indices: Iterable[int], tokens: Iterable[PartRecord], length: int) -> list[tuple[int, int]] | None:
    """Return first and last tokens of the parts with these indices, neighbours as one; None if a record lacks them."""
    counts = {part.index: part.counts for part in tokens}
    ranges: list[tuple[int, int]] = []
    for index in sorted(indices):
        if not {"first_sequence", "n_sequences"} <= counts.get(index, {}).keys():
            return None
        first = counts[index]["first_sequence"] * length
        end = first + counts[index]["n_sequences"] * length
        if ranges and ranges[-1][1] == first - 1:
            first = ranges.pop()[0]
        if end > first:
            ranges.append((first, end - 1))
    return ranges


def holding(parts: Iterable[PartRecord]) -> str:
    """Return a digest of the values in these parts: it does not depend on how they are cut or merged."""
    return fingerprint(sorted(item for part in parts for item in covered(part).items()))


def has_every_table(part: PartRecord) -> bool:
    """True if no statistics are missing, as they are in a part that an earlier saeflow made."""
    return _has(part, PART_TABLES)


def has_sample(part: PartRecord) -> bool:
    return _has(part, SAMPLE_TABLES)


def is_of_now(part: PartRecord) -> bool:
    """True if this saeflow, merging the part alone, would write no further table."""
    return has_every_table(part) and has_sample(part)


def _has(part: PartRecord, tables: Iterable[str]) -> bool:
    return {f"{table}.parquet" for table in tables} <= {file.name for file in part.files}


ENDS_IN_NAME = r"/low=(\d{1,18})/high=(\d{1,18})/[^/]*$"
"""What in a file's name says the first and last feature, or token, that it may hold. Larger numbers say nothing."""


def ends_in_name(name: str) -> tuple[int, int] | None:
    """Return the first and last feature, or token, that a file may hold; None for an older file, which may hold any."""
    found = re.search(ENDS_IN_NAME, name)
    return (int(found[1]), int(found[2])) if found else None
