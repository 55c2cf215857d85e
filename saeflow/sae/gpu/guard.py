"""Whether steps change anything: not from a loss on that is not finite, nor from entries on that do not fit.

The host learns of it when it next looks at the figures. Until then all steps do their work and leave no trace.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Guard:
    """Numbers (1) on the device that say whether the steps of a training change anything."""

    def __init__(self, place: torch.device) -> None:
        self.alive = torch.ones(1, device=place)
        """0 from the first loss on that is not finite."""
        self.fits = torch.ones(1, device=place)
        """0 from the first step on whose entries did not fit, until the host makes room."""
        self.suspect = torch.zeros(1, dtype=torch.float64, device=place)
        """The row to look at of the last batch that was judged while `alive` was 1: see `FIGURES`."""

    @property
    def open(self) -> Tensor:
        """1 if steps change anything."""
        return self.alive * self.fits

    def judge(self, loss: Tensor, x: Tensor, fits: Tensor) -> None:
        """Take in the loss (1) of a batch x (B, D), and whether its entries fit (1): if not, the loss says nothing."""
        going = self.open > 0
        row, is_finite = suspect(x)
        self.suspect = torch.where(going, row, self.suspect)
        self.alive = self.alive * torch.where(going, torch.where(fits, loss.isfinite(), is_finite), True)
        self.fits = self.fits * torch.where(self.alive > 0, fits, True)

    def change(self, old: Tensor, new: Tensor) -> None:
        """Let a tensor get new values, if steps change anything."""
        old.copy_(torch.where(self.open > 0, new, old).view_as(old))


def suspect(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of x (B, D) to look at if its loss is not finite (1), as in `FIGURES`, and whether x is finite."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    bad = ~norms.isfinite()
    row = torch.where(bad.any(), -1 - bad.int().argmax(), torch.where(bad, 0, norms).argmax())
    return row[None].double(), ~bad.any()[None]
