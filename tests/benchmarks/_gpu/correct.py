"""Each kernel at a real size against float64, on a sample of rows or features where the whole would not fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.recipe.settings import Architecture, SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from tests.benchmarks._gpu import steps
from tests.benchmarks._gpu.made import LR, Made
from tests.benchmarks._gpu.measure import Card, Row, Size
from tests.benchmarks._gpu.work import Task

ROWS, FEATURES = 64, 256
"""Rows and features that are compared."""
CLOSE = 1e-5
ENCODED: tuple[Architecture, ...] = ("topk", "batchtopk", "abstopk", "jumprelu")

WHOLE_STEPS = Size(256, 4096, 16, 1024)
"""Of trainings by kernels beside trainings by torch's operations, ten steps each."""


class Correct:
    """Compares what the kernels make of random numbers."""

    def __init__(self, card: Card) -> None:
        self.card, self.made = card, Made(card.sizes["small"], card)
        self.rows = torch.linspace(0, self.made.size.n_rows - 1, ROWS, device=card.place).long().unique()

    def pre_activations(self, product: Any = None) -> Tensor:
        """Return those of the sampled rows (n, F) in float64."""
        made = product or self.made.product
        return (made.low[self.rows].double() @ made.w_low.double().T) + made.bias.double()

    def _spread(self, entries: Any) -> tuple[Tensor, Tensor]:
        """Return where the entries of the sampled rows are (n, F), and their values there."""
        chosen = torch.zeros(len(self.rows), self.made.size.n_features, dtype=torch.bool, device=self.card.place)
        values = torch.zeros(chosen.shape, dtype=torch.float64, device=self.card.place)
        for n, row in enumerate(self.rows.tolist()):
            mine = slice(*entries.row_starts[row : row + 2].tolist())
            chosen[n, entries.ids[mine].long()] = True
            values[n, entries.ids[mine].long()] = entries.values[mine].double()
        return chosen, values

    def _compared(self, name: str, entries: Any, sizes: Tensor, pre: Tensor, nth: Tensor) -> list[Row]:
        """Compare values, and which entries there are: those of sizes above `nth`, but for rounding."""
        chosen, values = self._spread(entries)
        scale = pre.abs().amax(1, keepdim=True)
        error = ((values - pre).abs() * chosen / scale).max().item()
        missed = (sizes > nth + CLOSE * scale) & ~chosen
        wrong = chosen & (sizes < nth - CLOSE * scale)
        return [
            Row(f"{name}: error of values", error, "", asked=CLOSE, sense="<="),
            Row(f"{name}: entries that float64 chooses otherwise", int((missed | wrong).sum()), asked=0, sense="<="),
        ]

    def largest_of_rows(self, signed: bool) -> list[Row]:
        product = replace(self.made.product, signed=signed)
        pre = self.pre_activations()
        sizes = pre.abs() if signed else pre.clamp(min=0)
        nth = sizes.topk(self.made.size.k, 1).values[:, -1:]
        name = "largest of each row" + (" by magnitude" if signed else "")
        return self._compared(name, self.made.chosen(self.made.guess, product).entries, sizes, pre, nth)

    def in_float32(self) -> list[Row]:
        """The product in float32, of as many rows as are compared."""
        made, few = self.made, self.rows
        product = replace(made.product, low=made.product.low[few].float(), w_low=made.product.w_low.float())
        pre = self.pre_activations()
        entries = made.chosen(made.guess[few], product).entries
        whole, self.rows = self.rows, torch.arange(len(few), device=self.card.place)
        try:
            nth = pre.clamp(min=0).topk(made.size.k, 1).values[:, -1:]
            return self._compared("largest of each row in float32", entries, pre.clamp(min=0), pre, nth)
        finally:
            self.rows = whole

    def same_bits(self) -> Row:
        """A wrong guess costs time, never a bit."""
        made = self.made
        wrong = made.guess.clone()
        wrong[::8], wrong[1::8] = 0, torch.inf
        pairs = zip(made.choice.entries, made.chosen(wrong).entries, strict=True)
        n = sum(int((one.view(torch.int32) != other.view(torch.int32)).sum()) for one, other in pairs)
        return Row("largest of each row: bits that a wrong guess changes", n, asked=0, sense="<=")

    def largest_of_batch(self) -> list[Row]:
        from saeflow.sae.gpu.choice import choose, guess

        made, n = self.made, self.made.size.n_entries
        first = guess.first_of_batch(made.product, n)
        choice = choose.largest_of_batch(made.product, n, first, 2 * n)
        other = choose.largest_of_batch(made.product, n, 2 * choice.kth, 2 * n)
        bits = sum(int((a != b).sum()) for a, b in zip(choice.entries, other.entries, strict=True))
        pre = self.pre_activations()
        rows = self._compared("largest of the batch", choice.entries, pre, pre, choice.kth.double())
        return [*rows, Row("largest of the batch: entries that a wrong guess changes", bits, asked=0, sense="<=")]

    def above_cut(self) -> list[Row]:
        from saeflow.sae.gpu.choice import choose

        made = self.made
        cut = made.choice.kth.mean() * (1 + 0.1 * self.card.normal(made.size.n_features, seed=9))
        product = replace(made.product, bias=made.bias - cut)
        room = 4 * made.size.n_entries
        entries, n_found = choose.above_cut(product, cut, room)
        pre, nothing = self.pre_activations(), torch.zeros(1, device=self.card.place)
        if int(n_found) > room:
            return [Row("above a cut", note="failed: the buffer is full")]
        return self._compared("above a cut", entries, pre - cut.double(), pre, nothing)

    def decode(self, weights: torch.dtype, n_nested: int) -> Row:
        made = self.made
        w_dec = made.w_dec.to(weights)
        ends = (torch.arange(1, n_nested + 1, device=self.card.place) * made.size.n_features // n_nested).int()
        residual, losses, g = made.decoded(w_dec, ends)
        _, values = self._spread(made.choice.entries)
        target = made.target[self.rows].double()
        wanted = torch.stack([values[:, :end] @ w_dec[:end].double() - target for end in ends.tolist()])
        later = wanted.flip(0).cumsum(0).flip(0)
        errors = [_error(residual[:, self.rows], later), _error(losses[:, self.rows], wanted.square().sum(2))]
        starts = made.choice.entries.row_starts
        for n, row in enumerate(self.rows[:8].tolist()):
            mine = slice(*starts[row : row + 2].tolist())
            ids = made.choice.entries.ids[mine].long()
            owner = torch.searchsorted(ends, ids.int(), right=True)
            errors.append(_error(g[mine], (w_dec[ids].double() * later[owner, n]).sum(1)))
        dtype = str(weights).removeprefix("torch.")
        return Row(f"decode, {dtype}, {n_nested} nested", max(errors), asked=CLOSE, sense="<=")

    def sums_by_feature(self) -> Row:
        made, gradients = self.made, self.made.gradients()
        sums = gradients.by.sums(gradients.d_pre[None])[0]
        wanted = torch.zeros(made.size.n_features + 1, dtype=torch.float64, device=self.card.place)
        wanted.index_add_(0, made.used[0].long(), made.pair[1].double())
        return Row("sums by feature", _error(sums, wanted[:-1]), asked=CLOSE, sense="<=")

    def update(self) -> list[Row]:
        """Adam's step of rows with moments, of which some have the most entries of all, in segments."""
        made, rows = self.made, []
        counts = torch.bincount(made.used[0], minlength=made.size.n_features + 1)[:-1]
        some = torch.cat([counts.topk(8).indices, torch.arange(0, len(counts), max(len(counts) // FEATURES, 1)).to(
            self.card.place)])  # fmt: skip
        encoder, decoder = made.moments(made.w_enc, 20), made.moments(made.w_dec, 30)
        before = {name: [each[some].double() for each in of[:3]] for name, of in (("e", encoder), ("d", decoder))}
        self._update(encoder, decoder)
        gradients = self._gradients_of(some)
        w_dec = before["d"][0]
        of_decoder = gradients[1]
        along = (of_decoder * w_dec).sum(1, keepdim=True) / w_dec.square().sum(1, keepdim=True)
        wanted = _adam(*before["e"], gradients[0]), _adam(*before["d"], of_decoder - along * w_dec)
        wanted[1][0] = tf.normalize(wanted[1][0], dim=1)
        for name, found, there in (("encoder", encoder, wanted[0]), ("decoder", decoder, wanted[1])):
            moved = (found.weights[some].double() - there[0]).abs().max().item() / LR
            rows.append(Row(f"{name} after Adam: error, of the learning rate", moved, asked=1e-3, sense="<="))
            worst = max(_error(found.m[some], there[1]), _error(found.v[some], there[2]))
            rows.append(Row(f"{name}'s moments", worst, asked=CLOSE, sense="<="))
        return rows

    def _update(self, encoder: Any, decoder: Any, w_low: Tensor | None = None) -> None:
        from saeflow.sae.gpu.rows.moments import code_tables

        made = self.made
        codes = code_tables(self.card.place)
        made.wakefulness.last_step.fill_(0)
        made.gradients().update(encoder, decoder, w_low, codes, made.wakefulness, made.clock, 0)

    def _gradients_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of some features' rows of both matrices, in float64."""
        made = self.made
        ids, rows = made.used
        both = torch.zeros(2, len(features), made.size.width, dtype=torch.float64, device=self.card.place)
        for n, feature in enumerate(features.tolist()):
            mine = (ids == feature).nonzero()[:, 0]
            values, d_pre = made.pair[:, mine].double()
            both[0, n] = d_pre @ made.low[rows[mine].long()].double()
            both[1, n] = values @ made.residual[rows[mine].long()].double()
        return both[0], both[1]

    def small_moments(self) -> list[Row]:
        """8-bit moments and bfloat16 weights, after a step from none."""
        from saeflow.sae.gpu.rows.moments import AdamRows

        made, some = self.made, torch.arange(0, self.made.size.n_features, max(self.made.size.n_features // 64, 1))
        some = some.to(self.card.place)
        of_weights = [AdamRows.begin(weights.bfloat16(), eight_bit=True) for weights in (made.w_enc, made.w_dec)]
        before = of_weights[0].weights[some].double()
        self._update(*of_weights)
        gradient, _ = self._gradients_of(some)
        nothing = torch.zeros_like(gradient)
        weights, m, _ = _adam(before, nothing, nothing, gradient)
        found = of_weights[0]
        parts = AdamRows(*(each[some] for each in found)).moments()
        clear = gradient.abs() > 1e-3 * gradient.abs().amax(1, keepdim=True)
        moved = (found.weights[some].double() - weights).abs() / (2.0**-7 * weights.abs() + 1e-30)
        return [
            Row("8-bit moments: error, of the largest of a block", _error(parts[0], m), asked=0.02, sense="<="),
            Row("bfloat16 weights: error, in roundings", (moved * clear).max().item(), asked=1.01, sense="<="),
        ]

    def bias(self) -> Row:
        from saeflow.sae.gpu.rows.adam import update_vector

        made = self.made
        state = [made.bias.clone(), *(0.1 * self.card.normal(len(made.bias), seed=n) for n in (40, 41))]
        state[2].square_().add_(1e-3)
        gradient = self.card.normal(len(made.bias), seed=42)
        wanted = _adam(*(each.double() for each in state), gradient.double())
        update_vector(state[0], gradient, state[1], state[2], made.clock)
        worst = max(_error(one, other) for one, other in zip(state, wanted, strict=True))
        return Row("a bias after Adam", worst, asked=CLOSE, sense="<=")

    def whole_steps(self, architecture: Architecture) -> Row:
        """Losses of ten steps by kernels and by torch's operations, both in float32."""
        size = self.made.size if self.card.is_toy else WHOLE_STEPS
        batches = steps.batches(size, self.card, 2 if self.card.is_toy else 10)
        losses = []
        for by_kernels in (True, False):
            training = steps.a_training(architecture, size, self.card, batches[0], by_kernels, torch.float32, 1)
            if training.uses_fused is not by_kernels:
                return Row(f"{architecture}: whole steps", note="the kernels do not take these steps")
            for n, x in enumerate(batches):
                training.advance(steps.feed_batch(n, x))
            losses.append([row["loss"] for row in training.log])
        worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
        return Row(f"{architecture}: losses of {len(batches)} steps", worst, asked=1e-4, sense="<=")

    def encoding(self, architecture: Architecture) -> Row:
        """Values that differ from the processor's, in a bit or in whether they are there."""
        from saeflow.sae.gpu.encode import encode_by_kernels

        size = self.made.size
        x = self.made.low[: ROWS if self.card.on_gpu else 8].half()
        config = SAEConfig.model_validate({"architecture": architecture, "n_features": size.n_features, "k": size.k})
        sae = SparseAutoencoder(config, size.width).eval()
        with torch.no_grad():
            sae.threshold.fill_(float(self.made.choice.kth.mean()) / 2)  # rows of `encoder_scale` 0.5
        here = sae.encode_sparse(x.cpu())
        if self.card.on_gpu:
            there = sae.to(self.card.place).encode_sparse(x)
        else:
            function = sae.activation_function()
            cut = torch.from_numpy(function.thresholds) if function.thresholds.any() else None
            there = encode_by_kernels(x, sae.current_encoder(cut), function)
        one, other = (
            set(zip(each.rows.tolist(), each.feature_ids.tolist(), each.values.tolist(), strict=True))
            for each in (here, there)
        )
        name = f"{architecture}: {len(here.values):,} values encoded, those that differ from the processor's"
        return Row(name, len(one ^ other), asked=0, sense="<=")

    def tasks(self) -> dict[str, Task]:
        decoded = [(torch.float32, 1), (torch.float32, 5), (torch.bfloat16, 1)]
        tasks: dict[str, Task] = {
            "largest of each row": partial(self.largest_of_rows, False), "a wrong guess": self.same_bits,
            "by magnitude": partial(self.largest_of_rows, True), "in float32": self.in_float32,
            "of the batch": self.largest_of_batch, "above a cut": self.above_cut,
            **{f"decode {number}": partial(self.decode, *each) for number, each in enumerate(decoded)},
            "sums by feature": self.sums_by_feature, "Adam": self.update, "8 bits": self.small_moments,
            "bias": self.bias,
        }  # fmt: skip
        tasks |= {f"{name}: encoding": partial(self.encoding, name) for name in ENCODED}
        return tasks | {f"{name}: steps": partial(self.whole_steps, name) for name in steps.ARCHITECTURES}


def tasks(card: Card) -> dict[str, Task]:
    return Correct(card).tasks()


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference as a share of the largest number."""
    return float(((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item())


def _adam(weights: Tensor, m: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return weights and moments after the first step (Kingma and Ba 2015)."""
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
    moved = (m / 0.1) / ((v / 0.001).sqrt() + 1e-8)
    return [weights - LR * moved, m, v]
