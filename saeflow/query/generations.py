"""What the store had published when somebody began to read: `saeflow gc` may remove files that are being read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from saeflow.runtime.errors import UserError
from saeflow.runtime.sql_errors import QUERY_ERRORS, lacks_file
from saeflow.store.records import BESIDE
from saeflow.store.store import Store

Made = TypeVar("Made")


def generations(store: Store) -> object:
    """Return what changes whenever a run, its tokens, a file of labels, or what is known beside them is published."""
    found = []
    for artefact in store.artefacts("features", "tokens"):
        with contextlib.suppress(OSError):
            found.append((artefact.id, (artefact.path / "manifest.json").stat().st_mtime_ns))
            found.append((artefact.id, (artefact.path / "quality.json").stat().st_mtime_ns))
    for artefact in store.artefacts(*BESIDE):
        with contextlib.suppress(OSError):
            found.append((artefact.id, (artefact.path / "artefact.json").stat().st_mtime_ns))
    return found, store.storage.versions(store.root / "labels")


def again_if_replaced(store: Store, make: Callable[[], Made]) -> Made:
    """Return what `make` gives. If a file is gone because the store has changed meanwhile, it is made again."""
    before = generations(store)
    try:
        return make()
    except (UserError, *QUERY_ERRORS) as error:
        if not (lacks_file(error) and has_changed(store, before)):
            raise
    return again_if_replaced(store, make)


@contextlib.contextmanager
def opened_at(store: Store, state: object) -> Iterator[None]:
    """While open, files are read of a run that was opened when the store had this state.

    Raises UserError if one is gone because the store has changed.
    """
    try:
        yield
    except (UserError, *QUERY_ERRORS) as error:
        if lacks_file(error) and has_changed(store, state):
            raise UserError(
                f"{store.name} has changed since the run was opened, and files that it had then are removed "
                "(saeflow gc).\nOpen the run again."
            ) from error
        raise


def has_changed(store: Store, before: object) -> bool:
    """Look whether something was published, here or on another machine, since `generations` gave `before`."""
    store.storage.pull()
    return generations(store) != before
