"""What a step takes besides its batch, and the figures that it leaves on the device. Nothing here needs Triton."""

from __future__ import annotations

from dataclasses import dataclass

FIGURES = (
    "loss", "unexplained", "auxiliary", "sparsity", "n_active", "n_dead", "n_found", "n_wrong_guesses", "alive", "fits",
    "suspect", "n_dead_after", "step",
)  # fmt: skip
"""Figures of a step, in this order.

`n_found` entries were found, also those that are not active. `alive` is 0 if a loss was not finite, `fits` is 0 if
entries did not fit, in this step or before. `suspect` is the row to look at of the batch with the first loss that is
not finite: the first row that is not finite, as -1 - row, or else the longest. `n_dead_after` features are dead for the
next step. `step` counts the steps that have changed anything.
"""


@dataclass(frozen=True)
class StepOptions:
    """What may change from step to step."""

    lr: float
    k: int
    by_token: bool
    """True if the k largest values of each token are kept, not of the batch."""
    n_dead: int
    """Dead features, as of the figures fetched last. They decide how many rows the auxiliary loss takes."""
    sparsity: float = 1.0
    """Factor on the penalty."""
