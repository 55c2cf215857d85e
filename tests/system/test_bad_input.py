"""Bad input ends with one clear message and exit code 2, before or instead of work; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.activations.collector import Collector
from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.progress import Bar
from saeflow.store.records import PartRecord
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.command import Command, Said
from tests.support.small_pipeline import (
    Ingredients,
    a_table,
    brought_data,
    recipe_data,
    tree,
    write_recipe,
    write_table,
)


def refused(said: Said, *phrases: str) -> None:
    """One message of a few lines, exit code 2, no traceback."""
    assert said.code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    message = [line for line in said.err.splitlines() if line and not line.startswith(("store:", "tokens:"))]
    assert 1 <= len(message) <= 4, said.err
    for phrase in phrases:
        assert phrase in said.err


def published(store: Path) -> list[str]:
    """Kinds of artefacts that readers can see."""
    return sorted({path.parent.parent.name for path in store.glob("*/*/manifest.json")})


def latin1(folder: Path) -> str:
    (folder / "letter.txt").write_bytes("Grüße".encode("latin1"))
    return str(folder / "letter.txt")


def no_rows(folder: Path) -> str:
    (folder / "empty.csv").write_text("key,text\n")
    return str(folder / "empty.csv")


def other_columns(folder: Path) -> str:
    (folder / "other.csv").write_text("title,content\nEmma,Handsome\n")
    return str(folder / "other.csv")


@pytest.mark.parametrize(
    ("files", "phrases"),
    [
        (lambda folder: str(folder / "missing/*.txt"), ["nothing matches", "missing/*.txt"]),
        (no_rows, ["The corpus is empty", "empty.csv"]),
        (other_columns, ["no column 'text'", "title, content", 'text = "content"']),
        (latin1, ["letter.txt is not UTF-8", "byte 2", "iconv"]),
    ],
    ids=["missing", "empty", "without text column", "not UTF-8"],
)
def test_a_corpus_that_cannot_be_read(
    files: Any,
    phrases: list[str],
    saeflow: Command,
    ingredients: Ingredients,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, corpus={"files": [files(tmp_path)]}))
    refused(saeflow("run", "-q", recipe, "--store", tmp_path / "store"), *phrases)
    assert published(tmp_path / "store") == []
    (tmp_path / "good.csv").write_text("key,text\na,the cat sees the dog\n")
    assert (
        saeflow("tokens", recipe, "--store", tmp_path / "store", "--set", f"corpus.files={tmp_path}/good.csv").code == 0
    )


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        (
            {"activations": {"sites": ["transformer.h.0.mlp.akt"]}},
            ["no site 'transformer.h.0.mlp.akt'", "transformer.h.0.mlp.act"],
        ),
        (
            {"model": {"path": "no/such-model"}},
            ["model.path is 'no/such-model'", "neither a local folder nor a model on the hub"],
        ),
        ({"sae": {"site": "lm_head"}}, ["sae.site is 'lm_head'", "transformer.h.0.mlp.act"]),
        ({"sae": {"k": 65}}, ["sae.k is 65, but sae.n_features is 64", "at most 64"]),
        ({"feed": {"pool_bytes": "1KiB"}}, ["feed.pool_bytes is 1.0 KiB", "feed.pool_bytes to at least"]),
        ({"tokens": {"context_length": 65}}, ["tokens.context_length is 65", "at most 64"]),
        ({"sae": {"n_fetures": 8}}, ["unknown key sae.n_fetures", "Did you mean n_features?"]),
        ({"trian": {"lr": 1}}, ["unknown key trian", "Did you mean train?"]),
        ({"train": {"lr": "fast"}}, ["train.lr is 'fast'"]),
        ({"model": {"device": "cuda:7"}}, ["model.device is 'cuda:7'"]),
        ({"train": {"device": "cuda:99"}}, ["train.device is 'cuda:99'", '"auto" or "cpu"']),
    ],
    ids=["site", "model", "site of the SAE", "k", "memory", "context", "key", "section", "number",
         "device", "device of training"],
)  # fmt: skip
def test_a_recipe_that_cannot_work(
    changes: dict[str, Any],
    phrases: list[str],
    saeflow: Command,
    ingredients: Ingredients,
    tmp_path: Path,
) -> None:
    if "device" in changes.get("model", {}) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, **changes))
    refused(saeflow("run", "-q", recipe, "--store", tmp_path / "store"), *phrases)
    assert not {"activations", "features"} & set(published(tmp_path / "store"))


def test_a_folder_that_is_not_a_model(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("not a model")
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, model={"path": str(tmp_path / "model")}))
    refused(saeflow("run", "-q", recipe, "--store", tmp_path / "store"), str(tmp_path / "model"), "config.json")
    refused(saeflow("sites", tmp_path / "model"), "a folder without a Hugging Face model")


def test_a_recipe_that_is_not_there_or_not_toml(saeflow: Command, tmp_path: Path) -> None:
    refused(saeflow("run", "missing.toml"), "No recipe at missing.toml", "saeflow init missing.toml")
    (tmp_path / "broken.toml").write_text("name = \n")
    refused(saeflow("run", "broken.toml"), "broken.toml is not valid TOML")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_table_with_a_value_that_is_not_finite(value: float, saeflow: Command, tmp_path: Path) -> None:
    table = a_table()
    table[501, 3] = value
    recipe = write_recipe(tmp_path / "r.toml", brought_data(write_table(tmp_path / "t.npy", table)))
    refused(saeflow("run", "-q", recipe, "--store", tmp_path / "store"), "row 501", "neuron 3", str(value))
    assert published(tmp_path / "store") == []


def test_a_model_that_gives_nan(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(ingredients.model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][7] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, model={"path": str(tmp_path / "model")}))
    refused(saeflow("run", "-q", recipe, "--store", tmp_path / "store"), "part 0, row 0", "neuron 7", "nan")
    assert published(tmp_path / "store") == ["tokens"]


def test_an_activation_too_large_for_the_disk_format(saeflow: Command, tmp_path: Path) -> None:
    table = a_table()
    table[2, 1] = 70_000
    recipe = write_recipe(tmp_path / "r.toml", brought_data(write_table(tmp_path / "t.npy", table)))
    refused(
        saeflow("run", "-q", recipe, "--store", tmp_path / "store"), "70000", "row 2", "overflows float16", "bfloat16"
    )


@pytest.mark.parametrize("record", ["store.json", "tokens/*/artefact.json", "features/*/manifest.json"])
def test_a_store_made_by_a_newer_saeflow(
    record: str,
    saeflow: Command,
    finished: Finished,
    ingredients: Ingredients,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished.store.root, store)
    path = next(store.glob(record))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    before = tree(store)
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, sae={"seed": 1} if "tokens" in record else {}))
    for command in (["run", "-q", recipe], ["ask", "runs"], ["verify"]):
        said = saeflow(*command, "--store", store)
        if command[0] == "ask" and said.code == 0:  # other runs can still be asked
            continue
        refused(said, str(path), "format version 99", f"reads up to {FORMAT_VERSION}", "upgrade")
    assert tree(store) == before


def test_a_store_folder_that_cannot_be_made(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients))
    refused(saeflow("run", "-q", recipe, "--store", tmp_path / "file" / "store"), "cannot be written", "--store")
    assert (tmp_path / "file").read_text() == "mine"


class Disk:
    """A small disk of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.filler = root, root / "filler"

    def leave(self, n_bytes: int) -> None:
        """Fill it but for `n_bytes`."""
        self.filler.unlink(missing_ok=True)
        free = shutil.disk_usage(self.root).free
        self.filler.write_bytes(bytes(max(0, free - n_bytes)))

    def read_only(self, wanted: bool) -> None:
        option = "ro" if wanted else "rw"
        subprocess.run(["mount", "-o", f"remount,{option}", self.root], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield Disk(root)
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def test_a_store_on_a_read_only_disk(
    saeflow: Command,
    disk: Disk,
    finished: Finished,
    ingredients: Ingredients,
    tmp_path: Path,
) -> None:
    shutil.copytree(finished.store.root, disk.root / "store")
    disk.read_only(True)
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, sae={"seed": 1}))
    refused(saeflow("run", "-q", recipe, "--store", disk.root / "store"), "cannot be written: Read-only file system")
    assert saeflow("ask", "runs", "--store", disk.root / "store").code == 0
    assert saeflow("verify", "--full", "--store", disk.root / "store").code == 0
    assert tree(disk.root / "store") == tree(finished.store.root)


def test_too_little_disk_for_the_forecast(
    saeflow: Command,
    disk: Disk,
    ingredients: Ingredients,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients))
    disk.leave(200 << 10)
    said = saeflow("run", "-q", recipe, "--store", disk.root / "store")
    refused(said, "Storing the activations of 1 site(s) needs about", "KiB free", "--store")
    assert published(disk.root / "store") == ["tokens"]


STAGES = ["tokens", "collect", "train", "encode", "evaluate"]


@pytest.mark.parametrize(
    "stage", [each if each in ("collect", "encode") else pytest.param(each, marks=pytest.mark.long) for each in STAGES]
)
def test_a_disk_that_fills_up_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    saeflow: Command,
    disk: Disk,
    finished: Finished,
    ingredients: Ingredients,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients))
    store = disk.root / "store"
    Store.create(store)
    for earlier in STAGES[: STAGES.index(stage)]:
        assert saeflow(earlier, recipe, "--store", store, "-q").code == 0
    before = tree(store)
    if stage == "collect":
        fill_after_first_part(monkeypatch, disk)
    else:
        disk.leave(0 if stage == "evaluate" else 150 << 10 if stage == "encode" else 16 << 10)
    said = saeflow(stage, recipe, "--store", store, "-q")
    refused(said, "No space left on device", "Finished parts are safe", "run the same command again")
    after = tree(store)
    assert {name: after.get(name) for name in before} == before
    if stage == "collect":
        assert len(list(store.glob("activations/*/parts/*"))) == 1
    disk.filler.unlink()
    monkeypatch.undo()
    assert saeflow("run", "-q", recipe, "--store", store).code == 0
    assert tree(store) == tree(finished.store.root)


def fill_after_first_part(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    """Somebody else takes the disk while activations are collected: the check before the work saw room enough."""
    one_part = Collector.collect

    def filling(self: Collector, part: PartRecord, bar: Bar) -> PartRecord:
        if self.target.part_folders():
            disk.leave(16 << 10)
        return one_part(self, part, bar)

    monkeypatch.setattr(Collector, "collect", filling)
