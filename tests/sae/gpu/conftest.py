"""Fixtures of the tests of kernels."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter looks through its whole language at each call of a function: twice would be enough."""
    from tests.sae.gpu.quick import call, interpreter

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a digit says which tests `.ci/run` takes today, that is a tenth of them.

    All that compile a kernel are taken every day.
    """
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        long = item.get_closest_marker("long")
        if item.path.stem != "test_compiled":
            item.add_marker(pytest.mark.rotates(10))
        if long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))  # the interpreter has what other tests leave of the processor
