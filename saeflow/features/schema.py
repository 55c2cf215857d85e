"""The tables of a run, column by column, for the code that writes them and the code that reads them.

data/README.md says what they mean. A part that an earlier saeflow made lacks some tables, which read as empty.
"""

from __future__ import annotations

import pyarrow as pa

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

PART_TABLES: dict[str, pa.Schema] = {
    "feature_stats": pa.schema(
        {
            "feature_id": pa.int32(),
            "n_tokens": pa.int64(),
            "sum_value": pa.float64(),
            "sum_squares": pa.float64(),
            "max_value": pa.float64(),
        }
    ),
    "feature_histogram": pa.schema({"feature_id": pa.int32(), "bin": pa.int16(), "n_tokens": pa.int64()}),
    "feature_sources": pa.schema(
        {
            "feature_id": pa.int32(),
            "source": pa.string(),
            "is_rest": pa.bool_(),
            "n_tokens": pa.int64(),
            "sum_value": pa.float64(),
            "sum_squares": pa.float64(),
        }
    ),
    "feature_positions": pa.schema(
        {"feature_id": pa.int32(), "band": pa.int16(), "n_tokens": pa.int64(), "sum_value": pa.float64()}
    ),
    "feature_vocab": pa.schema(
        {"feature_id": pa.int32(), "vocab_id": pa.int32(), "n_tokens": pa.int64(), "sum_value": pa.float64()}
    ),
    "coactivation": pa.schema({"feature_id": pa.int32(), "other_id": pa.int32(), "n_both": pa.int64()}),
    "encoded_tokens": pa.schema(
        {"source": pa.string(), "is_rest": pa.bool_(), "band": pa.int16(), "n_tokens": pa.int64()}
    ),
}
"""One file each in a part, beside the two orders."""

RUN_TABLES: dict[str, pa.Schema] = {
    "similar": pa.schema({"feature_id": pa.int32(), "other_id": pa.int32(), "cosine": pa.float32()}),
    "logits": pa.schema({"feature_id": pa.int32(), "vocab_id": pa.int32(), "logit": pa.float32()}),
}
"""One file each beside the parts: they follow from the autoencoder and the model alone."""

LABELS = pa.schema({"feature_id": pa.int32(), "label": pa.string(), "source": pa.string(), "score": pa.float64()})

VALUES: dict[str, pa.Schema] = {
    "feature_major": pa.schema({"feature_id": pa.int32(), "token_id": pa.int64(), "value": pa.float32()}),
    "token_major": pa.schema({"token_id": pa.int64(), "feature_id": pa.int32(), "value": pa.float32()}),
}
