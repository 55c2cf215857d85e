"""Run a command of saeflow and print which of its files calls functions of which.

`tests.house` starts this file with PYTHONPATH set to a checkout: `traced.py CHECKOUT MODULE FUNCTION ARGUMENTS...`. Its
last line is JSON: pairs of files, and the name of every function of exactly (store, recipe) and every Lineage that was
called or made. Bodies of modules and classes lack the flag that functions have, and do not count.
"""

from __future__ import annotations

import inspect
import json
import sys
import threading
from importlib import import_module
from types import FrameType
from typing import Any

ROOT, MODULE, FUNCTION, *ARGUMENTS = sys.argv[1:]
OURS = tuple(f"{ROOT}/{folder}/" for folder in ("saeflow", "flows"))
calls: set[tuple[str, str]] = set()
lookups: list[str] = []


def file_of(frame: FrameType | None) -> str:
    """The file, below the checkout, of a frame of ours or of the nearest one that called it from there."""
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return frame.f_code.co_filename[len(ROOT) + 1 :] if frame else ""


def note(frame: FrameType, event: str, _: Any) -> None:
    code = frame.f_code
    if event != "call" or not code.co_flags & inspect.CO_OPTIMIZED:
        return
    is_lineage = code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ == "Lineage"
    if code.co_filename.startswith(OURS):
        calls.add((file_of(frame.f_back), file_of(frame)))
        is_lookup = code.co_varnames[: code.co_argcount] == ("store", "recipe")
        if is_lookup or is_lineage:
            lookups.append(f"{file_of(frame)} {code.co_name}")
    elif is_lineage:  # of a dataclass, whose __init__ lies in no file
        lookups.append(f"{file_of(frame)} Lineage")


def main() -> None:
    threading.setprofile(note)
    sys.setprofile(note)
    sys.argv = ["saeflow", *ARGUMENTS]
    try:
        getattr(import_module(MODULE), FUNCTION)()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
    print(json.dumps([sorted(calls), lookups]))


if __name__ == "__main__":
    main()
