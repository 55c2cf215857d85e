"""Train a sparse autoencoder on a feed: schedule, checkpoint, exact resume, publication."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow import activations
from saeflow.artefact import Artefact
from saeflow.config import Recipe, TrainConfig, UserError, facts_of, fingerprint
from saeflow.disk import read_json, replacing, write_json
from saeflow.encoding import fast_dtype
from saeflow.feed import Feed
from saeflow.model import Site
from saeflow.objects import Objects
from saeflow.parallel import keep_freed_memory, n_threads
from saeflow.progress import Progress
from saeflow.resample import resample
from saeflow.sae import SparseAutoencoder, StepInfo
from saeflow.store import Store
from saeflow.used import Used

_CHECKPOINT = "state.json"
"""The file of a checkpoint that is written last."""
_SAMPLE_ROWS = 65_536
"""Tokens from which the mean and the scale of the data set are taken."""


def learning_rate(step: int, n_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr`, flat, then linear decay towards zero over the last `decay_share` of steps."""
    warmup = max(1, math.ceil(config.warmup_share * n_steps))
    decay = max(1, math.ceil(config.decay_share * n_steps))
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (n_steps - step) / decay) if config.decay_share else 1.0
    return config.lr * min(rise, fall)


def artefact(store: Store, recipe: Recipe) -> Artefact:
    """The recipe's SAE: the one trained on the newest generation, however much was appended since; else the one to train."""
    settings = _settings(store, recipe)
    trained = [sae for sae in store.artefacts("saes") if sae.name == recipe.name and sae.complete()]
    mine = [sae for sae in trained if _without_seen(sae.record.facts) == settings]
    return max(mine, key=lambda sae: sae.record.facts["generation"]) if mine else fresh_artefact(store, recipe)


def fresh_artefact(store: Store, recipe: Recipe) -> Artefact:
    """The SAE of what the store holds now."""
    return store.artefact("saes", recipe.name, fingerprint(facts(store, recipe)))


def facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What makes a trained SAE the same: what it has seen, and every setting of the training."""
    hidden = activations.tokens_artefact(store, recipe).published().hidden_ids
    seen = {"generation": activations.artefact(store, recipe).published().number}
    return _settings(store, recipe) | seen | ({"hidden": fingerprint(hidden)} if hidden else {})


def _settings(store: Store, recipe: Recipe) -> dict[str, Any]:
    checkpoints = {"checkpoint_seconds"}
    return {
        "activations": activations.artefact(store, recipe).fp,
        "sae": facts_of(recipe.sae),
        "train": {name: value for name, value in facts_of(recipe.train).items() if name not in checkpoints},
        "feed": facts_of(recipe.feed),
        "threads": recipe.threads,
    } | Used.of(activations.tokens_artefact(store, recipe), recipe.activations).facts


def _without_seen(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in ("generation", "hidden")}


@dataclass
class Training:
    """State of one training: everything that a checkpoint holds, and the step that changes it."""

    sae: SparseAutoencoder
    adam: torch.optim.Adam
    config: TrainConfig
    scale: float
    n_steps: int
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def begin(cls, feed: Feed, recipe: Recipe, restart: int = 0) -> Training:
        """Fresh weights, the data set's mean and scale from a sample of shuffled rows."""
        rows = sample(feed)
        mean = rows.mean(0)
        spread = (rows - mean).square().sum(1).mean().item()
        if not spread > 0:
            raise UserError("All activations are equal; there is nothing to learn. Check the site and the corpus.")
        scale = math.sqrt(feed.site.width / spread) if recipe.sae.normalise else 1.0
        seeded = recipe.sae.model_copy(update={"seed": recipe.sae.seed + restart})
        sae = SparseAutoencoder(seeded, feed.site.width)
        sae.product_dtype = fast_dtype()
        if recipe.sae.decoder_bias == "mean":
            sae.initialise(mean * scale)
        config = recipe.train
        adam = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
        n_steps = max(1, round(config.n_tokens * feed.batches_per_epoch / feed.n_rows))
        return cls(sae, adam, config, scale, n_steps)

    def advance(self, batch: Tensor) -> StepInfo:
        """One optimiser step on a batch (B, D) in raw units."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.step, self.n_steps, self.config)
        x = batch.float() * self.scale
        loss, info = self.sae.training_loss(x, self.config.aux_weight, self.config.dead_after_tokens)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"The loss is {loss.item()} at step {self.step}. Lower train.lr (it is {self.config.lr}), "
                "or run `saeflow verify --full` to check the stored activations."
            )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.sae.after_step()
        if self.step in self._resample_steps:
            resample(self.sae, self.adam, x, self.config.dead_after_tokens, seed=self.step)
        if self.step % self.config.log_every == 0 or self.step == self.n_steps - 1:
            self.log.append(self._row(loss.item(), info, len(batch)))
        self.step += 1
        return info

    def _row(self, loss: float, info: StepInfo, n_rows: int) -> dict[str, float]:
        return {
            "step": self.step, "batch_rows": n_rows, "lr": self.adam.param_groups[0]["lr"], "loss": loss,
            "variance_unexplained": info.unexplained, "l0": info.n_active, "dead": info.n_dead,
            "auxiliary_loss": info.auxiliary, "sparsity_loss": info.sparsity,
        }  # fmt: skip

    @cached_property
    def _resample_steps(self) -> set[int]:
        return {round(share * self.n_steps) for share in self.config.resample_at}

    def error(self, rows: Tensor) -> float:
        """Mean squared error of reconstructing rows (n, D) in raw units, as the published SAE will."""
        self.sae.eval()
        x = rows * self.scale
        return float((self.sae.reconstruct(x) - x).square().mean())

    @property
    def product(self) -> str:
        """Precision of the encoder product, chosen once by measurement and then kept."""
        return str(self.sae.product_dtype).removeprefix("torch.")

    def save(self, folder: Path) -> None:
        """Write a checkpoint beside the last one, then take its place."""
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        moments = {
            f"adam.{number}.{name}": value
            for number, state in self.adam.state_dict()["state"].items()
            for name, value in state.items()
        }
        weights = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        save_file({**weights, **moments}, fresh / "state.safetensors")
        write_json(
            fresh / "state.json", {"step": self.step, "scale": self.scale, "product": self.product, "log": self.log}
        )
        _flush_file(fresh / "state.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(fresh, folder)

    def restore(self, folder: Path) -> bool:
        """Continue from the newest whole checkpoint, if there is one."""
        for candidate in (folder, folder.with_name(folder.name + ".new")):
            if all((candidate / name).is_file() for name in ("state.json", "state.safetensors")):
                self._load(candidate)
                return True
        return False

    def _load(self, folder: Path) -> None:
        tensors = load_file(folder / "state.safetensors")
        about = read_json(folder / "state.json")
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, slot = name.split(".", 2)
                state.setdefault(int(number), {})[slot] = value
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})
        self.sae.product_dtype = getattr(torch, about["product"])
        self.step, self.scale, self.log = int(about["step"]), float(about["scale"]), list(about["log"])


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sample(feed: Feed) -> Tensor:
    """Shuffled rows (n, D) float32 from the first pool of the first epoch."""
    rows: list[Tensor] = []
    for batch in feed.batches():
        rows.append(batch.float())
        if sum(map(len, rows)) >= min(_SAMPLE_ROWS, feed.n_rows):
            break
    return torch.cat(rows)


def run(store: Store, recipe: Recipe, progress: Progress, fresh: bool = False) -> Artefact:
    """Train the recipe's SAE, or continue a killed training where its checkpoint stands.

    An SAE trained before documents were appended or forgotten stays the recipe's own unless `fresh` is asked for.
    """
    target = fresh_artefact(store, recipe) if fresh else artefact(store, recipe)
    with target.writing():
        checkpoints = target.work.with_name(target.work.name + ".checkpoint")
        if target.complete():
            shutil.rmtree(checkpoints, ignore_errors=True)  # a run killed just after publication leaves it
            progress.skip("train", f"{recipe.sae.n_features:,} features in {target.path}")
            return target
        set_threads(recipe)
        feed = open_feed(store, recipe)
        progress.say(f"train: {feed.mixing()}")
        began = time.monotonic()
        training = fit(feed, recipe, checkpoints, progress, store.objects)
        publish(target, training, feed.site, store, recipe, time.monotonic() - began)
        if store.objects is not None:
            store.objects.remove(checkpoints)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return target


def fit(feed: Feed, recipe: Recipe, checkpoints: Path, progress: Progress, objects: Objects | None = None) -> Training:
    """Train as often as `train.restarts` says, each from its checkpoint if there is one; return the best.

    Checkpoints are kept in the object store, too, so that another machine can go on where this one was lost.
    """
    trained = []
    for restart in range(recipe.train.restarts):
        training = Training.begin(feed, recipe, restart)
        folder = checkpoints / f"restart-{restart}"
        if objects is not None and not folder.is_dir():
            objects.bring_back(folder, _CHECKPOINT)
        if training.restore(folder) and training.step < training.n_steps:
            progress.say(f"train: continuing at step {training.step} of {training.n_steps}")
        loop(training, feed, folder, progress, objects)
        if recipe.train.restarts > 1:
            training.save(folder)
        trained.append(training)
    rows = sample(feed)
    return min(trained, key=lambda each: each.error(rows)) if len(trained) > 1 else trained[0]


def last_row(target: Artefact) -> dict[str, float]:
    """The last row of a training's log."""
    log = pq.read_table(target.own_file("log.parquet"))
    return dict(log.slice(log.num_rows - 1).to_pylist()[0])


def set_threads(recipe: Recipe) -> None:
    torch.set_num_threads(n_threads(recipe.threads))
    keep_freed_memory()


def open_feed(store: Store, recipe: Recipe) -> Feed:
    stored = activations.artefact(store, recipe)
    site = activations.choose_site(stored, recipe.sae.site)
    used = Used.of(activations.tokens_artefact(store, recipe), recipe.activations)
    return Feed(used, stored, site, recipe.feed)


@contextlib.contextmanager
def whole_step() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended: a step half made must not be saved."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    asked: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if asked:
        signal.raise_signal(asked[0])


def loop(training: Training, feed: Feed, checkpoint: Path, progress: Progress, objects: Objects | None = None) -> None:
    """Step to the end, saving a checkpoint every `checkpoint_seconds` and when interrupted."""
    if training.step >= training.n_steps:
        return

    def keep() -> None:
        training.save(checkpoint)
        if objects is not None:
            objects.keep(checkpoint, training.step, _CHECKPOINT)

    saved = time.monotonic()
    with progress.bar("train", training.n_steps * feed.n_rows // feed.batches_per_epoch, "tokens") as bar:
        bar.resume_at(training.step * feed.n_rows // feed.batches_per_epoch)
        batches = feed.batches(skip=training.step)
        try:
            while training.step < training.n_steps:
                batch = next(batches)
                with whole_step():
                    info = training.advance(batch)
                bar.advance(
                    len(batch), f"unexplained {info.unexplained:.3f}, L0 {info.n_active:.1f}, dead {info.n_dead}"
                )
                if time.monotonic() - saved > training.config.checkpoint_seconds:
                    keep()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            keep()
            raise
        finally:
            batches.close()


def publish(target: Artefact, training: Training, site: Site, store: Store, recipe: Recipe, seconds: float) -> None:
    """Fold the scale into the weights and publish weights, settings and log."""
    inputs = [activations.tokens_artefact(store, recipe).id, activations.artefact(store, recipe).id]
    about = facts(store, recipe)
    with target.whole(about, inputs, {"seconds": seconds}) as folder:
        training.sae.folded(training.scale).save(
            folder, {"site": site.name, "saeflow": json.dumps(about, sort_keys=True)}
        )
        with replacing(folder / "log.parquet") as temporary:
            table = pa.Table.from_pylist(training.log)
            names = ["step", *sorted(set(table.column_names) - {"step"})]  # a checkpoint does not keep their order
            pq.write_table(table.select(names), temporary, compression="zstd")
