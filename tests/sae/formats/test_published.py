"""Every published layout opens, and gives the values and reconstructions of its formula in float64.

Values agree within 1e-5 × (|x| · |w| + |b|), besides saeflow's rounding to 11 bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_described, load_sae
from saeflow.sae.formats.save import save_sae
from saeflow.sae.formats.source import describe_source, effective_config
from tests.support.published_saes import LAYOUTS, Published, gemma_scope
from tests.support.small_saes import rows, values_of


def opened(made: Published) -> SparseAutoencoder:
    return load_described(describe_source(SAEConfig(source=str(made.source), **made.asked)))


def assert_agrees(sae: SparseAutoencoder, made: Published, x: Tensor) -> None:
    pre, wanted, got = made.pre(x), made.values(x), values_of(sae, x)
    norms = sae.W_enc.detach().double().norm(dim=1)
    read = sae._normalised(x)[0].double().norm(dim=1)[:, None]
    allowed = 1e-5 * (read * norms + sae.b_enc.detach().double().abs())
    near = 2 * allowed + 2.0**-11 * pre.abs()
    differs = got.sign() != wanted.sign()  # where a value is as near as that to its threshold, either is right
    assert differs.double().mean() < 0.01
    assert ((got - wanted).abs() <= allowed + 2.0**-11 * wanted.abs())[~differs].all()
    assert 0.005 < (wanted != 0).double().mean() < 0.9
    there, again = made.reconstruct(x), sae.reconstruct(x).double()
    exact = ~differs.any(dim=1)
    assert exact.double().mean() > 0.5
    scale = (near @ sae.W_dec.detach().double().abs()).max() + 1e-4 * there.abs().max()
    assert ((there - again).abs()[exact] <= scale).all()
    unexplained = (there - again)[exact].square().sum() / there[exact].square().sum()
    assert unexplained < 1e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_gives_its_programs_values(name: str, tmp_path: Path) -> None:
    made = LAYOUTS[name](tmp_path)
    assert_agrees(opened(made), made, rows())


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_opened_is_saved_and_comes_back_the_same(name: str, tmp_path: Path) -> None:
    made = LAYOUTS[name](tmp_path / "theirs")
    sae, x = opened(made), rows()
    save_sae(sae, tmp_path / "ours", {})
    again = load_sae(tmp_path / "ours")
    assert again.config == sae.config
    assert torch.equal(values_of(again, x), values_of(sae, x))
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-5)


def test_a_transcoder_of_gemma_scope_is_one_because_the_recipe_says_so(tmp_path: Path) -> None:
    """Its file alone does not tell; what is encoded is the same."""
    made = LAYOUTS["Gemma Scope"](tmp_path)
    asked = SAEConfig(source=str(made.source), target_site="other")
    assert effective_config(asked).target_site == "other"
    assert torch.equal(values_of(load_described(describe_source(asked)), rows()), values_of(opened(made), rows()))


HOOKS = {
    "sparsify": "layers.0.mlp", "Gemma Scope": "blocks.0.hook_resid_post", "Gemma Scope 2": "model.layers.0",
    "Gemma Scope transcoder": "blocks.0.ln2.hook_normalized", "Qwen-Scope": "blocks.0.hook_resid_post",
    "torch file": "blocks.0.hook_resid_post", "attention": "blocks.0.attn.hook_z",
    "circuit-tracer": "blocks.0.mlp.hook_in", "Llama Scope": "blocks.0.hook_resid_post",
    "OpenMOSS": "blocks.0.ln2.hook_normalized", "SAELens finetuned": "blocks.0.hook_resid_post",
    "Gemma Scope 2 transcoder": "model.layers.0.pre_feedforward_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_a_folder_says_where_in_the_model_its_sae_was_trained(name: str, tmp_path: Path) -> None:
    made = LAYOUTS[name](tmp_path)
    assert describe_source(SAEConfig(source=str(made.source), **made.asked)).hook == HOOKS[name]


def test_the_nearest_folder_says_of_what_a_gemma_scope_is(tmp_path: Path) -> None:
    made = gemma_scope(tmp_path / "res-work" / "my-transcoders", "gemma-scope-2b-pt-mlp")
    found = describe_source(SAEConfig(source=str(made.source)))
    assert (found.hook, found.config.target_site) == ("blocks.0.hook_mlp_out", None)
