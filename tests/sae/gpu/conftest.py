"""Fixtures of the tests of kernels."""

import os
import zlib
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter looks through its whole language at each call of a function: twice would be enough."""
    from tests.sae.gpu.quick import call, interpreter

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep, where `SAEFLOW_TENTH` is a digit, only that tenth of the long tests, but all that compile a kernel."""
    tenth = os.environ.get("SAEFLOW_TENTH", "")
    here = Path(__file__).parent
    left_out = [
        item
        for item in items
        if tenth and here in item.path.parents and item.get_closest_marker("long") and item.path.stem != "test_compiled"
        and zlib.crc32(item.nodeid.encode()) % 10 != int(tenth)
    ]  # fmt: skip
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if here in item.path.parents and item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))  # the interpreter has what other tests leave of the processor
