"""A byte is flipped, a file is gone: `verify` names it, repair and a run make the store equal again."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saeflow.activations.feed import held_out_rows
from saeflow.activations.shards import stored_sites
from saeflow.corpus.selection import TokenSelection
from saeflow.features.part_encoder import encode_together
from saeflow.model.sites import choose_site
from saeflow.pipeline import collect, encode, stages, train
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.runtime.errors import UserError
from saeflow.store import garbage
from saeflow.store import verify as integrity
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.small_pipeline import SITE, quiet, tree

PART = "parts/000001-*"
CLASSES = {
    "token table": f"tokens/*/{PART}/tokens.parquet",
    "blocks of the vocabulary": f"tokens/*/{PART}/vocab_blocks.parquet",
    "documents": f"tokens/*/{PART}/documents.parquet",
    "vocabulary": "tokens/*/vocab.parquet",
    "shard": f"activations/*/{PART}/*.zarr/c.0.0.0",
    "zarr.json": f"activations/*/{PART}/*.zarr/zarr.json",
    "feature-major": f"features/*/{PART}/feature_major/*/*/000.parquet",
    "token-major": f"features/*/{PART}/token_major/*/*/000.parquet",
    "histogram": f"features/*/{PART}/feature_histogram.parquet",
    "statistics": f"features/*/{PART}/feature_stats.parquet",
    "figures": "features/*/quality.json",
    "weights": "saes/*/sae_weights.safetensors",
    "settings of the SAE": "saes/*/cfg.json",
    "log": "saes/*/log.parquet",
    "record of the SAE": "saes/*/artefact.json",
    **{
        f"{what} of {kind}": f"{kind}/*/{file}"
        for kind in ("tokens", "activations", "features")
        for what, file in {
            "record of a part": f"{PART}/part.json",
            "generation list": "generations/000001.parquet",
            "manifest": "manifest.json",
            "record": "artefact.json",
        }.items()
    },
}
"""Every kind of file in a store but provenance.json and the picture, by what it is."""


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of the finished store, to be damaged."""
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    return Finished(store, finished.recipe, finished.summary)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(content)


def place_in(path: Path, which: str) -> int:
    size = path.stat().st_size
    return {"first": 0, "random": random.Random(path.name).randrange(size), "last": size - 1}[which]


def mended(copied: Finished) -> dict[str, bytes]:
    for found in list(integrity.verify(copied.store, full=True)):
        integrity.repair(found)
    stages.run(Lineage(copied.store, copied.recipe), quiet())
    assert [str(found) for found in integrity.verify(copied.store, full=True)] == []
    return tree(copied.store.root)


def test_every_file_of_a_store_belongs_to_a_class(finished: Finished) -> None:
    classed = {
        path for pattern in CLASSES.values() for path in finished.store.root.glob(pattern.replace("000001-", "*"))
    }
    known = {"provenance.json", "density.png", "store.json"}
    every = {path for path in finished.store.root.rglob("*") if path.is_file() and "tmp" not in path.parts}
    assert {path.name for path in every - classed} <= known


@pytest.mark.parametrize(
    "which", [pytest.param("first", marks=pytest.mark.long), "random", pytest.param("last", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", CLASSES)
def test_a_flipped_byte_is_named_with_its_part_and_repair_makes_it_equal_again(
    name: str, which: str, copied: Finished, finished: Finished
) -> None:
    (path,) = copied.store.root.glob(CLASSES[name])
    flip(path, place_in(path, which))
    found = [str(each) for each in integrity.verify(copied.store, full=True)]
    assert len(found) == 1
    assert str(path) in found[0]
    assert "/parts/" not in str(path) or ", part 1: " in found[0]
    if which == "random":  # the others end alike, and each takes a second
        assert mended(copied) == tree(finished.store.root)


@pytest.mark.parametrize("name", CLASSES)
def test_a_missing_file_is_named_even_by_the_quick_check(name: str, copied: Finished, finished: Finished) -> None:
    if name == "figures":
        pytest.skip("a run need not have been judged")
    (path,) = copied.store.root.glob(CLASSES[name])
    path.unlink()
    found = [str(each) for each in integrity.verify(copied.store, full=False)]
    assert any(str(path) in each for each in found)


@pytest.mark.parametrize(
    "name", ["manifest of tokens", "generation list of activations", "record of features", "shard"]
)
def test_a_run_mends_what_is_missing_without_being_told(name: str, copied: Finished, finished: Finished) -> None:
    (path,) = copied.store.root.glob(CLASSES[name])
    path.unlink()
    stages.run(Lineage(copied.store, copied.recipe), quiet())
    assert tree(copied.store.root) == tree(finished.store.root)


def test_files_that_a_file_manager_leaves_in_every_folder_stop_nothing(copied: Finished, finished: Finished) -> None:
    for folder in [path for path in copied.store.root.rglob("*") if path.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"Bud1")
    stages.run(Lineage(copied.store, copied.recipe), quiet())
    assert [str(found) for found in integrity.verify(copied.store, full=False)] == []
    kept = {name: content for name, content in tree(copied.store.root).items() if not name.endswith(".DS_Store")}
    assert kept == tree(finished.store.root)


def test_collect_makes_exactly_the_damaged_parts_again(copied: Finished) -> None:
    target = Lineage(copied.store, copied.recipe).activations
    parts = target.published().parts
    flip(target.part_path(parts[1]) / f"{SITE}.zarr" / "c.0.0.0", 99)
    before = {part.index: (target.part_path(part) / "part.json").stat().st_mtime_ns for part in parts}
    for found in list(integrity.verify(copied.store, full=True)):
        integrity.repair(found)
    collect.run(Lineage(copied.store, copied.recipe), quiet())
    after = {part.index: (target.part_path(part) / "part.json").stat().st_mtime_ns for part in parts}
    assert [index for index in before if before[index] != after[index]] == [1]


def read_by_feed(copied: Finished) -> object:
    feed = train.open_feed(Lineage(copied.store, copied.recipe))
    return [batch for batch, _ in zip(feed.batches(), range(feed.batches_per_epoch), strict=False)]


def read_held_out(copied: Finished) -> object:
    lineage = Lineage(copied.store, copied.recipe)
    stored = lineage.activations
    return list(held_out_rows(TokenSelection(lineage.tokens), stored, choose_site(stored_sites(stored), SITE), 10**9))


def read_by_encoder(copied: Finished) -> object:
    run = Ancestors(copied.store, Lineage(copied.store, copied.recipe).features)
    encoder = encode.encoder_of(run, run.selection(), copied.recipe.features)
    with quiet().bar("features", None, "tokens") as bar:
        return [encode_together([encoder], part, bar)[0] for part in encoder.stored.published().parts]


@pytest.mark.parametrize("read", [read_by_feed, read_held_out, read_by_encoder])
def test_a_deleted_shard_is_never_read_as_zeros(read: Callable[[Finished], object], copied: Finished) -> None:
    for path in copied.store.root.glob("activations/*/parts/*/*.zarr/c.0.0.0"):
        path.unlink()
    with pytest.raises(UserError, match=r"verify --full --repair"):
        read(copied)


def test_the_marker_of_a_store_is_mended(copied: Finished, finished: Finished) -> None:
    flip(copied.store.root / "store.json", 3)
    with pytest.raises(UserError, match=r"store\.json is missing or damaged"):
        Store.open(copied.store.root)
    assert "written again" in str(integrity.repair_marker(copied.store))
    assert integrity.repair_marker(copied.store) is None
    assert tree(copied.store.root) == tree(finished.store.root)


def listed(store: Store, grace_seconds: float) -> set[Path]:
    return {each.path for each in garbage.collect_garbage(store, grace_seconds, remove=False).garbage}


def test_gc_lists_what_no_generation_lists_and_keeps_what_readers_may_have_open(copied: Finished) -> None:
    target = Lineage(copied.store, copied.recipe).activations
    first = target.published()
    shutil.copytree(target.part_path(first.parts[0]), target.path / "parts" / "000009-00000000")
    (copied.store.root / "tmp" / "saes-gone-00000000").mkdir()
    target.publish(first.parts[:-1])
    shutil.copytree(target.part_path(first.parts[0]), target.path / "parts" / "000009-00000000", dirs_exist_ok=True)
    old = target.list_path(1)
    assert listed(copied.store, 3600) == {copied.store.root / "tmp" / "saes-gone-00000000"}
    found = listed(copied.store, 0)
    parts = target.path / "parts"
    assert found == {
        old, parts / "000009-00000000", parts / first.parts[-1].folder, copied.store.root / "tmp" / "saes-gone-00000000"
    }  # fmt: skip
    assert {each.path for each in garbage.collect_garbage(copied.store, 0, remove=True).garbage} == found
    assert listed(copied.store, 0) == set()
    assert target.published().parts == first.parts[:-1]


def test_gc_leaves_alone_what_is_being_written(copied: Finished) -> None:
    target = Lineage(copied.store, copied.recipe).activations
    with target.writing():
        target.work.mkdir(parents=True)
        (target.path / "parts" / "000009-00000000").mkdir()
        os.utime(target.path / "parts" / "000009-00000000", (0, 0))
        for remove in (False, True):
            done = garbage.collect_garbage(copied.store, 0, remove)
            assert done.garbage == []
            assert [f"{target.id}: process {os.getpid()}" in why for why in done.left_alone] == [True]
