"""The rows of a training's log as event files for TensorBoard, which is an optional package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeflow.runtime.errors import UserError


class TensorBoardLog:
    """Event files in a folder. Rows that an earlier run wrote for `first_step` and later steps are dropped."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]

    def add(self, row: Mapping[str, float]) -> None:
        """Write one scalar for each column but `step`."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def require_tensorboard(folder: str | None) -> None:
    """Raise UserError, before any work, if event files are asked for and TensorBoard is not installed."""
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"train.tensorboard is {folder!r}, but the package tensorboard is not installed.\n"
            "Install it with `pip install tensorboard`, or take the setting out."
        )
