"""Compressed activations: the same values, and damage is noticed as in those that are not."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.activations.shards import Layout, StoredArray, open_site, stored_sites
from saeflow.activations.writer import ArrayWriter, CompressedArrayWriter, open_writer
from saeflow.model.sites import choose_site
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.storage.folder import Folder
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.support.small_pipeline import a_table, brought_data, recipe_data, tree, write_table


def packed(path, values: np.ndarray, batch: int = 3) -> StoredArray:
    """Two sequences a chunk, four a shard."""
    writer = CompressedArrayWriter(path, Layout(values.shape, 2, 4), str(values.dtype))
    for start in range(0, len(values), batch):
        writer.append(values[start : start + batch])
    writer.close()
    return StoredArray(path, Folder(path.parent))


VALUES = np.random.default_rng(0).normal(size=(11, 3, 40)).astype(np.float16)


@pytest.mark.parametrize("batch", [1, 3, 4, 11])
def test_what_is_read_is_what_was_written_however_it_came(tmp_path, batch):
    values = VALUES.copy()
    values[4:8] = 0
    found = packed(tmp_path / "a.zarr", values, batch)
    assert not found._is_uncompressed
    for rows in (slice(0, 11), slice(3, 9), slice(10, 11), slice(5, 5)):
        np.testing.assert_array_equal(found.read(rows).numpy(), values[rows])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_pipeline_reads_the_same_values_compressed_or_not(tmp_path, progress, dtype):
    table = write_table(tmp_path / "t.npy", np.maximum(a_table(), 0))
    found = []
    for compression in ("none", "zstd"):
        data = brought_data(table, activations={"dtype": dtype, "compression": compression, "shard_bytes": 4000})
        where = Store.create(tmp_path / compression)
        _, artefact = import_table.run(Lineage(where, parse_recipe(data)), progress)
        site = choose_site(stored_sites(artefact), None)
        parts = artefact.published().parts
        found.append(torch.cat([open_site(artefact, p, site).read(slice(None)) for p in parts]))
        assert list(verify(where, full=True)) == []
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_two_collections_are_equal_byte_for_byte(tmp_path, ingredients, progress):
    recipe = parse_recipe(recipe_data(ingredients, activations={"compression": "zstd"}))
    for name in ("one", "two"):
        where = Store.create(tmp_path / name)
        tokens.run(Lineage(where, recipe), progress)
        collect.run(Lineage(where, recipe), progress)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON: keys and indices from the outside to the inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*place, key)
        yield from places_in(each, (*place, key))


def test_a_description_that_says_something_else_is_refused_or_changes_no_value(tmp_path):
    packed(tmp_path / "a.zarr", VALUES)
    file = tmp_path / "a.zarr" / "zarr.json"
    written = file.read_text()
    for *outer, last in places_in(json.loads(written)):
        for other in (None, "load", 7, -1, [], {}):
            about = json.loads(written)
            reduce(operator.getitem, outer, about)[last] = other
            file.write_text(json.dumps(about))
            with contextlib.suppress(UserError):
                found = StoredArray(tmp_path / "a.zarr", Folder(tmp_path)).read(slice(0, 3))
                if found.shape == VALUES[:3].shape:
                    np.testing.assert_array_equal(found.numpy(), VALUES[:3], err_msg=f"{outer} {last} {other}")


@pytest.mark.parametrize("place", ["first", "middle", "index"])
def test_a_flipped_byte_is_noticed(tmp_path, place):
    found = packed(tmp_path / "a.zarr", VALUES)
    file = tmp_path / "a.zarr" / "c.0.0.0"
    content = bytearray(file.read_bytes())
    content[{"first": 20, "middle": len(content) // 2, "index": -10}[place]] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        found.read(slice(0, 4))


@pytest.mark.parametrize("values", [VALUES, np.zeros_like(VALUES)], ids=["values", "zeros"])
def test_a_shard_that_is_gone_is_never_zeros(tmp_path, values):
    found = packed(tmp_path / "a.zarr", values)
    (tmp_path / "a.zarr" / "c.1.0.0").unlink()
    np.testing.assert_array_equal(found.read(slice(0, 4)).numpy(), values[:4])
    with pytest.raises(UserError, match="No such file"):
        found.read(slice(3, 5))


def test_without_compression_nothing_changes_its_name_or_its_writer(tmp_path, ingredients):
    usual = parse_recipe(recipe_data(ingredients))
    said = parse_recipe(recipe_data(ingredients, activations={"compression": "none"}))
    other = parse_recipe(recipe_data(ingredients, activations={"compression": "zstd"}))
    store = Store.create(tmp_path / "store")
    names = [Lineage(store, recipe).activations.fp for recipe in (usual, said, other)]
    assert names[0] == names[1] != names[2]
    assert "compression" not in Lineage(store, usual).activation_facts
    writer = open_writer(tmp_path / "a.zarr", Layout((1, 1, 1), 1, 1), ActivationsConfig())
    assert isinstance(writer, ArrayWriter)
