"""A kernel with the sizes it is compiled for ahead of time, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """What `triton.compile` takes. Pointers, and integers that are called `d…`, are divisible by 16."""

    kernel: Any
    signature: dict[str, str]
    """Type of every argument by its name, as triton spells types; constexprs are `constexpr`."""
    constexprs: dict[str, Any]
    warps: int
    stages: int
    name: str
