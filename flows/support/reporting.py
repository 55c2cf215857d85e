"""Show a flow run on Prefect's pages: its name and tags, progress, log lines, tables and pictures."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler

from flows.support import page
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.terminal import Terminal
from saeflow.runtime.text import harmless_lines


class _MessageAlone(logging.Filter):
    """Logs only the message of an error that the user has to mend: a traceback would hide what to do.

    No text of a traceback acts on a terminal.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(error := record.exc_info[1], UserError):
            record.msg, record.args, record.exc_info = harmless_lines(str(error)), (), None
        elif record.exc_info and not isinstance(record.exc_info, bool):
            record.exc_text = harmless_lines(logging.Formatter().formatException(record.exc_info))
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_MessageAlone())

PROGRESS_SECONDS, LOG_SECONDS = 5.0, 30.0
"""Between two updates of a progress artifact, and between two lines of progress in the log of a run."""


@contextmanager
def decoration() -> Iterator[None]:
    """Log an error of the server: a page that is not up to date must not fail a run."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("Prefect's page is not up to date: %s", error)


def name_run(stage: str, about: str = "") -> None:
    """Name the flow run by its work, as far as known, and tag it with stage, recipe and architecture."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    recipe = (context.parameters or {}).get("recipe")
    tags, name = {*context.flow_run.tags, stage}, stage
    if isinstance(recipe, Recipe):
        tags |= {recipe.name, *(member.sae.architecture for member in recipe.members())}
        name = f"{stage} {recipe.name}"
    with decoration(), get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, name=f"{name}: {about}" if about else name, tags=sorted(tags))


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


@contextmanager
def reporting(stage: str, page_seconds: float | None = None, log_seconds: float | None = None) -> Iterator[Progress]:
    """Name the flow run, and report its progress on the terminal, in one progress artifact and in its log.

    A run that a server started has no terminal of its own.
    """
    name_run(stage)
    served = "PREFECT__FLOW_RUN_ID" in os.environ
    logger, watched = get_run_logger(), _Watched(stage, page_seconds or PROGRESS_SECONDS, log_seconds or LOG_SECONDS)
    console = Terminal(stderr=True, quiet=served)
    progress = Progress(console, listener=watched.hear, log=lambda text: logger.info("%s", text))
    with _warnings_of_saeflow(), watched.shown():
        try:
            yield progress
        except UserError as error:
            error.args = (harmless_lines(str(error)),)  # it becomes the message of the run's state
            raise


class _Watched:
    """Writes the progress artifact and log of a stage from its own thread, so that no work waits for a slow server."""

    def __init__(self, stage: str, page_seconds: float, log_seconds: float) -> None:
        self.stage, self.page_seconds, self.log_seconds = stage, page_seconds, log_seconds
        self.bar: Bar | None = None
        self.ended = threading.Event()
        self.artifact: UUID | None = None

    def hear(self, bar: Bar) -> None:
        self.bar = bar

    @contextmanager
    def shown(self) -> Iterator[None]:
        with decoration():
            made = create_progress_artifact(0.0, key=f"saeflow-{self.stage}", description=f"{self.stage}: starting")
            self.artifact = made if isinstance(made, UUID) else None  # a coroutine only in async code
        thread = threading.Thread(target=copy_context().run, args=(self._watch,), name="saeflow-page", daemon=True)
        thread.start()
        how = "stopped"
        try:
            yield
            how = "done"
        finally:
            self.ended.set()
            thread.join()
            self._update(how)

    def _watch(self) -> None:
        rounds = 0
        while not self.ended.wait(self.page_seconds):
            if self.bar is None:
                continue
            rounds += 1
            self._update()
            if rounds % round(self.log_seconds / self.page_seconds) == 0:
                get_run_logger().info("%s", self.bar.line)

    def _update(self, how: str = "") -> None:
        line = self.bar.line if self.bar else ""
        share = 100.0 * self.bar.done / self.bar.total if self.bar and self.bar.total else 0.0
        about = page.plain(": ".join(filter(None, [how, line or self.stage])))
        with decoration():
            if self.artifact is not None:
                update_progress_artifact(self.artifact, 100.0 if how == "done" else min(share, 100.0), about)


@contextmanager
def _warnings_of_saeflow() -> Iterator[None]:
    """Log saeflow's warnings in this flow run, whichever thread they come from."""
    context = FlowRunContext.get()
    run_id = str(context.flow_run.id) if context and context.flow_run else None
    handler = APILogHandler(logging.WARNING)

    def belongs(record: logging.LogRecord) -> bool:
        record.flow_run_id, record.msg, record.args = run_id, harmless_lines(record.getMessage()), ()
        return run_id is not None

    handler.addFilter(belongs)
    logging.getLogger("saeflow").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("saeflow").removeHandler(handler)


def show_table(stage: str, facts: Mapping[str, Any]) -> None:
    """Show the numbers of a finished stage as a table artifact and one log line."""
    numbers = {name: value for name, value in facts.items() if not isinstance(value, dict | list)}
    rows = [{"what": name, "value": page.cell(name, value)} for name, value in numbers.items()]
    with decoration():
        create_table_artifact(table=rows, key=f"saeflow-{stage}-numbers", description=f"What {stage} made")
    said = ", ".join(f"{name} {page.shown(name, value)}" for name, value in numbers.items())
    get_run_logger().info("%s: %s", stage, said)


def show_rows(stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows as a table artifact."""

    def exact(value: Any) -> str:
        return str(value) if isinstance(value, int | float) else page.plain(str(value))

    lines = [{name: exact(value) for name, value in row.items()} for row in rows]
    with decoration():
        create_table_artifact(table=lines, key=f"saeflow-{stage}", description=f"What the {stage} made")
    get_run_logger().info("%s: %d lines", stage, len(rows))


def show_picture(stage: str, path: Path) -> None:
    """Show a picture as a markdown artifact; of a large one, only the path."""
    show_markdown(f"{stage}-picture", page.picture(stage, path), f"Picture of the {stage}")


def show_markdown(key: str, text: str, about: str) -> None:
    with decoration():
        create_markdown_artifact(markdown=text, key=f"saeflow-{key}", description=about)
