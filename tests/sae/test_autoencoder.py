import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as tf

from saeflow.recipe.settings import TOP_FAMILY, Architecture, SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder

ARCHITECTURES = ["relu", "topk", "batchtopk"]
B, D, F, K = 300, 24, 160, 5


def an_autoencoder(architecture="topk", product=torch.float32, kernels=True, **settings):
    sae = SparseAutoencoder(SAEConfig(architecture=architecture, n_features=F, k=K, seed=3, **settings), D)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.W_enc.add_(0.1 * torch.randn(F, D, generator=generator))
        sae.b_dec.normal_(0, 1, generator=generator)
    sae.product_dtype, sae.use_kernels = product, kernels
    return sae


def a_batch(n_rows=B, seed=0):
    return 2 * torch.randn(n_rows, D, generator=torch.Generator().manual_seed(seed)) + 1


def dense_loss(sae, x, dead=None, aux_weight=0.0):
    """The loss as its docstring says it, dense, in float64, differentiable; choosing as float32 rounding does."""
    w_enc, b_enc, w_dec, b_dec = (p.double() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    if sae.config.unit_norm:
        w_dec = tf.normalize(w_dec, dim=1)
    pre = (x.double() - b_dec) @ w_enc.t() + b_enc
    if sae.config.architecture == "topk":
        keep = pre >= pre.topk(K, dim=1).values[:, -1:]
    else:
        keep = pre >= pre.flatten().topk(K * len(x)).values[-1]
    values = tf.relu(pre) * keep
    error = x.double() - (values @ w_dec + b_dec)
    loss = error.square().sum() / (x.double() - x.double().mean(0)).square().sum()
    if dead is not None:
        rest = error.detach()
        k_dead = min(D // 2, len(dead))
        of_dead = tf.relu(pre[:, dead]) * (pre[:, dead] >= pre[:, dead].topk(k_dead, dim=1).values[:, -1:])
        n_rows = min(len(x), len(x) * K // (4 * k_dead))
        miss = (rest - of_dead @ w_dec[dead])[:n_rows].square().sum() / rest[:n_rows].square().sum()
        loss = loss + aux_weight * miss
    return loss


def gradients(loss, sae):
    sae.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in sae.parameters()]


def assert_near(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_sparse_step_has_the_loss_and_gradients_of_the_dense_one(architecture, kernels, unit_norm):
    sae, x = an_autoencoder(architecture, kernels=kernels, unit_norm=unit_norm), a_batch()
    loss, info = sae.training_loss(x)
    wanted = dense_loss(sae, x)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert info.unexplained == pytest.approx(wanted.item(), rel=1e-5)
    assert_near(gradients(loss, sae), gradients(wanted, sae), 1e-4)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_choosing_by_token_is_what_topk_does_and_leaves_the_threshold_alone(architecture):
    sae, topk, x = an_autoencoder(architecture, prefixes=[F]), an_autoencoder("topk"), a_batch()
    sae.threshold.fill_(0.7)
    (by_token, info), (wanted, _) = sae.training_loss(x, by_token=True), topk.training_loss(x)
    assert torch.equal(by_token, wanted)
    assert sae.threshold == torch.tensor(0.7)
    assert all(map(torch.equal, gradients(by_token, sae), gradients(wanted, topk)))
    sae.training_loss(x)
    assert info.n_active == K
    assert sae.threshold != torch.tensor(0.7)


@pytest.mark.parametrize("n_dead", [2, 60])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_auxiliary_loss_has_the_gradients_of_the_dense_one(kernels, n_dead):
    sae, x = an_autoencoder("topk", kernels=kernels), a_batch()
    sae.tokens_since_fired[:n_dead] = 1000
    wanted = dense_loss(sae, x, torch.arange(n_dead), 0.5)
    loss, info = sae.training_loss(x, aux_weight=0.5, dead_after_tokens=1000)
    assert info.n_dead == n_dead
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_near(gradients(loss, sae), gradients(wanted, sae), 1e-4)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_bfloat16_products_change_loss_and_gradients_only_a_little(architecture):
    x = a_batch()
    exact, quick = (an_autoencoder(architecture, product) for product in (torch.float32, torch.bfloat16))
    losses = [sae.training_loss(x)[0] for sae in (exact, quick)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for a, b in zip(gradients(losses[1], quick), gradients(losses[0], exact), strict=True):
        assert tf.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_kernels_and_torch_operations_agree(architecture, product):
    x, grads = a_batch(), []
    for kernels in (True, False):
        sae = an_autoencoder(architecture, product, kernels)
        sae.tokens_since_fired[:50] = 10**6
        loss, info = sae.training_loss(x, 1.0)
        grads.append([*gradients(loss, sae), info.fired.float(), sae.threshold[None]])
    assert_near(*grads, 1e-5)


def test_the_relu_loss_is_the_founding_articles():
    sae, x = an_autoencoder("relu", l1_weight=0.3, unit_norm=False), a_batch()
    values = tf.relu((x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc)
    wanted = (values @ sae.W_dec + sae.b_dec - x).square().mean() + 0.3 * values.abs().mean()
    loss, info = sae.training_loss(x)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert info.n_active == pytest.approx((values > 0).sum().item() / B)
    assert_near(gradients(loss, sae), gradients(wanted, sae), 1e-5)


def test_a_wrong_guess_of_the_threshold_changes_nothing():
    x, seen = a_batch(), []
    for guess in (0.0, 1e-9, 0.5, 7.0, 1e9):
        sae = an_autoencoder("batchtopk")
        sae._guess = guess
        loss, info = sae.training_loss(x)
        seen.append((loss.item(), info.n_active, sae.threshold.item()))
    assert len(set(seen)) == 1
    assert seen[0][1] == K


def test_fewer_positive_pre_activations_than_asked_for_are_all_taken():
    for architecture in ("topk", "batchtopk"):
        sae = an_autoencoder(architecture, encoder_scale=1.0)
        with torch.no_grad():
            sae.b_enc.fill_(-8.0)
        x = a_batch()
        n_positive = (((x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc) > 0).sum(1).clamp(max=K)
        _, info = sae.training_loss(x)
        assert 0 < info.n_active < K
        if architecture == "topk":
            assert info.n_active * B == pytest.approx(n_positive.sum().item())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_explains_superposed_features_and_keeps_unit_rows(architecture):
    generator = torch.Generator().manual_seed(1)
    true = tf.normalize(torch.randn(F // 2, D, generator=generator), dim=1)
    sae = SparseAutoencoder(SAEConfig(architecture=architecture, n_features=F, k=4, l1_weight=0.01), D)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)

    def sample():
        places = torch.randint(F // 2, (512, 2), generator=generator)
        return true[places].sum(1) * 3

    first = None
    for step in range(60):
        adam.param_groups[0]["lr"] = 1e-2 * min(1.0, (60 - step) / 30)
        loss, info = sae.training_loss(sample(), 1 / 32, 20_000)
        first = first or info.unexplained
        loss.backward()
        adam.step()
        adam.zero_grad()
        sae.after_step()
    assert info.unexplained < 0.5 * first
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    sae.eval()
    x = sample()
    unexplained = (sae.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert unexplained < 1.3 * info.unexplained
    if architecture == "batchtopk":
        assert len(sae.encode_sparse(x).values) / len(x) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_training_twice_gives_the_same_bytes(architecture):
    def train():
        sae = an_autoencoder(architecture, torch.bfloat16)
        adam = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        for seed in range(5):
            sae.training_loss(a_batch(seed=seed), 1.0, 500)[0].backward()
            adam.step()
            adam.zero_grad()
            sae.after_step()
        return sae.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_several_threads_compute_what_one_does(architecture):
    x, seen = a_batch(5000), []
    for n_threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            sae = an_autoencoder(architecture, torch.bfloat16)
            sae.threads = n_threads
            sae.tokens_since_fired[:40] = 10**6
            loss, _ = sae.training_loss(x, 1.0)
            seen.append([loss.detach(), *gradients(loss, sae)])
        finally:
            torch.set_num_threads(before)
    *most, d_b_dec = zip(*seen, strict=True)
    assert all(torch.equal(one, three) for one, three in most)
    torch.testing.assert_close(*d_b_dec)


@pytest.mark.parametrize("init", ["tied", "linear"])
@pytest.mark.parametrize("architecture", [each for each in get_args(Architecture) if each != "mp"])  # it has one matrix
def test_the_encoder_starts_as_long_as_is_asked_and_as_the_decoder_points(architecture, init):
    def first(**settings):
        return SparseAutoencoder(SAEConfig(architecture=architecture, n_features=F, k=K, init=init, **settings), D)

    asked, whole, silent = first(encoder_scale=0.2), first(encoder_scale=1.0), first()
    assert_near(asked.W_enc, 0.2 * whole.W_enc, 1e-6)
    assert_near(asked.W_dec, whole.W_dec, 1e-6)
    halved = architecture in (*TOP_FAMILY, "jumprelu")
    assert_near(silent.W_enc, (0.5 if halved else 1.0) * whole.W_enc, 1e-6)
    if init == "tied":
        assert_near(tf.normalize(silent.W_enc, dim=1), tf.normalize(silent.W_dec, dim=1), 1e-6)


def test_silence_is_counted_in_tokens_and_only_in_training():
    sae, x = an_autoencoder("topk"), a_batch()
    _, info = sae.training_loss(x)
    np.testing.assert_array_equal(sae.tokens_since_fired, torch.where(info.fired > 0, 0, B))
    assert info.fired.sum() == K * B
    before = sae.tokens_since_fired.clone()
    sae.eval().training_loss(x)
    assert torch.equal(sae.tokens_since_fired, before)


def test_parameters_that_change_in_eval_mode_are_noticed():
    sae, x = an_autoencoder("topk").eval(), a_batch()
    sae.encode_sparse(x)
    with torch.no_grad():
        sae.W_enc.neg_()
    fresh = an_autoencoder("topk").eval()
    fresh.load_state_dict(sae.state_dict())
    np.testing.assert_array_equal(sae.encode_sparse(x).values, fresh.encode_sparse(x).values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_gives_the_features_of_raw_activations_in_raw_units(architecture):
    sae, raw, scale = an_autoencoder(architecture).eval(), a_batch(), 4.0
    sae.threshold.fill_(3.0)
    scaled, folded = sae.encode_sparse(raw * scale), sae.folded(scale).encode_sparse(raw)
    np.testing.assert_array_equal(scaled.feature_ids, folded.feature_ids)
    np.testing.assert_array_equal(scaled.values / np.float32(scale), folded.values)
    torch.testing.assert_close(sae.reconstruct(raw * scale) / scale, sae.folded(scale).reconstruct(raw))


def test_losses_of_constant_batches_are_finite():
    for architecture in ARCHITECTURES:
        sae = an_autoencoder(architecture)
        loss, _ = sae.training_loss(torch.ones(10, D))
        loss.backward()
        assert math.isfinite(loss.item())
