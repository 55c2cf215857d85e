"""Temporary folders. If one is full, the message names it and the variable that moves it, and not the store."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from saeflow.runtime.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAID_BY_DUCKDB = ("max_temp_directory_size", "No space left on device")


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder that is removed at the end. Raises UserError if it cannot be made or filled."""
    with blaming_temporary_folder(), tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


@contextlib.contextmanager
def blaming_temporary_folder() -> Iterator[None]:
    """Turn errors that say that a disk is full into one about the temporary folder."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in NO_SPACE or any(each in str(error) for each in _SAID_BY_DUCKDB):
            raise UserError(
                f"The temporary folder {tempfile.gettempdir()} is full. Free some space there, or name a larger folder "
                "in the variable TMPDIR, e.g. TMPDIR=/data/tmp saeflow run RECIPE."
            ) from error
        raise
