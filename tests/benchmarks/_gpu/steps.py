"""Whole steps of each architecture, beside the compiled dense step and the peers, and the memory that a step takes."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from saeflow.recipe.settings import Architecture, SAEConfig, TrainConfig
from saeflow.runtime.linear import fast_dtype
from saeflow.sae import parameters
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu.memory import TrainingSize
from saeflow.train import fused
from saeflow.train.training import FeedBatch, Training
from tests.benchmarks import _peers
from tests.benchmarks._gpu.dense import dense_step
from tests.benchmarks._gpu.measure import Card, Row, Size, has_triton, rate, ratio
from tests.benchmarks._gpu.work import Task, failed

ARCHITECTURES: tuple[Architecture, ...] = (
    "topk", "batchtopk", "jumprelu", "matryoshka", "abstopk", "relu", "gated", "mp",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"l1_weight": 1.0, "first_share": 0.002}, "gated": {"l1_weight": 1.0, "first_share": 0.002},
}  # fmt: skip
SAELENS_HAS = ("batchtopk", "jumprelu", "matryoshka", "relu", "gated")
N_BATCHES, PEER_WARMUP, PEER_STEPS = 4, 3, 10


def batches(size: Size, card: Card, n: int = N_BATCHES) -> list[Tensor]:
    """Return batches of sums of few directions out of twice D, with a little noise."""
    directions = torch.nn.functional.normalize(card.normal(2 * size.width, size.width, seed=11), dim=1)
    found = []
    for number in range(n):
        strengths = card.normal(size.n_rows, len(directions), seed=100 + number)
        noise = card.normal(size.n_rows, size.width, seed=200 + number)
        found.append(3 * (strengths - 2).clamp_(min=0) @ directions + 0.1 * noise)
    return found


def feed_batch(number: int, x: Tensor) -> FeedBatch:
    return FeedBatch(number, (x,), None)  # type: ignore[arg-type]  # there is no feed to look into


def a_training(
    architecture: Architecture, size: Size, card: Card, first: Tensor, by_kernels: bool = True,
    product: torch.dtype | None = None, log_every: int = 10,
) -> Training:  # fmt: skip
    """Return a training on the card; by kernels where they can take its steps."""
    about = {"architecture": architecture, "n_features": size.n_features, "k": size.k, **OPTIONS.get(architecture, {})}
    with quick_weights(size, card):
        sae = SparseAutoencoder(SAEConfig.model_validate(about), size.width, threads=torch.get_num_threads())
    sae.product_dtype = product or fast_dtype(card.place)
    sae.to(card.place)
    sae.initialise(first.mean(0))
    sae.start_sparse(first)
    config = TrainConfig(lr=1e-3, warmup_share=0.0, decay_share=0.0, kernels=by_kernels, log_every=log_every)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    training = Training(sae, adam, config, (1.0,), 10**6)
    training.uses_fused = by_kernels and _takes(sae, config, card)
    return training


def quick_weights(size: Size, card: Card) -> AbstractContextManager[object]:
    """Let an SAE draw its first weights on the card: to draw half a billion numbers on the processor takes seconds."""

    def drawn(config: SAEConfig, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        directions = torch.nn.functional.normalize(card.normal(size.n_features, size.width, seed=config.seed), dim=1)
        biases = torch.zeros(size.n_features, device=card.place)
        return directions * config.first_encoder_scale, biases, directions

    return patch.object(parameters, "_initial_weights", drawn)


def _takes(sae: SparseAutoencoder, config: TrainConfig, card: Card) -> bool:
    """True if kernels take the steps; on the processor Triton's interpreter runs them."""
    return fused.suits(sae, config) if card.on_gpu else has_triton() and not sae.traits.pursues


def n_bytes_of_step(training: Training, size: Size) -> int:
    """Return what the formula says: the state, the batch in float32, and what the largest step holds besides."""
    of_step = TrainingSize.of(training.sae.config, training.config, (size.width, size.width), size.n_rows)
    of_step = replace(of_step, n_dead=0)
    return of_step.state_bytes + of_step.step_bytes + 4 * size.n_rows * size.width


class Steps:
    """Whole steps at one size."""

    def __init__(self, card: Card, name: str, architectures: Sequence[Architecture]) -> None:
        self.card, self.name, self.architectures = card, name, architectures
        self.size, self.seconds = card.sizes[name], 4.0
        self._batches: list[Tensor] = []

    @property
    def batches(self) -> list[Tensor]:
        if not self._batches:
            self._batches = batches(self.size, self.card)
        return self._batches

    def step(self, training: Training) -> Callable[[], None]:
        turns = itertools.cycle(self.batches)

        def take() -> None:
            training.advance(feed_batch(training.step, next(turns)))

        return take

    def ours(self, architecture: Architecture, by_kernels: bool = True) -> tuple[str, list[float]]:
        """Return how the steps are taken, and seconds of a step."""
        training = a_training(architecture, self.size, self.card, self.batches[0], by_kernels)
        seconds = self.card.rounds(self.step(training), self.seconds)
        return "by kernels" if training.uses_fused else "by torch's operations", seconds

    def dense(self, architecture: Architecture) -> list[float]:
        turns, step = itertools.cycle(self.batches), dense_step(architecture, self.size, self.card)
        return self.card.rounds(lambda: step(next(turns)), self.seconds)

    def speed(self, architecture: Architecture) -> list[Row]:
        how, seconds = self.ours(architecture)
        name = f"{self.size.name}: {architecture}"
        asked = 250_000 if self.name == "public" and architecture == "topk" else None
        about = {"asked": asked, "flops": self.size.flops, "n_bytes": 24.0 * self.size.n_weights}
        rows = [rate(self.size.n_rows, "tokens/s", f"{name}, {how}", seconds, **about)]
        if architecture == "topk":
            low, weights = self.batches[0].bfloat16(), self.card.normal(self.size.n_features, self.size.width, seed=3)
            weights = weights.bfloat16()
            product = self.card.rounds(lambda: low @ weights.T, 1)
            rows.append(ratio(f"{name}, beside the encoder product alone", 0.5, seconds, product))
        self.card.free()
        if architecture == "mp":
            return [*rows, Row(f"{name}, dense step by torch.compile", note="there is none")]
        try:
            theirs = self.dense(architecture)
        except Exception as error:  # out of memory, mostly: the row says so, ours stands
            why = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return [*rows, Row(f"{name}, dense step by torch.compile", note=why)]
        rows.append(rate(self.size.n_rows, "tokens/s", f"{name}, dense step by torch.compile", theirs))
        return [*rows, ratio(f"{name}, beside the dense step by torch.compile", 1, seconds, theirs)]

    def without_kernels(self) -> list[Row]:
        _, slow = self.ours("topk", by_kernels=False)
        return [rate(self.size.n_rows, "tokens/s", f"{self.size.name}: topk, by torch's operations", slow)]

    def memory(self) -> Row:
        """Memory at the peak of three steps of topk, over the formula's."""
        training = a_training("topk", self.size, self.card, self.batches[0])
        needed = n_bytes_of_step(training, self.size)
        if not self.card.on_gpu:
            self.step(training)()
            return Row(f"{self.size.name}: memory of a step, over the formula's", note="needs a GPU")
        self.card.free()
        others = sum(each.nbytes for each in self.batches)
        torch.cuda.reset_peak_memory_stats(self.card.place)
        for _ in range(3):
            self.step(training)()
        peak = torch.cuda.max_memory_allocated(self.card.place) - others
        name = f"{self.size.name}: memory of a step, {peak / 1e9:.2f} GB, over the formula's"
        return Row(name, peak / needed, "×", asked=1.05, sense="<=")

    def tasks(self) -> dict[str, Task]:
        speeds: dict[str, Task] = {name: partial(self.speed, name) for name in self.architectures}
        if "topk" not in self.architectures:
            return speeds
        return {"memory": self.memory, **speeds, "without kernels": self.without_kernels}


PEERS: dict[str, list[tuple[Architecture, bool]]] = {
    "SAELens": [("topk", True), ("topk", False), *((name, True) for name in ARCHITECTURES if name in SAELENS_HAS)],
    "sparsify": [("topk", True), ("topk", False)],
}
"""Architectures that a peer trains, each in bfloat16 autocast or without."""


class Peers:
    """SAELens and sparsify at the small size."""

    def __init__(self, card: Card) -> None:
        self.card, self.size = card, card.sizes["small"]

    def run(self, peer: str) -> list[Row]:
        package = {"SAELens": "sae_lens", "sparsify": "sparsify"}[peer]
        names = [f"{self.size.name}: {name} by {peer}" for name, _ in PEERS[peer]]
        if importlib.util.find_spec(package) is None and not _peers.available():
            return [Row(name, note=f"{peer} is not installed") for name in dict.fromkeys(names)]
        with tempfile.TemporaryDirectory(prefix="saeflow-gpu-") as temporary:
            path = Path(temporary) / "rows.npy"
            np.save(path, torch.cat(batches(self.size, self.card, 2)).cpu().numpy())
            shared = {
                "peer": peer.lower(), "data": path, "held_out": path, "batch": self.size.n_rows, "k": self.size.k,
                "n_features": self.size.n_features, "device": self.card.place.type, "is_scored": False,
                "n_steps": PEER_WARMUP + PEER_STEPS, "warmup_steps": PEER_WARMUP,
            }  # fmt: skip
            asked = [{"architecture": name, "autocast": cast, **shared} for name, cast in PEERS[peer]]
            python = _peers.PEER if _peers.available() else Path(sys.executable)
            found = _peers.train_each(asked, python)
        return [
            failed(name, each["error"]) if "error" in each
            else Row(name, each["tokens_per_s"], "tokens/s", note="in autocast" if cast else "in float32")
            for name, (_, cast), each in zip(names, PEERS[peer], found, strict=True)
        ]  # fmt: skip

    def tasks(self) -> dict[str, Task]:
        return {peer: partial(self.run, peer) for peer in PEERS}


def tasks(name: str, architectures: Sequence[Architecture], card: Card) -> dict[str, Task]:
    return Steps(card, name, architectures).tasks()


def peers(card: Card) -> dict[str, Task]:
    return Peers(card).tasks()


others = partial(tasks, "small", ARCHITECTURES[2:])
quick = partial(tasks, "small", ARCHITECTURES[:2])
large, public = (partial(tasks, name, ARCHITECTURES[:2]) for name in ("large", "public"))
