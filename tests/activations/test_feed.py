"""Shuffled minibatches: every training row once an epoch, inside its pool, in an order that can be found again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.activations import shards
from saeflow.activations.epoch import TrainingBlocks, plan_epoch
from saeflow.activations.feed import Feed, aligned_held_out_rows, held_out_rows
from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import choose_site
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.train import open_feed
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import FeedConfig
from saeflow.runtime.errors import UserError
from saeflow.store.records import PartRecord
from saeflow.store.store import Store
from tests.support.small_pipeline import (
    CONTEXT_LENGTH,
    SITE,
    WIDTH,
    a_table,
    brought_data,
    quiet,
    recipe_data,
    write_table,
)

SIZE, SEED = st.integers(1, 60), st.integers(0, 2**32)


@settings(deadline=None)
@given(n_rows=st.integers(1, 500), block_rows=SIZE, pool_blocks=SIZE, batch_rows=SIZE, seed=SEED, epoch=SIZE)
def test_an_epoch_takes_every_row_once_and_stays_inside_its_pool(
    n_rows, block_rows, pool_blocks, batch_rows, seed, epoch
):
    blocks = np.split(np.arange(n_rows), range(block_rows, n_rows, block_rows))
    taken, visited = [], []
    for pool in plan_epoch(blocks.__getitem__, len(blocks), pool_blocks, batch_rows, seed, epoch):
        assert 1 <= len(pool.blocks) <= pool_blocks
        visited.extend(pool.blocks)
        sizes = [len(rows) for rows in pool.batches]
        assert 1 <= min(sizes) <= max(sizes) <= batch_rows
        assert max(sizes) - min(sizes) <= 1
        for rows in pool.batches:
            assert np.isin(rows // block_rows, pool.blocks).all()
            taken.extend(rows)
    assert sorted(taken) == list(range(n_rows))
    assert sorted(visited) == list(range(len(blocks)))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=20), pool_blocks=SIZE, batch_rows=SIZE, seed=SEED)
def test_blocks_may_have_any_number_of_rows_or_none(sizes, pool_blocks, batch_rows, seed):
    ends = np.cumsum(sizes)
    blocks = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    pools = list(plan_epoch(blocks.__getitem__, len(blocks), pool_blocks, batch_rows, seed))
    assert sorted(row for pool in pools for rows in pool.batches for row in rows) == list(range(ends[-1]))


def test_the_plan_follows_from_seed_and_epoch_alone():
    blocks = np.arange(400).reshape(20, 20)

    def order(seed, epoch):
        return [
            r
            for p in plan_epoch(blocks.__getitem__, 20, 4, 16, seed, epoch)
            for rows in p.batches
            for r in rows.tolist()
        ]

    assert order(3, 0) == order(3, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0)[:6] == [130, 45, 59, 386, 133, 49]


@given(sequences=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8), block=st.integers(1, 6))
def test_blocks_cover_the_training_sequences_and_nothing_else(sequences, block):
    parts = [
        PartRecord(index=i, counts={"n_train_sequences": train, "n_sequences": train + held}, files=[])
        for i, (train, held) in enumerate(sequences)
    ]
    covered = [(b.part.index, row) for b in TrainingBlocks(parts, block) for row in range(b.start, b.stop)]
    assert covered == [(i, row) for i, (train, _) in enumerate(sequences) for row in range(train)]
    assert all(0 < b.stop - b.start <= block for b in TrainingBlocks(parts, block))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A store whose every activation vector tells its row: a brought table with the row number in the first column."""
    folder = tmp_path_factory.mktemp("numbered")
    values = np.stack([np.arange(700), np.ones(700)], 1).astype(np.float32)
    data = brought_data(write_table(folder / "t.npy", values), activations={"dtype": "float32"})
    store, recipe = Store.create(folder / "store"), parse_recipe(data)
    import_table.run(Lineage(store, recipe), quiet())
    return store, recipe


def feed_of(numbered, **settings) -> Feed:
    store, recipe = numbered
    config = FeedConfig(**{"batch_rows": 64, "block_bytes": 400, "pool_bytes": 3200} | settings)
    return open_feed(Lineage(store, recipe.model_copy(update={"feed": config})))


def take(feed: Feed, n: int, skip: int = 0) -> list[list[int]]:
    """Row numbers of the next batches."""
    batches = feed.batches(skip)
    found = [batch[:, 0].long().tolist() for batch in itertools.islice(batches, n)]
    batches.close()
    return found


def test_each_epoch_gives_every_row_once_in_another_order(numbered):
    feed = feed_of(numbered)
    n = feed.batches_per_epoch
    assert feed.n_rows == 700
    assert feed.pool_blocks == 4
    both = take(feed, 2 * n)
    first, second = ([row for batch in half for row in batch] for half in (both[:n], both[n:]))
    assert sorted(first) == sorted(second) == list(range(700))
    assert first != second


def test_the_batches_are_those_of_the_plan(numbered):
    feed = feed_of(numbered)
    starts = np.array([part.counts["first_sequence"] for part in (block.part for block in feed.blocks)])
    starts += [block.start for block in feed.blocks]
    planned = [rows for pool in feed.pools(0) for rows in pool.batches]
    wanted = [(starts[rows // feed.stride] + rows % feed.stride).tolist() for rows in planned]
    assert take(feed, len(planned)) == wanted


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(0, 40), share=st.floats(0, 1, exclude_max=True), about=st.sampled_from([
    {}, {"pool_bytes": 1 << 20}, {"block_bytes": 80}, {"batch_rows": 7},
]))  # fmt: skip
def test_the_activations_at_a_rows_whereabouts_are_those_of_the_row(numbered, batch, share, about):
    feed = feed_of(numbered, **about)
    [rows] = take(feed, 1, batch)
    row = int(share * len(rows))
    place = feed.locate(batch, row)
    assert (place.sequence, place.position) == (rows[row], 0)
    assert feed_of(numbered, **about).locate(batch, row) == place, "the plan alone says so"


@pytest.mark.parametrize("settings", [{}, {"pool_bytes": 1 << 20}, {"batch_rows": 1000}, {"block_bytes": 80}])
def test_skipping_n_batches_gives_what_follows_them(numbered, settings):
    feed = feed_of(numbered, **settings)
    n = feed.batches_per_epoch
    whole = take(feed, 2 * n + 2)
    for skip in {0, 1, n - 1, n, n + 1, 2 * n}:
        assert take(feed_of(numbered, **settings), 2, skip) == whole[skip : skip + 2]


def test_the_same_seed_gives_the_same_order_and_another_seed_another(numbered):
    one, same, other = (take(feed_of(numbered, seed=seed), 5) for seed in (1, 1, 2))
    assert one == same != other


def test_a_budget_below_one_block_read_and_one_mixed_is_refused_with_both_numbers(numbered):
    with pytest.raises(UserError) as caught:
        feed_of(numbered, pool_bytes=799)
    assert str(caught.value) == (
        "feed.pool_bytes is 799 B, but one block being mixed and one being read take 800 B.\n"
        "Set feed.pool_bytes to at least 800 B, or feed.block_bytes to at most 399 B."
    )
    with pytest.raises(UserError, match=r"to at least 800 B\.$"):  # no block is smaller than a sequence
        feed_of(numbered, pool_bytes=1)
    assert feed_of(numbered, pool_bytes=800).pool_blocks == 1


def rows_by_place(store, recipe):
    """Stored vectors, and which are training tokens and which held-out ones."""
    source, target = Lineage(store, recipe).tokens, Lineage(store, recipe).activations
    site = choose_site(stored_sites(target), SITE)
    values, train, held = [], [], []
    for token_part, part in zip(source.published().parts, target.published().parts, strict=True):
        mask = token_parts.read_part(source, token_part)[1]
        values.append(shards.open_site(target, part, site).read(slice(None)).reshape(-1, WIDTH))
        is_train = np.arange(len(mask))[:, None] < part.counts["n_train_sequences"]
        train.append((mask & is_train).reshape(-1))
        held.append((mask & ~is_train).reshape(-1))
    return torch.cat(values).float(), np.concatenate(train), np.concatenate(held)


def test_whereabouts_pass_over_padding_held_out_and_skipped_tokens(tmp_path, ingredients, progress):
    store = Store.create(tmp_path / "store")
    data = recipe_data(
        ingredients, tokens={"packing": "isolated"}, activations={"skip_positions": [0, 3]},
        feed={"batch_rows": 100, "block_bytes": 4096, "pool_bytes": 20_000},
    )  # fmt: skip
    recipe = parse_recipe(data)
    tokens.run(Lineage(store, recipe), progress)
    collect.run(Lineage(store, recipe), progress)
    feed, target = open_feed(Lineage(store, recipe)), Lineage(store, recipe).activations
    parts = {part.index: part for part in target.published().parts}
    for batch in (0, 1, feed.batches_per_epoch + 2):
        batches = feed.batches(batch)
        values = next(batches)
        batches.close()
        for row in range(0, len(values), 7):
            place = feed.locate(batch, row)
            array = shards.open_site(target, parts[place.part], feed.site)
            at = place.sequence - parts[place.part].counts["first_sequence"]
            torch.testing.assert_close(array.read(slice(at, at + 1))[0, place.position], values[row], rtol=0, atol=0)


def test_the_bytes_read_are_counted(numbered):
    small, large = feed_of(numbered), feed_of(numbered, pool_bytes=1 << 20)
    assert small.n_bytes_read == 0
    take(large, 3 * large.batches_per_epoch)
    assert large.n_bytes_read == 700 * 8, "what fits in half a pool is read once"
    take(small, small.batches_per_epoch)
    assert 700 * 8 <= small.n_bytes_read <= 2 * 700 * 8


def multiset(values: torch.Tensor) -> list[bytes]:
    return sorted(row.numpy().tobytes() for row in values)


@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
@pytest.mark.parametrize("feed", [{"batch_rows": 100}, {"batch_rows": 100, "block_bytes": 4096, "pool_bytes": 20_000}])
def test_held_out_and_masked_rows_never_appear_and_all_others_do(tmp_path, ingredients, progress, packing, feed):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(recipe_data(ingredients, tokens={"packing": packing}, feed=feed))
    tokens.run(Lineage(store, recipe), progress)
    collect.run(Lineage(store, recipe), progress)
    values, train, held = rows_by_place(store, recipe)
    assert held.sum() > 500
    assert (~train & ~held).sum() > 10
    reader = open_feed(Lineage(store, recipe))
    batches = reader.batches()
    epoch = torch.cat(list(itertools.islice(batches, reader.batches_per_epoch)))
    batches.close()
    assert reader.n_rows == train.sum()
    assert multiset(epoch.float()) == multiset(values[train])
    site, source, target = reader.site, Lineage(store, recipe).tokens, Lineage(store, recipe).activations
    for limit in (10**9, 300, 1):
        rows = torch.cat(list(held_out_rows(TokenSelection(source), target, site, limit)))
        torch.testing.assert_close(rows, values[held][:limit], rtol=0, atol=0)
    assert values.shape[0] % CONTEXT_LENGTH == 0


@pytest.mark.parametrize("limit", [10**9, 300, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("skip", [pytest.param([], marks=pytest.mark.long), [0, 15]])
def test_held_out_rows_of_several_sites_are_the_same_tokens(tmp_path, ingredients, progress, limit, skip):
    sites = [SITE, "transformer.h.1", "transformer.h.0.mlp.c_fc:input"]
    about = {"sites": sites, "chunk_bytes": 2048, "shard_bytes": 4096, "skip_positions": skip}
    recipe = parse_recipe(recipe_data(ingredients, activations=about, sae={"site": SITE}))
    store = Store.create(tmp_path / "store")
    tokens.run(Lineage(store, recipe), progress)
    target = collect.run(Lineage(store, recipe), progress)
    used = TokenSelection.of(Lineage(store, recipe).tokens, recipe.activations)
    chosen = [choose_site(stored_sites(target), name) for name in sites]
    found = list(aligned_held_out_rows(used, target, chosen, limit))
    for site, rows in zip(chosen, zip(*found, strict=True), strict=True):
        wanted = []
        for part in target.published().parts:
            held = slice(part.counts["n_train_sequences"], None)
            mask = torch.from_numpy(used.mask(part.index, held))
            wanted.append(shards.open_site(target, part, site).read(held)[mask])
        torch.testing.assert_close(torch.cat(rows), torch.cat(wanted).float()[:limit], rtol=0, atol=0)
    row_bytes = 16 * 2  # of the narrow sites, whose shards hold the most rows
    assert max(len(rows[0]) for rows in found) <= 4096 // row_bytes
    if limit == 10**9:
        assert len(found) > len(target.published().parts)


def test_a_store_without_training_tokens_is_refused_instead_of_waited_for(tmp_path, ingredients, progress):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(recipe_data(ingredients, corpus={"held_out": 0.9999}))
    tokens.run(Lineage(store, recipe), progress)
    collect.run(Lineage(store, recipe), progress)
    with pytest.raises(UserError, match=r"no training tokens.*corpus\.held_out"):
        open_feed(Lineage(store, recipe))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batches_have_the_precision_of_the_disk(tmp_path, progress, dtype):
    data = brought_data(write_table(tmp_path / "t.npy", a_table()), activations={"dtype": dtype})
    store, recipe = Store.create(tmp_path / "store"), parse_recipe(data)
    import_table.run(Lineage(store, recipe), progress)
    feed = open_feed(Lineage(store, recipe))
    batches = feed.batches()
    epoch = torch.cat(list(itertools.islice(batches, feed.batches_per_epoch)))
    batches.close()
    wanted = torch.from_numpy(a_table()).to(getattr(torch, dtype))
    assert epoch.dtype == wanted.dtype
    assert multiset(epoch.float()) == multiset(wanted.float())
