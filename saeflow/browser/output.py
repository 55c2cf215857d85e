"""A folder that pages or pictures are written into: never over files of somebody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saeflow.runtime.errors import UserError
from saeflow.store.files import read_json, replacing, write_json

MARKER = "saeflow.json"
"""Says in a folder what lies there, and of which run."""


@dataclass(frozen=True)
class OutputFolder:
    """A folder of saeflow's: an `export` or a `report`, whose files have names like `ours`."""

    path: Path
    made: str
    ours: Sequence[str]

    def prepare(self) -> None:
        """Make the folder, or take over an earlier one. Raises UserError if it holds anything else."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file. Name a folder with -o.")
        others = self.path.is_dir() and [each for each in self.path.iterdir() if not each.name.endswith(".new")]
        if others and self.about().get("made") != self.made:
            raise UserError(f"{self.path} is not empty, and holds no earlier {self.made}. Name another folder with -o.")
        self.path.mkdir(parents=True, exist_ok=True)

    def about(self) -> dict[str, object]:
        """Return what the folder says of itself; nothing if it does not."""
        try:
            found = read_json(self.path / MARKER)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def begin(self, about: dict[str, object]) -> None:
        """Write what the folder holds. Files stay if they belong to the same; else they go first."""
        about = {"made": self.made, **about}
        if self.about() != about:
            self.clear()
            write_json(self.path / MARKER, about)

    def clear(self) -> None:
        for path in self.files():
            path.unlink()

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def put(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(content)

    def files(self) -> list[Path]:
        """Return the files that were written here, by name."""
        return sorted(path for pattern in (MARKER, *self.ours) for path in self.path.glob(pattern))
