"""Train the SAEs of a recipe on one feed: what makes them the same, continuing after a kill, publication."""

from __future__ import annotations

import json
import shutil
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from saeflow.activations.feed import Feed, measure_mixing
from saeflow.model.sites import Site
from saeflow.pipeline import import_sae
from saeflow.pipeline.dask.clusters import workers_of
from saeflow.pipeline.identity import hidden_fact
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import PartMaker, PartWork, Records
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.devices import choose_device, device_memory
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import human_bytes
from saeflow.runtime.threads import keep_freed_memory, n_threads
from saeflow.sae import interchange
from saeflow.store.artefact import Artefact, writing_all
from saeflow.store.files import replacing
from saeflow.store.store import Store
from saeflow.train.group import TrainingGroup, TrainingJob, checkpoints_of
from saeflow.train.tensorboard import require_tensorboard
from saeflow.train.training import Training

_NOTICING_SECONDS = 10.0
"""How long a worker may take to notice that its run was killed: some batches."""


def run(lineage: Lineage, progress: Progress) -> Artefact:
    """Train the recipe's SAE, or continue a killed training where its checkpoint stands, or import the one that
    `sae.source` names; of a sweep all, and the first is returned.

    An SAE trained before documents were appended or forgotten stays the recipe's own unless the lineage is `fresh`. A
    killed training ends with what it has seen; the next fresh one sees what was appended since.
    """
    return run_all(lineage, progress)[0]


def run_all(lineage: Lineage, progress: Progress, noticing_seconds: float = _NOTICING_SECONDS) -> list[Artefact]:
    """The same; returns the SAE of each member, in their order.

    All that read the same sites are trained on each batch of one feed. Each is the artefact, byte for byte, that a run
    of the member's recipe would make, with a lock and a checkpoint of its own, and is published as soon as it is
    finished. On a cluster each worker trains its share of them, locks and publishes them; what is imported stays here.
    """
    members = lineage.members
    away = [each for each in members if lineage.recipe.cluster and not _is_import(each) and not each.sae.complete()]
    if away:
        _train_on_workers(lineage, away, progress, noticing_seconds)
    if here := [each for each in members if each not in away]:
        _train_here(lineage.recipe, here, progress)
    return [each.sae for each in members]


def _is_import(lineage: Lineage) -> bool:
    return lineage.recipe.sae.source is not None


def _train_here(recipe: Recipe, chosen: list[Lineage], progress: Progress) -> None:
    """Train or import these members of a recipe in this process."""
    targets = [each.sae for each in chosen]
    with writing_all(targets):
        left = [each for each in chosen if not each.sae.complete()]
        for target in (target for target in targets if target.complete()):
            shutil.rmtree(checkpoints_of(target), ignore_errors=True)  # a run killed just after publication leaves it
        _say_what_is_done(progress, recipe, chosen, len(left))
        ready = [each for each in left if _is_import(each)]
        for each in ready:
            import_sae.require_fits(each)
        for each in ready:
            import_sae.publish(each, progress)
        if left := [each for each in left if not _is_import(each)]:
            _train(left, progress)


def _train_on_workers(lineage: Lineage, away: list[Lineage], progress: Progress, noticing_seconds: float) -> None:
    """Train these members on a cluster: as many groups as it has workers, those of one group in one reading."""
    recipe, store = lineage.recipe, lineage.store
    assert recipe.cluster is not None
    sites = [tuple(each.distinct_sites) for each in away]
    _require_free([each.sae for each in away], noticing_seconds)
    with workers_of(store, recipe.cluster, progress) as workers:
        groups = [[away[number].recipe for number in group] for group in shares(sites, workers.n_expected)]
        work = PartWork(
            Trainer,
            {
                "recipe": recipe.model_copy(update={"cluster": None}).model_dump(mode="json"),
                "facts": {each.recipe.name: each.sae_facts for each in away},
            },
            [([member.name for member in group], max(m.train.n_tokens for m in group)) for group in groups],
            [each.sae for each in away],
            ("train", "tokens"),
            made=lambda names, _: progress.say(f"train: {', '.join(names)} finished on a worker"),
        )
        work.run(workers, progress)
    store.storage.pull()


@dataclass
class Trainer(PartMaker, name="train-train"):
    """On a worker: trains members of a sweep in one reading, each from its checkpoint, and publishes them."""

    whole: Lineage
    facts: dict[str, dict[str, Any]]
    """Of each member, what the client has chosen that its SAE sees."""

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Trainer:
        waiting = Store(store.storage, "wait")  # a worker that is thought lost may still be at it
        return cls(Lineage(waiting, parse_recipe(settings["recipe"])), settings["facts"])

    def members(self, names: list[str]) -> list[Lineage]:
        recipes = {recipe.name: recipe for recipe in self.whole.recipe.members()}
        return [self.whole.member(recipes[name], self.facts[name]) for name in names]

    def waits_for(self, item: list[str]) -> list[Artefact]:
        return [each.sae for each in self.members(item)]

    def make(self, item: list[str], progress: Progress) -> Records:
        _train_here(self.whole.recipe, self.members(item), progress)
        return {}


def _require_free(targets: Iterable[Artefact], noticing_seconds: float) -> None:
    """Refuse or wait, as `overlap` says, while another run is at one of these: here, not where it would keep a worker.

    A worker of a run that was killed may take some seconds to notice that nobody waits for it.
    """
    noticing = stop_after_delay(noticing_seconds)
    for target in targets:
        for attempt in Retrying(
            retry=retry_if_exception_type(UserError), stop=noticing, wait=wait_fixed(0.2), reraise=True
        ):
            with attempt, target.writing():
                pass


def shares(sites: Sequence[Hashable], n: int) -> list[list[int]]:
    """Numbers of things in about `n` groups of about equal size, only those of equal `sites` together."""
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


def _train(chosen: list[Lineage], progress: Progress) -> None:
    """Refuse what cannot be, then train: those that read the same sites together."""
    require_memory([(each.recipe, each.distinct_sites) for each in chosen])
    for each in chosen:
        require_tensorboard(each.recipe.train.tensorboard)
    set_threads(chosen[0].recipe)
    reads = [(each.sae_facts["generation"], *each.distinct_sites) for each in chosen]
    for wanted in dict.fromkeys(reads):
        together = [each for each, read in zip(chosen, reads, strict=True) if read == wanted]
        feed = _feed_of(together[0])
        now, number = feed.target.published().number, together[0].sae_facts["generation"]
        if now != number:
            progress.say(f"train: on generation {number} of {feed.target.id}, as begun; {now} is there by now")
        progress.say(f"train: {measure_mixing(feed)}")

        def publish_job(job: TrainingJob, training: Training, seconds: float, feed: Feed = feed) -> None:
            publish(job, training, feed, seconds)

        jobs = [TrainingJob(each.recipe, each.sae, each.sae_facts) for each in together]
        TrainingGroup(feed, jobs, progress, publish_job).run()


def _feed_of(lineage: Lineage) -> Feed:
    """The feed of what the SAE was chosen to see. Raises UserError where that is there no more."""
    number = int(lineage.sae_facts["generation"])
    feed = open_feed(lineage, number) if number in lineage.activations.numbers() else None
    hidden = hidden_fact(feed.selection.generation).get("hidden") if feed else None
    if feed is None or hidden != lineage.sae_facts.get("hidden"):
        raise UserError(
            "The store has changed since this run was begun: documents were forgotten or replaced, or it waited "
            f"until its generation {number} was collected.\nNothing is lost; run the same command again."
        )
    return feed


def require_devices(recipe: Recipe) -> None:
    """Refuse a device that is not there before hours of collecting, where this machine is to train as well."""
    for member in recipe.members() if recipe.cluster is None else ():
        choose_device("train.device", member.train.device)


def require_memory(wanted: Iterable[tuple[Recipe, list[Site]]]) -> None:
    """Weights and Adam's two moments of every training, and the gradients of the one that steps, float32."""
    needs: dict[torch.device, list[int]] = {}
    for recipe, sites in wanted:
        size = recipe.sae.n_features * (sites[0].width + sites[-1].width + 2)
        here = needs.setdefault(choose_device("train.device", recipe.train.device), [])
        here += [size] * recipe.train.restarts
    for place, sizes in needs.items():
        need, total = 4 * (3 * sum(sizes) + max(sizes)), device_memory(place)
        if need > total:
            where = "this machine has" if place.type == "cpu" else f"on {place} are free"
            raise UserError(
                f"{len(sizes)} SAEs in training take {human_bytes(need)} (weights, gradients, moments), but {where} "
                f"{human_bytes(total)} of memory.\n"
                "Train fewer at once: shorten [sweep], lower train.restarts, or choose a "
                "smaller sae.n_features."
            )


def set_threads(recipe: Recipe) -> None:
    torch.set_num_threads(n_threads(recipe.threads))
    keep_freed_memory()


def open_feed(lineage: Lineage, generation: int | None = None) -> Feed:
    """The training tokens of a generation of the activations, by default of the published one."""
    return Feed(lineage.selection(), lineage.activations, lineage.distinct_sites, lineage.recipe.feed, generation)


def fit(feed: Feed, recipe: Recipe, checkpoints: Path, progress: Progress) -> Training:
    """Train on a feed as often as `train.restarts` says, without publishing; return the best."""
    job = TrainingJob(recipe, Store(checkpoints).artefact("saes", recipe.name, "00000000"))
    trained: list[Training] = []
    TrainingGroup(feed, [job], progress, lambda _, training, __: trained.append(training)).run()
    return trained[0]


def last_row(target: Artefact) -> dict[str, float]:
    """The last row of a training's log."""
    log = pq.read_table(target.own_file("log.parquet"))
    return dict(log.slice(log.num_rows - 1).to_pylist()[0])


def publish(job: TrainingJob, training: Training, feed: Feed, seconds: float) -> None:
    """Fold the scale into the weights and publish weights, settings and log."""
    named = dict(zip(("site", "target_site"), (site.name for site in feed.sites), strict=False))
    about = job.facts
    n_seen = sum(part.counts["n_train_tokens"] for part in feed.blocks.parts)
    inputs = [feed.selection.source.id, feed.target.id]
    with job.target.publish_folder(about, inputs, {"seconds": seconds, "n_train_tokens": n_seen}) as folder:
        interchange.save(training.folded(), folder, named | {"saeflow": json.dumps(about, sort_keys=True)})
        with replacing(folder / "log.parquet") as temporary:
            table = pa.Table.from_pylist(training.log)
            names = ["step", *sorted(set(table.column_names) - {"step"})]  # a checkpoint does not keep their order
            pq.write_table(table.select(names), temporary, compression="zstd")
