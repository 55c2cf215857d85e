"""The tables of effects on disk, and how the rows of parts become one table."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from saeflow.features.schema import EFFECTS
from saeflow.model.direct_path import direct_path
from saeflow.query.files.quoting import literal, unglobbed
from saeflow.runtime.linear import linear
from saeflow.runtime.memory import total_memory
from saeflow.store.files import replacing

EFFECTS_FILE, DIRECT_FILE = "effects.parquet", "direct_effects.parquet"

FIRINGS = pa.schema(
    [("token_id", pa.int64()), ("feature_id", pa.int32()), ("value", pa.float32()), ("band", pa.int16())]
)
"""The firings that are changed, by token_id, then feature_id."""

EFFECT_ROW_GROUP = 16_384
_MOST_PRODUCT_BYTES = 64 << 20


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table that takes its place whole."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=EFFECT_ROW_GROUP)


def sort_into(target: Path, sources: list[Path], order: str, work: Path) -> None:
    """Write the rows of Parquet files as one, in an order. DuckDB sorts them, on disk if memory does not suffice."""
    files = literal([unglobbed(str(path)) for path in sources])
    config: dict[str, Any] = {"temp_directory": str(work / "spill"), "memory_limit": f"{total_memory() // 4}B"}
    with contextlib.closing(duckdb.connect(config=config)) as connection, replacing(target) as temporary:
        connection.execute(
            f"copy (select * from read_parquet({files}) order by {order}) to {literal(str(temporary))} "
            f"(format parquet, compression zstd, row_group_size {EFFECT_ROW_GROUP})"
        )


def entries_moved(effects: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of a feature and an entry that it moved at the changed token: ids (n), (n), in their order."""
    with contextlib.closing(duckdb.connect()) as connection:
        found = connection.execute(
            "select distinct feature_id, unnest(list_concat(up_ids, down_ids)) as vocab_id "
            f"from read_parquet({literal(unglobbed(str(effects)))}) where ahead = 0 order by feature_id, vocab_id"
        ).fetchnumpy()
    return np.asarray(found["feature_id"]), np.asarray(found["vocab_id"])


@torch.no_grad()
def direct_logits(
    effect: str, moved: tuple[np.ndarray, np.ndarray], w_dec: Tensor, model: nn.Module, site: str, n_vocab: int
) -> pa.Table:
    """Return what a value of 1 adds to the logit of each entry without passing a later layer: see `feature_logits`.

    Centred over the vocabulary. No rows if no direct path leads from the site to the logits.
    """
    features, entries = moved
    path = direct_path(model, site)
    if path is None or not len(features):
        return EFFECTS["direct_effects"].empty_table()
    unembedding = path.unembedding[:n_vocab].float().cpu()
    chosen, place = np.unique(features, return_inverse=True)
    at_once = max(1, _MOST_PRODUCT_BYTES // (4 * len(unembedding)))
    logits = np.empty(len(features), np.float32)
    for start in range(0, len(chosen), at_once):
        mine = np.flatnonzero((place >= start) & (place < start + at_once))
        stream = path.apply(w_dec[torch.from_numpy(chosen[start : start + at_once]).long()].detach().float().cpu())
        every = linear(stream, unembedding)
        every -= every.mean(1, keepdim=True)
        logits[mine] = every.numpy()[place[mine] - start, entries[mine]]
    columns = [[effect] * len(features), features.astype(np.int32), entries.astype(np.int32), logits]
    return pa.table(columns, schema=EFFECTS["direct_effects"])
