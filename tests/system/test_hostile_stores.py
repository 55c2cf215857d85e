"""A store from a stranger changes nothing outside of itself, and nothing of it runs, whatever command reads it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import saeflow as package
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.hostile_stores import HOSTILE, tree, write_outside
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe

READING = {
    "runs": ["ask", "runs"],
    "ask": ["ask", "top_tokens", "1"],
    "sql": ["sql", "select * from documents, src_hidden"],
    "ls": ["ls"],
    "verify": ["verify", "--full"],
}
WRITING = {
    "gc": ["gc", "--yes", "--grace", "0"],
    "forget": ["forget", "tales/000"],
    "encode": ["encode", "{recipe}"],
    "upgrade": ["upgrade"],
    "compact": ["compact", "{recipe}"],
    "label": ["label", "1", "mine"],
    "catalog": ["catalog"],
    "train": ["train", "{recipe}"],
    "repair": ["verify", "--full", "--repair"],
}


@pytest.fixture
def try_store(finished: Finished, ingredients: Ingredients, tmp_path: Path, saeflow: Command) -> Callable[..., None]:
    """Hands a hostile copy of a finished store to commands, and looks whether anything outside has changed."""
    (tmp_path / "home").mkdir()
    recipe = write_recipe(tmp_path / "small.toml", recipe_data(ingredients))

    def attempt(name: str, *commands: list[str]) -> None:
        store, outside = tmp_path / "x" / "store", tmp_path / "x" / "outside"
        shutil.rmtree(store.parent, ignore_errors=True)
        shutil.copytree(finished.store.root, store)
        HOSTILE[name](store, write_outside(outside))
        before = tree(outside)
        for command in commands:
            words = [word.format(recipe=recipe) for word in command]
            said = saeflow(*words, "--store", store)
            assert said.code in (0, 1, 2), said.err
            assert "Traceback" not in said.err
            assert "not your fault" not in said.err, said.err
            assert "precious" not in said.out + said.err
            assert tree(outside) == before, command
        assert sorted(os.listdir(store.parent)) == ["outside", "store"]

    return attempt


@pytest.mark.parametrize("number", range(0, len(HOSTILE), 3), ids=list(HOSTILE)[::3])
def test_a_strangers_store_reaches_nothing_outside_of_it(number, try_store):
    commands = [READING["runs"], *list(WRITING.values())[:2]]
    try_store(list(HOSTILE)[number], commands[number // 3 % 3])


@pytest.mark.long
@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_store_reaches_nothing_outside_of_it_by_any_command(name, try_store):
    try_store(name, *READING.values())
    store = Path("x/store")  # of this folder
    with contextlib.suppress(UserError), package.open(store) as run:
        run.ask("runs")
        run.sql("from tokens")
    assert not list(store.parent.rglob("PWNED*"))
    for command in WRITING.values():
        try_store(name, command)


def test_forty_and_more_stores_are_tried():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith("forgotten: ")])
def test_a_strangers_list_of_forgotten_documents_is_damage(name, try_store, saeflow):
    try_store(name, WRITING["forget"])
    said = saeflow("verify", "--store", Path("x/store"))
    assert (said.code, "forgotten.json is missing or damaged" in said.err) == (2, True)


@pytest.mark.parametrize("kind", ["shard", "zarr.json", "table", "vocabulary"])
def test_nobody_waits_for_a_pipe_in_a_strangers_store(kind, finished, ingredients, tmp_path, saeflow):
    shutil.copytree(finished.store.root, tmp_path / "store")
    HOSTILE[next(name for name in HOSTILE if name.startswith("pipe: ") and name.endswith(kind))](
        tmp_path / "store", tmp_path
    )
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, sae={"k": 2}, train={"n_tokens": 1000}))
    said = saeflow("train", recipe, "--store", tmp_path / "store")
    assert said.code in (0, 2), said.err
    assert "not your fault" not in said.err


def test_a_site_that_the_model_has_not_is_no_fault_of_saeflow(try_store):
    try_store("fact: stored", WRITING["encode"])


def test_a_link_that_stays_in_the_store_is_not_followed_either(finished, tmp_path):
    shutil.copytree(finished.store.root, tmp_path / "store")
    (tmp_path / "store" / "labels").symlink_to(tmp_path / "store" / "tmp")
    with pytest.raises(UserError, match="labels is a link"):
        Store.open(tmp_path / "store")


def test_the_folder_of_a_store_may_be_a_link(finished, tmp_path, saeflow):
    (tmp_path / "here").symlink_to(finished.store.root)
    assert saeflow("ask", "runs", "--store", tmp_path / "here").code == 0


def _as_user(user: int, group: int, work: Callable[[], object]) -> str:
    """Do something as another user, in a process of its own. Return the error, if it is one for a user."""
    there, here = os.pipe()
    if (child := os.fork()) == 0:
        said = ""
        try:
            os.setgroups([group])
            os.setgid(group)
            os.setuid(user)
            work()
        except BaseException as error:
            said = str(error) or type(error).__name__
        os.write(here, said.encode())
        os._exit(0)
    os.close(here)
    with os.fdopen(there) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return found


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator can become others")
@pytest.mark.parametrize(
    ("owner", "mode", "user", "group", "allowed"),
    [(0, 0o777, 4001, 5001, True), (4002, 0o777, 4001, 5001, False), (4002, 0o770, 4001, 5000, True),
     (4001, 0o700, 4001, 5001, True), (4002, 0o777, 0, 0, False)],
    ids=["a machine's", "a stranger's", "a group's", "my own", "a stranger's, by root"],
)  # fmt: skip
def test_only_who_shares_a_store_changes_it(public_folder, owner, mode, user, group, allowed):
    root = public_folder / "store"
    store = Store.create(root)
    for path in (root, *root.rglob("*")):
        os.chown(path, owner, 5000)
        path.chmod(mode if path.is_dir() else mode & 0o666)
    (root / "tmp" / "leftover").mkdir()
    os.chown(root / "tmp" / "leftover", owner, 5000)
    said = _as_user(user, group, lambda: store.storage.remove(root / "tmp" / "leftover"))
    assert (root / "tmp" / "leftover").exists() != allowed, said
    assert ("does not share it" in said) != allowed
