"""Train the SAEs of a recipe on one feed: what makes them the same, continuing after a kill, publication."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from saeflow.activations.feed import Feed
from saeflow.activations.mixing import measure_mixing
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.pipeline import collect, import_sae, lineage
from saeflow.pipeline.dask import work
from saeflow.pipeline.dask.workers import workers_of
from saeflow.recipe.fingerprint import fingerprint
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
from saeflow.train.group import Job, Reading, checkpoints_of
from saeflow.train.tensorboard import require_tensorboard
from saeflow.train.training import Training

_NOTICING_SECONDS = 10.0
"""That a worker may take to notice that its run was killed: some batches."""


def artefact(store: Store, recipe: Recipe) -> Artefact:
    """The recipe's SAE: the one that was trained last, however much was appended since; else the one to train."""
    return _job(store, recipe, fresh=False).target


def _job(store: Store, recipe: Recipe, fresh: bool) -> Job:
    """An SAE with the facts that it is trained by: what it sees is chosen here, whatever is appended meanwhile."""
    if recipe.sae.source is None and not fresh and (known := lineage.newest(store, recipe)) is not None:
        return Job(recipe, known, known.record.facts)
    about = lineage.facts(store, recipe)
    return Job(recipe, _named(store, recipe, about), about)


def _named(store: Store, recipe: Recipe, about: dict[str, Any]) -> Artefact:
    return store.artefact("saes", recipe.name, fingerprint(about))


def run(store: Store, recipe: Recipe, progress: Progress, fresh: bool = False) -> Artefact:
    """Train the recipe's SAE, or continue a killed training where its checkpoint stands, or import the one that
    `sae.source` names; of a sweep all, and the first is returned.

    An SAE trained before documents were appended or forgotten stays the recipe's own unless `fresh` is asked for. A
    killed training ends with what it has seen; the next `fresh` one sees what was appended since.
    """
    return run_all(store, recipe, progress, fresh)[0]


def run_all(store: Store, recipe: Recipe, progress: Progress, fresh: bool = False) -> list[Artefact]:
    """The same; returns the SAE of each member, in their order.

    All that read the same sites are trained on each batch of one feed. Each is the artefact, byte for byte, that a run
    of the member's recipe would make, with a lock and a checkpoint of its own, and is published as soon as it is
    finished. On a cluster each worker trains its share of them, locks and publishes them; what is imported stays here.
    """
    jobs = [_job(store, member, fresh) for member in recipe.members()]
    away = [job for job in jobs if recipe.cluster and job.recipe.sae.source is None and not job.target.complete()]
    if away:
        _train_on_workers(store, recipe, away, progress)
    if here := [job for job in jobs if job not in away]:
        _train_here(store, recipe, here, progress)
    return [job.target for job in jobs]


def _train_here(store: Store, recipe: Recipe, chosen: list[Job], progress: Progress) -> None:
    """Train or import these members of a recipe in this process."""
    targets = [job.target for job in chosen]
    with writing_all(targets):
        jobs = [job for job in chosen if not job.target.complete()]
        for target in (target for target in targets if target.complete()):
            shutil.rmtree(checkpoints_of(target), ignore_errors=True)  # a run killed just after publication leaves it
        _say_what_is_done(progress, recipe, targets, len(jobs))
        ready = [job for job in jobs if job.recipe.sae.source is not None]
        for job in ready:
            import_sae.require_fits(store, job.recipe)
        for job in ready:
            import_sae.publish(job.target, store, job.recipe, progress)
        if jobs := [job for job in jobs if job.recipe.sae.source is None]:
            _train(store, jobs, progress)


def _train_on_workers(store: Store, recipe: Recipe, away: list[Job], progress: Progress) -> None:
    """Train these members on a cluster: as many groups as it has workers, those of one group in one reading."""
    settings = {
        "recipe": recipe.model_copy(update={"cluster": None}).model_dump(mode="json"),
        "facts": {job.recipe.name: job.facts for job in away},
    }
    sites = [tuple(sites_of(store, job.recipe)) for job in away]
    _require_free([job.target for job in away])
    with workers_of(store, recipe, progress) as workers:
        assert workers is not None
        groups = [[away[number].recipe for number in group] for group in shares(sites, workers.n_expected)]
        items = [[member.name for member in group] for group in groups]
        n_tokens = {
            json.dumps(item): max(m.train.n_tokens for m in group) for item, group in zip(items, groups, strict=True)
        }
        with (
            progress.bar("train", sum(n_tokens.values()), "tokens") as bar,
            contextlib.closing(workers.each("pipeline.train.train_at", settings, items, bar, n_tokens)) as finished,
        ):
            for names, _ in finished:
                progress.say(f"train: {', '.join(names)} finished on a worker")
    for job in away:
        job.target.look_again()
    store.storage.pull()


def _require_free(targets: Iterable[Artefact]) -> None:
    """Refuse or wait, as `overlap` says, while another run is at one of these: here, not where it would keep a worker.

    A worker of a run that was killed may take some seconds to notice that nobody waits for it.
    """
    noticing = stop_after_delay(_NOTICING_SECONDS)
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


def train_at(name: str, settings: str, names: list[str], progress: Progress) -> list[str]:
    """On a worker: train these members of a sweep in one reading, each from its checkpoint; the artefacts."""
    work.let_go()
    about, opened = work.settings_of(settings), work.store_at(name)
    store = Store(opened.storage, "wait")  # a worker that is thought lost may still be at it
    recipe = parse_recipe(about["recipe"])
    facts = {name: about["facts"][name] for name in names}
    members = [member for member in recipe.members() if member.name in facts]
    jobs = [Job(each, _named(store, each, facts[each.name]), facts[each.name]) for each in members]
    work.wait_for_turn([job.target for job in jobs], progress)
    with work.one_at_a_time:
        _train_here(store, recipe, jobs, progress)
    return [job.target.id for job in jobs]


def _say_what_is_done(progress: Progress, recipe: Recipe, targets: list[Artefact], n_jobs: int) -> None:
    if n_jobs == 0:
        one = f"{import_sae.sae_config(recipe).n_features:,} features in {targets[0].path}"
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
    reads = [(job.facts["generation"], *each) for job, each in zip(jobs, sites, strict=True)]
    for chosen in dict.fromkeys(reads):
        together = [job for job, each in zip(jobs, reads, strict=True) if each == chosen]
        feed = _feed_of(store, together[0])
        now = feed.target.published().number
        if now != together[0].facts["generation"]:
            progress.say(
                f"train: on generation {together[0].facts['generation']} of {feed.target.id}, as begun; {now} is "
                "there by now"
            )
        progress.say(f"train: {measure_mixing(feed)}")

        def publish_job(job: Job, training: Training, seconds: float, feed: Feed = feed) -> None:
            publish(job, training, feed, store, seconds)

        Reading(feed, together, progress, publish_job).run()


def _feed_of(store: Store, job: Job) -> Feed:
    """The feed of what the job was chosen to see. Raises UserError where that is there no more."""
    number = int(job.facts["generation"])
    listed = number in collect.artefact(store, job.recipe).numbers()
    feed = open_feed(store, job.recipe, number) if listed else None
    if feed is None or lineage.hidden_in(feed.selection.generation).get("hidden") != job.facts.get("hidden"):
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


def sites_of(store: Store, recipe: Recipe) -> list[Site]:
    """The site read and, for a transcoder, the one to reconstruct."""
    return list(dict.fromkeys(collect.sites_of(collect.artefact(store, recipe), recipe.sae)))


def open_feed(store: Store, recipe: Recipe, generation: int | None = None) -> Feed:
    """The training tokens of a generation of the activations, by default of the published one."""
    stored = collect.artefact(store, recipe)
    used = TokenSelection.of(collect.tokens_artefact(store, recipe), recipe.activations)
    return Feed(used, stored, sites_of(store, recipe), recipe.feed, generation)


def fit(feed: Feed, recipe: Recipe, checkpoints: Path, progress: Progress) -> Training:
    """Train on a feed as often as `train.restarts` says, without publishing; return the best."""
    job = Job(recipe, Store(checkpoints).artefact("saes", recipe.name, "00000000"))
    trained: list[Training] = []
    Reading(feed, [job], progress, lambda _, training, __: trained.append(training)).run()
    return trained[0]


def last_row(target: Artefact) -> dict[str, float]:
    """The last row of a training's log."""
    log = pq.read_table(target.own_file("log.parquet"))
    return dict(log.slice(log.num_rows - 1).to_pylist()[0])


def publish(job: Job, training: Training, feed: Feed, store: Store, seconds: float) -> None:
    """Fold the scale into the weights and publish weights, settings and log."""
    source, stored = collect.tokens_artefact(store, job.recipe), collect.artefact(store, job.recipe)
    named = dict(zip(("site", "target_site"), (site.name for site in feed.sites), strict=False))
    about = job.facts
    n_seen = sum(part.counts["n_train_tokens"] for part in feed.blocks.parts)
    with job.target.publish_folder(
        about, [source.id, stored.id], {"seconds": seconds, "n_train_tokens": n_seen}
    ) as folder:
        interchange.save(training.folded(), folder, named | {"saeflow": json.dumps(about, sort_keys=True)})
        with replacing(folder / "log.parquet") as temporary:
            table = pa.Table.from_pylist(training.log)
            names = ["step", *sorted(set(table.column_names) - {"step"})]  # a checkpoint does not keep their order
            pq.write_table(table.select(names), temporary, compression="zstd")
