"""A whole optimiser step of the top-k family on a GPU, in which the host never waits for the device.

No tensor of shape (B, F) and no gradient of shape (F, D) exists. Sizes that depend on data are counters on the device.
From the first batch on whose loss is not finite nothing changes any more, until the host has looked at the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.sae.batch import variance_of
from saeflow.sae.gpu.auxiliary import Auxiliary, Reconstructed
from saeflow.sae.gpu.choice import choose, guess
from saeflow.sae.gpu.choice.choose import Choice
from saeflow.sae.gpu.choice.product import Product
from saeflow.sae.gpu.decode import decode_rows, room_for_residuals
from saeflow.sae.gpu.exchange import RowExchange
from saeflow.sae.gpu.rows.adam import AdamClock, AdamSettings, Wakefulness, update_vector
from saeflow.sae.gpu.rows.by_feature import gradient_through_centring, rows_of_entries, rows_of_residuals, used_ids
from saeflow.sae.gpu.rows.moments import AdamRows, code_tables
from saeflow.sae.gpu.rows.update import RowGradients
from saeflow.sae.loss import THRESHOLD_MEMORY
from saeflow.sae.parameters import SAEParameters

CAPACITY = 16
"""Entries that a row's buffer holds, as a multiple of k: see `guess`."""

FIGURES = (
    "loss", "unexplained", "auxiliary", "n_active", "n_dead", "n_wrong_guesses", "alive", "suspect", "n_dead_after",
)  # fmt: skip
"""Figures of a step, in this order. `alive` is 0 if a loss was not finite, in this step or before. `suspect` is the row
of that batch to look at, the first one that is not finite, as -1 - row, or else the longest. `n_dead_after` features
are dead for the next step."""


@dataclass(frozen=True)
class StepOptions:
    """What may change from step to step."""

    lr: float
    k: int
    by_token: bool
    """True if the k largest values of each token are kept, not of the batch."""
    n_dead: int
    """Dead features, as of the figures fetched last. They decide how many rows the auxiliary loss takes."""


class _Centred(NamedTuple):
    low: Tensor
    target: Tensor
    variance: Tensor
    """(1) float64: see `saeflow.sae.batch.centred_batch`."""


class FusedStep:
    """The optimiser steps of one training.

    The moments are those of `adam`, so that a checkpoint holds them as ever. It must hold `settle`'s: call it before.
    """

    def __init__(
        self, sae: SAEParameters, adam: torch.optim.Adam, dtype: torch.dtype, highest_lr: float, aux_weight: float,
        dead_after_tokens: int, tolerance: float = 0.0,
    ) -> None:  # fmt: skip
        self.sae, self.adam = sae, adam
        self.aux_weight = aux_weight if sae.traits.revives_dead else 0.0
        self.dead_after = dead_after_tokens
        group, place = adam.param_groups[0], sae.W_enc.device
        beta1, beta2 = group["betas"]
        settings = AdamSettings(beta1, beta2, group["eps"], highest_lr, tolerance)
        self.clock = AdamClock(settings, place)
        self.wakefulness = Wakefulness.asleep(sae.config.n_features, place)
        self.codes = code_tables(place)
        self.moments = {name: _moments(adam, weight) for name, weight in sae.named_parameters() if weight.requires_grad}
        self.w_low = sae.W_enc.detach().to(dtype)
        self.ends = torch.tensor(sae.config.nested, dtype=torch.int32, device=place)
        self.guess: Tensor | None = None
        """Ratio of guess to length, or a number for the whole batch (1): see `guess`."""
        self.guess_is_of_batch = False
        self.auxiliary = Auxiliary(sae.traits.signed)
        self.alive = torch.ones(1, device=place)
        """1, or 0 from the first loss on that is not finite."""
        self.suspect = torch.zeros(1, dtype=torch.float64, device=place)
        self.figures = torch.zeros(len(FIGURES), dtype=torch.float64, device=place)
        self._resume()

    def _resume(self) -> None:
        """Take the clock from Adam's state. Rows with moments are awake until their next step says more."""
        step = self.adam.state[self.sae.W_dec]["step"]
        self.clock.step.fill_(int(step))
        self.wakefulness.last_step.fill_(int(step))
        moved = torch.stack([self.moments[name][0].abs().amax(1) > 0 for name in ("W_enc", "W_dec")]).any(0)
        self.wakefulness.awake_until.copy_(torch.where(moved, int(step) + 1, 0))

    @torch.no_grad()
    def __call__(self, x: Tensor, target: Tensor | None, options: StepOptions) -> None:
        """Take a step on x (B, D), and for a transcoder its target (B, D_out), float32. See `figures`."""
        sae = self.sae
        batch = _centred(x, sae.b_in, target, sae.b_dec, self.w_low.dtype)
        exchange = RowExchange(sae.split.for_rows(len(x)).rows, len(x))
        choice = exchange.choice_of_all(
            self._choose(batch.low[exchange.mine], len(x), options), options.k, options.by_token
        )
        main = self._reconstructed(choice, batch, exchange)
        dead = sae.tokens_since_fired >= self.dead_after
        added = self._auxiliary(main, batch, dead, options)
        loss, figures = self._losses(main, added, batch, choice, dead, len(x))
        self._judge(loss, x)
        self._remember(main.ids.long(), choice, len(x), options)
        still = (sae.tokens_since_fired >= self.dead_after).sum()[None].double()
        self.figures.copy_(torch.cat([loss, *figures, self.alive, self.suspect, still]))
        self._update(main, added, batch, options.lr)

    def _choose(self, low: Tensor, n_rows: int, options: StepOptions) -> Choice:
        """Return the largest entries of these rows, as many as the batch of `n_rows` may have of them."""
        sae, k = self.sae, options.k
        product = Product.of(low, self.w_low, sae.b_enc.detach(), sae.traits.signed)
        if options.by_token:
            if self.guess is None or self.guess_is_of_batch:
                self.guess, self.guess_is_of_batch = guess.first_ratio(product, k), False
            lengths = guess.lengths(low)
            choice = choose.largest_of_rows(product, k, self.guess * lengths, _power_of_two(CAPACITY * k))
            self.guess = guess.next_ratio(choice.kth, lengths)
            return choice
        n = min(k * n_rows, len(low) * len(self.w_low))
        if self.guess is None or not self.guess_is_of_batch:
            self.guess, self.guess_is_of_batch = guess.first_of_batch(product, n), True
        choice = choose.largest_of_batch(product, n, self.guess, 2 * n)
        self.guess = choice.kth * guess.BATCH_MARGIN
        return choice

    def _reconstructed(self, choice: Choice, batch: _Centred, exchange: RowExchange) -> Reconstructed:
        starts, ids, values = choice.entries
        n_rows, n_features, mine = len(batch.low), len(self.w_low), exchange.mine
        target, bounds, g = batch.target[mine], starts[mine.start : mine.stop + 1], torch.zeros_like(values)
        rooms = room_for_residuals(len(self.ends), target)
        decode_rows(bounds, ids, values, self.sae.W_dec.detach(), target, self.ends, *rooms, g)
        residual, losses = map(exchange.rows_of_all, rooms)
        residual = residual.flatten(0, 1)
        exchange.ranks.sum_(g)  # others have zeros where this rank has products
        used = used_ids(ids, starts, n_features)
        rows = rows_of_entries(starts, len(ids))
        where = rows_of_residuals(used, rows, self.ends, n_rows).clamp(max=len(residual) - 1)
        # the scale of the loss: a share of the variance, and the mean over nested dictionaries
        scale = (2 / (batch.variance * len(self.ends))).float()
        pair = torch.stack([values, g]) * scale
        return Reconstructed(used, rows.clamp(max=n_rows - 1), where, pair, residual, losses, scale)

    def _auxiliary(
        self, main: Reconstructed, batch: _Centred, dead: Tensor, options: StepOptions
    ) -> Reconstructed | None:
        if not options.n_dead or not self.aux_weight > 0:
            return None
        rest = -main.residual[-len(batch.low) :]
        weights = self.w_low, self.sae.b_enc.detach(), self.sae.W_dec.detach()
        return self.auxiliary(
            batch.low, rest, batch.target, weights, dead, options.k, options.n_dead, self.aux_weight, len(main.residual)
        )

    def _losses(
        self, main: Reconstructed, added: Reconstructed | None, batch: _Centred, choice: Choice, dead: Tensor, n: int
    ) -> tuple[Tensor, list[Tensor]]:
        errors = main.losses.double().sum(1)
        auxiliary = (
            torch.zeros_like(batch.variance) if added is None else added.losses.double().sum()[None] / added.scale
        )
        loss = errors.mean()[None] / batch.variance + self.aux_weight * auxiliary
        n_active = choice.entries.row_starts[-1:].double() / n
        unexplained = errors[-1:] / batch.variance
        return loss, [unexplained, auxiliary, n_active, dead.sum()[None].double(), choice.n_wrong.double()]

    def _judge(self, loss: Tensor, x: Tensor) -> None:
        """Stop all changes if the loss is not finite, and note the row to look at."""
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        bad = ~norms.isfinite()
        row = torch.where(bad.any(), -1 - bad.int().argmax(), torch.where(bad, 0, norms).argmax())[None].double()
        self.suspect = torch.where(self.alive > 0, row, self.suspect)
        self.alive = self.alive * loss.isfinite()

    def _remember(self, used: Tensor, choice: Choice, n_rows: int, options: StepOptions) -> None:
        """Count the tokens since each feature fired; let the running threshold follow the least chosen value."""
        sae = self.sae
        since = torch.cat([sae.tokens_since_fired + n_rows, sae.tokens_since_fired[:1]]).scatter_(0, used, 0)[:-1]
        sae.tokens_since_fired.copy_(torch.where(self.alive > 0, since, sae.tokens_since_fired))
        if sae.config.counts_k and not options.by_token:
            sizes = torch.where(used < len(self.w_low), choice.entries.values.abs(), torch.inf)
            memory = torch.where(sae.threshold > 0, THRESHOLD_MEMORY, 0.0)
            least = sizes.min()
            known = least.isfinite() & (self.alive[0] > 0)
            new = memory * sae.threshold + (1 - memory) * least
            sae.threshold.copy_(torch.where(known, new, sae.threshold))

    def _update(self, main: Reconstructed, added: Reconstructed | None, batch: _Centred, lr: float) -> None:
        sae, both = self.sae, main if added is None else main.followed_by(added)
        self.clock.lr.fill_(lr)
        self.clock.advance()
        self.clock.step.sub_(1 - self.alive.int())
        gradients = RowGradients.of_entries(
            both.ids, both.rows, both.residual_rows, both.pair, batch.low, both.residual, len(self.w_low),
            sae.config.unit_norm,
        )  # fmt: skip
        d_pre = gradients.by.sums(gradients.d_pre[None])[0]
        d_b_dec = main.residual[: len(batch.low)].sum(0) * main.scale
        if sae.config.target_site is None:
            d_b_dec = d_b_dec + gradient_through_centring(d_pre, sae.W_enc.detach())
        encoder, decoder = (self._rows(name) for name in ("W_enc", "W_dec"))
        gradients.update(
            encoder, decoder, self.w_low, self.codes, self.wakefulness, self.clock, sae.config.seed, self.alive
        )
        self._update_bias("b_enc", d_pre)
        if sae.b_dec.requires_grad:
            self._update_bias("b_dec", d_b_dec)

    def _rows(self, name: str) -> AdamRows:
        m, v = self.moments[name]
        nothing = m.new_empty(len(m), 0)
        return AdamRows(getattr(self.sae, name).detach(), m, v, nothing, nothing)

    def _update_bias(self, name: str, gradient: Tensor) -> None:
        bias = getattr(self.sae, name).detach()
        state = bias, *self.moments[name]
        fresh = [each.clone() for each in state]
        update_vector(fresh[0], gradient, fresh[1], fresh[2], self.clock)
        for old, new in zip(state, fresh, strict=True):
            old.copy_(torch.where(self.alive > 0, new, old))

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the moments of sleeping rows, and Adam's count of steps, up to now."""
        self.wakefulness.settle([self._rows(name) for name in ("W_enc", "W_dec")], self.clock)
        for state in self.adam.state.values():
            state["step"].copy_(self.clock.step[0])


def _moments(adam: torch.optim.Adam, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return Adam's moments of a parameter, made if it has none yet."""
    state = adam.state[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in range(2))
    return state["exp_avg"].detach(), state["exp_avg_sq"].detach()


def _centred(x: Tensor, b_in: Tensor, target: Tensor | None, b_dec: Tensor, dtype: torch.dtype) -> _Centred:
    low = x - b_in
    wanted = low if target is None else target - b_dec
    wide = wanted.double()
    variance = variance_of(wide.sum(0), wide.square().sum()[None], len(x))
    return _Centred(low.to(dtype), wanted, variance)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
