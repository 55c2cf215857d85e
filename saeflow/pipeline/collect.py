"""Sequences through the model to Zarr: one array [sequence, position, width] per site and part."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from saeflow.activations.epoch import fit_pool
from saeflow.activations.norms import NORMS_FILE, Norms, norms_of, warn_of_massive_positions
from saeflow.activations.shards import ITEM_BYTES, plan_layout, stored_sites
from saeflow.activations.writer import open_writer, to_disk_precision
from saeflow.corpus import token_parts
from saeflow.model.load import load_model, model_fingerprint
from saeflow.model.sites import (
    Site,
    SiteReader,
    device_of,
    require_length,
    require_running_order,
    resolve_sites,
    site_pair,
)
from saeflow.pipeline.dask import work
from saeflow.pipeline.dask.workers import Workers, workers_of
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import ActivationsConfig
from saeflow.runtime.devices import model_threads, own_stream
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.threads import keep_freed_memory, map_in_order
from saeflow.store.artefact import Artefact, Job
from saeflow.store.records import PartRecord

_QUEUE = 4
"""Forward batches waiting for the disk before the model has to wait."""


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
        vocab_ids, mask = token_parts.read_part(self.source, part)
        n, length = vocab_ids.shape
        batches = [
            slice(start, min(start + self.config.forward_batch, n)) for start in range(0, n, self.config.forward_batch)
        ]
        reader = SiteReader(self.model, self.sites)

        norms = Norms(self.sites, length)

        def forward(rows: slice) -> list[tuple[np.ndarray, np.ndarray]]:
            """Of every site what is stored, and its norms."""
            padding = None if mask[rows].all() else torch.from_numpy(mask[rows])
            found = []
            with own_stream(device_of(self.model)):
                read = reader.read(torch.from_numpy(vocab_ids[rows]), padding)
                for values in (read[site.name] for site in self.sites):
                    lengths = norms_of(values)
                    stored = to_disk_precision(values, self.config, part, rows.start, float(lengths.max()))
                    found.append((stored, lengths))
            return found

        known: dict[str, str] = {}
        with (
            self.target.new_part(part.index, dict(part.counts), {"tokens": part.folder}, known) as folder,
            contextlib.closing(reader),
        ):
            writers = [
                open_writer(folder / site.file, plan_layout(n, length, site.width, self.config), self.config)
                for site in self.sites
            ]
            with ThreadPoolExecutor(1, "saeflow-disk") as disk:
                pending: deque[Future[None]] = deque()
                for rows, found in zip(batches, map_in_order(forward, batches, self.workers), strict=True):
                    pending += [disk.submit(w.append, block) for w, (block, _) in zip(writers, found, strict=True)]
                    norms.add([each for _, each in found], mask[rows])
                    while len(pending) > _QUEUE * len(writers):
                        pending.popleft().result()
                    bar.advance(int(mask[rows].sum()))
                for future in pending:
                    future.result()
            norms.write(folder / NORMS_FILE)
            for writer in writers:
                writer.close()
                known |= {f"{writer.path.name}/{name}": each for name, each in writer.checksums.items()}
        return self.target.made[part.index]


def run(lineage: Lineage, progress: Progress) -> Artefact:
    """Collect every missing part and publish."""
    with collecting(lineage, progress) as job:
        list(job.make(job.missing))
    return lineage.activations


@contextlib.contextmanager
def collecting(lineage: Lineage, progress: Progress) -> Iterator[Job]:
    """The parts that are missing and how to make one; publishes when the block ends well."""
    recipe, target = lineage.recipe, lineage.activations
    lineage.tokens.published()  # before anybody is waited for
    with target.writing():
        wanted = lineage.tokens.published().parts
        inputs = {part.index: {"tokens": part.folder} for part in wanted}
        done = target.parts_from(inputs)
        plan = {part.index: part for part in wanted if part.index not in done}
        if plan or not target.complete():
            collector = open_collector(lineage, plan.values())
            if len(collector.sites) > 1 and not all(member.sae.site for member in recipe.members()):
                progress.say(f"activations: {len(collector.sites)} sites; training needs sae.site, one of them")
            n_tokens = {index: part.counts["n_tokens"] for index, part in plan.items()}
            with (
                progress.bar("activations", sum(n_tokens.values()), "tokens") as bar,
                workers_of(lineage.store, recipe, progress) as workers,
            ):
                if workers is None:
                    yield Job(list(plan), lambda indices: (collector.collect(plan[index], bar) for index in indices))
                else:
                    del collector  # the model is wanted on the workers
                    yield _on_workers(lineage, workers, n_tokens, bar)
                    target.look_again()
        else:
            skipped(target, progress)
            yield Job([], lambda _: iter(()))
        done = target.parts_from(inputs)
        target.publish([done[part.index] for part in wanted])
        if plan:
            warn_of_massive_positions(target, recipe.activations, progress)


def _on_workers(lineage: Lineage, workers: Workers, n_tokens: dict[int, int], bar: Bar) -> Job:
    """The same job, done by a cluster."""
    recipe, target = lineage.recipe, lineage.activations
    place = {"cluster": None, "sweep": None, "threads": workers.threads(recipe.threads)}
    settings = {
        "recipe": recipe.model_copy(update=place).model_dump(mode="json"),
        "target": target.id,
        "generation": lineage.tokens.published().number,
    }

    def make(indices: Sequence[int]) -> Iterator[PartRecord]:
        with contextlib.closing(workers.each("pipeline.collect.collect_at", settings, indices, bar, n_tokens)) as found:
            for index, record in found:
                target.made[index] = PartRecord.model_validate(record)
                yield target.made[index]

    return Job(list(n_tokens), make, workers.n_calls)


def collect_at(store: str, settings: str, index: int, progress: Progress) -> dict[str, Any]:
    """On a worker: collect one part; the record of it."""
    collector, parts = work.held(_collector_at, store, settings)
    with work.one_at_a_time, progress.bar("activations", None, "tokens") as bar:
        return collector.collect(parts[index], bar).model_dump(mode="json")


def _collector_at(name: str, settings: str) -> tuple[Collector, dict[int, PartRecord]]:
    """What a worker needs for every part, and the token parts: made once, from what the client has begun."""
    about = work.settings_of(settings)
    store, recipe = work.store_at(name), parse_recipe(about["recipe"])
    assert recipe.model is not None
    target = work.shared(store, about["target"])
    source = Ancestors(store, target).tokens
    if model_fingerprint(recipe.model) != target.record.facts["model"]:
        raise UserError(
            f"model.path is {recipe.model.path!r}, but its files are others than where the run was started."
        )
    model = load_model(recipe.model)
    workers = model_threads(device_of(model), recipe.threads)
    keep_freed_memory()
    generation = source.generation(about["generation"])
    assert generation is not None
    parts = {part.index: part for part in generation.parts}
    return Collector(source, target, recipe.activations, model, stored_sites(target), workers), parts


def skipped(target: Artefact, progress: Progress) -> None:
    parts = target.parts().values()
    n_tokens, n_bytes = sum(p.counts["n_tokens"] for p in parts), sum(p.n_bytes for p in parts)
    progress.skip("activations", f"{n_tokens:,} tokens, {n_bytes / 1e9:.2f} GB")


def open_collector(lineage: Lineage, plan: Iterable[PartRecord]) -> Collector:
    """Load the model, name the sites, check the disk and what training will ask for, and create the artefact."""
    recipe = lineage.recipe
    assert recipe.model is not None
    place = {"device": "cpu"} if recipe.cluster else {}  # the workers' devices are theirs
    model = load_model(recipe.model.model_copy(update=place))
    sites = resolve_sites(model, recipe.activations.sites)
    length = recipe.tokens.context_length
    require_length(model, length, sites)
    for site in sites:
        fit_pool(recipe.feed, length * site.width * ITEM_BYTES[recipe.activations.dtype])
    for member in recipe.members():
        if member.sae.site or member.sae.target_site:
            read, target_site = site_pair(sites, member.sae)
            if read != target_site:
                require_running_order(model, read.name, target_site.name)
            wanted = sum(site.width for site in {read, target_site})
            fit_pool(recipe.feed, length * wanted * ITEM_BYTES[recipe.activations.dtype])
    row_bytes = length * sum(site.width for site in sites) * ITEM_BYTES[recipe.activations.dtype]
    n_bytes = row_bytes * sum(part.counts["n_sequences"] for part in plan)
    lineage.store.require_free(int(n_bytes * 1.05), f"Storing the activations of {len(sites)} site(s)")
    about = lineage.activation_facts | {"stored": [[site.name, site.width] for site in sites]}
    lineage.activations.create(about, [lineage.tokens.id])
    workers = model_threads(device_of(model), recipe.threads)
    keep_freed_memory()
    return Collector(lineage.tokens, lineage.activations, recipe.activations, model, sites, workers)
