"""The figures of quality of stores, in closed form and against brute force; their sums are in test_metrics."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as tf

from saeflow.activations import shards
from saeflow.activations.shards import stored_sites
from saeflow.activations.sparse_values import SparseValues
from saeflow.corpus import token_parts
from saeflow.corpus.document import is_held_out
from saeflow.model.load import load_model
from saeflow.pipeline import collect, encode, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.judge import evaluate
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import ask
from saeflow.query.connection import check, connect
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import FeaturesConfig, SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_sae
from saeflow.store.records import read_checked, write_checked
from saeflow.store.store import Store
from tests.support.small_pipeline import (
    SITE,
    WIDTH,
    a_table,
    brought_data,
    quiet,
    recipe_data,
    tree,
    value_file,
    write_table,
)

X = torch.randint(-9, 10, (64, WIDTH), generator=torch.Generator().manual_seed(0)).float()
"""Small whole numbers: exact in 11 bits, and so is their mean over 64 rows in float32."""


def perfect() -> SparseAutoencoder:
    """Every neuron has a feature for its positive and one for its negative part."""
    sae = SparseAutoencoder(SAEConfig(architecture="relu", n_features=2 * WIDTH), WIDTH).eval()
    with torch.no_grad():
        both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
    return sae


def constant(value: torch.Tensor) -> SparseAutoencoder:
    """Nothing is active; the decoder bias is all there is."""
    sae = perfect()
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
        sae.b_dec.copy_(value)
    return sae


class Fake:
    """Does `what` to vectors; as if every neuron were a feature that always fires."""

    def __init__(self, what, width=WIDTH):
        self.what, self.config = what, SAEConfig(architecture="relu", n_features=width)

    def encode_sparse(self, x):
        n, width = x.shape
        ids = np.tile(np.arange(width, dtype=np.int32), n)
        return SparseValues(np.arange(n + 1) * width, ids, x.float().numpy().reshape(-1))

    def decode(self, sparse, x=None):
        return self.what(torch.from_numpy(sparse.values).view(len(sparse.row_starts) - 1, -1))

    def reconstruct(self, x):
        return self.decode(self.encode_sparse(x))


def identity() -> Fake:
    return Fake(lambda x: x)


def test_the_perfect_autoencoder_of_these_tests_is_perfect():
    assert (perfect().reconstruct(X) == X).all()
    assert (constant(X[3]).reconstruct(X) == X[3]).all()


@pytest.fixture(scope="module")
def rows(finished):
    """The held-out vectors of the finished store."""
    site = stored_sites(Lineage(finished.store, finished.recipe).activations)[0]
    return torch.cat(list(held_out(finished.store, finished.recipe, site)))


@pytest.fixture(scope="module")
def language_model(finished, rows):
    """Figures of the language model with any autoencoder in the place of the trained one."""

    def figures(sae, **how):
        return evaluate._language_model(Lineage(finished.store, finished.recipe), sae, rows.mean(0), quiet(), **how)

    return figures


def held_out(store, recipe, site):
    source, stored = Lineage(store, recipe).tokens, Lineage(store, recipe).activations
    for token_part, part in zip(source.published().parts, stored.published().parts, strict=True):
        mask = token_parts.read_part(source, token_part)[1][part.counts["n_train_sequences"] :]
        rows = shards.open_site(stored, part, site).read(slice(part.counts["n_train_sequences"], None))
        yield rows[torch.from_numpy(mask)].float()


def judged(finished, sae, **changes):
    return judge(Lineage(finished.store, finished.recipe.model_copy(update=changes)), sae, quiet())


def judge(lineage, sae, progress):
    return evaluate.judge_together(lineage, [sae], progress)[0].figures


def test_judging_needs_no_trained_autoencoder_and_no_features(finished, rows):
    figures = judged(finished, perfect())
    assert figures["n_tokens"] == len(rows)
    assert figures["variance_unexplained"] == pytest.approx(0, abs=1e-5)  # values keep 11 bits
    assert figures["l0"] == pytest.approx((perfect().encode_sparse(rows).values > 0).sum() / len(rows))
    assert figures["judged_on"] == "held-out documents"


def test_the_identity_explains_everything_and_the_mean_nothing(finished, rows):
    whole = judged(finished, identity())
    assert (whole["variance_unexplained"], whole["mean_squared_error"], whole["silent"]) == (0, 0, 0)
    assert whole["shrinkage"] == pytest.approx(1, abs=1e-9)
    assert whole["density_histogram"] == {"log10_from": [-0.5], "n_features": [WIDTH], "n_never": 0}
    mean = judged(finished, Fake(lambda x: rows.double().mean(0).expand(len(x), -1)))
    assert mean["variance_unexplained"] == pytest.approx(1, abs=1e-9)


def test_halving_every_vector_is_shrinkage_of_a_half(finished):
    assert judged(finished, Fake(lambda x: 0.5 * x))["shrinkage"] == pytest.approx(0.5, abs=1e-9)


def test_features_that_fire_on_no_held_out_token_are_silent(finished):
    figures = judged(finished, constant(torch.zeros(WIDTH)))
    assert (figures["silent"], figures["l0"]) == (2 * WIDTH, 0)
    assert figures["density_histogram"]["n_never"] == 2 * WIDTH


def assert_equal_figures(found, wanted, rel):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), name


@pytest.mark.parametrize("batch_rows", [1, 7, 100_000])
def test_figures_do_not_depend_on_the_batch(finished, batch_rows):
    sae = load_sae(Lineage(finished.store, finished.recipe).sae.path)
    found = judged(finished, sae, features=FeaturesConfig(batch_rows=batch_rows))
    assert_equal_figures(found, judged(finished, sae), rel=1e-9)


FLOAT32 = 1e-5
"""Relative error that float32 logits may leave in a loss when the passes that gave them had other shapes; sums add
none."""


@pytest.mark.parametrize("n_together", [1, 3, 50])
def test_figures_of_the_language_model_do_not_depend_on_how_many_sequences_run_together(language_model, n_together):
    sae = Fake(lambda x: 0.8 * x)
    assert_equal_figures(language_model(sae, n_together=n_together), language_model(sae), rel=FLOAT32)


@pytest.mark.long
def test_how_the_corpus_is_cut_into_parts_does_not_matter(tmp_path, ingredients, finished, progress):
    """One document a sequence and one sequence a pass: parts then hold the very same activations."""
    sae = load_sae(Lineage(finished.store, finished.recipe).sae.path)
    found = []
    for part_tokens in (200, 800, 10**6):
        about = {"packing": "isolated", "part_tokens": part_tokens}
        data = recipe_data(ingredients, tokens=about, activations={"forward_batch": 1})
        store, recipe = Store.create(tmp_path / str(part_tokens)), parse_recipe(data)
        tokens.run(Lineage(store, recipe), progress)
        n_parts = len(collect.run(Lineage(store, recipe), progress).published().parts)
        model = evaluate._language_model(Lineage(store, recipe), sae, torch.ones(WIDTH), progress)
        found.append((n_parts, judge(Lineage(store, recipe), sae, progress), model))
    assert found[0][0] > found[1][0] > found[2][0] == 1
    for _, figures, model in found[1:]:
        assert_equal_figures(figures, found[0][1], rel=1e-9)
        assert_equal_figures(model, found[0][2], rel=FLOAT32)


def test_how_a_table_is_cut_into_parts_does_not_matter(tmp_path, progress):
    path, found = write_table(tmp_path / "t.npy", a_table()), []
    for part_rows in (100, 300, 1000):
        recipe = parse_recipe(brought_data(path, activations={"part_rows": part_rows}))
        store = Store.create(tmp_path / str(part_rows))
        import_table.run(Lineage(store, recipe), progress)
        found.append(judge(Lineage(store, recipe), Fake(lambda x: x.relu(), 12), progress))
    assert_equal_figures(found[0], found[1], rel=1e-9)
    assert_equal_figures(found[0], found[2], rel=1e-9)


def test_the_identity_recovers_everything_and_takes_predictions_nowhere(language_model):
    quality = language_model(identity())
    assert quality["loss_sae"] == quality["loss"]
    assert quality["kl_sae"] == 0
    assert {quality[f"{figure}_recovered_{kind}"] for figure in ("loss", "kl") for kind in ("mean", "zero")} == {1}


def test_splicing_in_what_was_there_in_11_bits_recovers_nearly_all(language_model):
    quality = language_model(perfect())
    assert quality["loss_sae"] == pytest.approx(quality["loss"], abs=1e-3)
    assert 0 < quality["kl_sae"] < 1e-5
    assert quality["loss_recovered_zero"] == pytest.approx(1, abs=0.02)
    assert quality["loss_recovered_mean"] == pytest.approx(1, abs=0.05)
    assert quality["kl_recovered_mean"] == pytest.approx(1, abs=1e-3)


def test_splicing_in_the_mean_or_zero_recovers_nothing_against_that_ablation(language_model, rows):
    mean = language_model(constant(rows.mean(0)))
    assert (mean["loss_sae"], mean["kl_sae"]) == (mean["loss_mean_ablated"], mean["kl_mean_ablated"])
    assert (mean["loss_recovered_mean"], mean["kl_recovered_mean"]) == (0, 0)
    zero = language_model(constant(torch.zeros(WIDTH)))
    assert (zero["loss_sae"], zero["kl_sae"]) == (zero["loss_zero_ablated"], zero["kl_zero_ablated"])
    assert (zero["loss_recovered_zero"], zero["kl_recovered_zero"]) == (0, 0)
    assert len({zero["loss"], zero["loss_zero_ablated"], zero["loss_mean_ablated"]}) == 3
    assert zero["kl_recovered_mean"] == pytest.approx(1 - zero["kl_zero_ablated"] / zero["kl_mean_ablated"])


def test_the_divergence_of_ablation_is_that_of_float64_arithmetic_on_the_models_logits(finished, language_model, rows):
    quality, model = language_model(identity()), load_model(finished.recipe.model)
    mlp = model.get_submodule(SITE)
    sums = {"zero": 0.0, "mean": 0.0}
    for batch in evaluate._held_out_sequences(Lineage(finished.store, finished.recipe), evaluate._SEQUENCES):
        for kind, value in (("zero", torch.zeros(WIDTH)), ("mean", rows.mean(0))):
            runs = []
            for instead in (None, value):
                handle = mlp.register_forward_hook(
                    lambda module, inputs, output, instead=instead, used=batch.used: (
                        None if instead is None else torch.where(used[:, :, None], instead, output)
                    )
                )
                with torch.no_grad():
                    padding = None if batch.real.all() else batch.real
                    runs.append(model(batch.vocab_ids, attention_mask=padding).logits.double().log_softmax(-1))
                handle.remove()
            each = tf.kl_div(runs[1], runs[0], log_target=True, reduction="none").sum(-1)
            sums[kind] += each[:, :-1][batch.real[:, 1:]].sum().item()
    for kind, total in sums.items():
        assert quality[f"kl_{kind}_ablated"] == pytest.approx(total / quality["n_predicted"], rel=1e-9)
        assert total > 1


def test_logits_of_the_passes_that_are_compared_take_a_quarter_of_the_memory_at_most(finished):
    model, recipe = load_model(finished.recipe.model), finished.recipe.model_copy(update={"threads": 8})
    n_logits = recipe.tokens.context_length * model.config.vocab_size
    for room, wanted in ((0, (1, 1)), (1, (1, 1)), (3, (3, 1)), (9, (8, 1)), (17, (8, 2)), (10**6, (8, 4))):
        assert evaluate._room(model, recipe, 4 * room * n_logits * (8 + 3 * 4)) == wanted


READ, TARGET = "transformer.h.0.mlp:input", "transformer.h.0.mlp"


@pytest.fixture(scope="module")
def two_sites(ingredients, tmp_path_factory):
    """What a transcoder from an MLP's input to its output needs, and the MLP itself."""
    store = Store.create(tmp_path_factory.mktemp("two") / "store")
    about = {"sites": [READ, TARGET], "dtype": "float32", "forward_batch": 8}
    data = recipe_data(ingredients, activations=about, sae={"site": READ, "target_site": TARGET})
    recipe = parse_recipe(data)
    tokens.run(Lineage(store, recipe), quiet())
    collect.run(Lineage(store, recipe), quiet())
    return store, recipe, load_model(recipe.model).get_submodule(TARGET)


def target_rows(store, recipe):
    site = next(s for s in stored_sites(Lineage(store, recipe).activations) if s.name == TARGET)
    return torch.cat(list(held_out(store, recipe, site)))


def test_a_transcoder_is_judged_on_what_it_should_reconstruct(two_sites, progress):
    store, recipe, mlp = two_sites
    exact = judge(Lineage(store, recipe), Fake(mlp, 16), progress)
    assert exact["variance_unexplained"] == pytest.approx(0, abs=1e-10)
    assert exact["shrinkage"] == pytest.approx(1, abs=1e-5)
    y = target_rows(store, recipe).double()
    assert exact["n_tokens"] == len(y)
    mean = judge(Lineage(store, recipe), Fake(lambda x: y.mean(0).expand(len(x), -1), 16), progress)
    assert mean["variance_unexplained"] == pytest.approx(1, abs=1e-9)
    assert judge(Lineage(store, recipe), identity(), progress)["variance_unexplained"] > 0.5


def test_a_transcoder_that_is_the_mlp_recovers_everything(two_sites, progress):
    store, recipe, mlp = two_sites
    mean = target_rows(store, recipe).mean(0)
    quality = evaluate._language_model(Lineage(store, recipe), Fake(mlp, 16), mean, progress)
    assert quality["loss_sae"] == pytest.approx(quality["loss"], rel=1e-6)
    assert 0 <= quality["kl_sae"] < 1e-10
    for figure in ("loss", "kl"):
        for kind in ("mean", "zero"):
            assert quality[f"{figure}_recovered_{kind}"] == pytest.approx(1, abs=1e-4)
            assert quality[f"{figure}_{kind}_ablated"] > quality[f"{figure}_sae"] + 0.01


def test_the_mean_that_is_put_in_place_is_the_targets(two_sites, progress):
    store, recipe, _ = two_sites
    mean = evaluate.judge_together(Lineage(store, recipe), [Fake(lambda x: x, 16)], progress)[0].reconstruction.mean
    torch.testing.assert_close(mean, target_rows(store, recipe).double().mean(0))
    ablates = Fake(lambda x: mean.float().expand(len(x), -1), 16)
    quality = evaluate._language_model(Lineage(store, recipe), ablates, mean.float(), progress)
    assert (quality["loss_sae"], quality["kl_recovered_mean"]) == (quality["loss_mean_ablated"], 0)


def test_a_transcoder_against_the_run_of_the_model_is_refused(two_sites, ingredients, progress):
    store, recipe, _ = two_sites
    about = recipe.sae.model_copy(update={"site": TARGET, "target_site": READ})
    backwards = recipe.model_copy(update={"sae": about})
    with pytest.raises(UserError, match=rf"sae\.target_site is '{READ}'.*before sae\.site, '{TARGET}'"):
        evaluate._language_model(Lineage(store, backwards), identity(), torch.zeros(16), progress)


def test_a_target_that_is_not_stored_is_named(two_sites, progress):
    store, recipe, mlp = two_sites
    about = recipe.sae.model_copy(update={"target_site": "transformer.h.7"})
    with pytest.raises(UserError, match=r"sae\.target_site is 'transformer\.h\.7'; the sites are: .*h\.0\.mlp"):
        judge(Lineage(store, recipe.model_copy(update={"sae": about})), Fake(mlp, 16), progress)


def test_the_loss_is_that_of_predicting_each_held_out_token_from_those_before_it(finished):
    quality = finished.summary["quality"]
    model = load_model(finished.recipe.model)
    source = Lineage(finished.store, finished.recipe).tokens
    total, n = 0.0, 0
    for part in source.published().parts:
        vocab_ids, mask = token_parts.read_part(source, part)
        for ids, real in list(zip(vocab_ids, mask, strict=True))[part.counts["n_train_sequences"] :]:
            line = torch.from_numpy(ids[real])
            with torch.no_grad():
                scores = model(line[None]).logits[0].log_softmax(-1)
            total -= scores[torch.arange(len(line) - 1), line[1:]].sum().item()
            n += len(line) - 1
    assert quality["n_predicted"] == n > 500
    assert quality["loss"] == pytest.approx(total / n, rel=1e-5)


def test_the_figures_of_a_run_are_those_of_its_held_out_tokens_and_its_whole_corpus(finished):
    store, recipe, quality = finished.store, finished.recipe, finished.summary["quality"]
    site = stored_sites(Lineage(store, recipe).activations)[0]
    x = torch.cat(list(held_out(store, recipe, site))).double()
    sae = load_sae(Lineage(store, recipe).sae.path)
    error = (x - sae.reconstruct(x.float()).double()).square().sum()
    assert quality["judged_on"] == "held-out documents"
    assert quality["n_tokens"] == len(x)
    assert quality["variance_unexplained"] == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-9)
    assert quality["l0"] == pytest.approx(len(sae.encode_sparse(x.float()).values) / len(x))
    artefact = Lineage(store, recipe).features
    rows = [pq.read_table(value_file(artefact.part_path(p))) for p in artefact.published().parts]
    fired = np.bincount(np.concatenate([table.column("feature_id") for table in rows]), minlength=64)
    assert quality["n_values"] == fired.sum()
    assert quality["n_dead"] == (fired == 0).sum()
    assert quality["dead_share"] == (fired == 0).mean()
    histogram = quality["density_histogram"]
    assert histogram["n_never"] == quality["n_dead"]
    assert sum(histogram["n_features"]) + histogram["n_never"] == 64
    assert histogram["n_features"][-1] == (fired > 10**-0.5 * artefact.published().total("n_tokens")).sum()
    assert quality["dense_share"] == (fired > 0.1 * artefact.published().total("n_tokens")).mean()


def test_all_figures_are_numbers_and_are_kept_beside_the_features(finished):
    kept = read_checked(Lineage(finished.store, finished.recipe).features.path / "quality.json")
    assert kept == finished.summary["quality"]
    assert all(math.isfinite(value) for value in kept.values() if isinstance(value, int | float))
    assert {name for name, value in kept.items() if not isinstance(value, int | float)} == {
        "judged_on", "parts", "density_histogram"
    }  # fmt: skip


def test_the_disk_contract_explains_every_figure(finished):
    page = (Path(__file__).resolve().parents[2] / "data" / "README.md").read_text("utf-8")
    section = page.split("## Quality\n")[1].split("\n## ")[0]
    keys = {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert keys == finished.summary["quality"].keys() - {"format_version"}


def test_judging_again_does_nothing(finished, progress):
    before = tree(finished.store.root)
    assert evaluate.run(Lineage(finished.store, finished.recipe), progress) == finished.summary["quality"]
    assert tree(finished.store.root) == before


def test_figures_of_an_earlier_version_are_completed(finished, progress, tmp_path):
    shutil.copytree(finished.store.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    path = Lineage(store, finished.recipe).features.path / "quality.json"
    kept = read_checked(path)
    write_checked(path, {name: value for name, value in kept.items() if name != "shrinkage" and "kl_" not in name})
    evaluate.run(Lineage(store, finished.recipe), progress)
    assert read_checked(path) == kept


def test_without_held_out_documents_the_training_data_are_judged_and_that_is_said(tmp_path, progress):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table())))
    for stage in (import_table.run, train.run, encode.run):
        stage(Lineage(store, recipe), progress)
    quality = evaluate.run(Lineage(store, recipe), progress)
    assert quality["judged_on"] == "training data"
    assert quality["n_tokens"] == 700
    sae = load_sae(Lineage(store, recipe).sae.path)
    x = torch.from_numpy(a_table()).half().float()
    wanted = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert quality["variance_unexplained"] == pytest.approx(wanted.item(), rel=1e-5)
    assert quality["mean_squared_error"] == pytest.approx(tf.mse_loss(sae.reconstruct(x), x).item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"held_out": 0.1, "seed": 3}, *(pytest.param({"held_out": each}, marks=pytest.mark.long) for each in (0.25, 0.5))],
)
def test_rows_of_a_table_are_held_out_by_their_keys_and_judged(tmp_path, progress, changes):
    store = Store.create(tmp_path / "store")
    data = brought_data(write_table(tmp_path / "t.npy", a_table()), activations={"part_rows": 300}, corpus=changes)
    recipe = parse_recipe(data)
    for stage in (import_table.run, train.run, encode.run):
        stage(Lineage(store, recipe), progress)
    lineage = Lineage(store, recipe)
    quality = evaluate.run(lineage, progress)
    seed, share = changes.get("seed", 0), changes["held_out"]
    wanted = [is_held_out(f"row {i} #{i}", seed, share) for i in range(700)]
    assert (quality["judged_on"], quality["n_tokens"]) == ("held-out documents", sum(wanted))
    sae = load_sae(lineage.sae.path)
    x = torch.from_numpy(a_table()).half().float()[torch.tensor(wanted)]
    error = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert quality["variance_unexplained"] == pytest.approx(error.item(), rel=1e-5)
    documents = [lineage.tokens.part_file(p, "documents.parquet") for p in lineage.tokens.published().parts]
    rows = pa.concat_tables(map(pq.read_table, documents)).to_pylist()
    assert [row["held_out"] for row in rows] == wanted
    assert sorted(row["first_token_id"] for row in rows) == list(range(700))
    with connect(store) as connection:
        first = ask(connection, "top_tokens", [0, 1]).to_pylist()
        assert not any(rows.num_rows for _, rows in check(connection))
    for row in first:
        number = int(row["key"].partition("#")[2])
        assert row["piece"] == f"row {number}"
        own = sae.encode_sparse(torch.from_numpy(a_table()).half().float()[number : number + 1])
        assert dict(zip(own.feature_ids.tolist(), own.values.tolist(), strict=True))[0] == pytest.approx(row["value"])


def test_without_held_out_documents_at_most_max_tokens_are_judged(tmp_path, progress):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table()), evaluate={"max_tokens": 130}))
    for stage in (import_table.run, train.run, encode.run):
        stage(Lineage(store, recipe), progress)
    assert evaluate.run(Lineage(store, recipe), progress)["n_tokens"] == 130


def test_at_most_max_tokens_are_used(finished, progress, ingredients, tmp_path):
    shutil.copytree(finished.store.root, tmp_path / "store")
    store, recipe = Store(tmp_path / "store"), parse_recipe(recipe_data(ingredients, evaluate={"max_tokens": 100}))
    (Lineage(store, recipe).features.path / "quality.json").unlink()
    quality = evaluate.run(Lineage(store, recipe), progress)
    assert quality["n_tokens"] == 100
    assert 50 < quality["n_predicted"] <= 112  # whole sequences
