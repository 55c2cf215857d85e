"""Activations through trained SAEs to Parquet: every non-zero value, in two orders, with statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow import activations, arrays, checks, compaction, imported, interchange, run_tables, train
from saeflow.artefact import Artefact, Job
from saeflow.config import Recipe
from saeflow.coverage import covered
from saeflow.fingerprints import fingerprint
from saeflow.model import Site
from saeflow.parallel import use_one_thread
from saeflow.part_writer import PartWriter
from saeflow.progress import Bar, Progress
from saeflow.records import PartRecord
from saeflow.sae import SparseAutoencoder
from saeflow.sections import FeaturesConfig, UserError
from saeflow.store import Store
from saeflow.token_facts import facts_of
from saeflow.transfer import device, n_workers, own_stream
from saeflow.used import Used

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
        return encode_together([self], part, bar)[0]

    def rows(self, part: PartRecord, mask: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
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


def encode_together(encoders: Sequence[Encoder], part: PartRecord, bar: Bar) -> list[PartRecord]:
    """Encode one activation part for several SAEs of its site in one reading, on one thread."""
    use_one_thread()
    first = encoders[0]
    about = facts_of(first.used, part.index)
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


def part_inputs(used: Used, part: PartRecord) -> dict[str, str]:
    """What the values of an activation part follow from."""
    hidden = used.generation.hidden_digest(part.index)
    inputs = {"tokens": used.parts[part.index].folder, "activations": part.folder}
    return inputs | ({"hidden": hidden} if hidden else {})


def open_encoder(store: Store, recipe: Recipe, used: Used, progress: Progress) -> Encoder:
    """Make the tables beside the parts, create the artefact, and load the SAE."""
    source, stored = activations.tokens_artefact(store, recipe), activations.artefact(store, recipe)
    trained, target = _trained(store, recipe), artefact(store, recipe)
    about = facts(store, recipe) | {
        "context_length": used.length,
        "architecture": imported.sae_config(recipe).architecture,
    }
    sae = interchange.load(trained.fetched())
    made = run_tables.write(target, recipe, sae, about["site"], progress)
    target.begin(about | used.facts, [source.id, stored.id, trained.id], made)
    target.attach(made)
    return encoder_of(store, target, used, recipe.features)


def encoder_of(store: Store, target: Artefact, used: Used, config: FeaturesConfig) -> Encoder:
    """The encoder of a run that exists, from what its record says."""
    _, stored, trained = (store.by_id(name) for name in target.record.inputs)
    site = activations.choose_site(stored, target.record.facts["site"])
    sae = interchange.load(trained.fetched()).to(device("features.device", config.device))
    sae.prepare()
    return Encoder(used, stored, target, site, sae, config.batch_rows)


def run(store: Store, recipe: Recipe, progress: Progress) -> Artefact:
    """Encode every missing part, several at once, and publish."""
    run_together(store, [recipe], progress)
    return artefact(store, recipe)


def run_all(store: Store, recipe: Recipe, progress: Progress) -> None:
    """Encode every SAE of a sweep; those of one site in one reading."""
    for group in by_site(store, recipe):
        run_together(store, group, progress)


def by_site(store: Store, recipe: Recipe) -> list[list[Recipe]]:
    """The SAEs of a recipe, those together that read one site."""
    groups: dict[str, list[Recipe]] = {}
    for member in recipe.members():
        groups.setdefault(facts(store, member)["site"], []).append(member)
    return list(groups.values())


def run_together(store: Store, recipes: Sequence[Recipe], progress: Progress) -> None:
    """Encode the SAEs of recipes that read one site, in one reading."""
    with (
        encoding_together(store, recipes, progress) as job,
        _workers(recipes[0].features, recipes[0].threads) as pool,
    ):
        _all_done(pool, [pool.submit(job.work, index) for index in job.missing])


def _workers(config: FeaturesConfig, threads: int) -> ThreadPoolExecutor:
    """Threads that encode a part each: their use of one thread of torch stays theirs."""
    return ThreadPoolExecutor(n_workers(device("features.device", config.device), threads), "saeflow-encode")


def _all_done(pool: ThreadPoolExecutor, futures: Sequence[Future[Any]]) -> None:
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextlib.contextmanager
def encoding_together(store: Store, recipes: Sequence[Recipe], progress: Progress) -> Iterator[Job]:
    """The parts that an SAE lacks and how to make one for each of them; publishes when the block ends well."""
    first = recipes[0]
    targets = {artefact(store, recipe): recipe for recipe in recipes}
    with contextlib.ExitStack() as stack:
        for target in sorted(
            targets, key=lambda target: target.id
        ):  # in one order: nobody waits for one who waits for him
            stack.enter_context(target.writing())
        wanted = activations.artefact(store, first).published().parts
        used = Used.of(activations.tokens_artefact(store, first), first.activations)
        inputs = {part.index: part_inputs(used, part) for part in wanted}
        lacking = {target: inputs.keys() - compaction.owners(target, inputs) for target in targets}
        n_tokens = [sum(part.counts["n_tokens"] for part in wanted if part.index in left) for left in lacking.values()]
        _require_room(store, recipes, n_tokens)
        encoders = {
            target: open_encoder(store, recipe, used, progress)
            for target, recipe in targets.items()
            if lacking[target] or not target.complete()
        }
        plan = {part.index: part for part in wanted if any(part.index in lacking[target] for target in encoders)}
        if encoders:
            with progress.bar("features", sum(part.counts["n_tokens"] for part in plan.values()), "tokens") as bar:

                def work(index: int) -> PartRecord:
                    chosen = [encoder for target, encoder in encoders.items() if index in lacking[target]]
                    return encode_together(chosen, plan[index], bar)[0]

                yield Job(list(plan), work)
        else:
            n_values = sum(each.total("n_values") for target in targets if (each := target.generation()))
            progress.skip("features", f"{n_values:,} values")
            yield Job([], lambda index: next(iter(targets)).made[index])
        for target, recipe in targets.items():
            publish(store, target, used, inputs, progress, recipe.features.check_values)


def _trained(store: Store, recipe: Recipe) -> Artefact:
    trained = train.artefact(store, recipe)
    if not trained.complete():
        raise UserError(f"{trained.id} is not trained. Run `saeflow train RECIPE` first.")
    return trained


def _require_room(store: Store, recipes: Sequence[Recipe], n_tokens: Sequence[int]) -> None:
    """Refuse what the disk cannot hold: of each SAE its values at so many tokens."""
    n_values = 0.0
    for recipe, n in zip(recipes, n_tokens, strict=True):
        n_values += n * train.last_row(_trained(store, recipe)).get("l0", recipe.sae.k) if n else 0
    store.require_free(int(n_values * _BYTES_PER_NONZERO), "Storing every feature activation")


def compact(store: Store, recipe: Recipe, progress: Progress, enough: int | None = None) -> None:
    """Merge the parts of every run of the recipe, where at least `enough` can be (default: `features.compact_parts`)."""
    for member in recipe.members():
        target = artefact(store, member)
        if target.generation() is not None:
            train.set_threads(member)
            merge_parts(store, target, progress, enough or member.features.compact_parts)


def merge_parts(store: Store, target: Artefact, progress: Progress, enough: int, mend: bool = False) -> None:
    """Compact one run. Raises UserError where the disk has no room for the parts that would be made beside the old ones."""
    used = used_of(store, target)
    groups = compaction.plan(target.published().parts, used.spans, enough, mend)
    n_bytes = sum(part.n_bytes for group in groups for part in group)
    store.require_free(n_bytes, f"Merging the parts of {target.id}")
    compaction.run(target, used, progress, enough, mend)


def add_tables(store: Store, target: Artefact, recipe: Recipe, progress: Progress) -> None:
    """Tables beside the parts that a run of an earlier saeflow lacks; the recipe names the model."""
    with target.writing():
        if run_tables.lacking(target):
            sae = interchange.load(store.by_id(target.record.inputs[2]).fetched())
            target.attach(run_tables.write(target, recipe, sae, target.record.facts["site"], progress))


def used_of(store: Store, target: Artefact) -> Used:
    """The tokens that a run encodes, as they are now."""
    return Used.from_facts(store.by_id(target.record.inputs[0]), target.record.facts)


def publish(
    store: Store, target: Artefact, used: Used, inputs: Mapping[int, dict[str, str]], progress: Progress,
    check_values: int = checks.MOST_VALUES,
) -> None:  # fmt: skip
    """Show the parts that follow from these inputs; a compacted one that holds more is written again without it.

    New ones are checked first, at most so many values of them. Raises UserError where a check finds something.
    """
    generation, parts = target.generation(), compaction.settled(target, used, inputs)
    if lost := inputs.keys() - {index for part in parts for index in covered(part)}:
        raise UserError(f"Part {min(lost)} of {target.id} is gone since it was encoded. Run the same command again.")
    known = {part.folder for part in generation.parts} if generation else set()
    checks.require(store, target, [part for part in parts if part.folder not in known], check_values, progress)
    target.publish(parts)


def refresh(store: Store, target: Artefact, progress: Progress, grow: bool = False) -> list[int]:
    """Encode again the parts of a run that no longer follow from what they were made of; their indices.

    `grow`: also those of activations that came since, so that the run holds the whole store again.
    """
    with target.writing():
        used = used_of(store, target)
        known = {index for part in target.published().parts for index in covered(part)}
        stored = store.by_id(target.record.inputs[1]).published().parts
        wanted = {part.index: part for part in stored if grow or part.index in known}
        inputs = {index: part_inputs(used, part) for index, part in wanted.items()}
        stale = sorted(inputs.keys() - compaction.owners(target, inputs))
        if stale:
            _encode(store, target, used, [wanted[index] for index in stale], progress)
        publish(store, target, used, inputs, progress)
    return stale


def _encode(store: Store, target: Artefact, used: Used, parts: Sequence[PartRecord], progress: Progress) -> None:
    config, n_tokens = FeaturesConfig(), sum(part.counts["n_tokens"] for part in parts)
    encoder = encoder_of(store, target, used, config)
    with progress.bar("features", n_tokens, "tokens") as bar, _workers(config, 0) as pool:
        _all_done(pool, [pool.submit(encoder.encode, part, bar) for part in parts])
