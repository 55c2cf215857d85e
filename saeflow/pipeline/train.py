"""Train or import the SAEs of a recipe, here or on a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from saeflow.activations.feed import Feed, measure_mixing
from saeflow.pipeline.dask.clusters import workers_of
from saeflow.pipeline.dask.gang import make_together
from saeflow.pipeline.facts import DATA_SEEN, hidden_fact
from saeflow.pipeline.foreign import import_sae
from saeflow.pipeline.lineage import Lineage, grouped
from saeflow.pipeline.parts import PartMaker, PartWork, Records
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.devices import choose_device
from saeflow.runtime.errors import ToldElsewhere, UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.ranks import ALONE, Ranks, joined_at
from saeflow.runtime.threads import use_threads
from saeflow.store.artefact import Artefact, writing_all
from saeflow.store.links import remove
from saeflow.store.store import Store
from saeflow.train.fused import require_kernels
from saeflow.train.group import (
    TrainingGroup,
    TrainingJob,
    checkpoints_of,
    require_tensorboard,
)
from saeflow.train.memory import require_memory
from saeflow.train.shares import require_shareable

_NOTICING_SECONDS = 10.0
"""Time that a worker may take to notice that its run was killed."""


def run(lineage: Lineage, progress: Progress) -> Artefact:
    """Train the recipe's SAE, continue a killed training from its checkpoint, or import the SAE in `sae.source`.

    A sweep trains all its SAEs; the first is returned. An SAE trained before documents were appended or forgotten stays
    the recipe's own unless the lineage is `fresh`. A killed training ends with the data that it has seen; the next
    fresh one also sees what was appended since.
    """
    return run_all(lineage, progress)[0]


def run_all(
    lineage: Lineage, progress: Progress, noticing_seconds: float = _NOTICING_SECONDS, ranks: Ranks = ALONE
) -> list[Artefact]:
    """Do what `run` does; return the SAE of each member, in order.

    SAEs that read the same sites share one feed. Each SAE has a lease and a checkpoint of its own, is published as soon
    as it is finished, and equals, byte for byte, the one that its own recipe would give. On a cluster each worker
    trains, locks and publishes its share. Imports stay in this process.

    Several ranks share each training. The first holds the leases, imports and publishes; the others return nothing.
    """
    lineage = lineage.training
    members = lineage.members
    if not ranks.is_first:
        _follow_first_rank(lineage, ranks, Progress(verbosity=-1))
        return []
    require_shareable((each.recipe for each in members), ranks)
    away = [each for each in members if lineage.recipe.cluster and not _is_import(each) and not each.sae.complete()]
    if away:
        _train_on_workers(lineage, away, progress, noticing_seconds)
    if here := [each for each in members if each not in away]:
        _train_here(lineage.recipe, here, progress, ranks)
    return [each.sae for each in members]


def _follow_first_rank(lineage: Lineage, ranks: Ranks, progress: Progress) -> None:
    """Train what the first rank trains, on the data that it has chosen."""
    facts = ranks.first_says()
    chosen = [each for each in lineage.members if each.recipe.name in facts]
    if chosen:
        _train([lineage.member(each.recipe, facts[each.recipe.name]) for each in chosen], progress, ranks)


def _is_import(lineage: Lineage) -> bool:
    return lineage.recipe.sae.source is not None


def _train_here(recipe: Recipe, chosen: list[Lineage], progress: Progress, ranks: Ranks = ALONE) -> None:
    """Train or import these members of a recipe in this process."""
    targets = [each.sae for each in chosen]
    with writing_all(targets):
        left = [each for each in chosen if not each.sae.complete()]
        for target in (target for target in targets if target.complete()):
            remove(checkpoints_of(target))  # a run killed just after publication leaves it
        _say_what_is_done(progress, recipe, chosen, len(left))
        ready = [each for each in left if _is_import(each)]
        for each in ready:
            import_sae.require_fits(each)
        for each in ready:
            import_sae.run(each, progress)
        left = [each for each in left if not _is_import(each)]
        ranks.first_says({each.recipe.name: each.sae_facts for each in left})
        if left:
            _train(left, progress, ranks)


def _train_on_workers(lineage: Lineage, away: list[Lineage], progress: Progress, noticing_seconds: float) -> None:
    """Train these members on a cluster: one group of them a worker, or all workers together; a group in one reading."""
    recipe, store = lineage.recipe, lineage.store
    assert recipe.cluster is not None
    n_ranks = recipe.cluster.ranks
    alone = recipe.model_copy(update={"cluster": None})
    require_shareable((each.recipe.model_copy(update={"cluster": None}) for each in away), Ranks(0, n_ranks))
    sites = [tuple(each.distinct_sites) for each in away]
    _require_free([each.sae for each in away], noticing_seconds)
    with workers_of(store, recipe.cluster, progress) as workers:
        n_groups = workers.n_expected if n_ranks == 1 else 1
        groups = [[away[number].recipe for number in group] for group in shares(sites, n_groups)]
        settings = {
            "recipe": alone.model_dump(mode="json"),
            "facts": {each.recipe.name: each.sae_facts for each in away},
        }
        sizes = [([member.name for member in group], max(m.train.n_tokens for m in group)) for group in groups]
        work = PartWork(
            Trainer if n_ranks == 1 else RankTrainer, settings, sizes, [each.sae for each in away], ("train", "tokens"),
            made=lambda names, _: progress.say(f"train: {', '.join(names)} finished on a worker"),
        )  # fmt: skip
        if n_ranks == 1:
            work.run(workers, progress)
        for names, size in sizes if n_ranks > 1 else ():
            make_together(workers, work, names, size, n_ranks, progress)
            progress.say(f"train: {', '.join(names)} finished on {n_ranks} workers together")
    store.storage.pull()
    if n_ranks > 1:
        require_published(work.targets)


def require_published(targets: Iterable[Artefact]) -> None:
    """Raise UserError if all ranks have ended, and an SAE is not there: the rank that knew why was lost."""
    for target in targets:
        if not target.complete():
            raise UserError(
                f"The workers that trained {target.id} together have ended before it was done, and none says why: see "
                "their logs.\nNothing up to the last checkpoint is lost: run the same command again."
            )


@dataclass
class Trainer(PartMaker, name="train-train"):
    """On a worker: trains members of a sweep in one reading, and publishes them. An item is the members' names."""

    whole: Lineage
    facts: dict[str, dict[str, Any]]
    """Facts of each member's SAE, which the client has chosen."""

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Trainer:
        waiting = Store(store.storage, "wait")  # a worker that is thought lost may still train
        return cls(Lineage(waiting, parse_recipe(settings["recipe"])), settings["facts"])

    def members(self, names: list[str]) -> list[Lineage]:
        recipes = {recipe.name: recipe for recipe in self.whole.recipe.members()}
        return [self.whole.member(recipes[name], self.facts[name]) for name in names]

    def waits_for(self, item: list[str]) -> list[Artefact]:
        return [each.sae for each in self.members(item)]

    def make(self, item: list[str], progress: Progress) -> Records:
        _train_here(self.whole.recipe, self.members(item), progress)
        return {}


class RankTrainer(Trainer, name="train-ranks"):
    """On a worker: one rank of a training. An item is [rank, number of ranks, host, port, names of members]."""

    def waits_for(self, item: list[Any]) -> list[Artefact]:
        return super().waits_for(item[-1]) if item[0] == 0 else []

    def make(self, item: list[Any], progress: Progress) -> Records:
        number, n, host, port, names = item
        with contextlib.suppress(ToldElsewhere), joined_at(host, port, number, n) as ranks:
            if ranks.is_first:
                _train_here(self.whole.recipe, self.members(names), progress, ranks)
            else:
                _follow_first_rank(self.whole, ranks, progress)
        return {}


def _require_free(targets: Iterable[Artefact], noticing_seconds: float) -> None:
    """Refuse or wait, as `overlap` says, while another run writes one of these; a worker would wait in vain.

    A worker of a killed run may take some seconds to notice that nobody waits for it.
    """
    noticing = stop_after_delay(noticing_seconds)
    for target in targets:
        for attempt in Retrying(
            retry=retry_if_exception_type(UserError), stop=noticing, wait=wait_fixed(0.2), reraise=True
        ):
            with attempt, target.writing():
                pass


def shares(sites: Sequence[Hashable], n: int) -> list[list[int]]:
    """Return indices of `sites` in about `n` groups of about equal size. A group has equal sites only."""
    groups: list[list[int]] = []
    for chosen in dict.fromkeys(sites):
        numbers = [number for number, each in enumerate(sites) if each == chosen]
        n_groups = min(max(1, round(n * len(numbers) / len(sites))), len(numbers))
        groups += [list(map(int, group)) for group in np.array_split(numbers, n_groups)]
    return groups


def _say_what_is_done(progress: Progress, recipe: Recipe, chosen: list[Lineage], n_left: int) -> None:
    if n_left == 0:
        one = f"{chosen[0].sae_config.n_features:,} features in {chosen[0].sae.path}"
        progress.skip("train", f"{len(chosen)} SAEs of {recipe.name}" if recipe.is_sweep else one)
    elif n_left < len(chosen):
        progress.say(f"train: {len(chosen) - n_left} of {len(chosen)} SAEs are trained already")
    if recipe.sae.source is None and (n_former := sum(each.has_former_defaults for each in chosen)):
        which = f"{n_former} of {len(chosen)} SAEs" if recipe.is_sweep else "this SAE"
        progress.say(f"train: an earlier saeflow trained {which} with its own defaults; --fresh takes today's")


def _train(chosen: list[Lineage], progress: Progress, ranks: Ranks) -> None:
    """Check memory and packages, then train SAEs that read the same sites together."""
    require_memory([(each.recipe, each.distinct_sites) for each in chosen], ranks)
    for each in chosen:
        require_tensorboard(each.recipe.train.tensorboard)
        require_kernels(each.recipe.train, choose_device("train.device", each.recipe.train.device))
        if different := each.store.why_new(each.sae, each.sae_facts, DATA_SEEN):
            progress.say(different)
    use_threads(chosen[0].recipe.threads)
    for together in grouped(chosen, lambda each: (each.sae_facts["generation"], *each.distinct_sites)):
        feed = _feed_of(together[0])
        now, number = feed.target.published().number, together[0].sae_facts["generation"]
        if now != number:
            progress.say(f"train: on generation {number} of {feed.target.id}, as begun; {now} is there by now")
        progress.say(f"train: {measure_mixing(feed)}")
        for reason, n in feed.left_out.items():
            which = "tokens are left out" if reason == "n_left_out" else "of these for the length of their vectors"
            progress.say(f"train: {n:,} {which}")
        jobs = [TrainingJob(each.recipe, each.sae, each.sae_facts) for each in together]
        TrainingGroup(feed, jobs, progress, ranks=ranks).run()


def _feed_of(lineage: Lineage) -> Feed:
    """Return the feed of the data chosen for the SAE. Raises UserError if the store no longer has that data."""
    number = int(lineage.sae_facts["generation"])
    feed = open_feed(lineage, number) if number in lineage.activations.numbers() else None
    hidden = hidden_fact(feed.selection.generation).get("hidden") if feed else None
    if feed is None or hidden != lineage.sae_facts.get("hidden"):
        raise UserError(
            "The store has changed since this run was begun: documents were forgotten or replaced, or it waited "
            f"until its generation {number} was collected.\nNothing is lost; run the same command again."
        )
    return feed


def open_feed(lineage: Lineage, generation: int | None = None) -> Feed:
    """Return the feed of training tokens, by default of the published generation."""
    return Feed(lineage.selection(), lineage.activations, lineage.distinct_sites, lineage.recipe.feed, generation)
