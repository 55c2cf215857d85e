"""Sequences through the model to Zarr: one array [sequence, position, width] per site and part."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
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
from saeflow.pipeline.dask.clusters import make_parts
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.pipeline.parts import PartMaker, PartWork, Records, Through, directly, dumped, shared
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import ActivationsConfig
from saeflow.runtime.devices import model_threads, own_stream
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.threads import keep_freed_memory, map_in_order
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

_QUEUE = 4
"""Forward batches waiting for the disk before the model has to wait."""


@dataclass
class Collector(PartMaker, name="activations-collect", stays=True):
    """Runs the model over token parts: everything that is needed for each of them."""

    source: Artefact
    target: Artefact
    config: ActivationsConfig
    model: nn.Module
    sites: list[Site]
    workers: int
    """Forward passes at the same time."""
    parts: dict[int, PartRecord]
    """Token parts by index."""

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Collector:
        """Load the model, and read what the client has begun. Raises UserError if the model is another one."""
        config, target = parse_recipe(settings["recipe"]), shared(store, settings["target"])
        assert config.model is not None
        if model_fingerprint(config.model) != target.record.facts["model"]:
            raise UserError(
                f"model.path is {config.model.path!r}, but its files are others than where the run was started."
            )
        source = Ancestors(store, target).tokens
        generation = source.generation(settings["generation"])
        assert generation is not None
        parts, model = {part.index: part for part in generation.parts}, load_model(config.model)
        return cls.of(model, source, target, config.activations, stored_sites(target), settings["threads"], parts)

    @classmethod
    def of(
        cls, model: nn.Module, source: Artefact, target: Artefact, config: ActivationsConfig, sites: list[Site],
        threads: int, parts: dict[int, PartRecord],
    ) -> Collector:  # fmt: skip
        """The collector of a model that is loaded, on so many threads."""
        keep_freed_memory()
        return cls(source, target, config, model, sites, model_threads(device_of(model), threads), parts)

    def make(self, item: int, progress: Progress) -> Records:
        with progress.bar("activations", None, "tokens") as bar:
            return dumped({self.target: self.collect(self.parts[item], bar)})

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


def run(lineage: Lineage, progress: Progress, through: Through = directly) -> Artefact:
    """Collect every missing part and publish."""
    recipe, target = lineage.recipe, lineage.activations
    lineage.tokens.published()  # before anybody is waited for
    with target.writing():
        wanted = lineage.tokens.published().parts
        inputs = {part.index: {"tokens": part.folder} for part in wanted}
        done = target.parts_from(inputs)
        missing = [part for part in wanted if part.index not in done]

        def publish() -> None:
            made = target.parts_from(inputs)
            target.publish([made[part.index] for part in wanted])

        if not missing and target.complete():
            skipped(target, progress)
            publish()
            return target
        make_parts(_collect_work(lineage, missing, publish, progress), lineage.store, recipe.cluster, progress, through)
        if missing:
            warn_of_massive_positions(target, recipe.activations, progress)
    return target


def _collect_work(
    lineage: Lineage, missing: list[PartRecord], publish: Callable[[], None], progress: Progress
) -> PartWork:
    """The parts that are missing, once they are known to fit."""
    recipe, target = lineage.recipe, lineage.activations
    collector = open_collector(lineage, missing)
    if len(collector.sites) > 1 and not all(member.sae.site for member in recipe.members()):
        progress.say(f"activations: {len(collector.sites)} sites; training needs sae.site, one of them")
    return PartWork(
        Collector,
        {
            "recipe": recipe.model_copy(update={"cluster": None, "sweep": None}).model_dump(mode="json"),
            "target": target.id,
            "generation": lineage.tokens.published().number,
        },
        [(part.index, part.counts["n_tokens"]) for part in missing],
        [target],
        ("activations", "tokens"),
        here=None if recipe.cluster else collector,  # on a cluster the memory of its model is freed
        threads=recipe.threads,
        publish=publish,
    )


def skipped(target: Artefact, progress: Progress) -> None:
    parts = target.parts().values()
    n_tokens, n_bytes = sum(p.counts["n_tokens"] for p in parts), sum(p.n_bytes for p in parts)
    progress.skip("activations", f"{n_tokens:,} tokens, {n_bytes / 1e9:.2f} GB")


def open_collector(lineage: Lineage, plan: Sequence[PartRecord]) -> Collector:
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
    parts = {part.index: part for part in plan}
    return Collector.of(model, lineage.tokens, lineage.activations, recipe.activations, sites, recipe.threads, parts)
