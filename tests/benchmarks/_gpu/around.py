"""What surrounds the steps: batches brought to the card, activations collected by it, values encoded on it."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeflow.activations.upload import Room, uploaded
from saeflow.pipeline import tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.store.store import Store
from tests.benchmarks import collect
from tests.benchmarks._gpu import steps
from tests.benchmarks._gpu.measure import Card, Row, rate, ratio
from tests.benchmarks._gpu.work import Task

SHARE, TOY_SHARE = 0.1, 0.002
LARGER = {"n_embd": 1024, "n_inner": 4096, "n_head": 16, "n_layer": 12}
"""A model of 160 million parameters, its weights random, with the demo's vocabulary."""


class Around:
    """What is done before and after the steps."""

    def __init__(self, card: Card) -> None:
        self.card, self.size = card, card.sizes["small"]

    def uploads(self, n: int | None = None) -> Generator[tuple[Tensor, ...], None, None]:
        """Yield n batches, or batches without end, that come from the host in float16."""

        def read(room: Room | None) -> Iterator[tuple[Tensor, ...]]:
            for x in itertools.islice(itertools.cycle(self.on_host), n):
                yield tuple(out.copy_(x) for out in room([(len(x), x.shape[1])], x.dtype)) if room else (x,)

        return uploaded(read, self.card.place)

    @cached_property
    def on_host(self) -> list[Tensor]:
        return [each.half().cpu() for each in steps.batches(self.size, self.card)]

    def feed_is_right(self) -> Row:
        """Batches compared with the host's, each behind work that lasts longer than a copy."""
        n, n_wrong, busy = 20, torch.zeros((), device=self.card.place), self.on_host[0].float().to(self.card.place)
        wanted = [each.to(self.card.place) for each in self.on_host]
        for number, (x,) in enumerate(self.uploads(n)):
            for _ in range(number % 4):
                _ = busy.T @ busy
            n_wrong += (x != wanted[number % len(wanted)]).any()
        return Row(f"batches of {n} that differ from the host's", int(n_wrong), asked=0, sense="<=")

    def feed(self) -> list[Row]:
        """Steps on float16 batches from the host's memory, beside steps on batches that are on the card."""
        taken = steps.Steps(self.card, "small", ["topk"])
        training, coming = steps.a_training("topk", self.size, self.card, taken.batches[0]), self.uploads()

        def step() -> None:
            training.advance(steps.feed_batch(training.step, next(coming)[0]))

        from_host = self.card.rounds(step, 4)
        there = self.card.rounds(taken.step(training), 4)
        coming.close()
        name = f"{self.size.name}: topk"
        return [
            rate(self.size.n_rows, "tokens/s", f"{name}, batches from the host", from_host),
            ratio(f"{name}, batches from the host beside batches on the card", 0.95, from_host, there),
        ]

    def collect(self, larger: bool) -> list[Row]:
        """The collect stage beside the same forward pass whose output is dropped."""
        with tempfile.TemporaryDirectory(prefix="saeflow-gpu-") as temporary:
            folder = Path(temporary)
            changes: dict[str, Any] = {"corpus.share": TOY_SHARE if self.card.is_toy else SHARE}
            changes |= {"model.device": self.card.place.type, "activations.forward_batch": 128}
            name = "demo model"
            if larger:
                name = "random model of 160M parameters in bfloat16, 6th block"
                changes |= {"model.path": str(larger_model(folder, self.card.is_toy)), "model.dtype": "bfloat16"}
                changes |= {"activations.sites": [f"transformer.h.{0 if self.card.is_toy else 5}"]}
            store, recipe = some_tokens(folder, changes)
            collect.collected(store, recipe)  # the first run warms up
            n = 1 if self.card.is_toy else 3
            ours, alone = zip(
                *((collect.collected(store, recipe), collect.dropped(store, recipe)) for _ in range(n)), strict=True
            )
        return [
            rate(1, "tokens/s", f"collect, {name}", [1 / each for each in ours]),
            ratio(f"collect, {name}, beside the forward pass", 0.9, [1 / e for e in ours], [1 / e for e in alone]),
        ]

    def encode(self, architecture: str) -> list[Row]:
        """Exact values of a batch, their way back to the host included."""
        x = steps.batches(self.size, self.card, 1)[0].half()
        about = {"architecture": architecture, "n_features": self.size.n_features, "k": self.size.k}
        with steps.quick_weights(self.size, self.card):
            sae = SparseAutoencoder(SAEConfig.model_validate(about), self.size.width).eval()
        sae.to(self.card.place)
        with torch.no_grad():
            sae.threshold.fill_(_threshold(sae, x, self.size.k))
        sae.prepare()
        seconds = self.card.rounds(lambda: sae.encode_sparse(x), 4)
        name = f"{self.size.name}: encode, {architecture}"
        found = rate(self.size.n_rows, "tokens/s", name, seconds, flops=self.size.flops, asked_share=0.4)
        l0 = len(sae.encode_sparse(x).values) / len(x)
        return [found, Row(f"{name}, values a token", l0)]

    def tasks(self) -> dict[str, Task]:
        return {
            "batches": self.feed_is_right, "feed": self.feed, "encode topk": lambda: self.encode("topk"),
            "encode batchtopk": lambda: self.encode("batchtopk"), "collect": lambda: self.collect(False),
            "collect, larger": lambda: self.collect(True),
        }  # fmt: skip


def _threshold(sae: SparseAutoencoder, x: Tensor, k: int) -> float:
    """Return a number that about k pre-activations of a token exceed."""
    pre = (x[:64].float() - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    return float(pre.topk(k, dim=1).values[:, -1].mean())


def some_tokens(folder: Path, changes: dict[str, Any]) -> tuple[Store, Recipe]:
    """Return a store with the tokens of a share of the demo's documents."""
    recipe = load_recipe(collect.RECIPES / "demo.toml", **changes)
    store = Store.create(folder / "store")
    tokens.run(Lineage(store, recipe), collect.QUIET)
    return store, recipe


def larger_model(folder: Path, is_toy: bool) -> Path:
    """Return a folder with random weights and the demo's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    demo, made = collect.ROOT / "data" / "demo" / "model", folder / "model"
    about = json.loads((demo / "config.json").read_text("utf-8")) | ({} if is_toy else LARGER)
    GPT2LMHeadModel(GPT2Config(**about)).save_pretrained(made)
    for path in demo.glob("tokenizer*"):
        shutil.copy(path, made)
    return made


def tasks(card: Card) -> dict[str, Task]:
    return Around(card).tasks()
