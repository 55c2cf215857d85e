"""A damaged file of one run keeps no other run from being asked, and says where it is and what mends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.command import Command
from tests.support.small_store import Given


def footer(content: bytearray) -> None:
    content[-9] ^= 0xFF


def magic(content: bytearray) -> None:
    content[-1] ^= 0xFF


def middle(content: bytearray) -> None:
    for i in range(4, len(content) - 8):
        content[i] ^= 0xFF


@pytest.fixture
def store(tmp_path: Path) -> Store:
    Given(name="old", fp="f0000009").write(tmp_path)
    return Given(name="new").write(tmp_path)


def damage(store: Store, run: str, table: str, how: Callable[[bytearray], None]) -> Path:
    [path] = store.root.glob(f"*/{run}-*/**/{table}.parquet")
    content = bytearray(path.read_bytes())
    how(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", [footer, *(pytest.param(each, marks=pytest.mark.long) for each in (magic, middle))])
@pytest.mark.parametrize("table", ["feature_stats", "tokens", "vocab", "token_major", "documents"])
def test_a_damaged_file_leaves_out_its_run_alone(store: Store, table: str, how: Callable[[bytearray], None]) -> None:
    damage(store, "new", table, how)
    with connect(store, "old") as connection:
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        assert ask(connection, "feature_summary").num_rows == 4


@pytest.mark.parametrize("table", ["feature_stats", "tokens", "feature_major"])
def test_a_run_with_a_damaged_file_names_it_and_the_command_that_mends_it(store: Store, table: str) -> None:
    path = damage(store, "new", table, magic)
    with pytest.raises(UserError, match="verify --full --repair") as refused:
        connect(store, "new")
    assert str(path) in str(refused.value)
    with connect(store) as connection:  # the newest that can be read
        assert ask(connection, "tokens_where", [0]).num_rows == 4
        problems = {row["schema_name"]: row["problem"] for row in ask(connection, "runs").to_pylist()}
        assert str(path) in problems["new"]


def test_a_question_that_meets_a_damaged_page_says_how_to_mend_it(saeflow: Command, store: Store) -> None:
    damage(store, "new", "feature_major", middle)
    said = saeflow("ask", "tokens_where", 0, "--run", "new", "--store", store.root)
    assert said.code == 2
    assert "verify --full --repair" in said.err
    assert saeflow("ask", "tokens_where", 0, "--run", "old", "--store", store.root).code == 0
