"""Sequences through the model to disk: what is stored is what the model gave."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from saeflow.activations import shards as arrays
from saeflow.activations.shards import stored_sites
from saeflow.activations.writer import ArrayWriter
from saeflow.corpus import token_parts
from saeflow.model.load import load_model
from saeflow.model.sites import Site, SiteReader, choose_site
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum
from saeflow.store.storage.folder import Folder
from saeflow.store.store import Store
from tests.support.small_pipeline import (
    CONTEXT_LENGTH,
    SITE,
    WIDTH,
    a_table,
    brought_data,
    quiet,
    recipe_data,
    tree,
    write_corpus,
    write_table,
)

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def with_tokens(tmp_path, finished) -> Store:
    """A store in which only the tokens stage has run."""
    new = Store.create(tmp_path / "store")
    shutil.copytree(finished.store.root / "tokens", new.root / "tokens")
    return new


def collected(where: Store, ingredients, progress, **changes):
    """Recipe and artefact after the stage."""
    recipe = parse_recipe(recipe_data(ingredients, **changes))
    tokens.run(Lineage(where, recipe), progress)
    return recipe, collect.run(Lineage(where, recipe), progress)


def stored(artefact, name: str = SITE) -> torch.Tensor:
    """All sequences of a site (S, T, D)."""
    site = choose_site(stored_sites(artefact), name)
    parts = artefact.published().parts
    return torch.cat([arrays.open_site(artefact, p, site).read(slice(None)) for p in parts])


def outputs(recipe, where: Store, name: str = SITE) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module gives (S, T, D) when the whole model runs, sequence after sequence, and the mask."""
    model, seen = load_model(recipe.model), []
    model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(output))
    source = Lineage(where, recipe).tokens
    masks = []
    for part in source.published().parts:
        vocab_ids, mask = token_parts.read_part(source, part)
        masks.append(torch.from_numpy(mask))
        for ids, real in zip(vocab_ids, mask, strict=True):
            with torch.no_grad():
                model(torch.from_numpy(ids)[None], attention_mask=torch.from_numpy(real)[None])
    return torch.cat(seen), torch.cat(masks)


@pytest.fixture(scope="module", params=["concatenated", "isolated"])
def packed(request, ingredients, tmp_path_factory):
    """A packing, a store of tokens packed so, and the model's own outputs on them."""
    where = Store.create(tmp_path_factory.mktemp("packed") / "store")
    recipe = parse_recipe(recipe_data(ingredients, tokens={"packing": request.param}))
    tokens.run(Lineage(where, recipe), quiet())
    return request.param, where, *outputs(recipe, where)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_rows_are_the_models_own_output_in_the_precision_of_the_disk(packed, ingredients, progress, dtype):
    packing, where, wanted, mask = packed
    changes = {"activations": {"dtype": dtype}, "tokens": {"packing": packing}}
    _, artefact = collected(where, ingredients, progress, **changes)
    got = stored(artefact)
    assert got.dtype == STORED[dtype]
    assert got.shape == wanted.shape == (mask.shape[0], CONTEXT_LENGTH, WIDTH)
    assert packing == "concatenated" or not mask.all()
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}[dtype]
    torch.testing.assert_close(got[mask].float(), wanted[mask], rtol=tolerance, atol=2e-6)


def test_several_sites_are_stored_in_one_pass_each_as_if_alone(with_tokens, ingredients, progress, finished):
    both = {"activations": {"sites": ["transformer.h.*.mlp.act", "transformer.h.0.ln_2:input"]}}
    _, artefact = collected(with_tokens, ingredients, progress, **both)
    assert stored_sites(artefact) == [
        Site("transformer.h.0.ln_2:input", 16), Site(SITE, WIDTH), Site("transformer.h.1.mlp.act", WIDTH)
    ]  # fmt: skip
    alone = Lineage(finished.store, finished.recipe).activations
    torch.testing.assert_close(stored(artefact), stored(alone), rtol=0, atol=0)


def test_a_site_must_be_named_where_several_are_stored(with_tokens, ingredients, progress):
    _, artefact = collected(with_tokens, ingredients, progress, activations={"sites": ["transformer.h.*.mlp.act"]})
    assert choose_site(stored_sites(artefact), SITE).width == WIDTH
    for wrong in (None, "transformer.h.2.mlp.act"):
        with pytest.raises(UserError, match=r"sae\.site is .*; the sites are: transformer\.h\.0\.mlp\.act, "):
            choose_site(stored_sites(artefact), wrong)


@pytest.mark.parametrize("layout", [{"chunk_bytes": 1, "shard_bytes": 1}, {"chunk_bytes": 3000, "shard_bytes": 7000}])
def test_the_sizes_of_chunks_and_shards_change_no_value(with_tokens, ingredients, progress, finished, layout):
    _, artefact = collected(with_tokens, ingredients, progress, activations=layout)
    usual = Lineage(finished.store, finished.recipe).activations
    assert artefact.fp != usual.fp
    torch.testing.assert_close(stored(artefact), stored(usual), rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"activations": {"forward_batch": 5}}, {"threads": 2}])
def test_how_sequences_are_batched_and_threaded_changes_values_by_rounding_at_most(
    with_tokens, ingredients, progress, finished, change
):
    _, artefact = collected(with_tokens, ingredients, progress, **change)
    usual = Lineage(finished.store, finished.recipe).activations
    torch.testing.assert_close(stored(artefact), stored(usual), rtol=1e-3, atol=2e-6)


def test_parts_mirror_those_of_the_tokens(finished):
    source = Lineage(finished.store, finished.recipe).tokens.published().parts
    parts = Lineage(finished.store, finished.recipe).activations.published().parts
    assert [part.counts for part in parts] == [part.counts for part in source]


@pytest.mark.parametrize("n_kept", [0, 1, 4])
def test_collecting_goes_on_after_any_number_of_finished_parts_to_the_same_bytes(
    with_tokens, finished, progress, n_kept
):
    usual = Lineage(finished.store, finished.recipe).activations
    cut = Lineage(with_tokens, finished.recipe).activations
    shutil.copytree(usual.path, cut.path)
    for part in cut.published().parts[n_kept:]:
        shutil.rmtree(cut.part_path(part))
    shutil.rmtree(cut.path / "generations")
    (cut.path / "manifest.json").unlink()
    collect.run(Lineage(with_tokens, finished.recipe), progress)
    assert tree(cut.path) == tree(usual.path)


def test_a_flipped_byte_is_noticed_when_it_is_read(tmp_path, finished):
    usual = Lineage(finished.store, finished.recipe).activations
    shutil.copytree(usual.path, tmp_path / "activations" / usual.path.name)
    copy = Store(tmp_path).by_id(usual.id)
    path = next((copy.part_path(copy.published().parts[0]) / f"{SITE}.zarr").glob("c.*"))
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum") as caught:
        stored(copy)
    assert f"{SITE}.zarr" in str(caught.value)
    assert "verify --full --repair" in str(caught.value)


def test_a_flipped_byte_is_noticed_where_a_shard_is_read_in_part(tmp_path):
    config = ActivationsConfig(sites=[SITE], chunk_bytes=2 * 8 * 4 * 2, shard_bytes=8 * 8 * 4 * 2)
    layout = arrays.plan_layout(8, 8, 4, config)
    assert (layout.chunk, layout.shard) == (2, 8)
    writer = ArrayWriter(tmp_path / f"{SITE}.zarr", layout, "float16")
    writer.append(np.ones((8, 8, 4), np.float16))
    writer.close()
    shard = tmp_path / f"{SITE}.zarr" / "c.0.0.0"
    content = bytearray(shard.read_bytes())
    content[10] ^= 4
    shard.write_bytes(content)
    whole = SimpleNamespace(part_path=lambda part: tmp_path, storage=Folder(tmp_path))
    with pytest.raises(UserError, match="checksum"):
        arrays.open_site(whole, None, Site(SITE, 4)).read(slice(0, 2))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 40), chunk=st.integers(1, 9), per_shard=st.integers(1, 5), batch=st.integers(1, 12))
def test_shards_hold_the_bytes_that_zarr_would_write(tmp_path, n, chunk, per_shard, batch):
    values = np.random.default_rng(n).normal(size=(n, 3, 5)).astype(np.float16)
    mine, theirs = tmp_path / "mine.zarr", tmp_path / "theirs.zarr"
    for path in (mine, theirs):
        shutil.rmtree(path, ignore_errors=True)
    writer = ArrayWriter(mine, arrays.Layout(values.shape, chunk, chunk * per_shard), "float16")
    for start in range(0, n, batch):
        writer.append(values[start : start + batch])
    writer.close()
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.create_array(
            theirs, shape=values.shape, dtype="float16", chunks=(chunk, 3, 5), shards=(chunk * per_shard, 3, 5),
            compressors=[Crc32cCodec()], filters=None, fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
        )  # fmt: skip
        array[:] = values
    shards, as_zarr_writes = (
        {name: content for name, content in tree(path).items() if name != "zarr.json"} for path in (mine, theirs)
    )
    assert shards == as_zarr_writes
    assert (zarr.open_array(mine)[:] == values).all()
    assert writer.checksums == {name: checksum(mine / name) for name in shards}


def test_a_disk_that_cannot_be_written_past_its_cache_is_written_through_it(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr("os.open", refusing)
    values = np.ones((4, 2, 3), np.float16)
    writer = ArrayWriter(tmp_path / "a.zarr", arrays.Layout(values.shape, 2, 4), "float16")
    writer.append(values)
    writer.close()
    assert (zarr.open_array(tmp_path / "a.zarr")[:] == values).all()


def spoil(monkeypatch, value: float, at: tuple[int, int, int]) -> None:
    """Let the second batch of the model's output hold `value`."""
    real, calls = SiteReader.read, []

    def read(self, vocab_ids, mask):
        found = real(self, vocab_ids, mask)
        if len(vocab_ids) != 8:  # trials: of the context length, and of how long vectors are
            return found
        calls.append(None)
        if len(calls) == 2:
            found[SITE][at] = value
        return found

    monkeypatch.setattr(SiteReader, "read", read)


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (float("nan"), "float16", r"part 0, row 11 \(position 4, neuron 5\) is nan\. Nothing of this part was stored"),
        (float("inf"), "float32", r"part 0, row 11 \(position 4, neuron 5\) is inf"),
        (
            -70000.0,
            "float16",
            r"-70000 in part 0, row 11 .* overflows float16\.\nSet activations\.dtype to \"bfloat16\"",
        ),
    ],
)
def test_what_the_disk_cannot_hold_is_refused_with_part_and_row(
    with_tokens, ingredients, progress, monkeypatch, value, dtype, says
):
    spoil(monkeypatch, value, (3, 4, 5))  # batches of 8: row 11
    with pytest.raises(UserError, match=says):
        collected(with_tokens, ingredients, progress, activations={"dtype": dtype})
    (artefact,) = with_tokens.artefacts("activations")
    assert artefact.parts() == {}
    assert artefact.generation() is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_overflows_float16_fits_the_other_precisions(with_tokens, ingredients, progress, monkeypatch, dtype):
    spoil(monkeypatch, -70000.0, (3, 4, 5))
    _, artefact = collected(with_tokens, ingredients, progress, activations={"dtype": dtype})
    assert stored(artefact)[11, 4, 5].item() == pytest.approx(-70000, rel=4e-3)


def test_documents_that_are_all_empty_store_no_rows(tmp_path, ingredients, progress):
    empty = [{"key": key, "text": "", "source": "s", "title": "t"} for key in "abc"]
    corpus = write_corpus(tmp_path / "c.parquet", empty)
    where = Store.create(tmp_path / "store")
    _, artefact = collected(where, ingredients, progress, corpus={"files": [str(corpus)]})
    assert stored(artefact).shape == (0, CONTEXT_LENGTH, WIDTH)


class NearlyFull(Folder):
    def free_bytes(self):
        return 5000


def test_too_little_disk_is_refused_before_work_with_both_numbers(with_tokens, ingredients, progress):
    with pytest.raises(UserError, match=r"activations of 1 site.* needs about 2\d\d\.\d KiB, but .* has 4\.9 KiB free"):
        collected(Store(NearlyFull(with_tokens.root)), ingredients, progress)
    assert with_tokens.artefacts("activations") == []


def test_a_context_longer_than_the_model_reads_is_refused(with_tokens, ingredients, progress):
    with pytest.raises(UserError, match=r"tokens\.context_length is 65, but the model reads at most 64"):
        collected(with_tokens, ingredients, progress, tokens={"context_length": 65})


def test_collecting_before_tokens_says_what_to_run(tmp_path, ingredients, progress):
    recipe = parse_recipe(recipe_data(ingredients))
    with pytest.raises(UserError, match=r"tokens/small-.* is not finished\. .*saeflow run"):
        collect.run(Lineage(Store.create(tmp_path / "store"), recipe), progress)


SIZES = st.integers(1, 5000)


@given(n=st.integers(1, 300), length=st.integers(1, 20), width=st.integers(1, 20), chunk=SIZES, shard=SIZES)
def test_a_layout_keeps_to_the_sizes_asked_for_where_a_sequence_fits(n, length, width, chunk, shard):
    config = ActivationsConfig(chunk_bytes=chunk, shard_bytes=shard)
    layout = arrays.plan_layout(n, length, width, config)
    row_bytes = 2 * length * width
    assert layout.shape == (n, length, width)
    assert 1 <= layout.chunk <= n
    assert layout.shard % layout.chunk == 0
    assert layout.chunk * row_bytes <= max(chunk, row_bytes)
    assert layout.shard * row_bytes <= max(shard, layout.chunk * row_bytes)
    assert layout.shard < n + layout.chunk


@pytest.mark.parametrize("part_rows", [100, 300, 10_000])
def test_a_brought_table_is_stored_row_for_row_whatever_the_part_size(tmp_path, progress, part_rows):
    values = a_table()
    data = brought_data(
        write_table(tmp_path / "t.npy", values), activations={"part_rows": part_rows, "dtype": "float32"}
    )
    recipe = parse_recipe(data)
    source, artefact = import_table.run(Lineage(Store.create(tmp_path / "store"), recipe), progress)
    np.testing.assert_array_equal(stored(artefact, "table")[:, 0].numpy(), values)
    assert len(artefact.published().parts) == len(source.published().parts) == -(-len(values) // part_rows)
    before = tree(tmp_path / "store")
    import_table.run(Lineage(Store(tmp_path / "store"), recipe), progress)
    assert tree(tmp_path / "store") == before


def test_a_brought_row_that_is_not_finite_is_refused_before_anything_is_stored(tmp_path, progress):
    values = a_table()
    values[432, 7] = np.nan
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", values)))
    where = Store.create(tmp_path / "store")
    with pytest.raises(UserError, match=r"activations\.source: t\.npy has nan in row 432, neuron 7"):
        import_table.run(Lineage(where, recipe), progress)
    assert where.artefacts() == []


def test_a_table_that_changed_is_another_table(tmp_path, progress):
    where = Store.create(tmp_path / "store")
    for values in (a_table(50), a_table(40, seed=1)):
        recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", values), activations={"dtype": "float32"}))
        _, artefact = import_table.run(Lineage(where, recipe), progress)
        np.testing.assert_array_equal(stored(artefact, "table")[:, 0].numpy(), values)


def test_interrupted_bringing_is_finished_to_the_same_bytes(tmp_path, progress, monkeypatch):
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table())))
    for name in ("whole", "cut"):
        Store.create(tmp_path / name)
    import_table.run(Lineage(Store(tmp_path / "whole"), recipe), progress)
    real = import_table._bring_part

    def fail(*arguments):
        if arguments[-1] == 300:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(import_table, "_bring_part", fail)
        import_table.run(Lineage(Store(tmp_path / "cut"), recipe), progress)
    import_table.run(Lineage(Store(tmp_path / "cut"), recipe), progress)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
