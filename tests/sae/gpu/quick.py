"""Make Triton's interpreter quicker: it looks through the whole language again at each call of a function."""

from __future__ import annotations

from typing import Any

import pytest

interpreter = pytest.importorskip("triton.runtime.interpreter")
language = pytest.importorskip("triton.language")

_patched: set[int] = set()


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function inside a kernel, whose launch has patched `triton.language` for all modules of ours."""
    seen = {id(value) for value in self.fn.__globals__.values() if value is language or value is language.core}
    if id(language) not in seen and id(language.core) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(language.core))
    return self.rewrite()(*args, **kwargs)
