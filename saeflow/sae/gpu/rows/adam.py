"""Adam (Kingma and Ba 2015, arXiv 1412.6980) as torch.optim.Adam computes it, with all that changes on the device.

A row without active entries still moves by its momentum. The move of a row at step t after its last gradient is at most

    lr * |m| / sqrt(v) * rho^t,   rho = beta1 / sqrt(beta2)

so the row stays awake, and takes its step with a zero gradient, until all moves to come add up to no more than the
tolerance. Then it sleeps. When it wakes, its moments have become beta1^n and beta2^n of themselves in n steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.rows.moments import AdamRows
from saeflow.sae.gpu.specimens import Specimen
from saeflow.sae.optimizer.codes import most_ratio

STEP_SIZE = tl.constexpr(0)
"""Places in the table of `AdamClock`: lr / (1 - beta1^t)."""
ROOT = tl.constexpr(1)
"""sqrt(1 - beta2^t)"""
CLIP = tl.constexpr(2)
"""A factor on all gradients."""
EPS = tl.constexpr(3)
NEW_M, NEW_V, KEEP_V = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
"""1 - beta1, 1 - beta2, beta2"""
LOG_M, LOG_V = tl.constexpr(7), tl.constexpr(8)
"""log2 of beta1 and beta2."""
LOG_FADE, LOG_REST = tl.constexpr(9), tl.constexpr(10)
"""log2 of rho, and of the ratio |m| / sqrt(v) whose moves to come add up to the tolerance."""
MOST_RATIO = tl.constexpr(11)
"""The largest ratio |m| / sqrt(v) there can be."""
_TABLE = 12

VECTOR = 1024
"""Numbers of a vector that one program of `adam_vector_kernel` takes."""


@dataclass(frozen=True)
class AdamSettings:
    """What stays the same in a training."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    highest_lr: float = 1e-3
    """The highest learning rate there will be."""
    tolerance: float = 0.0
    """How far a weight may stay behind whenever its row falls asleep. 0: all rows that ever fired stay awake."""

    @property
    def fade(self) -> float:
        """rho: by what a move shrinks with each step without a gradient, at least."""
        return self.beta1 / math.sqrt(self.beta2) if self.beta2 else math.inf

    @property
    def most_ratio(self) -> float:
        """The most that |m| / sqrt(v) can be."""
        return most_ratio(self.beta1, self.beta2)

    @property
    def log_rest(self) -> float:
        """log2 of the ratio |m| / sqrt(v) whose moves to come add up to the tolerance."""
        if self.tolerance <= 0 or not 0 < self.fade < 1:
            return -1e9
        correction = max(math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t) for t in range(1, 10_000))
        return math.log2(self.tolerance * (1 - self.fade) / (self.highest_lr * correction))


class AdamClock:
    """The step, the learning rate and what follows from them, on the device: a CUDA graph can replay `advance`."""

    def __init__(self, settings: AdamSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        """Steps begun."""
        self.lr = torch.zeros(1, dtype=torch.float64, device=device)
        """To be filled before `advance`."""
        fade = settings.fade if 0 < settings.fade < 1 else 0.5
        kept = [0.0, 0.0, 1.0, settings.eps, *(1 - beta for beta in self.betas), settings.beta2]
        kept += [*(math.log2(max(beta, 1e-30)) for beta in self.betas), math.log2(fade), settings.log_rest]
        self.table = torch.tensor([*kept, settings.most_ratio], device=device)

    def advance(self) -> None:
        """Begin the next step."""
        self.step += 1
        steps = self.step.double()
        corrections = [1 - torch.pow(torch.full_like(steps, beta), steps) for beta in self.betas]
        self.table[STEP_SIZE.value : 1].copy_(self.lr / corrections[0])
        self.table[ROOT.value : 2].copy_(corrections[1].sqrt())

    @property
    def betas(self) -> tuple[float, float]:
        return self.settings.beta1, self.settings.beta2

    def clip(self, squares: Tensor, most: float) -> Tensor:
        """Let the step shorten gradients to the length `most`; return their length, whose square is `squares`.

        As torch.nn.utils.clip_grad_norm_ does it.
        """
        length = squares.sqrt()
        self.table[CLIP.value : CLIP.value + 1].copy_((most / (length + 1e-6)).clamp(max=1.0))
        return length


@dataclass(frozen=True)
class Wakefulness:
    """When rows last took a step, and until which step they take one without a gradient (F), int32."""

    last_step: Tensor
    awake_until: Tensor

    @classmethod
    def asleep(cls, n_rows: int, device: torch.device | str = "cpu") -> Wakefulness:
        """Return the state before the first step."""
        tables = [torch.zeros(n_rows, dtype=torch.int32, device=device) for _ in range(2)]
        return cls(*tables)

    def awake(self, feature_starts: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (F + 1, int32) that take a step, ascending, then garbage; and their number (1, int32)."""
        n_rows = len(self.awake_until)
        takes = (feature_starts.diff() > 0) | (self.awake_until >= step)
        places = takes.cumsum(0, dtype=torch.int32)
        rows = torch.empty(n_rows + 1, dtype=torch.int32, device=takes.device)
        numbers = torch.arange(n_rows, dtype=torch.int32, device=takes.device)
        return rows.scatter_(0, torch.where(takes, places - 1, n_rows).long(), numbers), places[-1:]

    def settle(self, matrices: Iterable[AdamRows], clock: AdamClock) -> None:
        """Let the moments of sleeping rows become those of an optimiser that takes every step, for a checkpoint."""
        n_steps = (clock.step - self.last_step).double()[:, None]
        factors = [torch.pow(torch.full_like(n_steps, beta), n_steps).float() for beta in clock.betas]
        for rows in matrices:
            pair = (rows.m_scale, rows.v_scale) if rows.eight_bit else (rows.m, rows.v)
            for moments, factor in zip(pair, factors, strict=True):
                moments.mul_(factor)
        self.last_step.copy_(clock.step.expand_as(self.last_step))


@triton.jit
def faded(moments, table, log_beta: tl.constexpr, n_steps):
    """Return moments after some steps without a gradient."""
    return tl.where(n_steps > 0, moments * tl.exp2(n_steps.to(tl.float32) * tl.load(table + log_beta)), moments)


@triton.jit
def adam_step(weights, gradient, m, v, table):
    """Return the weights and both moments after a step."""
    gradient *= tl.load(table + CLIP)
    m += (gradient - m) * tl.load(table + NEW_M)
    v = v * tl.load(table + KEEP_V) + gradient * gradient * tl.load(table + NEW_V)
    scale = tl.sqrt(v) / tl.load(table + ROOT) + tl.load(table + EPS)
    return weights - tl.load(table + STEP_SIZE) * (m / scale), m, v


@triton.jit
def largest_ratio(m, v, table):
    """Return the largest |m| / sqrt(v) of a row."""
    ratio = tl.where(m == 0, 0.0, tl.abs(m) / tl.sqrt(tl.maximum(v, 1e-38)))
    return tl.minimum(tl.max(ratio), tl.load(table + MOST_RATIO))


@triton.jit
def steps_awake(ratio, table):
    """Return how many more steps a row takes if it has no gradient: see the module."""
    steps = (tl.load(table + LOG_REST) - tl.log2(tl.maximum(ratio, 1e-30))) / tl.load(table + LOG_FADE)
    return tl.minimum(tl.maximum(tl.ceil(steps) - 1, 0.0), 1e9).to(tl.int32)


@triton.jit
def adam_vector_kernel(weights, gradient, m, v, table, n, VECTOR: tl.constexpr):
    """Take a step of VECTOR numbers."""
    at = tl.program_id(0) * VECTOR + tl.arange(0, VECTOR)
    inside = at < n
    new, new_m, new_v = adam_step(
        tl.load(weights + at, mask=inside, other=0.0),
        tl.load(gradient + at, mask=inside, other=0.0),
        tl.load(m + at, mask=inside, other=0.0),
        tl.load(v + at, mask=inside, other=0.0),
        table,
    )
    tl.store(weights + at, new, mask=inside)
    tl.store(m + at, new_m, mask=inside)
    tl.store(v + at, new_v, mask=inside)


def update_vector(weights: Tensor, gradient: Tensor, m: Tensor, v: Tensor, clock: AdamClock) -> None:
    """Take a step of a vector (n) in float32, such as a bias: always a dense one."""
    grid = (triton.cdiv(len(weights), VECTOR),)
    adam_vector_kernel[grid](weights, gradient, m, v, clock.table, len(weights), VECTOR, num_warps=4, num_stages=1)


SPECIMENS = [
    Specimen(
        adam_vector_kernel,
        dict.fromkeys(("weights", "gradient", "m", "v", "table"), "*fp32") | {"n": "i32", "VECTOR": "constexpr"},
        {"VECTOR": VECTOR},
        4,
        1,
        "Adam of a vector",
    )
]
