"""Fixtures of the tests of kernels."""

import pytest


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter looks through its whole language at each call of a function: twice would be enough."""
    from tests.sae.gpu.quick import call, interpreter

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
