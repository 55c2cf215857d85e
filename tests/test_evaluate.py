"""The figures of quality, in closed form and against brute force."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as tf

from saeflow import activations, arrays, bring, evaluate, features, tokens, train
from saeflow.config import SAEConfig, parse_recipe
from saeflow.evaluate import Reconstruction, loss_recovered
from saeflow.model import load_model
from saeflow.records import read_checked
from saeflow.sae import SparseAutoencoder
from saeflow.store import Store
from tests.small_pipeline import WIDTH, a_table, brought_data, quiet, recipe_data, tree, write_table

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


def judged(sae: SparseAutoencoder, *batches: torch.Tensor) -> Reconstruction:
    sums = Reconstruction(WIDTH)
    for batch in batches:
        sums.add(batch, sae)
    return sums


def test_a_perfect_autoencoder_leaves_nothing_unexplained():
    sums = judged(perfect(), X)
    assert sums.variance_unexplained == 0
    assert sums.l0 == pytest.approx((X != 0).sum().item() / 64)


def test_predicting_the_mean_leaves_everything_unexplained():
    sums = judged(constant(X.mean(0)), X)
    assert sums.variance_unexplained == pytest.approx(1, rel=1e-12)
    assert sums.l0 == 0
    torch.testing.assert_close(sums.mean.float(), X.mean(0))


def test_predicting_zero_is_worse_than_the_mean_by_the_means_own_length():
    spread, length = (X - X.mean(0)).square().sum(), 64 * X.mean(0).square().sum()
    assert judged(constant(torch.zeros(WIDTH)), X).variance_unexplained == pytest.approx(1 + (length / spread).item())


def test_the_figures_do_not_depend_on_batches():
    sae = constant(X[3])
    whole, cut = judged(sae, X), judged(sae, X[:1], X[1:40], X[40:])
    assert whole.variance_unexplained == pytest.approx(cut.variance_unexplained, rel=1e-12)
    assert (whole.n_tokens, whole.n_active) == (cut.n_tokens, cut.n_active)


@pytest.mark.parametrize(("spliced", "share"), [(2.0, 1.0), (5.0, 0.0), (3.5, 0.5), (6.5, -0.5), (1.7, 1.1)])
def test_loss_recovered_is_the_share_of_what_ablation_costs(spliced, share):
    assert loss_recovered(loss=2.0, spliced=spliced, ablated=5.0) == pytest.approx(share)


@pytest.fixture(scope="module")
def language_model_loss(finished):
    """Losses with any autoencoder in the place of the trained one."""
    site = activations.stored_sites(activations.artefact(finished.store, finished.recipe))[0]
    rows = torch.cat(list(held_out(finished.store, finished.recipe, site)))

    def losses(make):
        mean = rows.mean(0)
        return evaluate._language_model_loss(finished.store, finished.recipe, make(mean), mean, quiet())

    return losses


def held_out(store, recipe, site):
    source, stored = tokens.artefact(store, recipe), activations.artefact(store, recipe)
    for token_part, part in zip(source.published().parts, stored.published().parts, strict=True):
        mask = tokens.read_part(source, token_part)[1][part.counts["n_train_sequences"] :]
        rows = arrays.open_site(stored, part, site).read(slice(part.counts["n_train_sequences"], None))
        yield rows[torch.from_numpy(mask)].float()


def test_splicing_in_what_was_there_recovers_all_the_loss(language_model_loss):
    quality = language_model_loss(lambda mean: perfect())
    assert quality["loss_sae"] == pytest.approx(quality["loss"], abs=1e-3)
    assert quality["loss_recovered_zero"] == pytest.approx(1, abs=0.02)
    assert quality["loss_recovered_mean"] == pytest.approx(1, abs=0.05)


def test_splicing_in_the_mean_or_zero_recovers_nothing_against_that_ablation(language_model_loss):
    mean = language_model_loss(constant)
    assert mean["loss_sae"] == mean["loss_mean_ablated"]
    assert mean["loss_recovered_mean"] == 0
    zero = language_model_loss(lambda mean: constant(torch.zeros_like(mean)))
    assert zero["loss_sae"] == zero["loss_zero_ablated"]
    assert zero["loss_recovered_zero"] == 0
    assert len({zero["loss"], zero["loss_zero_ablated"], zero["loss_mean_ablated"]}) == 3


def test_the_loss_is_that_of_predicting_each_held_out_token_from_those_before_it(finished):
    quality = finished.summary["quality"]
    model = load_model(finished.recipe.model)
    source = tokens.artefact(finished.store, finished.recipe)
    total, n = 0.0, 0
    for part in source.published().parts:
        vocab_ids, mask = tokens.read_part(source, part)
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
    site = activations.stored_sites(activations.artefact(store, recipe))[0]
    x = torch.cat(list(held_out(store, recipe, site))).double()
    sae = SparseAutoencoder.load(train.artefact(store, recipe).path)
    error = (x - sae.reconstruct(x.float()).double()).square().sum()
    assert quality["judged_on"] == "held-out documents"
    assert quality["n_tokens"] == len(x)
    assert quality["variance_unexplained"] == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-9)
    assert quality["l0"] == pytest.approx(len(sae.encode_sparse(x.float()).values) / len(x))
    artefact = features.artefact(store, recipe)
    rows = [pq.read_table(artefact.part_path(p) / "token_major" / "000.parquet") for p in artefact.published().parts]
    fired = np.bincount(np.concatenate([table.column("feature_id") for table in rows]), minlength=64)
    assert quality["n_values"] == fired.sum()
    assert quality["n_dead"] == (fired == 0).sum()
    assert quality["dead_share"] == (fired == 0).mean()
    assert quality["dense_share"] == (fired > 0.1 * artefact.published().total("n_tokens")).mean()


def test_all_figures_are_numbers_and_are_kept_beside_the_features(finished):
    kept = read_checked(features.artefact(finished.store, finished.recipe).path / "quality.json")
    assert kept == finished.summary["quality"]
    assert all(math.isfinite(value) for value in kept.values() if not isinstance(value, str))


def test_judging_again_does_nothing(finished, progress):
    before = tree(finished.store.root)
    assert evaluate.run(finished.store, finished.recipe, progress) == finished.summary["quality"]
    assert tree(finished.store.root) == before


def test_without_held_out_documents_the_training_data_are_judged_and_that_is_said(tmp_path, progress):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table())))
    for stage in (bring.run, train.run, features.run):
        stage(store, recipe, progress)
    quality = evaluate.run(store, recipe, progress)
    assert quality["judged_on"] == "training data"
    assert quality["n_tokens"] == 700
    sae = SparseAutoencoder.load(train.artefact(store, recipe).path)
    x = torch.from_numpy(a_table()).half().float()
    wanted = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert quality["variance_unexplained"] == pytest.approx(wanted.item(), rel=1e-5)
    assert quality["mean_squared_error"] == pytest.approx(tf.mse_loss(sae.reconstruct(x), x).item(), rel=1e-5)


def test_at_most_max_tokens_are_used(finished, progress, ingredients, tmp_path):
    shutil.copytree(finished.store.root, tmp_path / "store")
    store, recipe = Store(tmp_path / "store"), parse_recipe(recipe_data(ingredients, evaluate={"max_tokens": 100}))
    (features.artefact(store, recipe).path / "quality.json").unlink()
    quality = evaluate.run(store, recipe, progress)
    assert quality["n_tokens"] == 100
    assert 50 < quality["n_predicted"] <= 112  # whole sequences
