"""Every architecture against a slow, dense, float64 version written from its paper, differentiated by torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.recipe.settings import Architecture, SAEConfig
from saeflow.sae.architectures import TRAITS
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.train.resample import resample_dead
from tests.support.small_saes import (
    D_OUT,
    EVERY,
    PENALISED,
    B,
    D,
    F,
    K,
    an_autoencoder,
    dense,
    obvious_values,
    rows,
    settings_of,
)


class _Window(torch.autograd.Function):
    """A value that jumps by `jump` where pre crosses the threshold: the straight-through estimate by a box kernel."""

    @staticmethod
    def forward(ctx, pre, threshold, jump, through, bandwidth):
        ctx.save_for_backward(pre, threshold, jump)
        ctx.through, ctx.bandwidth = through, bandwidth
        above = (pre > threshold).double()
        return pre * above if through else above

    @staticmethod
    def backward(ctx, d):
        pre, threshold, jump = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).double() / ctx.bandwidth
        d_pre = d * (pre > threshold) if ctx.through else torch.zeros_like(d)
        return d_pre, (-jump * near * d).sum(0), None, None, None


def obvious_loss(sae: SparseAutoencoder, x: Tensor, target: Tensor | None, k: int = K, sparsity: float = 1.0) -> Tensor:
    """The training loss as the papers have it, dense and in float64."""
    config, wide = sae.config, {name: p.double() for name, p in sae.named_parameters()}
    y = (x if target is None else target).double()
    w_dec = tf.normalize(wide["W_dec"], dim=1) if config.unit_norm else wide["W_dec"]
    b_in = wide["b_dec"] if target is None else sae.centre.double()
    pre = (x.double() - b_in) @ wide["W_enc"].t() + wide["b_enc"]
    lengths = w_dec.norm(dim=1)

    def missed(values: Tensor, decoder: Tensor = w_dec, bias: Tensor = wide["b_dec"]) -> Tensor:
        return (values @ decoder + bias - y).square()

    match config.architecture:
        case "topk" | "abstopk" | "batchtopk" | "matryoshka":
            size = pre.abs() if config.architecture == "abstopk" else pre
            n, numbers = (k, size) if sae.traits.chooses_by_token else (k * len(x), size.reshape(1, -1))
            keep = (size >= numbers.topk(n, dim=1).values[:, -1:]) & (size > 0)
            ends = {"matryoshka": [10, 50, F]}.get(config.architecture, [F])
            losses = [missed(pre * keep * (torch.arange(F) < end)).sum() for end in ends]
            return torch.stack(losses).mean() / (y - y.mean(0)).square().sum()
        case "relu":
            values = tf.relu(pre)
            paid = values * lengths if config.l1_norm_weighted else values
            return missed(values).mean() + sparsity * config.l1_weight * paid.mean()
        case "gated":
            gate = tf.relu(pre)
            inner = wide["r_mag"].exp() * (pre - wide["b_enc"]) + wide["b_mag"]
            values = (pre > 0) * tf.relu(inner)
            alone = missed(gate, w_dec.detach(), wide["b_dec"].detach()).mean()
            paid = gate * lengths if config.l1_norm_weighted else gate
            return missed(values).mean() + alone + sparsity * config.l1_weight * paid.mean()
        case _:
            threshold = wide["log_threshold"].exp()
            values = _Window.apply(pre, threshold, threshold, True, config.bandwidth)
            if config.penalty == "tanh":
                paid = torch.tanh(config.tanh_scale * values * lengths).sum() / (len(x) * y.shape[1])
            else:
                l0 = _Window.apply(pre, threshold, torch.ones_like(threshold), False, config.bandwidth).sum() / len(x)
                paid = (l0 / config.k - 1) ** 2
            return missed(values).mean() + sparsity * config.penalty_weight * paid


def gradients(loss: Tensor, sae: SparseAutoencoder) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters()}


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name in got:
        assert (got[name] - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), name


@pytest.mark.parametrize("settings", [{}, {"unit_norm": False, "l1_norm_weighted": True}, {"target_site": "other"}])
@pytest.mark.parametrize("way", ["sparse", "dense", "without kernels"])
@pytest.mark.parametrize("name", EVERY)
def test_loss_and_gradients_are_those_of_the_paper(name, way, settings):
    sae = an_autoencoder(name, way != "without kernels", **settings)
    sae.dense_share = 0.0 if way == "dense" else 1.0
    x, target = rows(), rows(D_OUT, 1) if "target_site" in settings else None
    loss, info = sae.training_loss(x, target=target, sparsity=0.7)
    wanted = obvious_loss(sae, x, target, sparsity=0.7)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert 0 < info.n_active < F
    assert_near(gradients(loss, sae), gradients(wanted, sae), 1e-4)


@pytest.mark.parametrize("name", PENALISED)
def test_dense_and_sparse_steps_see_the_same(name):
    seen = []
    for dense_share in (0.0, 1.0):
        sae = an_autoencoder(name)
        sae.dense_share = dense_share
        loss, info = sae.training_loss(rows())
        seen.append((loss.item(), info))
    (loss, one), (other_loss, other) = seen
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert torch.equal(one.fired, other.fired)
    assert one.n_active == other.n_active
    for number in ("unexplained", "sparsity"):
        assert getattr(one, number) == pytest.approx(getattr(other, number), rel=1e-5)


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka"])
def test_the_k_of_a_step_takes_the_place_of_the_configured_one(name):
    sae, x = an_autoencoder(name), rows()
    loss, info = sae.training_loss(x, k=9)
    assert info.n_active == 9
    assert loss.item() == pytest.approx(obvious_loss(sae, x, None, k=9).item(), rel=1e-5)


@pytest.mark.parametrize("name", PENALISED)
def test_without_sparsity_nothing_is_paid(name):
    sae, x = an_autoencoder(name), rows()
    wanted = obvious_loss(sae, x, None, sparsity=0.0)
    assert sae.training_loss(x, sparsity=0.0)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"target_site": "other"}])
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_encoding_gives_the_values_of_the_formula_to_11_bits(name, kernels, product, settings):
    sae, x = an_autoencoder(name, kernels, product, **settings).eval(), rows()
    if sae.threshold.dim() == 0:
        sae.threshold.fill_(2.5)
    got, wanted = dense(sae.encode_sparse(x), B), obvious_values(sae, x)
    assert torch.equal(got.sign(), wanted.sign())
    assert (got - wanted).abs().max() <= 2.0**-11 * wanted.abs().max()
    assert ((got - wanted).abs() <= 2.0**-11 * wanted.abs()).all()
    w_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
    torch.testing.assert_close(sae.reconstruct(x).double(), got @ w_dec + b_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_folding_gives_the_values_of_raw_activations_in_raw_units(name):
    sae, raw = an_autoencoder(name).eval(), rows()
    if sae.threshold.dim() == 0:
        sae.threshold.fill_(2.5)
    scaled, folded = dense(sae.encode_sparse(raw * 4), B), dense(sae.folded(4).encode_sparse(raw), B)
    assert torch.equal(scaled / 4, folded)


@pytest.mark.parametrize("name", EVERY)
def test_a_folded_transcoder_reads_and_writes_raw_activations(name):
    sae, raw = an_autoencoder(name, target_site="other").eval(), rows()
    if sae.threshold.dim() == 0:
        sae.threshold.fill_(2.5)
    scaled, folded = sae.reconstruct(raw * 4), sae.folded(4, 0.5).reconstruct(raw)
    torch.testing.assert_close(scaled / 0.5, folded)


@pytest.mark.parametrize("name", EVERY)
def test_training_lowers_what_is_not_explained(name):
    """Superposed features, two at a time: at the end at most a third of the first error, and unit rows."""
    generator = torch.Generator().manual_seed(1)
    true = tf.normalize(torch.randn(F // 2, D, generator=generator), dim=1)
    sae = SparseAutoencoder(settings_of(name, k=3, l1_weight=0.3, penalty_weight=0.3, first_threshold=0.5), D)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    history = []
    for step in range(120):
        adam.param_groups[0]["lr"] = 1e-2 * min(1.0, (120 - step) / 60)
        x = true[torch.randint(F // 2, (512, 2), generator=generator)].sum(1) * 3
        loss, info = sae.training_loss(x, 1 / 32, 20_000)
        history.append(info.unexplained)
        adam.zero_grad()
        loss.backward()
        adam.step()
        sae.after_step()
    assert history[-1] < 0.34 * min(1.0, history[0])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    unexplained = (sae.eval().reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert unexplained < 1.5 * history[-1] + 0.02


def test_a_nested_dictionary_is_good_by_itself():
    """Of two trained alike, the first 16 features of the matryoshka one explain more."""
    generator = torch.Generator().manual_seed(1)
    true = tf.normalize(torch.randn(32, D, generator=generator), dim=1)
    missed = {}
    for architecture in ("batchtopk", "matryoshka"):
        sae = SparseAutoencoder(settings_of(architecture, k=3, prefixes=[16]), D)
        adam = torch.optim.Adam(sae.parameters(), lr=5e-3, fused=True)
        for _ in range(150):
            x = true[torch.randint(32, (512, 2), generator=generator)].sum(1) * 3
            loss, _ = sae.training_loss(x)
            adam.zero_grad()
            loss.backward()
            adam.step()
            sae.after_step()
        values = dense(sae.eval().encode_sparse(x), len(x)).float()
        values[:, 16:] = 0
        missed[architecture] = (values @ sae.W_dec + sae.b_dec - x).square().sum().item()
    assert missed["matryoshka"] < 0.7 * missed["batchtopk"]


def test_the_quadratic_penalty_brings_l0_to_its_aim():
    generator = torch.Generator().manual_seed(1)
    true = tf.normalize(torch.randn(F // 2, D, generator=generator), dim=1)
    sae = SparseAutoencoder(settings_of("jumprelu-l0", k=4, first_threshold=0.5, bandwidth=2.0), D)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    for step in range(200):
        x = true[torch.randint(F // 2, (512, 2), generator=generator)].sum(1) * 3
        if step == 0:
            sae.start_sparse(x)
        loss, info = sae.training_loss(x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        sae.after_step()
    assert info.n_active == pytest.approx(4, rel=0.15)


def a_jumprelu_trained(k: int, n_steps: int, lr: float, first_share: float | None, **settings) -> float:
    """Train on sums of four of 80 directions and return L0 over k on rows that the training has not had."""
    generator = torch.Generator().manual_seed(1)
    true = tf.normalize(torch.randn(F // 2, D, generator=generator), dim=1)

    def made(n: int) -> Tensor:
        strength = 0.5 + torch.randn(n, 4, 1, generator=generator).abs()
        return (true[torch.randint(F // 2, (n, 4), generator=generator)] * strength).sum(1) * 3

    config = SAEConfig(architecture="jumprelu", n_features=F, k=k, first_share=first_share, **settings)
    sae = SparseAutoencoder(config, D)
    sae.start_sparse(made(4096))
    adam = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    for step in range(n_steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, (n_steps - step) / (0.3 * n_steps))
        loss, _ = sae.training_loss(made(256), 1 / 32)
        loss.backward()
        adam.step()
        sae.after_step()
        adam.zero_grad()
    return len(sae.eval().encode_sparse(made(4096)).values) / 4096 / k


@pytest.mark.parametrize(
    ("k", "n_steps"),
    [(3, 400), pytest.param(8, 600, marks=pytest.mark.long), pytest.param(20, 400, marks=pytest.mark.long)],
)
def test_jumprelu_has_the_l0_that_was_asked_for_however_short_the_training(k, n_steps):
    assert a_jumprelu_trained(k, n_steps, 1e-3, None) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"lr": 1e-2, "first_share": None}, marks=pytest.mark.long),
        pytest.param({"lr": 1e-4, "first_share": 0.3}, marks=pytest.mark.long),
        {"lr": 1e-3, "first_share": 0.0, "first_threshold": 30.0},
        {"lr": 1e-3, "first_share": 0.0, "unit_norm": False, "encoder_scale": 3.0},
    ],
    ids=["high-rate", "low-rate", "none-active-at-first", "all-active-at-first"],
)
def test_jumprelu_has_the_l0_that_was_asked_for_wherever_it_begins(settings):
    assert a_jumprelu_trained(6, 400, **settings) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("settings", [{"penalty": "tanh"}, {"penalty_weight": 0.0}])
def test_without_an_aim_jumprelus_thresholds_follow_their_gradients_alone(settings):
    assert abs(a_jumprelu_trained(4, 30, 1e-5, 0.3, **settings) - 1) > 1


@pytest.mark.parametrize("name", EVERY)
def test_the_same_training_twice_and_on_any_number_of_threads_gives_the_same_weights(name):
    seen = []
    for n_threads in (1, 1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            sae = an_autoencoder(name)
            sae.threads = n_threads
            loss, info = sae.training_loss(rows(n=3000), 1.0, 500)
            seen.append(gradients(loss, sae) | {"fired": info.fired})
        finally:
            torch.set_num_threads(before)
    first, second, third = seen
    assert all(torch.equal(first[each], second[each]) for each in first)
    for each in first.keys() - {"b_dec"}:
        assert torch.equal(first[each], third[each]), each


def test_every_architecture_is_tested():
    elsewhere = {"mp"}  # test_pursuit
    assert {name.partition("-")[0] for name in EVERY} | elsewhere == set(Architecture.__args__) == TRAITS.keys()


def test_an_architecture_that_nobody_lists_is_an_error():
    sae = an_autoencoder("batchtopk")
    sae.config = sae.config.model_copy(update={"architecture": "new"})
    with pytest.raises(AssertionError, match="new"):
        sae.activation_function()
    with pytest.raises(KeyError, match="new"):
        sae.training_loss(rows())


@pytest.mark.parametrize("name", PENALISED)
def test_a_sparse_start_lets_each_feature_fire_on_its_share_of_rows(name):
    sae, x = SparseAutoencoder(settings_of(name, first_share=0.1, first_threshold=0.01), D), rows(n=1000)
    sae.initialise(x.mean(0))
    sae.start_sparse(x)
    fired = (obvious_values(sae, x) > 0).double().mean(0)
    assert (fired - 0.1).abs().max() <= 0.002


def test_where_the_largest_are_chosen_nothing_starts_sparse():
    sae = an_autoencoder("topk", first_share=0.1)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.start_sparse(rows())
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu-l0"])
def test_a_batch_that_is_no_number_leaves_nothing_behind(name):
    sae, x = an_autoencoder(name), rows()
    sae.training_loss(x)
    before = {each: value.clone() for each, value in sae.state_dict().items()}
    x[7, 3] = torch.nan
    loss, _ = sae.training_loss(x)
    assert not torch.isfinite(loss)
    assert all(torch.equal(value, before[each]) for each, value in sae.state_dict().items())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n", [1, 5])
def test_rows_that_are_all_equal_make_no_giant_steps(name, n):
    sae = an_autoencoder(name)
    loss, _ = sae.training_loss(rows()[:1].expand(n, D).contiguous(), 1.0, 0)
    found = gradients(loss, sae)
    assert loss.item() < 1e3
    assert all(gradient.abs().max() < 1e4 for gradient in found.values())


def test_a_feature_started_anew_fires_on_its_share_of_rows():
    sae, x = an_autoencoder("gated", first_share=0.1), rows(n=1000)
    sae.tokens_since_fired[:40] = 10**6
    adam = torch.optim.Adam(sae.parameters())
    loss, _ = sae.training_loss(x)
    loss.backward()
    adam.step()
    sae.tokens_since_fired[:40] = 10**6
    assert resample_dead(sae, adam, x, 10**6, seed=0) == 40
    fired = (obvious_values(sae, x) > 0).double().mean(0)
    assert fired[:40].max() <= 0.11
    assert fired[:40].mean() > 0.09
