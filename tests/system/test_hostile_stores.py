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
from saeflow.browser.server import Application
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.asgi import ask
from tests.support.command import Command
from tests.support.hostile_stores import HOSTILE, tree, write_outside
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe
from tests.support.small_store import Given

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
@pytest.mark.rotates(5)
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


FORGED_BESIDE = [name for name in HOSTILE if name.startswith("beside: ")]
ANSWERED_BESIDE: dict[str, dict[str, object]] = {
    "annotations": {}, "annotated_tokens": {"annotation": "marks"}, "features_of_class": {"class": "marks"},
    "class_in_text": {"annotation": "marks", "class": "marks"}, "classes_of_feature": {"feature": 0},
    "feature_classes": {}, "sparse_probes": {}, "feature_effects": {}, "measured_effects": {},
    "effect_contexts": {"feature": 0}, "effects_on_entries": {"feature": 0},
}  # fmt: skip
PAGES_BESIDE = [
    "classes", "classes?annotation=marks&class=marks", "features/0", "features/0/classes", "features/0/effects",
    "features/0/moved", "features/0/effect_contexts", "questions",
]  # fmt: skip
COMMANDS_BESIDE = [["annotate"], ["probe", "marks"], ["ls"], ["verify", "--full"], ["gc"], ["catalog"]]


@pytest.mark.parametrize(
    "name",
    [name if name.endswith("nulls") else pytest.param(name, marks=pytest.mark.long) for name in FORGED_BESIDE],
)
def test_forged_tables_beside_a_run_do_not_stand_in_the_way_of_others(name, tmp_path, saeflow, monkeypatch):
    """Each is left out with a warning, answered as it is, or refused with one clear error."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    store, outside = Given(corpus=("demo", "c0000001")).write(tmp_path / "x" / "store"), tmp_path / "x" / "outside"
    with package.open(store.root) as run:
        usual = {question: run.ask(question, feature=0) for question in ("top_tokens", "feature_numbers")}
    HOSTILE[name](store.root, write_outside(outside))
    before = tree(outside)
    with package.open(store.root) as run:
        assert {question: run.ask(question, feature=0) for question in usual} == usual
        for question, arguments in ANSWERED_BESIDE.items():
            with contextlib.suppress(UserError):
                run.ask(question, **arguments)
    pages = Application(store)
    for address in PAGES_BESIDE:
        answered = ask(pages.app, f"/runs/demo/{address}")
        assert answered.error is None, address
        assert answered.status in (200, 400, 404), address
    for command in COMMANDS_BESIDE:
        said = saeflow(*command, "--store", store.root)
        assert said.code in (0, 2), said.err
        assert "not your fault" not in said.err, said.err
        assert "\x1b" not in said.out + said.err
    assert tree(outside) == before
    assert sorted(os.listdir(tmp_path / "x")) == ["outside", "store"]


@pytest.mark.parametrize(
    ("kind", "question", "said", "remedy"),
    [("annotations", "annotations", "spans.parquet is left out: it has no column class", "saeflow annotate marks FILE"),
     ("probes", "feature_classes", "feature_classes.parquet is left out: it has no column annotation",
      "saeflow probe marks"),
     ("effects", "feature_effects", "effects.parquet is left out: it has no column effect", "saeflow effects RUN")],
)  # fmt: skip
def test_a_table_beside_a_run_with_other_columns_is_left_out(kind, question, said, remedy, tmp_path, caplog):
    store = Given(corpus=("demo", "c0000001")).write(tmp_path / "store")
    HOSTILE[f"beside: {kind}, other columns"](store.root, tmp_path)
    with package.open(store.root) as run:
        assert run.ask(question).num_rows == 0
    assert f"{said}. Make it again: {remedy}" in caplog.text
