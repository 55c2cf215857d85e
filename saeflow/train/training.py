"""One training: its state, the step that changes the state, and the checkpoint that holds all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from saeflow.activations.feed import Feed
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import TrainConfig
from saeflow.runtime.devices import choose_device, to_device
from saeflow.runtime.errors import UserError
from saeflow.runtime.linear import fast_dtype
from saeflow.runtime.ranks import ALONE, Ranks
from saeflow.runtime.threads import n_threads
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.tensors import read_tensors
from saeflow.sae.loss import StepInfo
from saeflow.sae.optimizer import bfloat16
from saeflow.sae.optimizer.adam import optimizer_of
from saeflow.sae.split import Split
from saeflow.train import checkpoint, fused, schedules
from saeflow.train.kernel_steps import take_adam_step
from saeflow.train.resample import resample_dead
from saeflow.train.shares import read_share, whole_sae, whole_state
from saeflow.train.whitening import Whitening, whitening_of

_SCALE_ROWS = 65_536
"""Tokens from which the mean and the scale of the data set are taken."""


def sample_rows(feed: Feed) -> tuple[Tensor, ...]:
    """Return shuffled rows (n, D) float32 from the first pool of the first epoch, one tensor for each site."""
    batches: list[tuple[Tensor, ...]] = []
    for values in feed.aligned():
        batches.append(tuple(each.float() for each in values))
        if sum(len(each[0]) for each in batches) >= min(_SCALE_ROWS, feed.n_rows):
            break
    return tuple(map(torch.cat, zip(*batches, strict=True)))


@dataclass
class FeedBatch:
    """The rows (B, D) of each site that the feed gives for step `number`, in the same order."""

    number: int
    values: tuple[Tensor, ...]
    feed: Feed
    _scaled: dict[tuple[int, float, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.values[0])

    def scaled(self, site: int, scale: float, place: torch.device) -> Tensor:
        """Return the rows of a site in float32, times `scale`. Many trainings share them: do not change them.

        They have memory of their own: on a GPU that of `values` is used again after the step.
        """
        key = site, scale, place
        if key not in self._scaled:
            self._scaled[key] = to_device(self.values[site], place).float() * scale
        return self._scaled[key]

    def suspect(self) -> tuple[str, bool]:
        """Return in words the row to look at if a loss is NaN or infinite, and True if that row is finite.

        It is the first row that is not finite; if all are, the longest.
        """
        norms = torch.stack([torch.linalg.vector_norm(each.double(), dim=1) for each in self.values]).amax(0)
        bad = (~torch.isfinite(norms)).nonzero().flatten()
        row = int(bad[0]) if len(bad) else int(norms.argmax())
        place = self.feed.locate(self.number, row)
        return (f"{place} is not finite", False) if len(bad) else (f"{place}, of length {norms[row]:.4g}", True)


@dataclass
class Training:
    """The state of one training, which a checkpoint holds, and the step that changes it."""

    sae: SparseAutoencoder
    adam: torch.optim.Adam
    config: TrainConfig
    scales: tuple[float, ...]
    """Factors on the activations of the site read and, for a transcoder, of the site to reconstruct."""
    n_steps: int
    whitening: Whitening | None = None
    name: str = ""
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    info: StepInfo | None = None
    """Figures of the last step; by the kernels of a GPU, those that were fetched last."""
    fused: fused.FusedTraining | None = None
    """Takes the steps on a GPU. It begins with the next step whenever somebody else has changed weights or moments."""
    uses_fused: bool = False
    """True if the kernels of a GPU take the steps."""

    @classmethod
    def begin(
        cls, feed: Feed, recipe: Recipe, restart: int = 0, rows: tuple[Tensor, ...] | None = None,
        ranks: Ranks = ALONE,
    ) -> Training:  # fmt: skip
        """Return a training with fresh weights; a sample of shuffled rows gives the data set's mean and scale."""
        rows = rows or sample_rows(feed)
        whitening = whitening_of(rows[0]) if recipe.sae.whiten and recipe.sae.source is None else None
        if whitening is not None:
            rows = (_whitened(whitening, rows[0]),)
        means, scales = zip(*(mean_and_scale(each, recipe.sae.normalise) for each in rows), strict=True)
        widths = feed.sites[0].width, feed.sites[-1].width
        sae = _fresh_sae(recipe, restart, widths, ranks)
        sae.initialise(*(mean * scale for mean, scale in zip(means, scales, strict=True)))
        sae.start_sparse(rows[0] * scales[0])
        config, place = schedules.with_rate(recipe, widths[0]), choose_device("train.device", recipe.train.device)
        sae.product_dtype = fast_dtype(place)
        sae.to(place)
        if config.weights == "bfloat16":
            bfloat16.round_to_nearest(sae)
        adam = optimizer_of(sae, config)
        n_steps = max(1, round(config.n_tokens * feed.batches_per_epoch / feed.n_rows))
        training = cls(sae, adam, config, scales, n_steps, whitening, recipe.name)
        training.uses_fused = fused.suits(sae, config)
        return training

    @property
    def place(self) -> torch.device:
        return self.sae.W_enc.device

    @property
    def done(self) -> bool:
        return self.step >= self.n_steps

    def advance(self, batch: FeedBatch) -> StepInfo:
        """Take one optimiser step and return its figures."""
        for group in self.adam.param_groups:
            group["lr"] = schedules.learning_rate(self.step, self.n_steps, self.config)
        x, *others = (batch.scaled(site, scale, self.place) for site, scale in enumerate(self.scales))
        if self.whitening is not None:
            x = self.whitening.apply(batch.scaled(0, 1.0, self.place)) * self.scales[0]
        target, dead_after = others[0] if others else None, self.config.dead_after_tokens
        if self.uses_fused:
            return self._advance_fused(batch, x, target)
        loss, info = self.sae.training_loss(
            x, self.config.aux_weight, dead_after, target=target, k=self._k, sparsity=self._sparsity,
            by_token=schedules.chooses_by_token(self.step, self.n_steps, self.config),
        )  # fmt: skip
        if not math.isfinite(loss.item()):
            raise UserError(_loss_not_finite(self, loss.item(), *batch.suspect()))
        loss.backward()  # type: ignore[no-untyped-call]
        clipped = _clip(self.sae, self.config.clip_norm)
        take_adam_step(self.sae, self.adam, self.step + 1 if self.in_bfloat16 else None)
        if _resamples(self):
            self._resample(x, target, self.step)
        if self._is_logged(self.step):
            self.log.append(self._log_row(loss.item(), info, len(batch)) | clipped)
        self.step, self.info = self.step + 1, info
        return info

    def _advance_fused(self, batch: FeedBatch, x: Tensor, target: Tensor | None) -> StepInfo:
        """Take one step by the kernels of a GPU. Its figures are fetched only for the log, and before they are kept."""
        if self.fused is None:
            self.fused = fused.FusedTraining(self.sae, self.adam, self.config, batch.feed)
        by_token = self.sae.traits.chooses_by_token
        by_token = by_token or schedules.chooses_by_token(self.step, self.n_steps, self.config)
        self.fused.take(x, target, self.adam.param_groups[0]["lr"], self._k, by_token, self._sparsity)
        if self.info is None or self._is_logged(self.step):
            loss, self.info = self._fetched()
            self.log.append(self._log_row(loss, self.info, len(batch)))
        if _resamples(self):
            self.settle()
            self._resample(x, target, self.step)
        self.step += 1
        return self.info

    def _resample(self, x: Tensor, target: Tensor | None, step: int) -> None:
        self._widen()
        resample_dead(self.sae, self.adam, x, self.config.dead_after_tokens, step, target)
        if self.in_bfloat16:
            bfloat16.round_to_nearest(self.sae)

    @property
    def in_bfloat16(self) -> bool:
        """True if both matrices hold numbers of bfloat16 only."""
        return self.config.weights == "bfloat16"

    def _widen(self) -> None:
        """Store weights in float32, for all but the kernels of a GPU."""
        if self.in_bfloat16:
            self.sae.float()

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.n_steps - 1

    def _fetched(self) -> tuple[float, StepInfo]:
        """Return loss and figures of the last step. Raises UserError if a loss since the last call was not finite."""
        assert self.fused is not None
        found = self.fused.fetch()
        if found.suspect is not None:
            self.step = found.step
            self.fused.settle()
            self.fused = None
            raise UserError(_loss_not_finite(self, found.loss, *found.suspect))
        return found.loss, found.info

    def settle(self) -> None:
        """Bring weights and moments to where they can be kept, or changed by others. Raises as `advance` does."""
        if self.fused is not None:
            self._fetched()
            self.fused.settle()
            self.fused = None

    @property
    def _k(self) -> int:
        return schedules.active_features(self.step, self.n_steps, self.sae.config, self.config)

    @property
    def _sparsity(self) -> float:
        return schedules.sparsity_factor(self.step, self.n_steps, self.config)

    def _log_row(self, loss: float, info: StepInfo, n_rows: int) -> dict[str, float]:
        figures = _figures(info) | ({"k": self._k} if self.config.k_start and self.sae.config.counts_k else {})
        figures |= {"sparsity_factor": self._sparsity} if self.config.sparsity_warmup_share else {}
        return {"step": self.step, "batch_rows": n_rows, "lr": self.adam.param_groups[0]["lr"], "loss": loss} | figures

    def error(self, rows: Sequence[Tensor]) -> float:
        """Return the mean squared error of reconstructing raw rows (n, D), one tensor for each site, in eval mode."""
        self._widen()
        self.sae.eval()
        if self.whitening is not None:
            rows = [_whitened(self.whitening, rows[0])]
        scaled = [each.to(self.place) * scale for each, scale in zip(rows, self.scales, strict=True)]
        return float((self.sae.reconstruct(scaled[0]) - scaled[-1]).square().mean())

    def folded(self) -> SparseAutoencoder:
        """Return the SAE for raw activations, on the processor."""
        self._widen()
        sae = self.sae.folded(*self.scales).cpu()
        return sae if self.whitening is None else self.whitening.removed_from(sae)

    def bring_whole(self) -> None:
        """Bring all features to the first of several ranks, at the end of the training."""
        self.sae = whole_sae(self.sae)

    def save(self, folder: Path, work: Path | None = None, require: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint under `work`, then put it in the place of the last one, unless `require` raises.

        Of several ranks the first writes, for all.
        """
        self.settle()
        state = whole_state(_kept_state(self), self.sae)
        if self.sae.split.ranks.is_first:
            product = str(self.sae.product_dtype).removeprefix("torch.")  # chosen once, by measurement
            about = {"step": self.step, "scales": self.scales, "product": product, "log": self.log}
            checkpoint.write(folder, work or folder.parent, state, about, require)

    def restore(self, folder: Path) -> bool:
        """Continue from the newest whole checkpoint, which then lies in `folder`; return False if there is none.

        Raises Damaged if none of those that are there is whole: begin anew then. Raises UserError if the system refuses
        to read one.
        """
        return checkpoint.try_newest(folder, self.load)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`."""
        read = read_tensors if self.sae.split.features.n == 1 else partial(read_share, sae=self.sae)
        about, tensors = checkpoint.read_whole(folder, read)
        self.fused = None
        self._widen()
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        if self.whitening is not None:
            self.whitening = Whitening(*(tensors[f"whitening.{name}"] for name in Whitening._fields))
        checkpoint.set_moments(self.adam, tensors)
        self.sae.product_dtype = getattr(torch, about["product"])
        scales = about["scales"] if "scales" in about else [about["scale"]]  # written before there were transcoders
        self.step, self.scales, self.log = int(about["step"]), tuple(map(float, scales)), list(about["log"])


def _loss_not_finite(training: Training, loss: float, row: str, finite: bool) -> str:
    """Return what to say of a loss that is not finite. See `FeedBatch.suspect` for the last two."""
    begin = f"{training.name}: The loss is {loss} at step {training.step}."
    if not finite:
        return f"{begin} The activation at {row}. Check what is stored with `saeflow verify --full`."
    return (
        f"{begin} Lower train.lr (it is {training.config.lr or 0:g}), or set train.clip_norm.\n"
        f"All activations of the batch are finite; the longest is that at {row}."
    )


def _fresh_sae(recipe: Recipe, restart: int, widths: tuple[int, int], ranks: Ranks) -> SparseAutoencoder:
    seeded = recipe.sae.model_copy(update={"seed": recipe.sae.seed + restart})
    split = Split.of(ranks, recipe.train.parallel)
    return SparseAutoencoder(seeded, *widths, n_threads(recipe.threads), split)


def _resamples(training: Training) -> bool:
    """True if dead features start again after this step."""
    return training.step in {round(share * training.n_steps) for share in training.config.resample_at}


def _clip(sae: SparseAutoencoder, longest: float | None) -> dict[str, float]:
    """Shorten the gradient if `train.clip_norm` says so; return its length before, for the log."""
    return {} if longest is None else {"grad_norm": torch.nn.utils.clip_grad_norm_(sae.parameters(), longest).item()}


def _kept_state(training: Training) -> dict[str, Tensor]:
    """Return the weights of this rank and Adam's moments, by their names in a checkpoint."""
    weights = {f"sae.{name}": value for name, value in training.sae.state_dict().items()}
    if training.in_bfloat16:
        weights |= {name: weights[name].bfloat16() for name in map("sae.{}".format, bfloat16.MATRICES)}
    if training.whitening is not None:
        weights |= {f"whitening.{name}": value for name, value in training.whitening._asdict().items()}
    return weights | checkpoint.moments_of(training.adam)


def _figures(info: StepInfo) -> dict[str, float]:
    return {
        "variance_unexplained": info.unexplained, "l0": info.n_active, "dead": info.n_dead,
        "auxiliary_loss": info.auxiliary, "sparsity_loss": info.sparsity,
    }  # fmt: skip


def _whitened(whitening: Whitening, rows: Tensor) -> Tensor:
    return torch.cat([whitening.apply(part) for part in rows.split(4096)])


def mean_and_scale(rows: Tensor, normalise: bool) -> tuple[Tensor, float]:
    """Return the mean (D), and the factor that brings the rows' mean squared distance from it to D."""
    mean = rows.mean(0)
    spread = (rows - mean).square().sum(1).mean().item()
    if not math.isfinite(spread):
        raise UserError(
            f"The activations are too large: squares of {rows.abs().max():.3g} do not fit into float32.\n"
            "Bring them to a smaller scale, or choose another site."
        )
    if not spread > 0:
        raise UserError("All activations are equal; there is nothing to learn. Check the site and the corpus.")
    return mean, math.sqrt(rows.shape[1] / spread) if normalise else 1.0
