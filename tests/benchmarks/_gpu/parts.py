"""Each part of a step at a real size. What it has to compute and to move gives its limit on this card."""

from __future__ import annotations

from functools import partial

import torch

from saeflow.sae.optimizer.codes import code_tables
from tests.benchmarks._gpu.made import LR, Made
from tests.benchmarks._gpu.measure import Card, Row, rate
from tests.benchmarks._gpu.work import Task

SIDE = 8192
COPIED_BYTES = 4 << 30


class Limits:
    """What the card reaches when it does nothing else: the rates that limits are computed from."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def matmul(self) -> Row:
        side = 64 if self.card.is_toy else SIDE
        a, b = (self.card.normal(side, side, seed=n).bfloat16() for n in (1, 2))
        seconds = self.card.rounds(lambda: a @ b, 3)
        return rate(2e-12 * side**3, "TFLOP/s", MATMUL, seconds)

    def copy(self) -> Row:
        n = 1024 if self.card.is_toy else COPIED_BYTES
        source = torch.zeros(n, dtype=torch.uint8, device=self.card.place)
        copied = torch.empty_like(source)
        return rate(2e-9 * n, "GB/s", COPY, self.card.rounds(lambda: copied.copy_(source), 2))

    def from_host(self) -> Row:
        n = 1024 if self.card.is_toy else 256 << 20
        source = torch.zeros(n, dtype=torch.uint8, pin_memory=self.card.on_gpu)
        copied = torch.empty(n, dtype=torch.uint8, device=self.card.place)
        seconds = self.card.rounds(lambda: copied.copy_(source, non_blocking=True), 1)
        return rate(1e-9 * n, "GB/s", FROM_HOST, seconds)

    def tasks(self) -> dict[str, Task]:
        return {MATMUL: self.matmul, COPY: self.copy, FROM_HOST: self.from_host}


MATMUL, COPY, FROM_HOST = "matmul in bfloat16", "copy on the card", "copy from pinned memory"


class Parts:
    """The parts of a step of one size."""

    def __init__(self, card: Card, name: str) -> None:
        self.card = card
        self.size = card.sizes[name]
        self.made = Made(self.size, card)

    def named(self, what: str) -> str:
        return f"{self.size.name}: {what}"

    def torch_product(self) -> Row:
        low, weights = self.made.low, self.made.w_low
        return self.card.timed(self.named("encoder product by torch, stored"), lambda: low @ weights.T,
                               flops=self.size.flops)  # fmt: skip

    def searched(self) -> Row:
        """The product with its search, where guesses are right."""
        from saeflow.sae.gpu.choice.product import Candidates, Floor, RowList, collect

        product, bits = self.made.product, self.made.guess.view(torch.int32) + 1
        floor, rows = Floor(bits, torch.zeros_like(bits, dtype=torch.int64)), torch.arange(len(bits)).int().to(bits)
        listed, room = (
            RowList(rows, torch.full_like(rows[:1], len(rows))),
            Candidates.room_for(product, True, self.made.capacity),
        )

        def search() -> None:
            room.counts.zero_()
            collect(product, listed, floor, False, room)

        name = self.named("encoder product, searched")
        return self.card.timed(name, search, flops=self.size.flops, asked_share=0.8)

    def choice(self) -> list[Row]:
        made, name = self.made, self.named("choice, largest of each row")
        row = self.card.timed(name, lambda: made.chosen(made.guess), flops=self.size.flops, asked_share=0.7)
        n_wrong = int(made.choice.n_wrong)
        return [row, Row(self.named("rows whose guess was wrong"), n_wrong, f"of {self.size.n_rows:,}")]

    def choice_of_batch(self) -> Row:
        from saeflow.sae.gpu.choice import choose, guess

        product, n = self.made.product, self.size.n_entries
        first = choose.largest_of_batch(product, n, guess.first_of_batch(product, n), 2 * n).kth * guess.BATCH_MARGIN
        return self.card.timed(
            self.named("choice, largest of the batch"), lambda: choose.largest_of_batch(product, n, first, 2 * n),
            flops=self.size.flops, asked_share=0.6,
        )  # fmt: skip

    def decode(self) -> Row:
        made = self.made
        return self.card.timed(
            self.named("decode, loss and derivatives"), made.decoded, n_bytes=decode_bytes(made), asked_share=0.5
        )

    def sort(self) -> Row:
        from saeflow.sae.gpu.rows.by_feature import sort_by_feature

        ids, _ = self.made.used
        return self.card.timed(
            self.named("entries sorted by feature"), lambda: sort_by_feature(ids, self.size.n_features),
            n_bytes=2.0 * 12 * self.size.n_entries,
        )  # fmt: skip

    def update(self) -> Row:
        """Gradients and Adam of all rows, from entries that are sorted already."""

        made, codes = self.made, code_tables(self.card.place)
        encoder, decoder, gradients = made.moments(made.w_enc, 20), made.moments(made.w_dec, 30), made.gradients()
        w_low = made.w_low.clone()
        return self.card.timed(
            self.named("gradients, Adam and unit length"),
            lambda: gradients.update(encoder, decoder, w_low, codes, made.wakefulness, made.clock, 0),
            n_bytes=update_bytes(made), asked_share=0.7,
        )  # fmt: skip

    def update_in_8_bits(self) -> Row:
        from saeflow.sae.gpu.rows.moments import AdamRows

        made, codes = self.made, code_tables(self.card.place)
        rows = [AdamRows.begin(weights.bfloat16(), eight_bit=True) for weights in (made.w_enc, made.w_dec)]
        gradients = made.gradients()
        return self.card.timed(
            self.named("the same with 8-bit moments and bfloat16 weights"),
            lambda: gradients.update(rows[0], rows[1], None, codes, made.wakefulness, made.clock, 0),
            n_bytes=8.0 * self.size.n_weights + entry_bytes(made),
        )  # fmt: skip

    def through_centring(self) -> Row:
        from saeflow.sae.gpu.rows.by_feature import gradient_through_centring

        d_pre = self.made.bias
        return self.card.timed(
            self.named("encoder's part of the bias gradient"),
            lambda: gradient_through_centring(d_pre, self.made.w_enc), n_bytes=2.0 * self.size.n_weights,
        )  # fmt: skip

    def dense_adam(self) -> Row:
        """What torch's Adam alone takes."""
        weights = [torch.nn.Parameter(each.clone()) for each in (self.made.w_enc, self.made.w_dec)]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-6)
        adam = torch.optim.Adam(weights, lr=LR, fused=True)
        return self.card.timed(self.named("torch's fused Adam"), adam.step, n_bytes=28.0 * self.size.n_weights)

    def tasks(self) -> dict[str, Task]:
        return {
            "product": self.torch_product, "searched": self.searched, "choice": self.choice,
            "of the batch": self.choice_of_batch, "decode": self.decode, "sort": self.sort, "update": self.update,
            "8 bits": self.update_in_8_bits, "centring": self.through_centring, "Adam": self.dense_adam,
        }  # fmt: skip


def entry_bytes(made: Made) -> float:
    """Return the bytes of the rows that gradients are summed from, without reuse."""
    return made.size.n_entries * made.size.width * (made.low.itemsize + made.residual.itemsize)


def update_bytes(made: Made) -> float:
    """Return the bytes of an update: weights and moments read and written, the copy, and rows of entries."""
    return (24.0 + made.w_low.itemsize / 2) * made.size.n_weights + entry_bytes(made)


def decode_bytes(made: Made) -> float:
    """Return the bytes of active directions read once, of the target and of the residual."""
    size = made.size
    return size.width * (size.n_entries * made.w_dec.itemsize + 8.0 * size.n_rows)


def limits(card: Card) -> dict[str, Task]:
    return Limits(card).tasks()


def tasks(name: str, card: Card) -> dict[str, Task]:
    return Parts(card, name).tasks()


small, large = (partial(tasks, name) for name in ("small", "large"))
