"""What is needed to compile a kernel ahead of its use, without a GPU: its signature, constants and sizes of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """A kernel as it is launched at the sizes it is made for. Pointers and widths of rows are divisible by 16."""

    kernel: Any
    signature: dict[str, str]
    """Type of each argument, such as `*fp32` or `i32`; constants may be left out, or be `constexpr`."""
    constexprs: dict[str, Any]
    warps: int
    stages: int
    name: str
    capabilities: tuple[int, ...] = (80, 90, 100)
    """GPUs that it is launched on, by ten times their compute capability."""
    odd: tuple[str, ...] = ()
    """Sizes and addresses that need not be multiples of 16."""


def typed(names_by_type: dict[str, str]) -> dict[str, str]:
    """Return the type of each argument, from their names by type, parted by blanks."""
    return {name: kind for kind, names in names_by_type.items() for name in names.split()}
