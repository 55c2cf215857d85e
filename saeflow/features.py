"""Activations through trained SAEs to Parquet: every non-zero value, in two orders, with statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from saeflow.parallel import n_threads, use_one_thread
from saeflow.part_writer import PartWriter
from saeflow.progress import Bar, Progress
from saeflow.records import PartRecord
from saeflow.sae import SparseAutoencoder
from saeflow.sections import UserError
from saeflow.store import Store
from saeflow.token_facts import facts_of
from saeflow.transfer import device, own_stream
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


def open_encoder(store: Store, recipe: Recipe, progress: Progress) -> Encoder:
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
    sae = interchange.load(trained.fetched())
    tables = run_tables.write(target, recipe, sae, about["site"], progress)
    target.begin(about | used.facts, [source.id, stored.id, trained.id], tables)
    target.attach(tables)
    return encoder_of(store, target, recipe.features.batch_rows, recipe.features.device)


def encoder_of(store: Store, target: Artefact, batch_rows: int = 4096, place: str = "auto") -> Encoder:
    """The encoder of a run that exists, from what its record says."""
    _, stored, trained = (store.by_id(name) for name in target.record.inputs)
    site = activations.choose_site(stored, target.record.facts["site"])
    sae = interchange.load(trained.fetched()).to(device("features.device", place))
    return Encoder(used_of(store, target), stored, target, site, sae, batch_rows)


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
        ThreadPoolExecutor(n_threads(recipes[0].threads), "saeflow-encode") as pool,
    ):
        try:
            for future in [pool.submit(job.work, index) for index in job.missing]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def encoding_together(store: Store, recipes: Sequence[Recipe], progress: Progress) -> Iterator[Job]:
    """The parts that an SAE lacks and how to make one for each of them; publishes when the block ends well."""
    first = recipes[0]
    wanted = activations.artefact(store, first).published().parts
    used = Used.of(activations.tokens_artefact(store, first), first.activations)
    inputs = {part.index: part_inputs(used, part) for part in wanted}
    targets = {artefact(store, recipe): recipe for recipe in recipes}
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(target.writing())
        lacking = {target: sorted(inputs.keys() - compaction.owners(target, inputs)) for target in targets}
        encoders = {
            target: open_encoder(store, recipe, progress)
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
            n_values = sum(target.published().total("n_values") for target in targets)
            progress.skip("features", f"{n_values:,} values")
            yield Job([], lambda index: next(iter(targets)).made[index])
        for target, recipe in targets.items():
            publish(store, target, used, inputs, progress, recipe.features.check_values)


def compact(store: Store, recipe: Recipe, progress: Progress, enough: int | None = None) -> None:
    """Merge the parts of every run of the recipe, where at least `enough` can be (default: `features.compact_parts`)."""
    for member in recipe.members():
        target = artefact(store, member)
        if target.generation() is not None:
            train.set_threads(member)
            merge_parts(store, target, progress, enough or member.features.compact_parts)


def merge_parts(store: Store, target: Artefact, progress: Progress, enough: int, mend: bool = False) -> None:
    """Compact one run. Raises UserError where the disk has no room for the largest part that would be made."""
    groups = compaction.plan(target.published().parts, enough, mend)
    largest = max((sum(part.n_bytes for part in group) for group in groups), default=0)
    store.require_free(largest, f"Merging the parts of {target.id}")
    compaction.run(target, used_of(store, target), progress, enough, mend)


def add_tables(store: Store, target: Artefact, recipe: Recipe, progress: Progress) -> None:
    """Tables beside the parts that a run of an earlier saeflow lacks; the recipe names the model."""
    with target.writing():
        if run_tables.lacking(target):
            encoder = encoder_of(store, target)
            target.attach(run_tables.write(target, recipe, encoder.sae, encoder.site.name, progress))


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
    known = {part.folder for part in generation.parts} if generation else set()
    checks.require(store, target, [part for part in parts if part.folder not in known], check_values, progress)
    target.publish(parts)


def refresh(store: Store, target: Artefact, progress: Progress) -> list[int]:
    """Encode again the parts of a run that no longer follow from what they were made of; their indices."""
    with target.writing():
        encoder = encoder_of(store, target)
        known = {index for part in target.published().parts for index in covered(part)}
        wanted = [part for part in encoder.stored.published().parts if part.index in known]
        inputs = {part.index: part_inputs(encoder.used, part) for part in wanted}
        done = compaction.owners(target, inputs)
        stale = [part for part in wanted if part.index not in done]
        if stale:
            with progress.bar("features", sum(part.counts["n_tokens"] for part in stale), "tokens") as bar:
                for part in stale:
                    encoder.encode(part, bar)
        publish(store, target, encoder.used, inputs, progress)
    return [part.index for part in stale]
