"""saeflow: activations stored once, many sparse autoencoders trained, every feature activation in SQL.

import saeflow

with saeflow.open("data/store", run="demo") as run:
    table = run.ask("top_tokens", feature=12, n=5)   # a pyarrow.Table
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saeflow.browser.notebook import NotebookRun
    from saeflow.runtime.errors import UserError

    open = NotebookRun.open  # noqa: A001

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "open"]


def __getattr__(name: str) -> Any:
    """`saeflow.open` and `saeflow.UserError` load what they need when they are first used."""
    if name == "open":
        from saeflow.browser.notebook import NotebookRun

        return NotebookRun.open
    if name == "UserError":
        from saeflow.runtime.errors import UserError

        return UserError
    raise AttributeError(f"module 'saeflow' has no attribute {name!r}")
