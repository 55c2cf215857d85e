"""Names of TransformerLens mean the same sites in every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from saeflow.model.hook_names import is_understood, site_of_hook
from saeflow.model.sites import Site, SiteReader, choose_site, list_sites, resolve_sites
from saeflow.runtime.errors import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 8},
    "Llama": SIZES, "Mistral": SIZES, "Qwen3": SIZES, "Gemma2": SIZES,
    "GPTNeoX": {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")},
}  # fmt: skip
NORMAL = {
    "blocks.1.hook_resid_post": "{layer}", "blocks.1.hook_resid_pre": "{layer}:input",
    "blocks.1.hook_mlp_out": "{layer}.mlp",
    "blocks.1.hook_attn_out": "{layer}.{attention}", "blocks.1.attn.hook_z": "{layer}.{attention}.{out}:input",
    "blocks.1.mlp.hook_post": "{layer}.mlp.{down}:input", "blocks.1.ln2.hook_normalized": "{layer}.{second}",
    "blocks.1.hook_resid_mid": "{layer}.{second}:input", "hook_embed": "{embedding}",
    "blocks.1.ln1.hook_normalized": "{layer}.{first}", "layers.1": None,
}  # fmt: skip
LLAMA = {"layer": "model.layers.1", "attention": "self_attn", "out": "o_proj", "down": "down_proj",
         "second": "post_attention_layernorm", "first": "input_layernorm",
         "embedding": "model.embed_tokens"}  # fmt: skip
NAMES: dict[str, dict[str, str]] = {
    "GPT2": {"layer": "transformer.h.1", "attention": "attn", "out": "c_proj", "down": "c_proj", "second": "ln_2",
             "first": "ln_1", "embedding": "transformer.wte"},
    "Llama": LLAMA, "Mistral": LLAMA, "Qwen3": LLAMA, "Gemma2": LLAMA | {"second": "pre_feedforward_layernorm"},
    "GPTNeoX": LLAMA | {"layer": "gpt_neox.layers.1", "attention": "attention", "out": "dense",
                        "down": "dense_4h_to_h", "embedding": "gpt_neox.embed_in"},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module, list[str]]:
    import transformers

    about = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(about).eval()
    return request.param, model, [site.name for site in list_sites(model)]


def meant(family: str, hook: str) -> str | None:
    if family == "Gemma2" and hook.endswith("hook_mlp_out"):
        return "model.layers.1.post_feedforward_layernorm"
    if family == "Gemma2" and hook.endswith("hook_attn_out"):
        return "model.layers.1.post_attention_layernorm"
    if hook == "layers.1":
        return None if family == "GPT2" else NAMES[family]["layer"]
    return (NORMAL[hook] or "").format(**NAMES[family])


@pytest.mark.parametrize("hook", NORMAL)
def test_a_hook_is_the_site_that_it_means(hook: str, family: tuple[str, nn.Module, list[str]]) -> None:
    name, _, sites = family
    assert site_of_hook(hook, sites) == meant(name, hook)
    assert is_understood(hook)


def test_the_vectors_are_those_that_are_meant(family: tuple[str, nn.Module, list[str]]) -> None:
    """What a layer gives is what the next one takes; what MLP and attention add makes the difference."""
    name, model, _ = family
    hooks = [f"blocks.{layer}.hook_resid_{end}" for layer, end in ((0, "post"), (1, "pre"), (1, "post"))]
    hooks += ["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"]
    sites = resolve_sites(model, hooks)
    assert len(sites) == len(hooks)
    reader = SiteReader(model, sites)
    found = reader.read(torch.arange(6).reshape(1, 6), None)
    reader.close()
    first, before, after, mlp, attention = (
        found[choose_site(sites, hook).name] for hook in hooks
    )  # by names of TransformerLens
    assert torch.equal(first, before)
    torch.testing.assert_close(after, before + mlp + attention, rtol=1e-4, atol=1e-5)
    assert name in FAMILIES


def test_a_name_that_means_nothing_here_is_refused_with_the_nearest(family: tuple[str, nn.Module, list[str]]) -> None:
    _, model, sites = family
    assert site_of_hook("blocks.7.hook_resid_post", sites) is None
    assert not is_understood("blocks.1.hook_mystery")
    assert not is_understood(None)
    with pytest.raises(UserError, match=r"the model has no site 'blocks.7.hook_resid_post'"):
        resolve_sites(model, ["blocks.7.hook_resid_post"])


def test_a_store_with_the_site_alone_is_enough() -> None:
    sites = [Site("transformer.h.6", 16), Site("transformer.h.5", 16)]
    assert choose_site(sites, "blocks.6.hook_resid_post").name == "transformer.h.6"
    with pytest.raises(UserError, match=r"sae\.site is 'blocks\.6\.hook_mlp_out'; the sites are"):
        choose_site(sites, "blocks.6.hook_mlp_out")
