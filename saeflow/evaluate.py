"""How good is a trained SAE? Judged on held-out documents, and on the whole encoded corpus for dead features."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from saeflow import activations, features, tokens, train
from saeflow.artefact import Artefact
from saeflow.config import FORMAT_VERSION, Recipe, fingerprint
from saeflow.feed import Feed, held_out_rows
from saeflow.machine import total_memory
from saeflow.model import device_of, load_model, predicts_next_token, replaced
from saeflow.parallel import in_order
from saeflow.progress import Bar, Progress
from saeflow.records import Damaged, read_checked, write_checked
from saeflow.sae import SparseAutoencoder
from saeflow.store import Store
from saeflow.transfer import n_workers
from saeflow.used import Used

_SEQUENCES = 4
"""Sequences in one forward pass up to the logits: few, so that the logits stay in the processor's cache."""
_LOGIT_BYTES = 3 * 4
"""Memory of one logit: as the model gives it, in float32, and its logarithm of the softmax."""


@dataclass
class Reconstruction:
    """Sums over tokens (float64) from which variance unexplained and L0 follow."""

    width: int
    n_tokens: int = 0
    error: float = 0.0
    n_active: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.width, dtype=torch.float64)
        self.squares = 0.0

    def add(self, x: Tensor, sae: SparseAutoencoder) -> None:
        """Count tokens x (n, D)."""
        sparse = sae.encode_sparse(x)
        wide = x.double()
        self.n_tokens += len(x)
        self.n_active += len(sparse.values)
        self.error += (wide - sae.decode(sparse).double()).square().sum().item()
        self.total += wide.sum(0)
        self.squares += wide.square().sum().item()

    @property
    def mean(self) -> Tensor:
        return self.total / self.n_tokens

    @property
    def variance_unexplained(self) -> float:
        """Sum of |x - reconstruction|² over sum of |x - mean|², the mean taken over the same tokens."""
        return ratio(self.error, self.squares - self.n_tokens * self.mean.square().sum().item())

    @property
    def l0(self) -> float:
        """Active features per token."""
        return self.n_active / self.n_tokens


def loss_recovered(loss: float, spliced: float, ablated: float) -> float:
    """Share of the loss that ablation costs and the reconstruction does not; 1 is perfect, 0 no better than ablation."""
    return ratio(ablated - spliced, ablated - loss)


def ratio(part: float, whole: float) -> float:
    """part / whole; infinite where there is no whole."""
    return part / whole if whole else math.copysign(math.inf, part)


def run(store: Store, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Judge the recipe's SAE and keep the figures beside its features."""
    run_artefact = features.artefact(store, recipe)
    path = run_artefact.path / "quality.json"
    known = _known(path)
    judged = {"max_tokens": recipe.evaluate.max_tokens, "parts": _fingerprint(run_artefact)}
    if _matches(known, judged, run_artefact):
        progress.skip("evaluate", f"variance unexplained {known['variance_unexplained']:.4f}")
        return dict(known)
    train.set_threads(recipe)
    sae = SparseAutoencoder.load(train.artefact(store, recipe).fetched())
    quality = _reconstruction(store, recipe, sae, progress) | _liveness(run_artefact)
    if recipe.model is not None and quality.pop("held_out"):
        mean = quality.pop("mean")
        quality |= _language_model_loss(store, recipe, sae, mean, progress)
    else:
        quality.pop("mean", None)
        quality.pop("held_out", None)
    write_checked(path, {"format_version": FORMAT_VERSION} | quality | judged)
    run_artefact.send(path)
    return quality


def _known(path: Path) -> dict[str, Any]:
    """Figures of an earlier run; none where they cannot be read."""
    with contextlib.suppress(Damaged, OSError):
        return dict(read_checked(path))
    return {}


def _matches(known: dict[str, Any], judged: dict[str, Any], run_artefact: Artefact) -> bool:
    """Are the known figures those of what would be judged? Format 1 did not say which parts; it counted values."""
    if "parts" in known:
        return {name: known.get(name) for name in judged} == judged
    counted = (known.get("max_tokens"), known.get("n_values"))
    return counted == (judged["max_tokens"], run_artefact.published().total("n_values"))


def _fingerprint(run_artefact: Artefact) -> str:
    """Stands for the encoded corpus that was judged."""
    return fingerprint([part.folder for part in run_artefact.published().parts])


def _reconstruction(store: Store, recipe: Recipe, sae: SparseAutoencoder, progress: Progress) -> dict[str, Any]:
    source, stored = activations.tokens_artefact(store, recipe), activations.artefact(store, recipe)
    used = Used.of(source, recipe.activations)
    site = activations.choose_site(stored, recipe.sae.site)
    sums = Reconstruction(site.width)
    with progress.bar("evaluate", None, "tokens") as bar:
        for rows in held_out_rows(used, stored, site, recipe.evaluate.max_tokens):
            for x in torch.split(rows, recipe.features.batch_rows):
                sums.add(x, sae)
                bar.advance(len(x))
        held_out = sums.n_tokens > 0
        if not held_out:  # nothing was held out: judge on what was trained on, and say so
            feed = Feed(used, stored, site, recipe.feed)
            for x in itertools.islice(feed.batches(), feed.batches_per_epoch):
                sums.add(x, sae)
    return {
        "held_out": held_out,
        "mean": sums.mean.float(),
        "n_tokens": sums.n_tokens,
        "variance_unexplained": sums.variance_unexplained,
        "mean_squared_error": sums.error / sums.n_tokens / site.width,
        "l0": sums.l0,
        "judged_on": "held-out documents" if held_out else "training data",
    }


def _liveness(run_artefact: Artefact) -> dict[str, Any]:
    """Dead features never fire in the whole encoded corpus; dense ones fire at more than a tenth of its tokens."""
    generation = run_artefact.published()
    paths = [run_artefact.part_file(part, "feature_stats.parquet") for part in generation.parts]
    n_firing = sum(pq.read_table(path, columns=["n_tokens"]).column(0).to_numpy() for path in paths)
    density = np.asarray(n_firing) / max(generation.total("n_tokens"), 1)
    return {
        "n_values": generation.total("n_values"),
        "n_dead": int((density == 0).sum()),
        "dead_share": float((density == 0).mean()),
        "dense_share": float((density > 0.1).mean()),
    }


def _language_model_loss(
    store: Store, recipe: Recipe, sae: SparseAutoencoder, mean: Tensor, progress: Progress
) -> dict[str, Any]:
    """Next-token loss (nats) as it is, with the reconstruction spliced in, and with mean and zero instead."""
    assert recipe.model is not None
    model = load_model(recipe.model)
    if not predicts_next_token(model):
        progress.say("evaluate: the model does not predict the next token, so there is no loss to recover")
        return {}
    site = activations.choose_site(activations.artefact(store, recipe), recipe.sae.site).name
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "loss": None,
        "loss_sae": lambda x: sae.reconstruct(x.float().cpu().flatten(0, -2)).view(x.shape).to(x),
        "loss_mean_ablated": lambda x: mean.to(x).expand_as(x),
        "loss_zero_ablated": torch.zeros_like,
    }
    workers, n_together = _room(model, recipe)
    batches = list(_held_out_sequences(store, recipe, n_together))
    n_predicted = sum(int(_predicting(batch).sum()) for batch in batches)
    sums = {}
    with progress.bar("loss", len(changes) * n_predicted, "tokens") as bar:
        for name, change in changes.items():
            spliced = _Spliced(change)
            with replaced(model, site, spliced) if change else contextlib.nullcontext():
                each = in_order(partial(_summed_loss, model, spliced), batches, workers)
                sums[name] = math.fsum(_counted(each, batches, bar))
    losses = {name: ratio(total, n_predicted) for name, total in sums.items()}
    recovered = {
        f"loss_recovered_{kind}": loss_recovered(losses["loss"], losses["loss_sae"], losses[f"loss_{kind}_ablated"])
        for kind in ("mean", "zero")
    }
    return losses | recovered | {"n_predicted": n_predicted}


def _room(model: Any, recipe: Recipe) -> tuple[int, int]:
    """Forward passes at once, and sequences in each, so that the logits take a quarter of the memory at most."""
    on_processor = device_of(model).type == "cpu"
    room = (total_memory() if on_processor else torch.cuda.mem_get_info(device_of(model))[0]) // 4
    one = recipe.tokens.context_length * model.get_output_embeddings().weight.shape[0] * _LOGIT_BYTES
    workers = min(n_workers(device_of(model), recipe.threads), max(1, room // one))
    return workers, min(_SEQUENCES, max(1, room // one // workers))


def _counted(losses: Iterable[float], batches: list[_Batch], bar: Bar) -> Iterator[float]:
    for loss, batch in zip(losses, batches, strict=True):
        bar.advance(int(_predicting(batch).sum()))
        yield loss


@dataclass(frozen=True)
class _Batch:
    """Held-out sequences, (s, T) each: vocab_ids, what is text, what readers see of it, what the SAE is used on."""

    vocab_ids: Tensor
    real: Tensor
    seen: Tensor
    used: Tensor


class _Spliced:
    """What takes the place of the activations (s, T, D): the change at used tokens, nothing elsewhere."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None) -> None:
        self.change, self.here = change, threading.local()

    def __call__(self, x: Tensor) -> Tensor:
        assert self.change is not None
        used = self.here.used.to(x.device)
        return self.change(x) if used.all() else torch.where(used[:, :, None], self.change(x), x)


def _held_out_sequences(store: Store, recipe: Recipe, n_together: int) -> Iterator[_Batch]:
    """Held-out sequences, at most `evaluate.max_tokens` tokens."""
    source = activations.tokens_artefact(store, recipe)
    visible, used = Used(source), Used.of(source, recipe.activations)
    left = math.ceil(recipe.evaluate.max_tokens / recipe.tokens.context_length)
    for part in source.published().parts:
        rows = slice(part.counts["n_train_sequences"], part.counts["n_train_sequences"] + max(left, 0))
        if rows.start == min(rows.stop, part.counts["n_sequences"]):
            continue
        vocab_ids, real = (each[rows] for each in tokens.read_part(source, part))
        arrays = (vocab_ids, real, visible.mask(part.index, rows), used.mask(part.index, rows))
        pieces = (torch.split(torch.from_numpy(np.ascontiguousarray(each)), n_together) for each in arrays)
        yield from (_Batch(*batch) for batch in zip(*pieces, strict=True))
        left -= len(vocab_ids)


def _predicting(batch: _Batch) -> Tensor:
    """Where the next token of the sequence is predicted from one before it, bool (s, T); both are seen."""
    return tf.pad(batch.seen[:, 1:] & batch.seen[:, :-1], (0, 1))


@torch.no_grad()
def _summed_loss(model: nn.Module, spliced: _Spliced, batch: _Batch) -> float:
    """Summed loss of predicting each real token from those before it in its sequence."""
    place = next(model.parameters()).device
    spliced.here.used = batch.used
    vocab_ids, real = batch.vocab_ids.to(place), batch.real.to(place)
    logits = model(vocab_ids, attention_mask=None if real.all() else real).logits
    following = vocab_ids.roll(-1, dims=1).flatten()  # a sequence's last token predicts nothing: left out below
    each = tf.cross_entropy(logits.flatten(0, 1).float(), following, reduction="none")
    return float(each[_predicting(batch).flatten().to(place)].double().sum())
