"""Compiled loops work where their cache cannot be written, too."""

from __future__ import annotations

from typing import Any

from saeflow.runtime.compiled import compiled


def test_a_user_who_may_write_no_cache_compiles_at_every_start() -> None:
    made: dict[str, Any] = {}
    exec("def twice(number):\n    return 2 * number", made)  # Numba finds no folder for what no file holds
    assert compiled(made["twice"])(21) == 42
