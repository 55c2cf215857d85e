"""A reader that meets `saeflow gc` reads what is published now, and is not told that its store is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

import saeflow as package
from saeflow.pipeline import compact
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import query
from saeflow.query.connection import connect
from saeflow.runtime.errors import UserError
from saeflow.store.garbage import collect_garbage
from saeflow.store.storage.folder import Folder
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.small_pipeline import quiet

COUNT = "select count(*) as n from stg_token_major"


def replace_files(copied: Finished) -> None:
    """Merge the run's parts, and remove those it had."""
    store = Store(copied.store.root)
    compact.run(Lineage(store, copied.recipe), quiet(), enough=2)
    assert collect_garbage(store, grace_seconds=0, remove=True).garbage


@pytest.fixture
def beside_a_reader(copied: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as somebody has read the lists of parts, these files are replaced, once."""
    look_once, done = Folder.look_once, []

    def replacing(storage: Any, what: str, look: Callable[[], None]) -> None:
        look_once(storage, what, look)
        if not done:
            done.append(what)
            replace_files(copied)

    monkeypatch.setattr(Folder, "look_once", replacing)


@pytest.mark.usefixtures("beside_a_reader")
def test_who_connects_while_files_are_removed_reads_what_is_published_now(copied: Finished) -> None:
    with closing(connect(copied.store)) as connection:
        n = query(connection, COUNT).column(0)[0].as_py()
    assert n == Lineage(copied.store, copied.recipe).features.published().total("n_values")


@pytest.mark.long
@pytest.mark.usefixtures("beside_a_reader")
@pytest.mark.parametrize("words", [("ask", "top_tokens", "1"), ("sql", COUNT)], ids=["ask", "sql"])
def test_a_command_that_meets_it_answers(words: tuple[str, ...], copied: Finished, saeflow: Command) -> None:
    said = saeflow(*words, "-f", "json", "--store", copied.store.root)
    assert said.code == 0, said.err
    assert "damage" not in said.err


def test_an_open_run_whose_files_are_removed_says_to_open_it_again(copied: Finished) -> None:
    with package.open(copied.store.root) as run:
        replace_files(copied)
        with pytest.raises(UserError, match=r"has changed since the run was opened.*\n.*Open the run again"):
            run.sql(COUNT)
        with pytest.raises(UserError, match="has changed since the run was opened"):
            run.ask("tokens_where", 1, 0.0)
        with pytest.raises(UserError, match="There is no feature"):
            run.ask("tokens_where", 10**6, 0.0)


@pytest.mark.long
def test_a_file_that_is_missing_though_nothing_was_published_is_damage(copied: Finished) -> None:
    with package.open(copied.store.root) as run:
        for path in copied.store.root.glob("features/*/parts/*/token_major"):
            shutil.rmtree(path)
        with pytest.raises(UserError, match=r"(?s)ask again.*verify --full --repair"):
            run.sql(COUNT)
