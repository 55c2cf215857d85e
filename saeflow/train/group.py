"""Several trainings on the batches of one feed, each with its own checkpoints, TensorBoard log and publication."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saeflow.activations.feed import Feed
from saeflow.activations.upload import uploaded
from saeflow.model.sites import Site
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.interrupts import interrupts_noted, interrupts_wait
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.ranks import ALONE, Ranks
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.save import save_sae
from saeflow.store.artefact import Artefact
from saeflow.store.files import replacing
from saeflow.store.records import Damaged
from saeflow.store.store import Store
from saeflow.train.checkpoint import CHECKPOINT, is_checkpoint
from saeflow.train.training import FeedBatch, Training, sample_rows


def open_board(folder: Path, first_step: int) -> Any:
    """Open TensorBoard event files. Rows that an earlier run wrote for `first_step` and later steps are dropped."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]


@dataclass
class TrainingJob:
    """An SAE to train and publish, by several trainings if the recipe asks for restarts."""

    recipe: Recipe
    target: Artefact
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts of the SAE's record: what it is trained on, and how."""
    trainings: list[Training] = field(default_factory=list)
    boards: list[Any] = field(default_factory=list)
    published: bool = False

    @property
    def done(self) -> bool:
        return all(training.done for training in self.trainings)

    def folder(self, restart: int) -> Path:
        return checkpoints_of(self.target) / f"restart-{restart}"

    def best(self, feed: Feed) -> Training:
        """Return the training that reconstructs best."""
        if len(self.trainings) == 1:
            return self.trainings[0]
        rows = sample_rows(feed)
        return min(self.trainings, key=lambda training: training.error(rows))


def checkpoints_of(target: Artefact) -> Path:
    return target.work.with_name(target.work.name + ".checkpoint")


PublishJob = Callable[[TrainingJob, Training, Feed, float], None]
"""Publishes a finished job; takes the job, its best training, the feed, and the seconds it took."""


def publish_sae(job: TrainingJob, training: Training, feed: Feed, seconds: float) -> None:
    """Fold the scale into the weights and publish weights, settings and log."""
    n_seen = sum(part.counts["n_train_tokens"] for part in feed.blocks.parts)
    inputs, provenance = (
        [feed.selection.source.id, feed.target.id],
        {"seconds": seconds, "n_train_tokens": n_seen} | feed.left_out,
    )
    with job.target.publish_folder(job.facts, inputs, provenance) as folder:
        about = {"saeflow": json.dumps(job.facts, sort_keys=True)}
        write_sae(folder, training.folded(), feed.sites, about, training.log)


def write_sae(
    folder: Path, sae: SparseAutoencoder, sites: Sequence[Site], metadata: Mapping[str, Any], log: list[dict[str, Any]]
) -> None:
    """Write weights, settings with metadata and the sites' names, and the log."""
    named = dict(zip(("site", "target_site"), (site.name for site in sites), strict=False))
    save_sae(sae, folder, {**metadata, **named})
    with replacing(folder / "log.parquet") as temporary:
        table = pa.Table.from_pylist(log)
        names = ["step", *sorted(set(table.column_names) - {"step"})]  # a checkpoint does not keep their order
        pq.write_table(table.select(names), temporary, compression="zstd")


class TrainingGroup:
    """Trains SAEs on the batches of one feed, which is read once.

    Each batch goes to all trainings for which it is the next step. After a kill the trainings may be at different
    steps: the earliest ones catch up, each on the batches that it has not had yet.

    Of several ranks each reads all batches. The first one alone writes checkpoints and logs, and publishes.
    """

    def __init__(
        self, feed: Feed, jobs: list[TrainingJob], progress: Progress, publish: PublishJob = publish_sae,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.feed, self.jobs, self.progress, self.publish, self.ranks = feed, jobs, progress, publish, ranks
        self.began = self.saved = time.monotonic()
        self.seconds = min(job.recipe.train.checkpoint_seconds for job in jobs)

    @property
    def trainings(self) -> list[Training]:
        return [training for job in self.jobs for training in job.trainings]

    def run(self) -> None:
        """Train to the end and publish. If interrupted, or if a training cannot go on, write checkpoints first.

        Several ranks do so only when they agree on the step at which they stop: see `_agree`.
        """
        self._begin()
        try:
            if not all(training.done for training in self.trainings):
                self._read()
            for job in self.jobs:
                self._finish(job)
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if self.ranks.n == 1 and (isinstance(error, UserError) or interrupted):
                self._keep()
            raise
        finally:
            for job in self.jobs:
                for board in job.boards:
                    board.close()

    def _begin(self) -> None:
        rows = sample_rows(self.feed)
        for job in self.jobs:
            for restart in range(job.recipe.train.restarts):
                begin = partial(Training.begin, self.feed, job.recipe, restart, rows, self.ranks)
                job.trainings.append(self._begun_by_all(job, begin, restart))
                if job.recipe.train.tensorboard and self.ranks.is_first:
                    folder = Path(job.recipe.train.tensorboard) / job.target.id
                    folder = folder / f"restart-{restart}" if job.recipe.train.restarts > 1 else folder
                    job.boards.append(open_board(folder, job.trainings[-1].step))

    def _begun_by_all(self, job: TrainingJob, begin: Callable[[], Training], restart: int) -> Training:
        """Return the training as the first rank begins it or has restored it."""
        training = self._restored(job, begin, restart) if self.ranks.is_first else begin()
        sae = training.sae
        step, product = self.ranks.first_says([training.step, str(sae.product_dtype).removeprefix("torch.")])
        if step and not self.ranks.is_first:
            _fetch_checkpoint(job, job.folder(restart))
            training.load(job.folder(restart))
        sae.product_dtype = getattr(torch, product)  # chosen by measurement, which may differ between ranks
        return training

    def _restored(self, job: TrainingJob, begin: Callable[[], Training], restart: int) -> Training:
        """Return the training as its checkpoint has it, or begun anew; in a bucket it may be from another machine."""
        folder = job.folder(restart)
        _fetch_checkpoint(job, folder)
        training = begin()
        try:
            restored = training.restore(folder)
        except Damaged as error:
            self.progress.say(f"train: {error}; {training.name} begins anew")
            return begin()
        if restored and not training.done:
            which = f"{training.name} " if len(self.jobs) > 1 else ""
            self.progress.say(f"train: {which}continuing at step {training.step} of {training.n_steps}")
        return training

    def _read(self) -> None:
        first = min(training.step for training in self.trainings if not training.done)
        last = max(training.n_steps for training in self.trainings)
        rows, n_batches = self.feed.n_rows, self.feed.batches_per_epoch
        several = self.ranks.n > 1
        noting: AbstractContextManager[list[int]] = interrupts_noted() if several else contextlib.nullcontext([])
        with (
            self.progress.bar("train", last * rows // n_batches, "tokens") as bar,
            contextlib.closing(uploaded(partial(self.feed.aligned, first), self._place)) as batches,
            noting as asked,
        ):
            bar.resume_at(first * rows // n_batches)
            for number in range(first, last):
                self._step(FeedBatch(number, next(batches), self.feed), bar)
                self._agree(bool(asked))

    @property
    def _place(self) -> torch.device:
        """Where batches are brought, once for all trainings; trainings elsewhere bring them there themselves."""
        places = {training.place for training in self.trainings}
        return places.pop() if len(places) == 1 else torch.device("cpu")

    def _step(self, batch: FeedBatch, bar: Bar) -> None:
        for job in self.jobs:
            for training, board in itertools.zip_longest(job.trainings, job.boards):
                if training.step != batch.number or training.done:
                    continue
                with interrupts_wait():
                    training.advance(batch)
                    if board is not None and (row := training.log[-1])["step"] == batch.number:
                        for name in (name for name in row if name != "step"):
                            board.add_scalar(name, row[name], batch.number)
        bar.advance(len(batch), self._note())
        for job in self.jobs:
            if len(job.trainings) == 1:  # to choose the best of several reads the store again: not in between
                self._finish(job)

    def _agree(self, stop: bool) -> None:
        """Write checkpoints if it is time. Ranks stop together, after the same step, as soon as one has to."""
        due = self.ranks.is_first and time.monotonic() - self.saved > self.seconds
        stop, due = self.ranks.any(stop, due)
        if stop or due:
            self._keep()
        if stop:
            raise KeyboardInterrupt

    def _note(self) -> str:
        infos = [training.info for training in self.trainings if training.info is not None]
        if len(infos) == 1:
            return f"unexplained {infos[0].unexplained:.3f}, L0 {infos[0].n_active:.1f}, dead {infos[0].n_dead}"
        shares = [info.unexplained for info in infos]
        return f"{len(infos)} SAEs, unexplained {min(shares):.3f} to {max(shares):.3f}"

    def _keep(self) -> None:
        """Write checkpoints, to the bucket, too, so that another machine can go on if this one is lost."""
        for job in (job for job in self.jobs if not job.published):
            for board in job.boards:
                board.flush()
            for restart, training in enumerate(job.trainings):
                training.save(job.folder(restart), job.target.own_work, job.target.require_lease)
                if self.ranks.is_first:
                    job.target.storage.work.keep(job.folder(restart), training.step, CHECKPOINT)
        self.saved = time.monotonic()

    def _finish(self, job: TrainingJob) -> None:
        """Publish the job if it is trained to its end, and remove its checkpoints."""
        if job.published or not job.done:
            return
        for training in job.trainings:
            training.bring_whole()
        if self.ranks.is_first:
            self.publish(job, job.best(self.feed), self.feed, time.monotonic() - self.began)
        job.published = True
        if self.ranks.is_first:
            job.target.storage.remove(checkpoints_of(job.target))


def _fetch_checkpoint(job: TrainingJob, folder: Path) -> None:
    if not is_checkpoint(folder):  # a fetch may have been killed between two files
        job.target.storage.work.bring_back(folder, CHECKPOINT)


def fit(feed: Feed, recipe: Recipe, checkpoints: Path, progress: Progress) -> Training:
    """Train on a feed as often as `train.restarts` says; return the best training, without publishing."""
    job = TrainingJob(recipe, Store(checkpoints).artefact("saes", recipe.name, "00000000"))
    trained: list[Training] = []
    TrainingGroup(feed, [job], progress, lambda _, training, *__: trained.append(training)).run()
    return trained[0]


def require_tensorboard(folder: str | None) -> None:
    """Raise UserError, before any work, if event files are asked for and TensorBoard is not installed."""
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"train.tensorboard is {folder!r}, but the package tensorboard is not installed.\n"
            "Install it with `pip install tensorboard`, or take the setting out."
        )
