"""Matching pursuit against a slow, obvious float64 version of Costa et al. 2025, differentiated by torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.exact import rounded
from saeflow.sae.formats.load import load_sae
from saeflow.sae.formats.save import save_sae
from saeflow.sae.kernels import pursue_rows
from tests.support.small_saes import B, D, F, K, an_autoencoder, rows, values_of


def slow_values(x: Tensor, w_dec: Tensor, b_dec: Tensor, k: int = K, end: float = 0.0, repeats: bool = False) -> Tensor:
    """The values (B, F) in float64 of one row after the other."""
    out = torch.zeros(len(x), len(w_dec), dtype=torch.float64)
    for i, row in enumerate(x.double() - b_dec.double()):
        residual = row.float().double()
        for _ in range(k):
            products = w_dec.double() @ residual
            f = int(products.argmax())
            if not products[f] > 0:
                break
            residual = (residual - products[f] * w_dec[f].double()).float().double()
            again = out[i, f] > 0
            out[i, f] += products[f]
            if (again and repeats) or residual.norm() < end:
                break
    return out


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_pursuit_gives_the_values_of_the_formula_to_11_bits(kernels, product):
    sae, x = an_autoencoder("mp", kernels, product).eval(), rows()
    wanted = slow_values(x, sae.W_dec.detach(), sae.b_dec.detach())
    assert torch.equal(values_of(sae, x), rounded(wanted.flatten()).double().view_as(wanted))
    assert 0.9 * K * B < int((wanted > 0).sum()) <= K * B


@pytest.mark.parametrize("cuts", [[1], [7, 8, 150], [64, 128]])
def test_a_token_is_encoded_alike_in_any_batch_and_on_any_number_of_threads(cuts):
    sae, x = an_autoencoder("mp").eval(), rows()
    whole = values_of(sae, x)
    sae.threads = 3
    assert torch.equal(torch.cat([values_of(sae, part) for part in x.tensor_split(cuts)]), whole)


def test_of_equal_products_the_lower_feature_is_taken_and_a_feature_taken_again_adds_to_its_value():
    sae = SparseAutoencoder(SAEConfig(architecture="mp", n_features=4, k=3, unit_norm=False), 2).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.5, 0.0], [-1.0, 0.0]]))
        sae.W_enc.copy_(sae.W_dec)
    sparse = sae.encode_sparse(torch.tensor([[8.0, 1.0], [0.0, 0.0], [-3.0, 0.0]]))
    np.testing.assert_array_equal(sparse.row_starts, [0, 1, 1, 2])
    np.testing.assert_array_equal(sparse.feature_ids, [1, 3])
    np.testing.assert_array_equal(sparse.values, [4 + 3 + 2.25, 3])


def test_products_of_directions_choose_what_products_of_rows_do():
    sae, x = an_autoencoder("mp"), rows()
    residual, w_dec = x - sae.b_dec.detach(), sae.W_dec.detach()
    products, found = residual @ w_dec.t(), torch.empty(B, K, dtype=torch.int64)
    pursue_rows(products.numpy(), (w_dec @ w_dec.t()).numpy(), found.numpy())
    for step in range(K):
        wanted = residual @ w_dec.t()
        chosen = wanted.gather(1, found[:, step : step + 1])
        assert (chosen >= wanted.max(1, keepdim=True).values - 1e-3).all()
        residual = residual - chosen * w_dec[found[:, step]]
    nothing = torch.full((2, 3), -1, dtype=torch.int64)
    pursue_rows(-torch.ones(2, F).numpy(), torch.eye(F).numpy(), nothing[:, :2].numpy())
    assert nothing.eq(-1).all()
    pursue_rows(np.ones((1, F), np.float32), np.eye(F, dtype=np.float32), nothing[:1].numpy())
    assert nothing[0].tolist() == [0, 1, 2], "among equals the lower feature"


def obvious_loss(sae: SparseAutoencoder, x: Tensor, k: int) -> Tensor:
    w_dec, residual = sae.W_dec.double(), x.double() - sae.b_dec.double()
    w_dec = tf.normalize(w_dec, dim=1) if sae.config.unit_norm else w_dec
    for _ in range(k):
        chosen = w_dec[(residual @ w_dec.t()).argmax(1)]
        residual = residual - (residual * chosen).sum(1, keepdim=True).relu() * chosen
    return residual.square().sum() / (x.double() - x.double().mean(0)).square().sum()


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_loss_and_gradients_go_through_every_residual(kernels, unit_norm):
    sae, x = an_autoencoder("mp", kernels, unit_norm=unit_norm), rows()
    with torch.no_grad():
        sae.W_dec.mul_(1.0 if unit_norm else 0.8)
        sae.W_enc.copy_(sae.W_dec)
    loss, info = sae.training_loss(x, k=7)
    loss.backward()
    got = sae.W_dec.grad.clone(), sae.b_dec.grad.clone()
    sae.zero_grad()
    wanted = obvious_loss(sae, x, 7)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for mine, theirs in zip(got, (sae.W_dec.grad, sae.b_dec.grad), strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert sae.W_enc.grad is None
    assert 0 < info.n_active <= 7
    assert int(info.fired.sum()) == round(info.n_active * B)


def test_training_lowers_what_is_not_explained_and_twice_gives_the_same_weights():
    found = []
    for threads in (1, 1, 3):
        generator = torch.Generator().manual_seed(1)
        true = tf.normalize(torch.randn(F // 2, D, generator=generator), dim=1)
        sae = SparseAutoencoder(SAEConfig(architecture="mp", n_features=F, k=3), D, threads=threads)
        adam, history = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True), []
        for _ in range(80):
            x = true[torch.randint(F // 2, (512, 2), generator=generator)].sum(1) * 3
            loss, info = sae.training_loss(x)
            history.append(info.unexplained)
            adam.zero_grad()
            loss.backward()
            adam.step()
            sae.after_step()
        assert torch.equal(sae.W_enc, sae.W_dec)
        found.append(sae.W_dec.detach().clone())
    assert history[-1] < 0.34 * min(1.0, history[0])
    unexplained = (sae.eval().reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert unexplained == pytest.approx(history[-1], abs=0.05)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_folding_gives_the_values_of_raw_activations_in_raw_units():
    sae, raw = an_autoencoder("mp").eval(), rows()
    assert torch.equal(values_of(sae, raw * 4) / 4, values_of(sae.folded(4), raw))


def test_a_pursuit_is_saved_as_saelens_has_it_and_comes_back_to_the_bit(tmp_path: Path):
    sae, x = an_autoencoder("mp").eval(), rows()
    save_sae(sae, tmp_path, {})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    names = ("architecture", "max_iterations", "residual_threshold", "stop_on_duplicate_support")
    assert [cfg[name] for name in names] == ["matching_pursuit", K, 0.0, False]
    assert cfg["apply_b_dec_to_input"] is True
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_dec": (F, D), "b_dec": (D,)}
    again = load_sae(tmp_path)
    assert again.config == sae.config
    assert torch.equal(values_of(again, x), values_of(sae, x))
    save_sae(again, tmp_path / "two", {})
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("settings", [{}, {"residual_threshold": 4.0, "max_iterations": 9}, {"max_iterations": 6,
    "residual_threshold": 0, "stop_on_duplicate_support": False, "apply_b_dec_to_input": False}])  # fmt: skip
def test_a_pursuit_of_saelens_ends_where_its_settings_say(settings, tmp_path: Path):
    dice = torch.Generator().manual_seed(2)
    w_dec, b_dec = tf.normalize(torch.randn(F, D, generator=dice), dim=1), torch.randn(D, generator=dice)
    (tmp_path / "cfg.json").write_text(
        json.dumps({"architecture": "matching_pursuit", "d_in": D, "d_sae": F, "apply_b_dec_to_input": True} | settings)
    )
    save_file({"W_dec": w_dec, "b_dec": b_dec}, tmp_path / "sae_weights.safetensors")
    x, sae = rows(), load_sae(tmp_path)
    centre = b_dec * settings.get("apply_b_dec_to_input", True)
    end, repeats = settings.get("residual_threshold", 1e-2), settings.get("stop_on_duplicate_support", True)
    wanted = slow_values(x, w_dec, centre, settings.get("max_iterations", D), end, repeats)
    assert ((values_of(sae, x) - wanted).abs() <= 2.0**-11 * wanted + 1e-5 * x.norm(dim=1)[:, None]).all()
    save_sae(sae, tmp_path / "ours", {})
    assert torch.equal(values_of(load_sae(tmp_path / "ours"), x), values_of(sae, x))


def test_a_transcoder_cannot_encode_by_its_decoder():
    with pytest.raises(ValueError, match="Leave target_site out"):
        SAEConfig(architecture="mp", target_site="other")
