"""Vectors that are too long are left out alike in training, encoding, judging and SQL, wherever they stand, and are
counted."""

from __future__ import annotations

import contextlib
import io
import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from saeflow.activations import shards
from saeflow.activations.feed import Feed, held_out_rows
from saeflow.activations.lengths import LENGTHS_FILE, longest_allowed
from saeflow.corpus import token_parts
from saeflow.features.files import read_tokens
from saeflow.pipeline import collect, compact, encode, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.judge import evaluate
from saeflow.pipeline.lifecycle import forget, ingest
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import query
from saeflow.query.connection import check, connect
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.terminal import Terminal
from saeflow.sae.formats.load import load_sae
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.support.command import Command
from tests.support.small_pipeline import Ingredients, a_table, brought_data, quiet, recipe_data, tree, write_table

STREAM = "transformer.h.0"
DOT = "."
"""Every token of this entry is an attention sink: about a hundred times as long as others, wherever it stands."""


@pytest.fixture(scope="session")
def sinks(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    """The small model, with delimiters as attention sinks."""
    folder = tmp_path_factory.mktemp("sinks")
    tokenizer = AutoTokenizer.from_pretrained(ingredients.model)
    model = GPT2LMHeadModel.from_pretrained(ingredients.model)
    weight = model.transformer.wte.weight.data
    dot = tokenizer.convert_tokens_to_ids(DOT)
    weight[dot] *= 100 * weight.norm(dim=1).median() / weight[dot].norm()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Ingredients(folder, ingredients.corpus)


def recipe_of(ingredients: Ingredients, above: float | None = 10.0, **changes: Any) -> Recipe:
    activations = {"sites": [STREAM], "skip_norms_above": above} | changes.pop("activations", {})
    activations = {name: value for name, value in activations.items() if value is not None}
    return parse_recipe(recipe_data(ingredients, activations=activations, **changes))


STAGES = (tokens, collect, train, encode, evaluate)


def run(store: Store, recipe: Recipe, progress: Progress | None = None) -> Lineage:
    for stage in STAGES:
        stage.run(Lineage(store, recipe), progress or quiet())
    return Lineage(store, recipe)


def loud() -> Progress:
    return Progress(Terminal(file=io.StringIO(), width=400))


def said(progress: Progress) -> str:
    return str(progress.console.file.getvalue())


def stored(lineage: Lineage) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """token_ids, vocabulary ids, lengths in float64, and whether each real token is held out."""
    source, found = lineage.tokens, []
    for part, tokens_of in zip(lineage.activations.published().parts, source.published().parts, strict=True):
        x = shards.open_site(lineage.activations, part, lineage.site).read(slice(None)).double()
        ids, real = token_parts.read_part(source, tokens_of)
        hidden = [each.document_id for each in source.published().hidden.get(part.index, ())]
        owners = pq.read_table(source.part_file(tokens_of, "tokens.parquet")).column("document_id").to_numpy()
        real &= ~np.isin(owners.reshape(real.shape), hidden)
        numbers = np.arange(real.size).reshape(real.shape) + part.counts["first_sequence"] * real.shape[1]
        held = np.arange(len(real))[:, None].repeat(real.shape[1], 1) >= part.counts["n_train_sequences"]
        found.append([each[real] for each in (numbers, ids, x.norm(dim=2).numpy(), held)])
    one, two, three, four = (np.concatenate(each) for each in zip(*found, strict=True))
    return one, two, three, four


@pytest.fixture(scope="module")
def made(sinks: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lineage, str]:
    progress = loud()
    store = Store.create(tmp_path_factory.mktemp("leave_out") / "store")
    return run(store, recipe_of(sinks), progress), said(progress)


def long_ids(lineage: Lineage) -> set[int]:
    numbers, _, lengths, _ = stored(lineage)
    return set(numbers[lengths > 10 * lineage.activations.fact("median_lengths")[STREAM]].tolist())


def test_the_median_is_that_of_the_first_tokens_and_lengths_are_those_of_the_stored_vectors(made):
    lineage, _ = made
    median = lineage.activations.fact("median_lengths")
    numbers, _, lengths, _ = stored(lineage)
    first = lengths[numbers < 1024]
    assert median == {STREAM: pytest.approx(np.median(first), rel=1e-3)}
    for part in lineage.activations.published().parts:
        table = pq.read_table(lineage.activations.part_file(part, LENGTHS_FILE))
        x = shards.open_site(lineage.activations, part, lineage.site).read(slice(None)).double()
        np.testing.assert_allclose(table.column(STREAM), x.norm(dim=2).reshape(-1), rtol=1e-6)


def test_sinks_at_delimiters_are_neither_trained_on_nor_judged_nor_encoded(made):
    lineage, _ = made
    numbers, ids, lengths, held = stored(lineage)
    long = np.isin(numbers, list(long_ids(lineage)))
    pieces = pq.read_table(lineage.tokens.own_file("vocab.parquet")).column("piece").to_pylist()
    assert {pieces[i] for i in ids[long]} == {DOT}
    assert 0 < long.sum() < len(long) / 5
    assert len(set((numbers[long] % 16).tolist())) > 10  # they stand anywhere
    feed = Feed(lineage.selection(), lineage.activations, lineage.site, lineage.recipe.feed)
    assert feed.n_rows == (~held & ~long).sum()
    batches = feed.batches()
    seen = torch.cat([next(batches) for _ in range(feed.batches_per_epoch)]).double().norm(dim=1).numpy()
    np.testing.assert_allclose(np.sort(seen), np.sort(lengths[~held & ~long]), rtol=1e-6)
    judged = torch.cat(list(held_out_rows(lineage.selection(), lineage.activations, lineage.site, 10**6)))
    np.testing.assert_allclose(judged.double().norm(dim=1), lengths[held & ~long], rtol=1e-6)
    run_artefact = lineage.features
    for part in run_artefact.published().parts:
        encoded = read_tokens(run_artefact, part, 0, 10**9)[0]
        assert not set(encoded.tolist()) & long_ids(lineage)
    assert run_artefact.published().total("n_tokens") == (~long).sum()
    where = feed.locate(0, 3)
    assert where.sequence * 16 + where.position not in long_ids(lineage)


def test_what_is_left_out_is_counted_and_said_with_its_tokens(made, saeflow: Command):
    lineage, log = made
    numbers, _, _, held = stored(lineage)
    long = np.isin(numbers, list(long_ids(lineage)))
    n, n_train = long.sum(), (long & ~held).sum()
    assert f"at {STREAM}, {n:,} of {len(long):,} vectors are longer than 10 times the median length" in log
    assert f"most often '.' ({n:,}) and are left out" in log
    assert f"train: {n_train:,} tokens are left out" in log
    assert f"features: left out {n:,} with vectors that are too long (most often '.': {n:,})" in log
    assert lineage.features.published().total("n_left_out_by_length") == n
    shown = saeflow("show", "small", "--store", str(lineage.store.root))
    assert f"{n:,} with vectors that are too long" in " ".join(shown.out.replace("│", " ").split())


def test_sql_knows_which_tokens_are_encoded(made):
    lineage, _ = made
    numbers, *_ = stored(lineage)
    with connect(lineage.store) as connection:
        encoded = {row["token_id"] for row in query(connection, "from stg_tokens_encoded").to_pylist()}
        assert encoded == set(numbers.tolist()) - long_ids(lineage)
        [row] = query(connection, "from left_out").to_pylist()
        assert (row["reason"], row["piece"], row["n_tokens"]) == ("length", DOT, len(long_ids(lineage)))
        rates = query(connection, "select sum(n_tokens) as n from stg_encoded_tokens").to_pylist()
        assert rates == [{"n": len(encoded)}]
        profile = "select sum(n_encoded) as n from position_profile(0)"
        assert query(connection, profile).to_pylist() == [{"n": len(encoded)}]
        misses = query(connection, "select token_id from near_misses(0, 1000)").to_pylist()
        assert not {row["token_id"] for row in misses} & long_ids(lineage)
        assert [name for name, rows in check(connection) if len(rows)] == []


@pytest.mark.long
def test_another_factor_collects_nothing_again(made, sinks, tmp_path):
    lineage, _ = made
    store = Store.find(shutil.copytree(lineage.store.root, tmp_path / "store"))
    before = tree(store.root / "activations")
    other = run(store, recipe_of(sinks, 2000.0))
    assert tree(store.root / "activations") == before
    assert other.sae != Lineage(store, lineage.recipe).sae
    assert other.features.published().total("n_left_out_by_length") == 0
    plain = run(store, recipe_of(sinks, None))
    assert tree(store.root / "activations") == before
    assert "skip_norms_above" not in plain.features.record.facts


@pytest.mark.long
def test_an_sae_trained_without_the_sinks_leaves_less_variance_of_the_others_unexplained(sinks, made, tmp_path):
    """Both SAEs are judged on the held-out tokens that are no sinks, with float64 sums of its own."""
    store = Store.find(shutil.copytree(made[0].store.root, tmp_path / "store"))
    with_sinks = run(store, recipe_of(sinks, None))
    x = torch.cat(list(held_out_rows(made[0].selection(), made[0].activations, made[0].site, 10**6)))
    before, after = (
        float((x - load_sae(each.sae.path).reconstruct(x)).double().square().sum() / (x - x.mean(0)).square().sum())
        for each in (with_sinks, made[0])
    )
    assert after < 0.7 * before
    judged = [evaluate.run(each, quiet()) for each in (with_sinks, made[0])]
    assert judged[1]["variance_unexplained"] == pytest.approx(after, rel=1e-3)
    assert judged[1]["n_tokens"] == len(x) < judged[0]["n_tokens"]
    assert all("loss_recovered_mean" in each for each in judged)


@pytest.mark.long
def test_activations_of_an_earlier_saeflow_are_measured_when_asked(made, sinks, tmp_path):
    old, lineage = Store.create(tmp_path / "store"), made[0]
    tokens.run(Lineage(old, lineage.recipe), quiet())
    begun = Lineage(old, lineage.recipe)
    facts = {k: v for k, v in lineage.activations.record.facts.items() if k != "median_lengths"}
    begun.activations.create(facts, [begun.tokens.id])
    run(old, lineage.recipe)
    again = Lineage(Store.find(old.root), lineage.recipe)
    assert all(file.name != LENGTHS_FILE for part in again.activations.published().parts for file in part.files)
    assert again.activations.fact("median_lengths")[STREAM] == pytest.approx(
        lineage.activations.fact("median_lengths")[STREAM], rel=1e-5
    )
    assert tree(again.sae.path) == tree(lineage.sae.path)
    assert list(verify(old, full=True)) == []
    for one, other in zip(again.features.published().parts, lineage.features.published().parts, strict=True):
        assert one.files == other.files


@pytest.mark.long
def test_compaction_and_forgetting_keep_what_is_left_out(made, tmp_path):
    store = Store.find(shutil.copytree(made[0].store.root, tmp_path / "store"))
    lineage = Lineage(store, made[0].recipe)
    before = long_ids(lineage)
    shutil.rmtree(lineage.activations.path / "parts")  # merging needs no activations
    compact.run(lineage, quiet(), enough=2)
    [part] = lineage.features.published().parts
    assert part.counts["n_left_out_by_length"] == len(before)
    assert pq.read_table(lineage.features.part_file(part, "left_out.parquet")).num_rows == len(before)
    with connect(store) as connection:
        assert [name for name, rows in check(connection) if len(rows)] == []
        row = query(connection, "select key from documents order by n_tokens desc limit 1").to_pylist()[0]
    shutil.copytree(made[0].activations.path / "parts", lineage.activations.path / "parts")
    lineage = Lineage(Store.find(store.root), lineage.recipe)
    forget.forget(lineage.store, [row["key"]], quiet())
    visible = set(stored(lineage)[0].tolist())
    with connect(lineage.store) as connection:
        rows = query(connection, "select token_id from stg_left_out").to_pylist()
        assert {row["token_id"] for row in rows} == before & visible < before
        assert [name for name, found in check(connection) if len(found)] == []
    assert list(verify(lineage.store, full=True)) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("read", "target", "any_long"),
    [(STREAM, "transformer.h.1.mlp.act", True), ("transformer.h.0.mlp.act", STREAM, False)],
)
def test_a_transcoder_leaves_out_what_is_long_where_it_reads(sinks, tmp_path, read, target, any_long):
    store = Store.create(tmp_path / "store")
    sae = {"site": read, "target_site": target}
    lineage = run(store, recipe_of(sinks, activations={"sites": [read, target]}, sae=sae))
    lengths, median = stored(lineage)[2], lineage.activations.fact("median_lengths")[read]
    assert lineage.features.published().total("n_left_out_by_length") == (lengths > 10 * median).sum()
    assert (lengths > 10 * median).any() == any_long


@pytest.mark.long
@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_rows_of_a_table_are_left_out_likewise(tmp_path, held_out):
    values = a_table(1400)
    dice = np.random.default_rng(1)
    planted = np.sort(dice.choice(1400, 40, replace=False))
    values[planted] *= (
        100 * np.median(np.linalg.norm(values, axis=1)) / np.linalg.norm(values[planted], axis=1)[:, None]
    )
    path = write_table(tmp_path / "rows.npy", values)
    data = brought_data(path, corpus={"held_out": held_out}, activations={"skip_norms_above": 10})
    store, recipe = Store.create(tmp_path / "store"), parse_recipe(data)
    for stage in (import_table, train, encode, evaluate):
        stage.run(Lineage(store, recipe), quiet())
    lineage = Lineage(store, recipe)
    with contextlib.closing(connect(store)) as connection:
        rows = query(connection, "select piece from left_out order by vocab_id").to_pylist()
    assert {row["piece"] for row in rows} == {f"row {number}" for number in planted}
    assert lineage.features.published().total("n_tokens") == 1400 - 40


@pytest.mark.long
def test_an_sae_from_elsewhere_is_encoded_anew_for_another_choice(made, sinks, tmp_path):
    store = Store.find(shutil.copytree(made[0].store.root, tmp_path / "store"))
    runs = []
    for above, positions in ((None, []), (10.0, []), (None, [0]), (None, [])):
        recipe = recipe_of(
            sinks, above, name="foreign", data="small", activations={"skip_positions": positions},
            sae={"source": str(made[0].sae.path)},
        )  # fmt: skip
        for stage in (train, encode):
            stage.run(Lineage(store, recipe), quiet())
        runs.append(Lineage(store, recipe).features)
    assert len({each.id for each in runs}) == 3
    assert runs[0] == runs[3]
    counts = [each.published().total("n_tokens") for each in runs]
    assert counts[1] == counts[0] - len(long_ids(made[0]))
    assert counts[2] < counts[0]


def test_a_text_of_ones_own_is_read_without_its_sinks(made):
    import saeflow

    with saeflow.open(made[0].store.root) as opened:
        rows = opened.ask("features_of_text", "The old sailor sees a robot. A cat.", 9999).to_pylist()
    assert rows
    assert all(row["piece"] != DOT for row in rows)


def test_half_zero_vectors_are_refused_with_the_way_out(tmp_path):
    values = a_table(300)
    values[:200] = 0
    data = brought_data(write_table(tmp_path / "rows.npy", values), activations={"skip_norms_above": 10})
    store, recipe = Store.create(tmp_path / "store"), parse_recipe(data)
    import_table.run(Lineage(store, recipe), quiet())
    with pytest.raises(UserError, match="skip_norms_above is 10, but the median length at table is 0: half"):
        train.run(Lineage(store, recipe), quiet())


def test_a_site_whose_median_is_zero_is_refused_before_it_is_collected(sinks, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(sinks.model)
    for values in model.transformer.h[0].mlp.c_proj.parameters():
        torch.nn.init.zeros_(values)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(sinks.model).save_pretrained(tmp_path / "model")
    about = {"sites": ["transformer.h.0.mlp", STREAM]}
    recipe = recipe_of(
        Ingredients(tmp_path / "model", sinks.corpus), activations=about, sae={"site": about["sites"][0]}
    )
    store = Store.create(tmp_path / "store")
    tokens.run(Lineage(store, recipe), quiet())
    with pytest.raises(UserError, match=r"skip_norms_above is 10, but the median length at transformer.h.0.mlp is 0"):
        collect.run(Lineage(store, recipe), quiet())
    assert not Lineage(store, recipe).activations.exists()


@pytest.mark.parametrize("above", [1, 0.5, -3, 0])
def test_a_factor_that_would_leave_out_half_is_refused(sinks, above):
    with pytest.raises(UserError, match="skip_norms_above is"):
        recipe_of(sinks, above)


def test_sinks_that_no_position_names_are_said_with_the_setting(sinks, tmp_path):
    progress, store, recipe = loud(), Store.create(tmp_path / "store"), recipe_of(sinks, None)
    for stage in (tokens, collect):
        stage.run(Lineage(store, recipe), progress)
    assert "Set activations.skip_norms_above = 10; nothing is collected again." in said(progress)
    assert "most often '.'" in said(progress)


def test_all_reasons_are_counted_once_each(made, sinks, tmp_path):
    store = Store.find(shutil.copytree(made[0].store.root, tmp_path / "store"))
    recipe = recipe_of(sinks, activations={"skip_positions": [0, -1], "skip_special": ["e", DOT]})
    lineage = run(store, recipe)
    numbers, ids, *_ = stored(lineage)
    at = np.isin(numbers % 16, [0, 15])
    pieces = np.array(pq.read_table(lineage.tokens.own_file("vocab.parquet")).column("piece").to_pylist())
    special = np.isin(pieces[ids], ["e", DOT]) & ~at
    with contextlib.closing(connect(store, lineage.features.id)) as connection:
        rows = query(connection, "select reason, sum(n_tokens)::int as n from left_out group by reason").to_pylist()
    assert {row["reason"]: row["n"] for row in rows} == {"position": at.sum(), "special": special.sum()}
    total = lineage.features.published().total
    assert [total(f"n_left_out_by_{why}") for why in ("position", "special", "length")] == [at.sum(), special.sum(), 0]
    assert longest_allowed(lineage.selection(), lineage.activations, lineage.site) is not None


def files_of(run_artefact: Artefact) -> list[dict[str, str]]:
    return [{file.name: file.checksum for file in part.files} for part in run_artefact.published().parts]


@pytest.mark.long
@pytest.mark.parametrize("site", [STREAM, "transformer.h.0.mlp.act"])
def test_without_stored_activations_the_same_tokens_are_left_out_byte_for_byte(sinks, tmp_path, site):
    store, sites, source = Store.create(tmp_path / "store"), [STREAM, "transformer.h.0.mlp.act"], tmp_path / "sae"
    shutil.copytree(run(store, recipe_of(sinks, activations={"sites": sites}, sae={"site": site})).sae.path, source)
    runs = []
    for keep in (True, False):
        about: dict[str, Any] = {"activations": {"sites": sites, "keep": keep}, "name": f"keep_{keep}".lower()}
        recipe = recipe_of(sinks, **about, sae={"source": str(source), "site": site})
        runs.append(run(Store.create(tmp_path / f"store {keep}"), recipe))
    kept, one_pass = (each.features for each in runs)
    assert files_of(kept) == files_of(one_pass)
    assert [p.counts for p in kept.published().parts] == [p.counts for p in one_pass.published().parts]
    assert (kept.published().total("n_left_out_by_length") > 0) == (site == STREAM)
    figures = [evaluate.run(each, quiet()) for each in runs]
    for name in ("n_tokens", "l0", "silent", "density_histogram", "n_predicted"):
        assert figures[0][name] == figures[1][name]
    for name in ("variance_unexplained", "loss_recovered_mean"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-9)
    assert runs[0].activations.fact("median_lengths") == runs[1].activations.fact("median_lengths")
    compact.run(runs[1], quiet(), enough=2)
    with contextlib.closing(connect(runs[1].store)) as connection:
        assert [name for name, rows in check(connection) if len(rows)] == []


@pytest.mark.long
def test_a_sample_to_train_on_and_the_corpus_share_one_median(sinks, tmp_path):
    recipe = recipe_of(sinks, activations={"keep": False}, train={"share": 0.4})
    lineage = run(Store.create(tmp_path / "store"), recipe)
    sample = lineage.training.activations
    assert sample != lineage.activations
    assert sample.fact("median_lengths") == lineage.activations.fact("median_lengths")
    assert lineage.features.published().total("n_left_out_by_length") > 0


def collected(store: Store, recipe: Recipe, progress: Progress) -> Lineage:
    for stage in (tokens, collect):
        stage.run(Lineage(store, recipe), progress)
    return Lineage(store, recipe)


def test_a_sample_that_is_stored_after_the_corpus_was_encoded_takes_its_median(made, sinks, tmp_path):
    store, about = Store.create(tmp_path / "store"), {"activations": {"keep": False}}
    whole = collected(store, recipe_of(sinks, **about, sae={"source": str(made[0].sae.path)}), quiet())
    before = whole.activations.fact("median_lengths")
    lineage = collected(store, recipe_of(sinks, **about, train={"share": 0.4}), quiet())
    assert lineage.activations == whole.activations != lineage.training.activations
    assert lineage.training.activations.fact("median_lengths") == before


@pytest.mark.parametrize("above", [None, 10.0])
def test_one_pass_says_of_the_first_tokens_which_are_long_unless_they_are_left_out(made, sinks, tmp_path, above):
    progress, source = loud(), str(made[0].sae.path)
    recipe = recipe_of(sinks, above, activations={"keep": False}, sae={"source": source})
    lineage = collected(Store.create(tmp_path / "store"), recipe, progress)
    numbers, _, lengths, _ = stored(made[0])
    n_first = min(1024, lineage.tokens.published().parts[0].counts["n_sequences"] * 16)
    first, median = lengths[numbers < n_first], lineage.activations.fact("median_lengths")[STREAM]
    n = (first > 10 * median).sum()
    words = (
        f"activations: at {STREAM}, {n} of the first {len(first):,} vectors are longer than 10 times the median length "
        f"{median:,.4g}, most often '.' ({n}).\nUnless the SAE was trained on such vectors, set "
        "activations.skip_norms_above = 10."
    )
    assert n
    assert (words in said(progress)) == (above is None)


@pytest.mark.long
def test_documents_that_come_later_are_measured_by_the_first_median(sinks, tmp_path):
    store = Store.create(tmp_path / "store")
    first = run(store, recipe_of(sinks, corpus={"share": 0.4}))
    before = first.activations.fact("median_lengths")
    ingest.run(Lineage(store, recipe_of(sinks)), quiet())
    lineage = Lineage(Store.find(store.root), recipe_of(sinks))
    assert lineage.features.id == first.features.id
    assert lineage.activations.fact("median_lengths") == before
    with contextlib.closing(connect(lineage.store)) as connection:
        rows = query(connection, "select token_id from stg_left_out").to_pylist()
        encoded = query(connection, "from stg_tokens_encoded").to_pylist()
        assert [name for name, found in check(connection) if len(found)] == []
    numbers, *_ = stored(lineage)
    assert {row["token_id"] for row in rows} == long_ids(lineage)
    assert {row["token_id"] for row in encoded} == set(numbers.tolist()) - long_ids(lineage)
