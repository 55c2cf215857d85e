"""Train the SAEs of a recipe on one feed: what makes them the same, continuing after a kill, publication."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saeflow import activations, cluster_work, imported, interchange
from saeflow.artefact import Artefact, writing_all
from saeflow.board import require_tensorboard
from saeflow.cluster import workers_of
from saeflow.config import Recipe, parse_recipe
from saeflow.disk import human_bytes, replacing
from saeflow.feed import Feed
from saeflow.fingerprints import facts_of, fingerprint
from saeflow.model import Site
from saeflow.parallel import keep_freed_memory, n_threads
from saeflow.progress import Progress
from saeflow.reading import Job, Reading, checkpoints_of
from saeflow.sections import UserError
from saeflow.store import Store
from saeflow.training import Training
from saeflow.transfer import device, memory_of
from saeflow.used import Used


def artefact(store: Store, recipe: Recipe) -> Artefact:
    """The recipe's SAE: the one trained on the newest generation, however much was appended since; else the one to train."""
    if recipe.sae.source is not None:
        return fresh_artefact(store, recipe)
    settings = _settings(store, recipe)
    trained = [sae for sae in store.artefacts("saes") if sae.name == recipe.name and sae.complete()]
    mine = [sae for sae in trained if _without_seen(sae.record.facts) == settings]
    if not mine:
        return fresh_artefact(store, recipe)
    return max(reversed(mine), key=lambda sae: sae.record.facts["generation"])  # of equal ones the one trained last


def fresh_artefact(store: Store, recipe: Recipe) -> Artefact:
    """The SAE of what the store holds now."""
    return store.artefact("saes", recipe.name, fingerprint(facts(store, recipe)))


def facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What makes a trained SAE the same: what it has seen, and every setting of the training; or what was imported."""
    if recipe.sae.source is not None:
        return imported.facts(store, recipe)
    hidden = activations.tokens_artefact(store, recipe).published().hidden_ids
    seen = {"generation": activations.artefact(store, recipe).published().number}
    return _settings(store, recipe) | seen | ({"hidden": fingerprint(hidden)} if hidden else {})


def _settings(store: Store, recipe: Recipe) -> dict[str, Any]:
    no_settings = {"checkpoint_seconds", "device"}
    return {
        "activations": activations.artefact(store, recipe).fp,
        "sae": facts_of(recipe.sae),
        "train": {name: value for name, value in facts_of(recipe.train).items() if name not in no_settings},
        "feed": facts_of(recipe.feed),
        "threads": recipe.threads,
    } | Used.of(activations.tokens_artefact(store, recipe), recipe.activations).facts


def _without_seen(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in ("generation", "hidden")}


def run(store: Store, recipe: Recipe, progress: Progress, fresh: bool = False) -> Artefact:
    """Train the recipe's SAE, or continue a killed training where its checkpoint stands, or import the one that
    `sae.source` names; of a sweep all, and the first is returned.

    An SAE trained before documents were appended or forgotten stays the recipe's own unless `fresh` is asked for.
    """
    return run_all(store, recipe, progress, fresh)[0]


def run_all(store: Store, recipe: Recipe, progress: Progress, fresh: bool = False) -> list[Artefact]:
    """The same; returns the SAE of each member, in their order.

    All that read the same sites are trained on each batch of one feed. Each is the artefact, byte for byte, that a run of
    the member's recipe would make, with a lock and a checkpoint of its own, and is published as soon as it is finished.
    On a cluster each worker trains its share of them, locks and publishes them; what is imported stays here.
    """
    members = recipe.members()
    targets = [fresh_artefact(store, each) if fresh else artefact(store, each) for each in members]
    away = [(m, t) for m, t in zip(members, targets, strict=True) if m.sae.source is None and not t.complete()]
    if recipe.cluster is not None and away:
        _train_on_workers(store, recipe, away, progress, fresh)
        pairs = [pair for pair in zip(members, targets, strict=True) if pair not in away]
    else:
        pairs = list(zip(members, targets, strict=True))
    if pairs:
        _train_here(store, recipe, pairs, progress)
    return targets


def _train_here(store: Store, recipe: Recipe, pairs: list[tuple[Recipe, Artefact]], progress: Progress) -> None:
    """Train or import these members of a recipe in this process."""
    targets = [target for _, target in pairs]
    with writing_all(targets):
        jobs = [Job(*pair) for pair in pairs if not pair[1].complete()]
        for target in (target for target in targets if target.complete()):
            shutil.rmtree(checkpoints_of(target), ignore_errors=True)  # a run killed just after publication leaves it
        _say_what_is_done(progress, recipe, targets, len(jobs))
        ready = [job for job in jobs if job.recipe.sae.source is not None]
        for job in ready:
            imported.require_fits(store, job.recipe)
        for job in ready:
            imported.publish(job.target, store, job.recipe, progress)
        if jobs := [job for job in jobs if job.recipe.sae.source is None]:
            _train(store, jobs, progress)


def _train_on_workers(
    store: Store, recipe: Recipe, away: list[tuple[Recipe, Artefact]], progress: Progress, fresh: bool
) -> None:
    """Train these members on a cluster: as many groups as it has workers, those of one group in one reading."""
    settings = {"recipe": recipe.model_copy(update={"cluster": None}).model_dump(mode="json"), "fresh": fresh}
    sites = [tuple(sites_of(store, member)) for member, _ in away]
    with workers_of(store, recipe, progress) as workers:
        assert workers is not None
        groups = [[away[number][0] for number in group] for group in shares(sites, len(workers.able()))]
        items = [[member.name for member in group] for group in groups]
        n_tokens = {
            json.dumps(item): max(m.train.n_tokens for m in group) for item, group in zip(items, groups, strict=True)
        }
        with (
            progress.bar("train", sum(n_tokens.values()), "tokens") as bar,
            contextlib.closing(workers.each("train.train_at", settings, items, bar, n_tokens)) as finished,
        ):
            for names, _ in finished:
                progress.say(f"train: {', '.join(names)} finished on a worker")
    for _, target in away:
        target.look_again()
    if store.objects is not None:
        store.objects.pull()


def shares(sites: Sequence[Hashable], n: int) -> list[list[int]]:
    """Numbers of things in about `n` groups of about equal size, only those of equal `sites` together."""
    groups: list[list[int]] = []
    for chosen in dict.fromkeys(sites):
        numbers = [number for number, each in enumerate(sites) if each == chosen]
        n_groups = min(max(1, round(n * len(numbers) / len(sites))), len(numbers))
        groups += [list(map(int, group)) for group in np.array_split(numbers, n_groups)]
    return groups


def train_at(name: str, settings: str, names: list[str], progress: Progress) -> list[str]:
    """On a worker: train these members of a sweep in one reading, each from its checkpoint; the artefacts."""
    cluster_work.let_go()
    about, opened = cluster_work.settings_of(settings), cluster_work.store_at(name)
    store = replace(opened, overlap="wait")  # a worker that is thought lost may still be at it
    recipe = parse_recipe(about["recipe"])
    members = [member for member in recipe.members() if member.name in names]
    pairs = [(each, fresh_artefact(store, each) if about["fresh"] else artefact(store, each)) for each in members]
    with cluster_work.one_at_a_time:
        _train_here(store, recipe, pairs, progress)
    return [target.id for _, target in pairs]


def _say_what_is_done(progress: Progress, recipe: Recipe, targets: list[Artefact], n_jobs: int) -> None:
    if n_jobs == 0:
        one = f"{imported.sae_config(recipe).n_features:,} features in {targets[0].path}"
        progress.skip("train", f"{len(targets)} SAEs of {recipe.name}" if recipe.is_sweep else one)
    elif n_jobs < len(targets):
        progress.say(f"train: {len(targets) - n_jobs} of {len(targets)} SAEs are trained already")


def _train(store: Store, jobs: list[Job], progress: Progress) -> None:
    """Refuse what cannot be, then train: those that read the same sites together."""
    sites = [sites_of(store, job.recipe) for job in jobs]
    require_memory([(job.recipe, each) for job, each in zip(jobs, sites, strict=True)])
    for job in jobs:
        require_tensorboard(job.recipe.train.tensorboard)
    set_threads(jobs[0].recipe)
    for chosen in dict.fromkeys(map(tuple, sites)):
        together = [job for job, each in zip(jobs, sites, strict=True) if tuple(each) == chosen]
        feed = open_feed(store, together[0].recipe)
        progress.say(f"train: {feed.mixing()}")

        def publish_job(job: Job, training: Training, seconds: float, feed: Feed = feed) -> None:
            publish(job.target, training, feed, store, job.recipe, seconds)

        Reading(feed, together, progress, publish_job, store.objects).run()


def require_devices(recipe: Recipe) -> None:
    """Refuse a device that is not there before hours of collecting, where this machine is to train as well."""
    for member in recipe.members() if recipe.cluster is None else ():
        device("train.device", member.train.device)


def require_memory(wanted: Iterable[tuple[Recipe, list[Site]]]) -> None:
    """Weights and Adam's two moments of every training, and the gradients of the one that steps, float32."""
    needs: dict[torch.device, list[int]] = {}
    for recipe, sites in wanted:
        size = recipe.sae.n_features * (sites[0].width + sites[-1].width + 2)
        here = needs.setdefault(device("train.device", recipe.train.device), [])
        here += [size] * recipe.train.restarts
    for place, sizes in needs.items():
        need, total = 4 * (3 * sum(sizes) + max(sizes)), memory_of(place)
        if need > total:
            where = "this machine has" if place.type == "cpu" else f"on {place} are free"
            raise UserError(
                f"{len(sizes)} SAEs in training take {human_bytes(need)} (weights, gradients, moments), but {where} "
                f"{human_bytes(total)} of memory.\nTrain fewer at once: shorten [sweep], lower train.restarts, or choose a "
                "smaller sae.n_features."
            )


def set_threads(recipe: Recipe) -> None:
    torch.set_num_threads(n_threads(recipe.threads))
    keep_freed_memory()


def sites_of(store: Store, recipe: Recipe) -> list[Site]:
    """The site read and, for a transcoder, the one to reconstruct."""
    return list(dict.fromkeys(activations.sites_of(activations.artefact(store, recipe), recipe.sae)))


def open_feed(store: Store, recipe: Recipe) -> Feed:
    stored = activations.artefact(store, recipe)
    used = Used.of(activations.tokens_artefact(store, recipe), recipe.activations)
    return Feed(used, stored, sites_of(store, recipe), recipe.feed)


def fit(feed: Feed, recipe: Recipe, checkpoints: Path, progress: Progress) -> Training:
    """Train on a feed as often as `train.restarts` says, without publishing; return the best."""
    job = Job(recipe, Artefact(checkpoints, "saes", recipe.name, "00000000"))
    trained: list[Training] = []
    Reading(feed, [job], progress, lambda _, training, __: trained.append(training)).run()
    return trained[0]


def last_row(target: Artefact) -> dict[str, float]:
    """The last row of a training's log."""
    log = pq.read_table(target.own_file("log.parquet"))
    return dict(log.slice(log.num_rows - 1).to_pylist()[0])


def publish(target: Artefact, training: Training, feed: Feed, store: Store, recipe: Recipe, seconds: float) -> None:
    """Fold the scale into the weights and publish weights, settings and log."""
    inputs = [activations.tokens_artefact(store, recipe).id, activations.artefact(store, recipe).id]
    about = facts(store, recipe)
    named = dict(zip(("site", "target_site"), (site.name for site in feed.sites), strict=False))
    seen = {"n_train_tokens": activations.artefact(store, recipe).published().total("n_train_tokens")}
    with target.whole(about, inputs, {"seconds": seconds} | seen) as folder:
        interchange.save(training.folded(), folder, named | {"saeflow": json.dumps(about, sort_keys=True)})
        with replacing(folder / "log.parquet") as temporary:
            table = pa.Table.from_pylist(training.log)
            names = ["step", *sorted(set(table.column_names) - {"step"})]  # a checkpoint does not keep their order
            pq.write_table(table.select(names), temporary, compression="zstd")
