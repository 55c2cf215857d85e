"""Figures of a trained SAE, on held-out documents; those of dead features, on the whole encoded corpus."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from saeflow.activations.feed import Feed, aligned_held_out_rows
from saeflow.activations.forward import ForwardPass
from saeflow.activations.lengths import too_long
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection
from saeflow.features.schema import holding
from saeflow.model.load import load_model, may_run
from saeflow.model.sites import device_of, predicts_next_token, require_running_order, run_on, spliced
from saeflow.pipeline.collect import forward_of
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.devices import device_memory, model_threads
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import map_in_order, n_threads, use_threads
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_sae
from saeflow.sae.metrics import Firing, Predictions, Reconstruction, WithoutLongest, density_histogram, ratio, recovered
from saeflow.store.artefact import Artefact
from saeflow.store.records import read_or_empty, write_checked

_SEQUENCES = 4
"""Sequences in one forward pass up to the logits: few, so that the logits stay in the processor's cache."""
_LOGIT_BYTES = 8 + 3 * 4
"""Memory of one logit: the unchanged model's as a probability in float64, and three in float32 for the other pass (the
model's own, a cast and a soft cap)."""

Change = Callable[[Tensor, Tensor], Tensor]
"""Gives new activations (s, T, D) from those of the site that is read and those at the target."""


@dataclass
class Judged:
    """Reconstruction metrics of one SAE on its evaluation tokens."""

    reconstruction: Reconstruction
    without_longest: WithoutLongest
    firing: Firing
    held_out: bool = True

    def add(self, x: Tensor, wanted: Tensor, sae: SparseAutoencoder) -> None:
        """Count tokens x (n, D), to be reconstructed as `wanted`."""
        sparse = sae.encode_sparse(x)
        self.firing.add(sparse)
        there = sae.decode(sparse, x)
        self.reconstruction.add(wanted, there)
        self.without_longest.add(wanted, there)

    @property
    def figures(self) -> dict[str, Any]:
        sums, firing = self.reconstruction, self.firing
        return {
            "n_tokens": sums.n_tokens,
            "variance_unexplained": sums.variance_unexplained,
            **self.without_longest.figures,
            "mean_squared_error": sums.mean_squared_error,
            "shrinkage": sums.shrinkage,
            "l0": firing.l0,
            "silent": firing.silent,
            "density_histogram": density_histogram(firing.n_firing, firing.n_tokens),
            "judged_on": "held-out documents" if self.held_out else "training data",
        }


def run(lineage: Lineage, progress: Progress) -> dict[str, Any]:
    """Judge the recipe's SAE and keep the figures beside its features."""
    with lineage.features.writing():
        return _measure_run(lineage, progress)


def _measure_run(lineage: Lineage, progress: Progress) -> dict[str, Any]:
    recipe, run_artefact = lineage.recipe, lineage.features
    path = run_artefact.path / "quality.json"
    known = read_or_empty(path)
    judged = {"max_tokens": recipe.evaluate.max_tokens, "parts": holding(run_artefact.published().parts)}
    if "parts" in known:
        matches = "shrinkage" in known and {name: known.get(name) for name in judged} == judged
    else:  # format 1 counted values instead of naming parts
        counted = recipe.evaluate.max_tokens, run_artefact.published().total("n_values")
        matches = (known.get("max_tokens"), known.get("n_values")) == counted
    if matches:
        progress.skip("evaluate", f"variance unexplained {known['variance_unexplained']:.4f}")
        return dict(known)
    use_threads(recipe.threads)
    sae = load_sae(lineage.sae.fetched(), n_threads(recipe.threads))
    judgement = judge_together(lineage, [sae], progress)[0]
    quality = judgement.figures | _liveness(run_artefact)
    if may_run(recipe, *(site.name for site in lineage.sites)) and judgement.held_out:
        quality |= _language_model(lineage, sae, judgement.reconstruction.mean.float(), progress)
    with run_artefact.publishing():
        write_checked(path, {"format_version": FORMAT_VERSION} | quality | judged)
        run_artefact.storage.send(path)
    return quality


def l0_missed(lineage: Lineage, l0: float) -> dict[str, str]:
    """Return in words how far L0 is from `sae.k`; nothing if it is near, or if `k` sets nothing."""
    words = lineage.recipe.sae.misses_k(l0)
    return {"l0_missed": words} if words else {}


def judge_together(lineage: Lineage, saes: Sequence[SparseAutoencoder], progress: Progress) -> list[Judged]:
    """Judge SAEs or transcoders of the recipe's sites on held-out tokens, in one reading. Needs no encoded run.

    At most `evaluate.max_tokens` tokens are read, or run through the model if activations are not kept. Without
    held-out ones, they are training tokens, in the order of training (or of the corpus), and `judged_on` says so.
    """
    recipe, sites = lineage.recipe, lineage.distinct_sites
    most, width, n_rows = recipe.evaluate.max_tokens, sites[-1].width, recipe.features.batch_rows
    found = [Judged(Reconstruction(width), WithoutLongest(width, most), Firing(sae.config.n_features)) for sae in saes]
    forward = forward_of(lineage, sites)
    with progress.bar("evaluate", None, "tokens") as bar:
        for held_out in (True, False):
            for rows in _activations_to_judge(lineage, forward, held_out):
                for x, *others in zip(*(torch.split(each, n_rows) for each in rows), strict=True):
                    for judged, sae in zip(found, saes, strict=True):
                        judged.held_out = held_out
                        judged.add(x, others[0] if others else x, sae)
                    bar.advance(len(x))
            if found[0].firing.n_tokens:
                break
    return found


def _activations_to_judge(
    lineage: Lineage, forward: ForwardPass | None, held_out: bool
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the activations (n, D) to judge on, of each site: held-out ones, or those of training."""
    most, used, sites = lineage.recipe.evaluate.max_tokens, lineage.selection(), lineage.distinct_sites
    if forward:
        yield from forward.tokens(used, most, held_out, lineage.longest_allowed)
    elif held_out:
        yield from aligned_held_out_rows(used, lineage.activations, sites, most)
    else:
        feed = Feed(used, lineage.activations, sites, lineage.recipe.feed)
        with contextlib.closing(feed.aligned()) as batches:
            for batch in itertools.islice(batches, feed.batches_per_epoch):
                yield tuple(each[:most] for each in batch)
                most -= len(batch[0])
                if most <= 0:
                    return


def firing_counts(run_artefact: Artefact) -> tuple[np.ndarray, int]:
    """Return on how many tokens each feature fires (F,), and the number of encoded tokens."""
    generation = run_artefact.published()
    paths = [run_artefact.part_file(part, "feature_stats.parquet") for part in generation.parts]
    counts = [pq.read_table(path, columns=["n_tokens"]).column(0).to_numpy() for path in paths]
    return np.sum(counts, axis=0), generation.total("n_tokens")


def _liveness(run_artefact: Artefact) -> dict[str, Any]:
    """Return shares of dead features, which never fire, and of dense ones, which fire at over a tenth of all tokens."""
    n_firing, n_tokens = firing_counts(run_artefact)
    density = n_firing / max(n_tokens, 1)
    return {
        "n_values": run_artefact.published().total("n_values"),
        "density_histogram": density_histogram(n_firing, n_tokens),
        "n_dead": int((density == 0).sum()),
        "dead_share": float((density == 0).mean()),
        "dense_share": float((density > 0.1).mean()),
    }


def _language_model(
    lineage: Lineage, sae: SparseAutoencoder, mean: Tensor, progress: Progress, n_together: int = _SEQUENCES
) -> dict[str, Any]:
    """Return the next-token loss of the model, and its loss and KL divergence (nats a token) with three changes.

    The changes at the site: the SAE's reconstruction, the mean, zero. Also returns the shares of loss and KL divergence
    that the reconstruction recovers.
    """
    recipe = lineage.recipe
    assert recipe.model is not None
    model = load_model(recipe.model)
    if not predicts_next_token(model):
        progress.say("evaluate: the model does not predict the next token, so there is no loss to recover")
        return {}
    read, target = (site.name for site in lineage.sites)
    require_running_order(model, read, target)
    workers, n_together = _room(model, recipe, device_memory(device_of(model)), n_together)
    batches = list(_held_out_sequences(lineage, n_together))
    n_predicted = sum(int(_predicting(batch).sum()) for batch in batches)
    if not n_predicted:
        progress.say("evaluate: no held-out token follows another in its sequence, so there is no loss to recover")
        return {}
    dtype = getattr(torch, recipe.activations.dtype)
    splice, changes = _Splice(dtype, lineage.longest_allowed), _changes(sae, mean)
    n_passes = 1 + len(changes)
    with spliced(model, read, target, splice), progress.bar("loss", n_passes * n_predicted, "tokens") as bar:
        sums = []
        compared = map_in_order(partial(_compared, model, splice, changes), batches, workers)
        for found, batch in zip(compared, batches, strict=True):
            bar.advance(n_passes * int(_predicting(batch).sum()))
            sums.append(found)
    means = {name: ratio(math.fsum(batch[name] for batch in sums), n_predicted) for name in sums[0]}
    shares = {
        f"{figure}_recovered_{kind}": recovered(least, means[f"{figure}_sae"], means[f"{figure}_{kind}_ablated"])
        for figure, least in (("loss", means["loss"]), ("kl", 0.0))
        for kind in ("mean", "zero")
    }
    return means | shares | {"n_predicted": n_predicted}


def _changes(sae: SparseAutoencoder, mean: Tensor) -> dict[str, Change]:
    return {
        "sae": lambda x, there: sae.reconstruct(x.float().cpu().flatten(0, -2)).view(there.shape).to(there),
        "mean_ablated": lambda x, there: mean.to(there).expand_as(there),
        "zero_ablated": lambda x, there: torch.zeros_like(there),
    }


def _room(model: Any, recipe: Recipe, memory: int, n_together: int = _SEQUENCES) -> tuple[int, int]:
    """Return threads, and sequences at once in each, so that logits take at most a quarter of the memory."""
    room = memory // 4
    one = recipe.tokens.context_length * model.get_output_embeddings().weight.shape[0] * _LOGIT_BYTES
    workers = min(model_threads(device_of(model), recipe.threads), max(1, room // one))
    return workers, min(n_together, max(1, room // one // workers))


@dataclass(frozen=True)
class _Batch:
    """Held-out sequences, (s, T) each: vocab_ids, and masks of text, of visible tokens, of tokens that count."""

    vocab_ids: Tensor
    real: Tensor
    seen: Tensor
    used: Tensor


class _Splice:
    """Applies a change at the target, in the pass that this thread runs, to the tokens that count."""

    def __init__(self, dtype: torch.dtype, longest: float | None) -> None:
        self.here, self.dtype, self.longest = threading.local(), dtype, longest

    def set(self, change: Change | None, used: Tensor) -> None:
        self.here.change, self.here.used = change, used

    def __call__(self, x: Tensor, there: Tensor) -> Tensor:
        if self.here.change is None:
            return there
        used, changed = (
            self.here.used & ~torch.from_numpy(too_long(x.to(self.dtype), self.longest)),
            self.here.change(x, there),
        )
        used = used.to(there.device)
        return changed if used.all() else torch.where(used[:, :, None], changed, there)


def _held_out_sequences(lineage: Lineage, n_together: int) -> Iterator[_Batch]:
    """Yield held-out sequences, at most `evaluate.max_tokens` tokens."""
    recipe, source = lineage.recipe, lineage.tokens
    visible, used = TokenSelection(source), lineage.selection()
    left = math.ceil(recipe.evaluate.max_tokens / recipe.tokens.context_length)
    for part in source.published().parts:
        rows = slice(part.counts["n_train_sequences"], part.counts["n_train_sequences"] + max(left, 0))
        if rows.start == min(rows.stop, part.counts["n_sequences"]):
            continue
        vocab_ids, real = (each[rows] for each in token_parts.read_part(source, part))
        arrays = (vocab_ids, real, visible.mask(part.index, rows), used.mask(part.index, rows))
        pieces = (torch.split(torch.from_numpy(np.ascontiguousarray(each)), n_together) for each in arrays)
        yield from (_Batch(*batch) for batch in zip(*pieces, strict=True))
        left -= len(vocab_ids)


def _predicting(batch: _Batch) -> Tensor:
    """Return a mask (s, T) of visible tokens whose next token is visible, too."""
    return tf.pad(batch.seen[:, 1:] & batch.seen[:, :-1], (0, 1))


@torch.no_grad()
def _compared(model: nn.Module, splice: _Splice, changes: dict[str, Change], batch: _Batch) -> dict[str, float]:
    """Return sums over predicted tokens: the model's loss, and loss and KL divergence with each change."""
    place = device_of(model)
    vocab_ids, real = batch.vocab_ids.to(place), batch.real.to(place)
    rows = _predicting(batch).to(place).flatten().nonzero().flatten()

    def logits(change: Change | None) -> Tensor:
        splice.set(change, batch.used)
        found: Tensor = run_on(model, vocab_ids, None if real.all() else real).logits
        return found.flatten(0, 1)

    unchanged = Predictions(logits(None), rows, vocab_ids.flatten()[rows + 1])
    sums = {"loss": unchanged.loss}
    for name, change in changes.items():
        sums[f"loss_{name}"], sums[f"kl_{name}"] = unchanged.beside(logits(change))
    return sums
