"""Activations through a trained SAE to Parquet: every non-zero value, in two orders, with statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow import activations, arrays, imported, interchange, train
from saeflow.artefact import Artefact, Job
from saeflow.config import Recipe
from saeflow.encoding import SparseValues, feature_major, feature_statistics
from saeflow.fingerprints import fingerprint
from saeflow.model import Site
from saeflow.parallel import n_threads, use_one_thread
from saeflow.progress import Bar, Progress
from saeflow.records import PartRecord
from saeflow.sae import SparseAutoencoder
from saeflow.sections import UserError
from saeflow.store import Store
from saeflow.used import Used

SEGMENT_NONZEROS = 24_000_000
"""Values of one part held in memory at once; beyond, a part gets further pairs of files."""

_BYTES_PER_NONZERO = 8
"""Both orders together, compressed: for the forecast of disk space."""


def artefact(store: Store, recipe: Recipe) -> Artefact:
    return store.artefact("features", recipe.name, fingerprint(facts(store, recipe)))


def facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What makes a run: the SAE, and the activations it reads."""
    stored = activations.artefact(store, recipe)
    return {
        "sae": train.artefact(store, recipe).fp,
        "activations": stored.fp,
        "site": activations.choose_site(stored, recipe.sae.site).name,
        "n_features": imported.sae_config(recipe).n_features,
    }


@dataclass
class Encoder:
    """Everything a part needs: made once, used for every part."""

    used: Used
    stored: Artefact
    target: Artefact
    site: Site
    sae: SparseAutoencoder
    batch_rows: int

    def encode(self, part: PartRecord, bar: Bar) -> PartRecord:
        """Encode one activation part, on one thread, and keep its values as a part."""
        use_one_thread()
        mask = self.used.mask(part.index)
        counts = {"n_tokens": int(mask.sum()), "n_values": 0}
        totals = _Totals(self.sae.config.n_features)
        with self.target.new_part(part.index, counts, part_inputs(self.used, part)) as folder:
            for number, segment in enumerate(self._segments(part, mask, bar)):
                token_ids, sparse = segment
                counts["n_values"] += len(sparse.values)
                totals.add(sparse)
                write_token_major(folder / "token_major" / f"{number:03d}.parquet", token_ids, sparse)
                write_feature_major(
                    folder / "feature_major" / f"{number:03d}.parquet", token_ids, sparse, len(totals.n_tokens)
                )
            pq.write_table(totals.table(), folder / "feature_stats.parquet", compression="zstd")
        return self.target.made[part.index]

    def _segments(self, part: PartRecord, mask: np.ndarray, bar: Bar) -> Iterator[tuple[np.ndarray, SparseValues]]:
        held: list[tuple[np.ndarray, SparseValues]] = []
        for token_ids, rows in self._rows(part, mask):
            held.append((token_ids, self.sae.encode_sparse(rows)))
            bar.advance(len(token_ids))
            if sum(len(sparse.values) for _, sparse in held) >= SEGMENT_NONZEROS:
                yield _joined(held)
                held = []
        yield _joined(held)

    def _rows(self, part: PartRecord, mask: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Used tokens in order, at most `batch_rows` at once: token_ids (n,), activations (n, D)."""
        array = arrays.open_site(self.stored, part, self.site)
        length = mask.shape[1]
        block = array.chunk
        for start in range(0, len(mask), block):
            keep = np.flatnonzero(mask[start : start + block])
            token_ids = (part.counts["first_sequence"] + start) * length + keep
            values = array.read(slice(start, start + block)).reshape(-1, self.site.width)
            for at in range(0, len(keep), self.batch_rows):
                chosen = keep[at : at + self.batch_rows]
                rows = values[at : at + len(chosen)] if len(keep) == len(values) else values[torch.from_numpy(chosen)]
                yield token_ids[at : at + len(chosen)], rows


class _Totals:
    """Per-feature statistics of a part, added up in order."""

    def __init__(self, n_features: int) -> None:
        self.n_tokens = np.zeros(n_features, np.int64)
        self.sum_value = np.zeros(n_features)
        self.sum_squares = np.zeros(n_features)
        self.max_value = np.zeros(n_features)

    def add(self, sparse: SparseValues) -> None:
        found = feature_statistics(sparse, len(self.n_tokens))
        self.n_tokens += found.n_tokens
        self.sum_value += found.sum
        self.sum_squares += found.sum_squares
        self.max_value = np.maximum(self.max_value, found.max)

    def table(self) -> pa.Table:
        ids = np.arange(len(self.n_tokens), dtype=np.int32)
        return pa.table({"feature_id": ids} | vars(self))


def _joined(held: list[tuple[np.ndarray, SparseValues]]) -> tuple[np.ndarray, SparseValues]:
    """Batches end to end."""
    if not held:
        return np.empty(0, np.int64), SparseValues(
            np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        )
    counts = [np.diff(sparse.row_starts) for _, sparse in held]
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    ids, values = (np.concatenate([getattr(sparse, name) for _, sparse in held]) for name in ("feature_ids", "values"))
    return np.concatenate([token_ids for token_ids, _ in held]), SparseValues(starts, ids, values)


def write_token_major(path: Path, token_ids: np.ndarray, sparse: SparseValues) -> None:
    """Sorted by token, then feature."""
    owners = np.repeat(token_ids, np.diff(sparse.row_starts))
    _write(path, {"token_id": owners, "feature_id": sparse.feature_ids, "value": sparse.values})


def write_feature_major(path: Path, token_ids: np.ndarray, sparse: SparseValues, n_features: int) -> None:
    """Sorted by feature, then token."""
    ordered = feature_major(sparse, n_features)
    ids = np.repeat(np.arange(n_features, dtype=np.int32), np.diff(ordered.feature_starts))
    _write(path, {"feature_id": ids, "token_id": token_ids[ordered.rows], "value": ordered.values})


def _write(path: Path, columns: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        compression_level=1,
        row_group_size=122_880,
        use_dictionary=["feature_id"],
        column_encoding={"token_id": "DELTA_BINARY_PACKED", "value": "BYTE_STREAM_SPLIT"},
    )


def part_inputs(used: Used, part: PartRecord) -> dict[str, str]:
    """What the values of an activation part follow from."""
    hidden = used.generation.hidden_digest(part.index)
    inputs = {"tokens": used.parts[part.index].folder, "activations": part.folder}
    return inputs | ({"hidden": hidden} if hidden else {})


def open_encoder(store: Store, recipe: Recipe) -> Encoder:
    """Load the SAE, check the disk, and create the artefact."""
    source, stored = activations.tokens_artefact(store, recipe), activations.artefact(store, recipe)
    trained, target = train.artefact(store, recipe), artefact(store, recipe)
    if not trained.complete():
        raise UserError(f"{trained.id} is not trained. Run `saeflow train RECIPE` first.")
    n_tokens = stored.published().total("n_tokens")
    per_token = train.last_row(trained).get("l0", recipe.sae.k)
    store.require_free(int(n_tokens * per_token * _BYTES_PER_NONZERO), "Storing every feature activation")
    used = Used.of(source, recipe.activations)
    about = facts(store, recipe) | {
        "context_length": used.length,
        "architecture": imported.sae_config(recipe).architecture,
    }
    target.begin(about | used.facts, [source.id, stored.id, trained.id])
    return encoder_of(store, target, recipe.features.batch_rows)


def encoder_of(store: Store, target: Artefact, batch_rows: int = 4096) -> Encoder:
    """The encoder of a run that exists, from what its record says."""
    source, stored, trained = (store.by_id(name) for name in target.record.inputs)
    site = activations.choose_site(stored, target.record.facts["site"])
    used = Used.from_facts(source, target.record.facts)
    return Encoder(used, stored, target, site, interchange.load(trained.fetched()), batch_rows)


def run(store: Store, recipe: Recipe, progress: Progress) -> Artefact:
    """Encode every missing part, several at once, and publish."""
    with (
        encoding(store, recipe, progress) as job,
        ThreadPoolExecutor(n_threads(recipe.threads), "saeflow-encode") as pool,
    ):
        try:
            for future in [pool.submit(job.work, index) for index in job.missing]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return artefact(store, recipe)


@contextlib.contextmanager
def encoding(store: Store, recipe: Recipe, progress: Progress) -> Iterator[Job]:
    """The parts that are missing and how to make one; publishes when the block ends well."""
    target = artefact(store, recipe)
    wanted = activations.artefact(store, recipe).published().parts
    used = Used.of(activations.tokens_artefact(store, recipe), recipe.activations)
    inputs = {part.index: part_inputs(used, part) for part in wanted}
    with target.writing():
        done = target.fitting(inputs)
        plan = {part.index: part for part in wanted if part.index not in done}
        if plan or not target.complete():
            encoder = open_encoder(store, recipe)
            with progress.bar("features", sum(part.counts["n_tokens"] for part in plan.values()), "tokens") as bar:
                yield Job(list(plan), lambda index: encoder.encode(plan[index], bar))
        else:
            progress.skip("features", f"{sum(p.counts['n_values'] for p in done.values()):,} values")
            yield Job([], done.__getitem__)
        done = target.fitting(inputs)
        target.publish([done[part.index] for part in wanted])


def refresh(store: Store, target: Artefact, progress: Progress) -> list[int]:
    """Encode again the parts of a run that no longer follow from what they were made of; their indices."""
    with target.writing():
        encoder = encoder_of(store, target)
        known = {part.index for part in target.published().parts}
        wanted = [part for part in encoder.stored.published().parts if part.index in known]
        inputs = {part.index: part_inputs(encoder.used, part) for part in wanted}
        done = target.fitting(inputs)
        stale = [part for part in wanted if part.index not in done]
        if stale:
            with progress.bar("features", sum(part.counts["n_tokens"] for part in stale), "tokens") as bar:
                for part in stale:
                    done[part.index] = encoder.encode(part, bar)
        target.publish([done[part.index] for part in wanted])
    return [part.index for part in stale]
