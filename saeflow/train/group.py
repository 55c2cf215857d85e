"""Several SAEs in training on the batches of one feed, each with its checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.activations.feed import Feed
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.artefact import Artefact
from saeflow.train.tensorboard import Board
from saeflow.train.training import CHECKPOINT, Batch, Training, is_whole, sample, whole_step


@dataclass
class Job:
    """An SAE to train and to publish; several trainings where the recipe asks for restarts."""

    recipe: Recipe
    target: Artefact
    facts: dict[str, Any] = field(default_factory=dict)
    """By which it is trained and published."""
    trainings: list[Training] = field(default_factory=list)
    boards: list[Board] = field(default_factory=list)
    published: bool = False

    @property
    def done(self) -> bool:
        return all(training.done for training in self.trainings)

    @property
    def checkpoints(self) -> Path:
        return checkpoints_of(self.target)

    def folder(self, restart: int) -> Path:
        return self.checkpoints / f"restart-{restart}"

    def best(self, feed: Feed) -> Training:
        """Of its trainings the one that reconstructs best."""
        if len(self.trainings) == 1:
            return self.trainings[0]
        rows = sample(feed)
        return min(self.trainings, key=lambda training: training.error(rows))


def checkpoints_of(target: Artefact) -> Path:
    return target.work.with_name(target.work.name + ".checkpoint")


Publish = Callable[[Job, Training, float], None]
"""What is done with a finished job, its best training, and the seconds it took."""


class Reading:
    """Some SAEs in training on the batches of one feed, read once.

    A batch is given to every training whose next step it is. After a kill the trainings may stand at different steps:
    the earliest catch up with the others, each on just the batches that it has not seen.
    """

    def __init__(self, feed: Feed, jobs: list[Job], progress: Progress, publish: Publish) -> None:
        self.feed, self.jobs, self.progress, self.publish = feed, jobs, progress, publish
        self.began = self.saved = time.monotonic()
        self.seconds = min(job.recipe.train.checkpoint_seconds for job in jobs)

    @property
    def trainings(self) -> list[Training]:
        return [training for job in self.jobs for training in job.trainings]

    def run(self) -> None:
        """Train to the end and publish; when interrupted, or where one cannot go on, checkpoints hold what was done."""
        self._begin()
        try:
            if not all(training.done for training in self.trainings):
                self._read()
            for job in self.jobs:
                self._finish(job)
        except BaseException as error:
            if isinstance(error, UserError) or not isinstance(error, Exception):  # the latter: interrupted, however
                self._keep()
            raise
        finally:
            for board in (board for job in self.jobs for board in job.boards):
                board.close()

    def _begin(self) -> None:
        rows = sample(self.feed)
        for job in self.jobs:
            for restart in range(job.recipe.train.restarts):
                job.trainings.append(self._begun(job, Training.begin(self.feed, job.recipe, restart, rows), restart))
                if job.recipe.train.tensorboard:
                    folder = Path(job.recipe.train.tensorboard) / job.target.id
                    folder = folder / f"restart-{restart}" if job.recipe.train.restarts > 1 else folder
                    job.boards.append(Board(folder, job.trainings[-1].step))

    def _begun(self, job: Job, training: Training, restart: int) -> Training:
        """Return the training as its checkpoint has it, if there is one; in a bucket it may be from another machine."""
        folder = job.folder(restart)
        if not is_whole(folder):  # a fetch may have been killed between two files
            job.target.storage.bring_back(folder, CHECKPOINT)
        if training.restore(folder) and not training.done:
            which = f"{training.name} " if len(self.jobs) > 1 else ""
            self.progress.say(f"train: {which}continuing at step {training.step} of {training.n_steps}")
        return training

    def _read(self) -> None:
        first = min(training.step for training in self.trainings if not training.done)
        last = max(training.n_steps for training in self.trainings)
        rows, n_batches = self.feed.n_rows, self.feed.batches_per_epoch
        with (
            self.progress.bar("train", last * rows // n_batches, "tokens") as bar,
            contextlib.closing(self.feed.aligned(skip=first)) as batches,
        ):
            bar.resume_at(first * rows // n_batches)
            for number in range(first, last):
                self._step(Batch(number, next(batches), self.feed), bar)

    def _step(self, batch: Batch, bar: Bar) -> None:
        for job in self.jobs:
            for training, board in itertools.zip_longest(job.trainings, job.boards):
                if training.step != batch.number or training.done:
                    continue
                with whole_step():
                    training.advance(batch)
                    if board is not None and training.log[-1]["step"] == batch.number:
                        board.add(training.log[-1])
        bar.advance(len(batch), self._note())
        for job in self.jobs:
            if len(job.trainings) == 1:  # which of several is best takes another look at the store: after this reading
                self._finish(job)
        if time.monotonic() - self.saved > self.seconds:
            self._keep()

    def _note(self) -> str:
        seen = [training.info for training in self.trainings if training.info is not None]
        if len(seen) == 1:
            return f"unexplained {seen[0].unexplained:.3f}, L0 {seen[0].n_active:.1f}, dead {seen[0].n_dead}"
        shares = [info.unexplained for info in seen]
        return f"{len(seen)} SAEs, unexplained {min(shares):.3f} to {max(shares):.3f}"

    def _keep(self) -> None:
        """Write checkpoints, to the bucket, too, so that another machine can go on where this one was lost."""
        for job in (job for job in self.jobs if not job.published):
            for board in job.boards:
                board.flush()
            for restart, training in enumerate(job.trainings):
                training.save(job.folder(restart), job.target.own_work, job.target.require_lease)
                job.target.storage.keep(job.folder(restart), training.step, CHECKPOINT)
        self.saved = time.monotonic()

    def _finish(self, job: Job) -> None:
        """Publish what is trained to its end; its checkpoints are then no longer needed."""
        if job.published or not job.done:
            return
        self.publish(job, job.best(self.feed), time.monotonic() - self.began)
        job.published = True
        job.target.storage.remove(job.checkpoints)
