"""Sequences through the model to Zarr: one array [sequence, position, width] per site and part."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import zarr
from torch import Tensor, nn
from zarr.codecs import Crc32cCodec

from saeflow import brought, tokens
from saeflow.config import ActivationsConfig, Recipe, UserError, fingerprint
from saeflow.model import Site, SiteReader, load_model, model_fingerprint, resolve_sites
from saeflow.parallel import in_order, keep_freed_memory, n_threads
from saeflow.progress import Bar, Progress
from saeflow.store import Artefact, Damaged, Job, PartRecord, Store, checksum

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_QUEUE = 4
"""Forward batches waiting for the disk before the model has to wait."""


@dataclass(frozen=True)
class Layout:
    """How one array of `shape` (S, T, D) is cut: sequences in a chunk and in a shard."""

    shape: tuple[int, int, int]
    chunk: int
    shard: int


def plan_layout(n_sequences: int, length: int, width: int, config: ActivationsConfig) -> Layout:
    """Chunks and shards of about the asked size; a shard is a whole number of chunks and of forward batches."""
    row_bytes = length * width * _ITEM_BYTES[config.dtype]
    chunk = max(1, min(n_sequences, config.chunk_bytes // row_bytes))
    shard = max(1, min(-(-n_sequences // chunk), config.shard_bytes // (chunk * row_bytes))) * chunk
    return Layout((n_sequences, length, width), chunk, shard)


def artefact(store: Store, recipe: Recipe) -> Artefact:
    return store.artefact("activations", recipe.name, fingerprint(facts(store, recipe)))


def tokens_artefact(store: Store, recipe: Recipe) -> Artefact:
    """The tokens these activations belong to; for brought activations, one a row."""
    if recipe.model is not None:
        return tokens.artefact(store, recipe)
    return store.artefact("tokens", recipe.name, fingerprint(_brought_facts(recipe)))


def facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What makes two activation artefacts comparable."""
    about = recipe.activations
    source = _brought_facts(recipe) if recipe.model is None else {"model": model_fingerprint(recipe.model)}
    return {
        "tokens": tokens_artefact(store, recipe).fp,
        **source,
        "sites": about.sites,
        "dtype": about.dtype,
        "forward_batch": about.forward_batch,
        "layout": [about.chunk_bytes, about.shard_bytes],
    }


def _brought_facts(recipe: Recipe) -> dict[str, Any]:
    about = recipe.activations
    made = about.synthetic.model_dump(mode="json") if about.synthetic else None
    share = recipe.corpus.held_out if recipe.corpus else 0.0
    content = checksum(Path(about.source)) if about.source and Path(about.source).is_file() else None
    return {
        "source": about.source,
        "content": content,
        "synthetic": made,
        "part_rows": about.part_rows,
        "held_out": share,
    }


@dataclass
class Collector:
    """Everything a part needs: made once, used for every part."""

    source: Artefact
    target: Artefact
    config: ActivationsConfig
    model: nn.Module
    sites: list[Site]
    workers: int

    def collect(self, part: PartRecord, bar: Bar) -> PartRecord:
        """Run the model over one token part and keep the activations as a part."""
        vocab_ids, mask = tokens.read_part(self.source, part)
        n, length = vocab_ids.shape
        batches = [
            slice(start, min(start + self.config.forward_batch, n)) for start in range(0, n, self.config.forward_batch)
        ]
        reader = SiteReader(self.model, self.sites)

        def forward(rows: slice) -> list[np.ndarray]:
            padding = None if mask[rows].all() else torch.from_numpy(mask[rows])
            read = reader.read(torch.from_numpy(vocab_ids[rows]), padding)
            return [_stored(read[site.name], self.config, part, rows.start) for site in self.sites]

        with self.target.new_part(part.index, dict(part.counts)) as folder, contextlib.closing(reader):
            writers = [
                _Writer(folder / site.file, plan_layout(n, length, site.width, self.config), self.config.dtype)
                for site in self.sites
            ]
            with ThreadPoolExecutor(1, "saeflow-disk") as disk:
                pending: deque[Future[None]] = deque()
                for rows, values in zip(batches, in_order(forward, batches, self.workers), strict=True):
                    pending += [disk.submit(w.append, block) for w, block in zip(writers, values, strict=True)]
                    while len(pending) > _QUEUE * len(writers):
                        pending.popleft().result()
                    bar.advance(int(mask[rows].sum()))
                for future in pending:
                    future.result()
            for writer in writers:
                writer.close()
        return self.target.made[part.index]


class _Writer:
    """Fills one array from its beginning, a whole shard at a time."""

    def __init__(self, path: Path, layout: Layout, dtype: str) -> None:
        self.layout, self.rows, self.at = layout, 0, 0
        stored = {"bfloat16": "uint16"}.get(dtype, dtype)
        self.array = zarr.create_array(
            path, shape=layout.shape, dtype=stored,
            chunks=(layout.chunk, *layout.shape[1:]), shards=(layout.shard, *layout.shape[1:]),
            compressors=[Crc32cCodec()], filters=None, fill_value=0,
            attributes={"dtype": dtype}, dimension_names=("sequence", "position", "width"),
        )  # fmt: skip
        self.buffer = np.empty((layout.shard, *layout.shape[1:]), stored)

    def append(self, block: np.ndarray) -> None:
        while len(block):
            taken = block[: self.layout.shard - self.rows]
            self.buffer[self.rows : self.rows + len(taken)] = taken
            self.rows += len(taken)
            block = block[len(taken) :]
            if self.rows == self.layout.shard:
                self._write()

    def _write(self) -> None:
        self.array[self.at : self.at + self.rows] = self.buffer[: self.rows]
        self.at += self.rows
        self.rows = 0

    def close(self) -> None:
        if self.rows:
            self._write()
        assert self.at == self.layout.shape[0]


def _stored(values: Tensor, config: ActivationsConfig, part: PartRecord, first: int) -> np.ndarray:
    """Values (S, T, D) in the precision of the disk. Raises UserError for what it cannot hold."""
    dtype = getattr(torch, config.dtype)
    low, high = (extreme.to(dtype).item() for extreme in torch.aminmax(values))  # NaN goes through
    stored = values.to(dtype).cpu()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _not_finite(values.cpu(), stored, config, part, first)
    return (stored.view(torch.uint16) if config.dtype == "bfloat16" else stored).numpy()


def _not_finite(values: Tensor, stored: Tensor, config: ActivationsConfig, part: PartRecord, first: int) -> UserError:
    sequence, position, neuron = (int(i) for i in (~torch.isfinite(stored)).nonzero()[0])
    where = (
        f"part {part.index}, row {part.counts['first_sequence'] + first + sequence} "
        f"(position {position}, neuron {neuron})"
    )
    value = values[sequence, position, neuron].item()
    if math.isfinite(value):
        return UserError(
            f"An activation of {value:.6g} in {where} overflows {config.dtype}.\n"
            'Set activations.dtype to "bfloat16" or "float32".'
        )
    return UserError(
        f"An activation in {where} is {value}; nothing of this part was stored.\n"
        'Check the model or the table; for a model run in float16 set model.dtype = "float32".'
    )


def run(store: Store, recipe: Recipe, progress: Progress) -> Artefact:
    """Collect every missing part and publish."""
    with collecting(store, recipe, progress) as job:
        for index in job.missing:
            job.work(index)
    return artefact(store, recipe)


@contextlib.contextmanager
def collecting(store: Store, recipe: Recipe, progress: Progress) -> Iterator[Job]:
    """The parts that are missing and how to make one; publishes when the block ends well."""
    target = artefact(store, recipe)
    wanted = tokens_artefact(store, recipe).published().parts
    with target.writing():
        done = target.parts()
        plan = {part.index: part for part in wanted if part.index not in done}
        if plan:
            collector = open_collector(store, recipe, plan.values())
            with progress.bar("activations", sum(part.counts["n_tokens"] for part in plan.values()), "tokens") as bar:
                yield Job(list(plan), lambda index: collector.collect(plan[index], bar))
        else:
            skipped(target, progress)
            yield Job([], target.parts().__getitem__)
        done = target.parts()
        target.publish([done[part.index] for part in wanted])


def skipped(target: Artefact, progress: Progress) -> None:
    parts = target.parts().values()
    n_tokens, n_bytes = sum(p.counts["n_tokens"] for p in parts), sum(p.n_bytes for p in parts)
    progress.skip("activations", f"{n_tokens:,} tokens, {n_bytes / 1e9:.2f} GB")


def open_collector(store: Store, recipe: Recipe, plan: Iterable[PartRecord]) -> Collector:
    """Load the model, name the sites, check the disk, and create the artefact."""
    assert recipe.model is not None
    source, target = tokens_artefact(store, recipe), artefact(store, recipe)
    model = load_model(recipe.model)
    sites = resolve_sites(model, recipe.activations.sites)
    length = recipe.tokens.context_length
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise UserError(
            f"tokens.context_length is {length}, but the model reads at most {limit} tokens. Set at most {limit}."
        )
    row_bytes = length * sum(site.width for site in sites) * _ITEM_BYTES[recipe.activations.dtype]
    n_bytes = row_bytes * sum(part.counts["n_sequences"] for part in plan)
    store.require_free(int(n_bytes * 1.05), f"Storing the activations of {len(sites)} site(s)")
    about = facts(store, recipe) | {"stored": [[site.name, site.width] for site in sites]}
    target.begin(about, [source.id])
    on_processor = next(model.parameters()).device.type == "cpu"
    workers = n_threads(recipe.threads) if on_processor else 1
    keep_freed_memory()
    return Collector(source, target, recipe.activations, model, sites, workers)


def stored_sites(target: Artefact) -> list[Site]:
    return [Site(name, width) for name, width in target.record.facts["stored"]]


def choose_site(target: Artefact, wanted: str | None) -> Site:
    """The site an SAE reads; it must be named where several are stored."""
    sites = stored_sites(target)
    found = [site for site in sites if site.name == wanted] if wanted else sites
    if len(found) != 1:
        names = ", ".join(site.name for site in sites)
        raise UserError(f"sae.site is {wanted!r}; the store holds: {names}. Set sae.site to one of them.")
    return found[0]


def open_site(target: Artefact, part: PartRecord, site: Site) -> zarr.Array[Any]:
    """The stored array (S, T, D) of one part, for reading.

    By zarr's own codecs: zarrs 0.2.3 is quicker, but leaves checksums unread where a shard is read in part.
    """
    return zarr.open_array(target.part_path(part) / site.file, mode="r")


def read_rows(array: zarr.Array[Any], rows: slice) -> Tensor:
    """Sequences of an array as a tensor (s, T, D) in the stored precision. Raises Damaged where bytes have changed."""
    try:
        values = torch.from_numpy(np.asarray(array[rows]))
    except (RuntimeError, ValueError) as error:
        raise Damaged(
            f"Rows {rows.start} to {rows.stop} of {array.store_path} cannot be read: {error}.\n"
            "Remove what is damaged with `saeflow verify --full --repair`, then run the recipe again: the rest is kept."
        ) from error
    return values.view(torch.bfloat16) if array.attrs["dtype"] == "bfloat16" else values


def bring(store: Store, recipe: Recipe, progress: Progress) -> tuple[Artefact, Artefact]:
    """Store a user's table, or a made one, as activations of one-token documents."""
    source, target = tokens_artefact(store, recipe), artefact(store, recipe)
    with source.writing(), target.writing():
        if source.generation() and target.generation() and not _missing(source, target):
            skipped(target, progress)
            return source, target
        about = recipe.activations
        torch.set_num_threads(n_threads(recipe.threads))
        table = brought.make_table(about.synthetic) if about.synthetic else brought.read_table(str(about.source))
        site = Site("table", table.values.shape[1])
        store.require_free(int(table.values.nbytes * 1.05), "Storing the table")
        source.begin(_brought_facts(recipe) | {"context_length": 1})
        target.begin(facts(store, recipe) | {"stored": [[site.name, site.width]]}, [source.id])
        pieces = sorted(set(table.labels))
        tokens.write_vocab(source.path / "vocab.parquet", pieces, [piece.encode() for piece in pieces])
        with progress.bar("activations", len(table.labels), "rows") as bar:
            for index, start in enumerate(range(0, len(table.labels), about.part_rows)):
                _bring_part(source, target, recipe, site, table, pieces, index, start)
                bar.advance(min(about.part_rows, len(table.labels) - start))
        for item in (source, target):
            item.publish(item.parts().values())
    return source, target


def _missing(source: Artefact, target: Artefact) -> list[PartRecord]:
    parts = [(item, part) for item in (source, target) for part in item.published().parts]
    return [part for item, part in parts if part.index not in item.parts()]


def _bring_part(
    source: Artefact, target: Artefact, recipe: Recipe, site: Site,
    table: brought.Table, pieces: list[str], index: int, start: int,
) -> None:  # fmt: skip
    labels = table.labels[start : start + recipe.activations.part_rows]
    numbers = np.arange(start, start + len(labels))
    place = {piece: i for i, piece in enumerate(pieces)}
    packed = tokens.Packed(np.array([[place[label]] for label in labels], np.int32), numbers[:, None])
    n = len(labels)
    counts = {
        "first_sequence": start, "n_sequences": n, "n_train_sequences": n, "first_document": start,
        "n_documents": n, "n_tokens": n, "n_train_tokens": n,
    }  # fmt: skip
    documents = pa.table(
        {
            "document_id": numbers, "key": [f"{label} #{i}" for i, label in zip(numbers, labels, strict=True)],
            "source": ["table"] * n, "content_hash": [""] * n, "held_out": [False] * n,
            "n_tokens": np.ones(n, np.int64), "first_token_id": numbers,
        }
    )  # fmt: skip
    record = tokens.write_part(source, index, counts, packed, documents)
    values = torch.from_numpy(table.values[start : start + n, None, :])
    with target.new_part(index, counts) as folder:
        writer = _Writer(
            folder / site.file, plan_layout(n, 1, site.width, recipe.activations), recipe.activations.dtype
        )
        writer.append(_stored(values, recipe.activations, record, 0))
        writer.close()
