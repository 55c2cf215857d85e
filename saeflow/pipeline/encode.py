"""Activations through trained SAEs to Parquet: every non-zero value, in two orders, with statistics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.activations import shards
from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction, run_tables
from saeflow.features.coverage import covered, stands_for
from saeflow.features.part_merger import MergeSettings
from saeflow.features.part_writer import PartWriter
from saeflow.features.token_columns import read_token_columns
from saeflow.model.sites import Site
from saeflow.pipeline import train
from saeflow.pipeline.dask import work
from saeflow.pipeline.dask.workers import Workers, kept_open, workers_of
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.query import checks
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import FeaturesConfig
from saeflow.runtime.devices import choose_device, model_threads, own_stream
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.threads import n_threads, use_one_thread
from saeflow.sae import interchange
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.store.artefact import Artefact, Job, writing_all
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

_BYTES_PER_NONZERO = 8
"""Both orders together, compressed: for the forecast of disk space."""


@dataclass
class Encoder:
    """Everything a part needs: made once, used for every part."""

    used: TokenSelection
    stored: Artefact
    target: Artefact
    site: Site
    sae: SparseAutoencoder
    batch_rows: int

    def encode(self, part: PartRecord, bar: Bar) -> PartRecord:
        """Encode one activation part, on one thread, and keep its values as a part."""
        return encode_together([self], part, bar)[0]

    def rows(self, part: PartRecord, mask: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Selected tokens in order, at most `batch_rows` at once: token_ids (n,), activations (n, D)."""
        array = shards.open_site(self.stored, part, self.site)
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


def encode_together(encoders: Sequence[Encoder], part: PartRecord, bar: Bar) -> list[PartRecord]:
    """Encode one activation part for several SAEs of its site in one reading, on one thread."""
    use_one_thread()
    first = encoders[0]
    about = read_token_columns(first.used, part.index)
    mask = about.mask.reshape(-1, first.used.length)
    inputs = part_inputs(first.used, part)
    with contextlib.ExitStack() as stack:
        writers = []
        for encoder in encoders:
            counts: dict[str, int] = {}
            folder = stack.enter_context(encoder.target.new_part(part.index, counts, inputs))
            writers.append((encoder.sae, PartWriter(folder, counts, about, encoder.sae.config.n_features)))
        with own_stream(first.sae.W_enc.device):
            for token_ids, rows in first.rows(part, mask):
                for sae, writer in writers:
                    writer.take(token_ids, sae.encode_sparse(rows))
                bar.advance(len(token_ids))
        for _, writer in writers:
            writer.close()
    return [encoder.target.made[part.index] for encoder in encoders]


def part_inputs(used: TokenSelection, part: PartRecord) -> dict[str, str]:
    """What the values of an activation part follow from."""
    hidden = used.generation.hidden_digest(part.index)
    inputs = {"tokens": used.parts[part.index].folder, "activations": part.folder}
    return inputs | ({"hidden": hidden} if hidden else {})


def open_encoder(lineage: Lineage, used: TokenSelection, progress: Progress) -> Encoder:
    """Make the tables beside the parts, create the artefact, and load the SAE."""
    trained, target = _trained(lineage), lineage.features
    about = lineage.feature_facts | {
        "context_length": used.length,
        "architecture": lineage.sae_config.architecture,
    }
    sae = interchange.load(trained.fetched())
    made = run_tables.write_run_tables(target, lineage.recipe, sae, about["site"], progress)
    target.create(about | used.facts, [lineage.tokens.id, lineage.activations.id, trained.id], made)
    target.add_files(made)
    return encoder_of(Ancestors(lineage.store, target), used, _config_here(lineage.recipe))


def _config_here(recipe: Recipe) -> FeaturesConfig:
    """The settings for this machine; the devices of a cluster's workers are theirs."""
    return recipe.features.model_copy(update={"device": "cpu"}) if recipe.cluster else recipe.features


def encoder_of(run: Ancestors, used: TokenSelection, config: FeaturesConfig) -> Encoder:
    """The encoder of a run that exists, from what its record says."""
    sae = interchange.load(run.sae.fetched()).to(choose_device("features.device", config.device))
    sae.prepare()
    return Encoder(used, run.activations, run.artefact, run.site, sae, config.batch_rows)


def run(lineage: Lineage, progress: Progress) -> Artefact:
    """Encode every missing part, several at once, and publish."""
    run_together([lineage], progress)
    return lineage.features


def run_all(lineage: Lineage, progress: Progress) -> None:
    """Encode every SAE of a sweep; those of one site in one reading."""
    with kept_open():
        for group in by_site(lineage):
            run_together(group, progress)


def by_site(lineage: Lineage) -> list[list[Lineage]]:
    """The SAEs of a recipe, those together that read one site."""
    groups: dict[str, list[Lineage]] = {}
    for member in lineage.members:
        groups.setdefault(member.feature_facts["site"], []).append(member)
    return list(groups.values())


def run_together(lineages: Sequence[Lineage], progress: Progress) -> None:
    """Encode SAEs that read one site, in one reading."""
    recipe = lineages[0].recipe
    with encoding_together(lineages, progress) as job:
        if job.n_calls:
            list(job.make(job.missing))
            return
        with _workers(recipe.features, recipe.threads) as pool:
            _all_done(pool, [pool.submit(list, job.make([index])) for index in job.missing])


def _workers(config: FeaturesConfig, threads: int) -> ThreadPoolExecutor:
    """Threads that encode a part each: their use of one thread of torch stays theirs."""
    return ThreadPoolExecutor(n_at_once(config, threads), "saeflow-encode")


def n_at_once(config: FeaturesConfig, threads: int) -> int:
    """Parts that this process encodes at once: one a core, or enough to keep a GPU busy."""
    return model_threads(choose_device("features.device", config.device), threads)


def _all_done(pool: ThreadPoolExecutor, futures: Sequence[Future[Any]]) -> None:
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextlib.contextmanager
def encoding_together(lineages: Sequence[Lineage], progress: Progress) -> Iterator[Job]:
    """The parts that an SAE lacks and how to make one for each of them; publishes when the block ends well."""
    first, store = lineages[0], lineages[0].store
    targets = {lineage.features: lineage for lineage in lineages}
    with writing_all(targets):
        wanted = first.activations.published().parts
        used = first.selection()
        inputs = {part.index: part_inputs(used, part) for part in wanted}
        lacking = {target: inputs.keys() - compaction.part_of_each(target, inputs) for target in targets}
        missing = [sum(part.counts["n_tokens"] for part in wanted if part.index in left) for left in lacking.values()]
        _require_room(store, [(_trained(lineage), n) for lineage, n in zip(lineages, missing, strict=True) if n])
        encoders = {
            target: open_encoder(lineage, used, progress)
            for target, lineage in targets.items()
            if lacking[target] or not target.complete()
        }
        plan = {part.index: part for part in wanted if any(part.index in lacking[target] for target in encoders)}
        if encoders:
            n_tokens = {index: part.counts["n_tokens"] for index, part in plan.items()}
            with (
                progress.bar("features", sum(n_tokens.values()), "tokens") as bar,
                workers_of(store, first.recipe, progress) as workers,
            ):

                def make(indices: Sequence[int]) -> Iterator[PartRecord]:
                    for index in indices:
                        chosen = [encoder for target, encoder in encoders.items() if index in lacking[target]]
                        yield encode_together(chosen, plan[index], bar)[0]

                if workers is None:
                    yield Job(list(plan), make)
                else:
                    wanted_of = {target: set(lacking[target]) for target in encoders}
                    yield _on_workers(next(iter(encoders.values())), first.recipe, workers, wanted_of, n_tokens, bar)
                    for target in targets:
                        target.look_again()
        else:
            n_values = sum(each.total("n_values") for target in targets if (each := target.generation()))
            progress.skip("features", f"{n_values:,} values")
            yield Job([], lambda _: iter(()))
        for target, lineage in targets.items():
            publish(store, target, used, inputs, progress, lineage.recipe.features.check_values)


def _trained(lineage: Lineage) -> Artefact:
    if not lineage.sae.complete():
        raise UserError(f"{lineage.sae.id} is not trained. Run `saeflow train RECIPE` first.")
    return lineage.sae


def _require_room(store: Store, wanted: Iterable[tuple[Artefact, int]]) -> None:
    """Refuse what the disk cannot hold: of each SAE its values at so many tokens."""
    n_values = sum(n * train.last_row(trained).get("l0", 0) for trained, n in wanted)
    store.require_free(int(n_values * _BYTES_PER_NONZERO), "Storing every feature activation")


def _on_workers(
    encoder: Encoder, recipe: Recipe, workers: Workers, lacking: Mapping[Artefact, set[int]], n_tokens: dict[int, int],
    bar: Bar,
) -> Job:  # fmt: skip
    """The same job, done by a cluster."""
    settings = {
        "features": recipe.features.model_dump(mode="json"),
        "generations": [encoder.used.generation.number, encoder.stored.published().number],
        "runs": [target.id for target in lacking],
    }
    runs = {target.id: target for target in lacking}

    def make(indices: Sequence[int]) -> Iterator[PartRecord]:
        items = [(index, [name for name, at in runs.items() if index in lacking[at]]) for index in indices]
        sizes = {json.dumps(item): n_tokens[item[0]] for item in items}
        with contextlib.closing(workers.each("pipeline.encode.encode_at", settings, items, bar, sizes)) as found:
            for (index, _), records in found:
                for name, record in records.items():
                    runs[name].made[index] = PartRecord.model_validate(record)
                yield runs[next(iter(records))].made[index]

    return Job(list(n_tokens), make, workers.n_calls)


def encode_at(store: str, settings: str, item: tuple[int, list[str]], progress: Progress) -> dict[str, Any]:
    """On a worker: encode an activation part for these runs; the record of each."""
    index, runs = item
    encoders, parts = work.held(_encoders_at, store, settings)
    with progress.bar("features", None, "tokens") as bar:
        records = encode_together([encoders[run] for run in runs], parts[index], bar)
    return {run: record.model_dump(mode="json") for run, record in zip(runs, records, strict=True)}


def _encoders_at(name: str, settings: str) -> tuple[dict[str, Encoder], dict[int, PartRecord]]:
    """What a worker needs for every part, and the activation parts: made once, from what the client has begun."""
    about, store = work.settings_of(settings), work.store_at(name)
    config = FeaturesConfig.model_validate(about["features"])
    runs = {run: Ancestors(store, work.shared(store, run)) for run in about["runs"]}
    encoders = {name: encoder_of(run, run.selection(), config) for name, run in runs.items()}
    first = next(iter(encoders.values()))
    generation = first.stored.published()
    if [first.used.generation.number, generation.number] != about["generations"]:
        raise UserError("The store has changed since this run began. Nothing is lost; run the same command again.")
    return encoders, {part.index: part for part in generation.parts}


def compact(lineage: Lineage, progress: Progress, enough: int | None = None) -> None:
    """Merge the parts of the recipe's runs, where at least `enough` can be (default: `features.compact_parts`)."""
    with kept_open():
        for member in lineage.members:
            recipe = member.recipe
            if member.features.generation() is not None:
                train.set_threads(recipe)
                merge_parts(member.store, member.features, recipe, progress, enough or recipe.features.compact_parts)


def merge_parts(
    store: Store, target: Artefact, recipe: Recipe, progress: Progress, enough: int, mend: bool = False
) -> None:
    """Merge the parts of one run. Raises UserError where the disk has no room for old and new parts together."""
    used = Ancestors(store, target).selection()
    groups = compaction.plan_merges(target.published().parts, used.spans, enough, mend)
    n_bytes = sum(part.n_bytes for group in groups for part in group)
    store.require_free(n_bytes, f"Merging the parts of {target.id}")
    if not groups or recipe.cluster is None:
        return compaction.compact_run(target, used, progress, enough, mend, settings=MergeSettings(recipe.threads))
    with workers_of(store, recipe, progress) as workers:
        assert workers is not None
        by_workers = partial(_merged_by_workers, workers, target, recipe.threads)
        return compaction.compact_run(target, used, progress, enough, mend, by_workers)


def _merged_by_workers(
    workers: Workers, target: Artefact, threads: int, groups: list[list[PartRecord]], bar: Bar
) -> Iterator[PartRecord]:
    """The merged part of each group, in their order, so that generations follow one another as in one process."""
    about = {"run": target.id, "generation": target.published().number, "threads": workers.threads(threads)}
    items = [[group[0].folder, group[-1].folder] for group in groups]
    sizes = {json.dumps(item): sum(p.counts["n_values"] for p in g) for item, g in zip(items, groups, strict=True)}
    early: dict[str, PartRecord] = {}
    with contextlib.closing(workers.each("pipeline.encode.merge_at", about, items, bar, sizes)) as found:
        for item in items:
            while item[0] not in early:
                made, record = next(found)
                early[made[0]] = PartRecord.model_validate(record)
            target.look_again()
            yield early.pop(item[0])


def merge_at(store: str, settings: str, ends: tuple[str, str], progress: Progress) -> dict[str, Any]:
    """On a worker: merge neighbouring parts of a run, from one folder to another; the record of the new one."""
    work.let_go()
    about, opened = work.settings_of(settings), work.store_at(store)
    target = work.shared(opened, about["run"])
    torch.set_num_threads(n_threads(about["threads"]))
    generation = target.generation(about["generation"])
    assert generation is not None
    parts = compaction.group_between(generation.parts, *ends)
    with work.one_at_a_time, progress.bar("compact", None, "values") as bar:
        sizes = MergeSettings(about["threads"])
        made = compaction.merge_whole_parts(target, Ancestors(opened, target).selection(), parts, bar, sizes)
        return made.model_dump(mode="json")


def add_tables(store: Store, target: Artefact, recipe: Recipe, progress: Progress) -> None:
    """Tables beside the parts that a run of an earlier saeflow lacks; the recipe names the model."""
    with target.writing():
        if run_tables.missing_tables(target):
            sae = interchange.load(Ancestors(store, target).sae.fetched())
            target.add_files(run_tables.write_run_tables(target, recipe, sae, target.record.facts["site"], progress))


def publish(
    store: Store, target: Artefact, used: TokenSelection, inputs: Mapping[int, dict[str, str]], progress: Progress,
    check_values: int = checks.CHECK_VALUES,
) -> None:  # fmt: skip
    """Show the parts that follow from these inputs; a compacted one that holds more is written again without it.

    New ones are checked first, at most so many values of them. Raises UserError where a check finds something.
    """
    generation, parts = target.generation(), compaction.parts_to_show(target, used, inputs)
    if lost := inputs.keys() - {index for part in parts for index in covered(part)}:
        raise UserError(f"Part {min(lost)} of {target.id} is gone since it was encoded. Run the same command again.")
    known = {part.folder for part in generation.parts} if generation else set()
    checks.require(store, target, [part for part in parts if part.folder not in known], check_values, progress)
    target.publish(parts)


def runs_over(store: Store, stored: Artefact) -> list[Artefact]:
    """The published runs that read these activations, whosever they are."""
    runs = [each for each in store.artefacts("features") if stored.id in each.record.inputs]
    return [each for each in runs if (each.path / "manifest.json").is_file()]


def holds_all(store: Store, target: Artefact) -> bool:
    """Do the published parts of a run follow from all activations as they are now? Read from records alone."""
    run = Ancestors(store, target)
    used = run.selection()
    known = dict(item for part in target.published().parts for item in covered(part).items())
    return all(
        known.get(each.index) == stands_for(part_inputs(used, each)) for each in run.activations.published().parts
    )


def refresh(
    store: Store, target: Artefact, progress: Progress, grow: bool = False, recipe: Recipe | None = None
) -> list[int]:
    """Encode again the parts of a run that no longer follow from what they were made of; their indices.

    `grow`: also those of activations that came since, so that the run holds the whole store again. How it is done the
    `[features]`, `threads` and `[cluster]` of a recipe say. Raises UserError where the disk has no room for a recipe's.
    """
    config = recipe.features if recipe else FeaturesConfig()
    run = Ancestors(store, target)
    with target.writing():
        used = run.selection()
        known = {index for part in target.published().parts for index in covered(part)}
        stored = run.activations.published().parts
        wanted = {part.index: part for part in stored if grow or part.index in known}
        inputs = {index: part_inputs(used, part) for index, part in wanted.items()}
        stale = sorted(inputs.keys() - compaction.part_of_each(target, inputs))
        if stale:
            _encode(run, used, [wanted[index] for index in stale], progress, recipe)
        publish(store, target, used, inputs, progress, config.check_values)
    return stale


def _encode(
    run: Ancestors,
    used: TokenSelection,
    parts: Sequence[PartRecord],
    progress: Progress,
    recipe: Recipe | None,
) -> None:
    store, target = run.store, run.artefact
    n_tokens = {part.index: part.counts["n_tokens"] for part in parts}
    if recipe:
        _require_room(store, [(run.sae, sum(n_tokens.values()))])
    config, threads = (_config_here(recipe), recipe.threads) if recipe else (FeaturesConfig(), 0)
    encoder = encoder_of(run, used, config)
    joined = workers_of(store, recipe, progress) if recipe else contextlib.nullcontext()
    with progress.bar("features", sum(n_tokens.values()), "tokens") as bar, joined as workers:
        if recipe and workers:
            list(_on_workers(encoder, recipe, workers, {target: set(n_tokens)}, n_tokens, bar).make(list(n_tokens)))
            target.look_again()
            return
        with _workers(config, threads) as pool:
            _all_done(pool, [pool.submit(encoder.encode, part, bar) for part in parts])
