"""A whole optimiser step on a GPU, in which the host never waits for the device.

No tensor of shape (B, F) and no gradient of shape (F, D) exists. Sizes that depend on data are counters on the device.
From the first batch on whose loss is not finite, or whose entries do not fit, nothing changes any more, until the host
has looked at the figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saeflow.sae.architectures import FeatureSums, TrainingRule
from saeflow.sae.gpu.auxiliary import Auxiliary, AuxiliaryLoss
from saeflow.sae.gpu.choice.chooser import Chosen, EntriesAboveCut, LargestEntries
from saeflow.sae.gpu.choice.product import Product, filled_up
from saeflow.sae.gpu.exchange import RowExchange
from saeflow.sae.gpu.explain import Centred, Explained, explain
from saeflow.sae.gpu.feature_exchange import Exchange, FeatureExchange
from saeflow.sae.gpu.figures import FIGURES, StepOptions
from saeflow.sae.gpu.guard import Guard
from saeflow.sae.gpu.rows.adam import AdamClock, AdamSettings, Wakefulness
from saeflow.sae.gpu.rows.by_feature import gradient_through_centring
from saeflow.sae.gpu.rows.moments import AdamRows
from saeflow.sae.gpu.rows.update import RowGradients
from saeflow.sae.gpu.vectors import move_thresholds, update_vectors
from saeflow.sae.loss import THRESHOLD_MEMORY, training_rule
from saeflow.sae.optimizer.adam import begun_state
from saeflow.sae.optimizer.codes import code_tables
from saeflow.sae.parameters import SAEParameters


class FusedStep:
    """The optimiser steps of one training.

    The moments are those of `adam`, so that a checkpoint holds them as ever. It must hold `settle`'s: call it before.
    """

    def __init__(
        self, sae: SAEParameters, adam: torch.optim.Adam, dtype: torch.dtype, highest_lr: float, aux_weight: float,
        dead_after_tokens: int, tolerance: float = 0.0, chooser: LargestEntries | EntriesAboveCut | None = None,
    ) -> None:  # fmt: skip
        self.sae, self.adam, self.chooser = sae, adam, chooser or LargestEntries()
        self.aux_weight = aux_weight if sae.traits.revives_dead else 0.0
        self.dead_after = dead_after_tokens
        group, place = adam.param_groups[0], sae.W_enc.device
        beta1, beta2 = group["betas"]
        settings = AdamSettings(beta1, beta2, group["eps"], highest_lr, tolerance)
        self.clock = AdamClock(settings, place)
        self.wakefulness = Wakefulness.asleep(len(sae.W_enc), place)
        self.codes = code_tables(place)
        self.moments = {name: begun_state(adam, each) for name, each in sae.named_parameters() if each.requires_grad}
        weights = sae.W_enc.detach()
        self.w_low = filled_up(weights.to(dtype))
        """The encoder's rows as the product reads them: the weights themselves if their precision and width suit it."""
        self._is_copy = self.w_low is not weights
        mine = sae.split.features.share(sae.config.n_features)
        ends = torch.tensor(sae.config.nested, dtype=torch.int32, device=place)
        self.ends = (ends - mine.start).clamp(0, mine.stop - mine.start)
        self.auxiliary = AuxiliaryLoss(sae.traits.signed)
        self.guard = Guard(place)
        self.figures = torch.zeros(len(FIGURES), dtype=torch.float64, device=place)
        self._resume()

    def _resume(self) -> None:
        """Take the clock from Adam's state. Rows with moments are awake until their next step says more."""
        step = self.adam.state[self.sae.W_dec]["step"]
        self.clock.step.fill_(int(step))
        self.wakefulness.last_step.fill_(int(step))
        matrices = self._rows("W_enc"), self._rows("W_dec")
        moved = torch.stack([(each.m_scale if each.eight_bit else each.m.abs()).amax(1) > 0 for each in matrices]).any(
            0
        )
        self.wakefulness.awake_until.copy_(torch.where(moved, int(step) + 1, 0))

    @torch.no_grad()
    def __call__(self, x: Tensor, target: Tensor | None, options: StepOptions) -> None:
        """Take a step on x (B, D), and for a transcoder its target (B, D_out), float32. See `figures`."""
        sae = self.sae
        batch = Centred.of(x, sae.b_in, target, sae.b_dec, self.w_low.dtype)
        rule = training_rule(sae, len(x), batch.target.shape[1], options.sparsity)
        exchange = self._exchange(len(x))
        chosen = self._choose(batch, rule, options, exchange)
        scale = batch.scale(sae.config.counts_k)
        explained = explain(chosen.entries, batch, rule, sae.W_dec.detach(), self.ends, scale, exchange)
        dead = sae.tokens_since_fired >= self.dead_after
        added = self._auxiliary(explained, batch, dead, options, exchange)
        loss, figures = self._losses(explained, added, batch, rule, scale)
        self.guard.judge(loss, x, chosen.n_found <= len(chosen.entries.ids))
        self._remember(explained, chosen, len(x), options, exchange)
        still = sae.tokens_since_fired >= self.dead_after
        self._update(explained, added, batch, rule, options, exchange)
        n_dead, n_still = exchange.total(torch.stack([dead.sum(), still.sum()])).unbind()
        self._note([loss, *figures, n_dead, chosen.n_found, chosen.n_wrong], n_still)

    def _exchange(self, n_rows: int) -> Exchange:
        """Return what ranks tell one another for a batch of so many rows."""
        split = self.sae.split.for_rows(n_rows)
        if split.features.n > 1:
            return FeatureExchange(split.features, n_rows, self.sae.config.n_features)
        return RowExchange(split.rows, n_rows)

    def _choose(self, batch: Centred, rule: TrainingRule, options: StepOptions, exchange: Exchange) -> Chosen:
        bias, k, by_token = self.sae.b_enc.detach(), options.k, options.by_token
        product = Product.of(batch.low[exchange.mine], self.w_low, bias, self.sae.traits.signed)
        return exchange.chosen_of_all(self.chooser(product, rule, k, by_token, len(batch.low)), k, by_token)

    def _auxiliary(
        self, explained: Explained, batch: Centred, dead: Tensor, options: StepOptions, exchange: Exchange
    ) -> Auxiliary | None:
        if not options.n_dead or not self.aux_weight > 0:
            return None
        rest = -explained.main.residual[-len(batch.low) :]
        weights = self.w_low, self.sae.b_enc.detach(), self.sae.W_dec.detach()
        return self.auxiliary(batch, rest, weights, dead, options.k, options.n_dead, self.aux_weight, exchange)

    def _losses(
        self, explained: Explained, added: Auxiliary | None, batch: Centred, rule: TrainingRule, scale: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss (1), and the figures from `unexplained` to `n_active`."""
        auxiliary = torch.zeros_like(explained.n_active) if added is None else added.share
        penalty, sparsity = rule.penalty_loss(explained.penalty, explained.n_active)
        mean_error = explained.errors.mean() + explained.second_error
        loss = mean_error * scale + penalty + self.aux_weight * auxiliary
        return loss, [explained.errors[-1] / batch.variance, auxiliary, sparsity, explained.n_active]

    def _note(self, figures: list[Tensor], n_dead_after: Tensor) -> None:
        guard = self.guard
        last = [guard.alive, guard.fits, guard.suspect, n_dead_after, self.clock.step]
        self.figures.copy_(torch.cat([each.double().view(1) for each in (*figures, *last)]))

    def _remember(
        self, explained: Explained, chosen: Chosen, n_rows: int, options: StepOptions, exchange: Exchange
    ) -> None:
        """Count the tokens since each feature fired; let the running threshold follow the least chosen value."""
        sae, fired = self.sae, explained.fired.long()
        since = torch.cat([sae.tokens_since_fired + n_rows, sae.tokens_since_fired[:1]]).scatter_(0, fired, 0)[:-1]
        self.guard.change(sae.tokens_since_fired, since)
        if sae.config.counts_k and not options.by_token:
            sizes = torch.where(fired < len(self.w_low), chosen.entries.values.abs(), torch.inf)
            memory = torch.where(sae.threshold > 0, THRESHOLD_MEMORY, 0.0)
            least = exchange.least(sizes.min())
            new = memory * sae.threshold + (1 - memory) * least
            self.guard.change(sae.threshold, torch.where(least.isfinite(), new, sae.threshold))

    def _update(
        self, explained: Explained, added: Auxiliary | None, batch: Centred, rule: TrainingRule, options: StepOptions,
        exchange: Exchange,
    ) -> None:  # fmt: skip
        """Take Adam's step of all parameters. Their gradients are computed before the first of them changes."""
        sae, main = self.sae, explained.main
        self.clock.lr.fill_(options.lr)
        self.clock.advance()
        self.clock.step.sub_(1 - self.guard.open.int())
        both = main if added is None else main.followed_by(added.entries)
        gradients = RowGradients.of_entries(
            both.ids, both.rows, both.residual_rows, both.pair, batch.low, both.residual, len(self.w_low),
            sae.config.unit_norm,
        )  # fmt: skip
        numbers = torch.stack([both.pair[1], *both.to_sum.values()])
        d_pre, *by_name = gradients.by.sums(gradients.by.take(numbers))
        sums = dict(zip(both.to_sum, by_name, strict=True))
        if "length" in sums and not sae.config.unit_norm:
            gradients = replace(gradients, length_sums=sums["length"])
        vectors = self._vector_gradients(d_pre, sums, explained, rule, exchange)
        encoder, decoder = (self._rows(name) for name in ("W_enc", "W_dec"))
        by_kernel = self._is_copy and self.w_low.dtype == torch.bfloat16
        low = self.w_low if by_kernel else None
        gradients.update(
            encoder, decoder, low, self.codes, self.wakefulness, self.clock, sae.config.seed, self.guard.open
        )
        if self._is_copy and not by_kernel:  # the kernel would need too many registers to write float32 twice
            self.w_low[:, : encoder.weights.shape[1]].copy_(encoder.weights)
        update_vectors(sae, vectors, self.moments, self.clock, self.guard)
        if sae.config.architecture == "jumprelu":
            move_thresholds(sae, explained.n_active, options.k, options.sparsity, self.guard)

    def _vector_gradients(
        self, d_pre: Tensor, sums: FeatureSums, explained: Explained, rule: TrainingRule, exchange: Exchange
    ) -> dict[str, Tensor]:
        """Return the gradients of biases and of the architecture's own parameters from sums by feature (F)."""
        sae, d_b_dec = self.sae, explained.d_b_dec
        if sae.config.target_site is None:
            d_b_dec = d_b_dec + exchange.total(gradient_through_centring(d_pre, sae.W_enc.detach()))
        own = rule.own_gradients(sums, explained.n_active)
        gradients = {"b_enc": rule.bias_gradient(d_pre, sums), "b_dec": d_b_dec}
        gradients |= zip(sae.traits.own_parameters, own, strict=True)
        return {name: gradient for name, gradient in gradients.items() if name in self.moments}

    def _rows(self, name: str) -> AdamRows:
        state = self.moments[name]
        nothing = state["exp_avg"].new_empty(len(state["exp_avg"]), 0)
        scales = (state.get(slot, nothing) for slot in ("exp_avg_scale", "exp_avg_sq_scale"))
        return AdamRows(getattr(self.sae, name).detach(), state["exp_avg"], state["exp_avg_sq"], *scales)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the moments of sleeping rows, and Adam's count of steps, up to now."""
        self.wakefulness.settle([self._rows(name) for name in ("W_enc", "W_dec")], self.clock)
        for state in self.adam.state.values():
            state["step"].copy_(self.clock.step[0])
