"""Many changed copies of a sequence in one pass give what one changed sequence at a time gives, whatever the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeflow.meaning.effects.branches import Branches, BranchPass, CopiedPass, SharedPass, choose_pass
from saeflow.meaning.effects.figures import compare
from saeflow.model.sites import choose_site, list_sites

_SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
          "num_attention_heads": 4, "initializer_range": 0.4, "max_position_embeddings": 32}  # fmt: skip
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
MODELS: dict[str, tuple[str, dict[str, Any], str, type[BranchPass] | None]] = {
    "gpt2-resid": ("GPT2LMHeadModel", _GPT2, "transformer.h.0", SharedPass),
    "gpt2-attn": ("GPT2LMHeadModel", _GPT2, "transformer.h.1.attn", SharedPass),
    "gpt2-mlp": ("GPT2LMHeadModel", _GPT2, "transformer.h.1.mlp", SharedPass),
    "gpt2-before-attention": ("GPT2LMHeadModel", _GPT2, "transformer.h.1.ln_1", SharedPass),
    "llama-resid": ("LlamaForCausalLM", _GROUPED, "model.layers.1", SharedPass),
    "llama-hidden": ("LlamaForCausalLM", _GROUPED, "model.layers.0.mlp.down_proj:input", SharedPass),
    "mistral-window": ("MistralForCausalLM", _GROUPED | {"sliding_window": 4}, "model.layers.0", CopiedPass),
    "gemma2-capped": (
        "Gemma2ForCausalLM", _GROUPED | {"head_dim": 4, "sliding_window": 6}, "model.layers.0", CopiedPass,
    ),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, "model.layers.0.mlp", None),
    "neox": ("GPTNeoXForCausalLM", _SMALL, "gpt_neox.layers.1", None),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16, "init_std": 0.4}, "model.decoder.layers.0", None,
    ),
    "bloom-alibi": (
        "BloomForCausalLM",
        {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}, "transformer.h.0",
        CopiedPass,
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 61, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.4},
        "backbone.layers.0", CopiedPass,
    ),
}  # fmt: skip
"""Class, settings, site, and the kind of pass that is right (None: either may be)."""


def a_model(kind: str, about: dict[str, Any]) -> Any:
    named = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return named(named.config_class(**about)).eval().requires_grad_(False)


def one_at_a_time(model: Any, site: str, branches: Branches) -> tuple[Tensor, Tensor]:
    """Logits before and after, by a pass over the whole sequence for each branch, with a hook of the test's own."""
    name, _, side = site.partition(":")
    module: nn.Module = model.get_submodule(name)
    ids, before, after = torch.from_numpy(branches.vocab_ids)[None], [], []
    for place, length, move in zip(branches.places, branches.lengths, branches.moves, strict=True):

        def moved(value: Any, place: int = place, move: Tensor = move) -> Any:
            first = (value[0] if isinstance(value, tuple) else value).clone()
            first[0, place] += move
            return (first, *value[1:]) if isinstance(value, tuple) else first

        rows = slice(place, place + length)
        with torch.no_grad():
            before.append(model(ids).logits[0, rows])
            hook = (
                module.register_forward_pre_hook(lambda m, inputs: moved(inputs))
                if side
                else module.register_forward_hook(lambda m, inputs, output: moved(output))
            )
            after.append(model(ids).logits[0, rows])
            hook.remove()
    return torch.cat(before), torch.cat(after)


def some_branches(width: int, seed: int, length: int = 20, n: int = 7) -> Branches:
    dice = np.random.default_rng(seed)
    places = np.sort(dice.integers(0, length, n))
    lengths = np.minimum(dice.integers(1, 5, n), length - places)
    moves = torch.from_numpy(dice.normal(size=(n, width)).astype(np.float32))
    return Branches(dice.integers(0, 61, length), places, lengths, moves)


@contextlib.contextmanager
def opened(kind: type[BranchPass], model: Any, site: str) -> Iterator[BranchPass]:
    with contextlib.closing(kind(model, site, site)) as running:
        yield running


_QUICK = ("gpt2-resid", "gpt2-attn", "llama-hidden", "mistral-window")


@pytest.mark.parametrize(
    "name", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
def test_a_pass_for_many_changes_gives_what_one_change_at_a_time_gives(name: str) -> None:
    kind, about, site, expected = MODELS[name]
    model = a_model(kind, about)
    width = choose_site(list_sites(model), site).width
    chosen = choose_pass(model, site, site, width, 20)
    assert expected is None or chosen.kind is expected
    assert chosen.reaches_later
    batch = [some_branches(width, seed, length) for seed, length in ((0, 20), (1, 9), (2, 20))]
    wanted = [one_at_a_time(model, site, each) for each in batch]
    for each in {chosen.kind, CopiedPass}:
        with opened(each, model, site) as running:
            pieces = [running.logits(piece) for piece in running.batches(batch)]
        for found, slow in zip(zip(*pieces, strict=True), zip(*wanted, strict=True), strict=True):
            one, other = (torch.log_softmax(torch.cat(rows).double(), 1) for rows in (found, slow))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_transcoder_is_changed_where_it_writes() -> None:
    model, read, target = a_model("GPT2LMHeadModel", _GPT2), "transformer.h.0.mlp:input", "transformer.h.0.mlp"
    branches = some_branches(16, 3)
    with contextlib.closing(SharedPass(model, read, target)) as running:
        found = running.logits([branches])
    for one, other in zip(found, one_at_a_time(model, target, branches), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_site_behind_the_last_attention_reaches_no_later_token() -> None:
    model = a_model("GPT2LMHeadModel", _GPT2 | {"n_layer": 1})
    assert not choose_pass(model, "transformer.h.0.mlp", "transformer.h.0.mlp", 16, 20).reaches_later
    assert choose_pass(model, "transformer.wte", "transformer.wte", 16, 20).reaches_later


def test_a_closed_pass_leaves_the_model_as_it_was() -> None:
    model = a_model("GPT2LMHeadModel", _GPT2)
    ids = torch.arange(9)[None]
    before = model(ids).logits
    with opened(SharedPass, model, "transformer.h.1") as running:
        running.logits([some_branches(16, 0)])
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=60), min_size=1, max_size=6), st.booleans())
def test_batches_hold_every_branch_once_in_order_and_stay_small(counts: list[list[int]], copied: bool) -> None:
    model = a_model("GPT2LMHeadModel", _GPT2 | {"n_layer": 1, "n_positions": 64})
    ids = np.zeros(64, np.int64)
    every = [Branches(ids, np.zeros(len(each), int), np.array(each), torch.zeros(len(each), 16)) for each in counts]
    with opened(CopiedPass if copied else SharedPass, model, "transformer.h.0") as running:
        batches = list(running.batches(every))
        for batch in batches:
            longest = max(running.n_tokens(piece) for piece in batch)
            assert len(batch) == 1 or len(batch) * longest <= 8192
            assert longest <= 8192 + 64
    taken = [length for batch in batches for piece in batch for length in piece.lengths.tolist()]
    assert taken == [length for each in counts for length in each]


def test_figures_are_those_of_their_definitions() -> None:
    dice = torch.Generator().manual_seed(0)
    before = torch.randn(9, 30, generator=dice) * 3
    after = before + torch.randn(9, 30, generator=dice)
    following = np.array([3, -1, 0, 29, 5, 5, -1, 7, 8])
    found = compare(before, after, following, 4, 25)
    p, q = (torch.softmax(each.double(), 1) for each in (before, after))
    assert np.allclose(found.kl, (p * (p / q).log()).sum(1).numpy(), atol=1e-12)
    assert np.isnan(found.loss_change[[1, 6]]).all()
    for row in (0, 2, 3, 4, 5, 7, 8):
        one, other = float(-p[row, following[row]].log()), float(-q[row, following[row]].log())
        assert abs(found.loss[row] - one) < 1e-12
        assert abs(found.loss_change[row] - (other - one)) < 1e-12
    gained = (q - p)[:, :25]
    assert found.up.entries.tolist() == gained.topk(4, 1).indices.tolist()
    assert found.down.entries.tolist() == (-gained).topk(4, 1).indices.tolist()
    assert np.allclose(found.up.after - found.up.before, gained.topk(4, 1).values.numpy(), atol=1e-7)


def test_what_does_not_change_has_no_effect() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    found = compare(logits, logits, np.arange(5), 4, 30)
    assert not found.loss_change.any()
    assert not found.kl.any()
    assert not found.up.counts.any()
    assert not found.down.counts.any()


def test_a_logit_of_minus_infinity_gives_no_nonsense() -> None:
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf
    found = compare(logits, logits * 1.5, np.array([1, 2]), 2, 8)
    assert np.isfinite(found.kl).all()
    assert (found.kl > 0).all()
