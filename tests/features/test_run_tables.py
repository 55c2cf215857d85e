"""Features alike, and the vocabulary entries that a direction pushes: against slow obvious arithmetic and real
models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from torch import Tensor

from saeflow.features.run_tables import ONE_WORKER, ProductBlocks, logits, similar
from saeflow.features.schema import RUN_TABLES, TOP, TOP_LOGITS
from saeflow.model.direct_path import direct_path
from saeflow.model.load import load_model
from saeflow.model.sites import list_sites, spliced
from saeflow.recipe.data_settings import ModelConfig

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo" / "model"
VOCAB = 80
FAR = 1e7
"""An intervention so large that what later layers add, whose norms take it back to size, is nothing beside it."""


def some_directions(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


SMALL_BLOCKS = ProductBlocks(rows=7, columns=11)


def slow_similar(rows: np.ndarray, top: int) -> list[tuple[int, int, float]]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    unit = rows / np.where(lengths > 0, lengths, 1)[:, None]
    found = []
    for i in np.flatnonzero(lengths):
        cosines = [(-float(np.round(unit[i] @ unit[j], 6)), int(j)) for j in np.flatnonzero(lengths) if j != i]
        found += [(int(i), j, -cosine) for cosine, j in sorted(cosines)[:top]]
    return found


def rows_of(table: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def assert_same(table: pa.Table, expected: list[tuple[int, int, float]], within: float = 1e-5) -> None:
    found = rows_of(table)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], abs=within)


@pytest.mark.parametrize("top", [1, 5, 40])
def test_each_feature_has_the_others_of_largest_cosine_whatever_the_blocks(top: int) -> None:
    rows = some_directions(40, 6).numpy()
    table = similar(rows, top, SMALL_BLOCKS)
    assert table.schema == RUN_TABLES["similar"]
    assert_same(table, slow_similar(rows, top))


def test_among_equal_cosines_the_lower_features_come_first() -> None:
    rows = np.eye(4, dtype=np.float32)[np.arange(30) % 4]
    assert_same(similar(rows, 10, SMALL_BLOCKS), slow_similar(rows, 10))


def test_lengths_of_directions_do_not_matter() -> None:
    rows = some_directions(20, 5)
    lengths = torch.logspace(-30, 15, 20)[:, None]
    assert rows_of(similar(rows * lengths, 3))[0][:2] == rows_of(similar(rows, 3))[0][:2]
    assert similar(rows * lengths, 3).column("cosine").to_numpy() == pytest.approx(
        similar(rows, 3).column("cosine").to_numpy(), abs=1e-5
    )


def test_directions_without_length_are_like_nobody() -> None:
    rows = some_directions(6, 4)
    rows[1], rows[4] = 0, torch.nan
    table = similar(rows)
    assert {row[0] for row in rows_of(table)} == {0, 2, 3, 5}
    assert {row[1] for row in rows_of(table)} == {0, 2, 3, 5}
    assert len(table) == 4 * 3


@pytest.mark.parametrize("n", [0, 1])
def test_one_feature_alone_is_like_nobody(n: int) -> None:
    assert similar(torch.ones(n, 3)).schema == RUN_TABLES["similar"]
    assert len(similar(torch.ones(n, 3))) == 0


def test_cosines_are_never_above_one_and_the_opposite_comes_last() -> None:
    one = some_directions(1, 300)
    found = rows_of(similar(torch.cat([one, 3 * one, -one]), 2))
    assert [row[:2] for row in found[:4]] == [(0, 1), (0, 2), (1, 0), (1, 2)]
    assert all(abs(row[2]) <= 1 for row in found)
    assert [row[2] for row in found[:2]] == pytest.approx([1, -1], abs=1e-6)


def test_as_many_are_kept_as_the_contract_says() -> None:
    assert len(similar(some_directions(70, 8))) == 70 * TOP


def test_the_number_of_threads_changes_no_bit() -> None:
    rows, model = some_directions(600, 512), load_model(ModelConfig(path=str(DEMO)))
    site = "transformer.h.0.mlp.act"
    one, two = (
        (similar(rows, blocks=ProductBlocks(n)), logits(rows, model, site, blocks=ProductBlocks(n))) for n in (1, 2)
    )
    assert one == two


def made(kind: Any, about: transformers.PretrainedConfig) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(about).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms and biases that do something
                weight.add_(0.3 * torch.randn_like(weight), alpha=1.0 if "bias" not in name else 0.1)
    return model


def gpt2(**about: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=2, initializer_range=0.2, **about
    )
    return made(transformers.GPT2LMHeadModel, config)


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "initializer_range": 0.2,
}  # fmt: skip


def llama() -> Any:
    return made(transformers.LlamaForCausalLM, transformers.LlamaConfig(num_key_value_heads=1, **SHAPE))


def gemma() -> Any:
    """Its norms scale by 1 + weight."""
    return made(transformers.GemmaForCausalLM, transformers.GemmaConfig(num_key_value_heads=1, head_dim=12, **SHAPE))


def pythia() -> Any:
    """Attention and MLP side by side."""
    return made(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SHAPE))


def opt() -> Any:
    """A linear module between the last norm and the unembedding."""
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.OPTConfig(
        ffn_dim=40, word_embed_proj_dim=16, max_position_embeddings=16, init_std=0.2, do_layer_norm_before=True, **shape
    )
    return made(transformers.OPTForCausalLM, config)


def bert(kind: Any) -> Any:
    return made(kind, transformers.BertConfig(**SHAPE))


def width_of(model: Any, site: str) -> int:
    return next(each.width for each in list_sites(model) if each.name == site)


def unit(rows: Tensor) -> Tensor:
    centred = rows.double() - rows.double().mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)


def pushed(model: Any, site: str, direction: Tensor) -> Tensor:
    """What a huge step along the direction changes in the logits of every token, up to one positive factor (T, V)."""
    ids = torch.tensor([[5, 9, 2]])
    there = []
    for step in (FAR, -FAR):
        with spliced(model, site, site, lambda read, x, step=step: x + step * direction):
            there.append(model(ids).logits[0].double())
    return unit(there[0] - there[1])


def all_logits(model: Any, site: str, rows: Tensor, blocks: ProductBlocks = ONE_WORKER) -> Tensor:
    """Our numbers as a matrix (n, V)."""
    table = logits(rows, model, site, VOCAB, blocks)
    assert table is not None
    out = torch.full((len(rows), VOCAB), torch.nan)
    feature_id, vocab_id, values = (torch.tensor(column.to_pylist()) for column in table.columns)
    out[feature_id, vocab_id] = values
    return out


@pytest.mark.parametrize(
    ("model", "site"),
    [
        (gpt2, "transformer.h.1.mlp"),
        (gpt2, "transformer.h.1.mlp.act"),
        (gpt2, "transformer.h.1.attn.c_proj:input"),
        (gpt2, "transformer.h.0"),
        (gpt2, "transformer.h.0.attn"),
        (gpt2, "transformer.ln_f"),
        (lambda: gpt2(tie_word_embeddings=False).double(), "transformer.h.0.mlp.c_proj:input"),
        (llama, "model.layers.1"),
        (llama, "model.layers.0.mlp"),
        (llama, "model.layers.1.mlp.down_proj:input"),
        (llama, "model.layers.1.self_attn.o_proj:input"),
        (gemma, "model.layers.0"),
        (gemma, "model.layers.1.mlp.down_proj:input"),
        (pythia, "gpt_neox.layers.0"),
        (pythia, "gpt_neox.layers.1.mlp.act"),
        (pythia, "gpt_neox.layers.0.attention.dense:input"),
        (opt, "model.decoder.layers.0"),
        (opt, "model.decoder.layers.1.self_attn.out_proj:input"),
    ],
)
@torch.no_grad()
def test_logits_are_what_a_step_along_the_direction_changes_up_to_a_factor_of_the_token(model: Any, site: str) -> None:
    language_model = model()
    rows = some_directions(3, width_of(language_model, site))
    found = all_logits(language_model, site, rows)
    for row, ours in zip(rows, found, strict=True):
        for of_token in pushed(language_model, site, row):
            torch.testing.assert_close(unit(ours), of_token, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_norm_between_the_module_and_the_stream_scales_too() -> None:
    about = transformers.Gemma2Config(
        num_key_value_heads=1, head_dim=12, final_logit_softcapping=None, tie_word_embeddings=False, **SHAPE
    )
    model = made(transformers.Gemma2ForCausalLM, about)
    for weight in (model.get_input_embeddings().weight, model.model.layers[1].self_attn.o_proj.weight):
        weight.zero_()  # the stream is what the last MLP gives
    site, row = "model.layers.1.mlp.down_proj:input", some_directions(1, 40)
    for layer in model.model.layers[:1]:
        layer.mlp.down_proj.weight.zero_()
    torch.testing.assert_close(
        unit(all_logits(model, site, row))[0], pushed(model, site, row[0])[0], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("model", "site"),
    [
        (lambda: bert(transformers.BertModel), "encoder.layer.1"),
        (lambda: bert(transformers.BertForMaskedLM), "bert.encoder.layer.0"),
        (lambda: llama().model, "layers.0"),
        (gpt2, "transformer.h.1.ln_1"),
        (gpt2, "transformer.h.1.attn.c_attn"),
        (gpt2, "transformer.h.1.mlp.c_fc"),
        (gpt2, "transformer.h.1.mlp.act:input"),
        (gpt2, "transformer.h.1.mlp:input"),
        (gpt2, "lm_head"),
        (llama, "model.layers.1.self_attn.q_proj"),
        (llama, "model.layers.1.self_attn.v_proj"),
        (llama, "model.layers.1.mlp.act_fn"),
        (llama, "model.layers.1.mlp.up_proj"),
        (llama, "model.layers.1.post_attention_layernorm"),
    ],
)
def test_sites_without_a_direct_path_have_no_logits(model: Any, site: str) -> None:
    language_model = model()
    assert logits(some_directions(2, width_of(language_model, site)), language_model, site) is None


def test_logits_of_the_demo_model_are_those_of_its_weights() -> None:
    model: Any = load_model(ModelConfig(path=str(DEMO)))
    rows = some_directions(20, 512)
    rows[3] = 0
    table = logits(rows, model, "transformer.h.0.mlp.act")
    assert table is not None
    assert table.schema == RUN_TABLES["logits"]
    stream = rows.double() @ model.transformer.h[0].mlp.c_proj.weight.double()
    scaled = (stream - stream.mean(1, keepdim=True)) * model.transformer.ln_f.weight.double()
    exact = scaled @ model.lm_head.weight.double().t()
    exact -= exact.mean(1, keepdim=True)
    expected = []
    for feature in [*range(3), *range(4, 20)]:
        order = exact[feature].argsort(descending=True).tolist()
        expected += [(feature, i, exact[feature, i].item()) for i in order[:TOP_LOGITS] + order[-TOP_LOGITS:]]
    assert_same(table, expected, within=1e-3)


def test_logits_are_the_same_in_whatever_blocks() -> None:
    model, site, rows = gpt2(), "transformer.h.1", some_directions(30, 24)
    stream = (rows - rows.mean(1, keepdim=True)) * model.transformer.ln_f.weight
    exact = stream @ model.lm_head.weight.t()
    exact -= exact.mean(1, keepdim=True)
    torch.testing.assert_close(all_logits(model, site, rows, SMALL_BLOCKS), exact, rtol=1e-4, atol=1e-4)


def test_what_goes_into_a_norm_of_a_block_is_the_stream_itself() -> None:
    model, rows = gpt2(), some_directions(4, 24)
    inside = logits(rows, model, "transformer.h.1.ln_2:input")
    assert inside is not None
    assert inside.equals(logits(rows, model, "transformer.h.1"))


def test_directions_may_be_read_only() -> None:
    rows = some_directions(4, 24).numpy()
    expected = similar(rows)
    rows.flags.writeable = False
    assert similar(rows).equals(expected)


def test_entries_that_are_pushed_alike_come_in_their_own_order() -> None:
    model = gpt2(tie_word_embeddings=False)
    model.lm_head.weight.copy_(torch.ones(VOCAB, 24) * torch.tensor([1.0, -1.0] * 12))
    model.lm_head.weight[50:] *= -1
    direction = torch.tensor([[1.0, -1.0] * 12]) / model.transformer.ln_f.weight
    table = logits(direction, model, "transformer.ln_f:input")
    assert table is not None
    ids = table.column("vocab_id").to_pylist()
    values = table.column("logit").to_pylist()
    assert sorted(values, reverse=True) == values
    assert len(set(ids)) == 2 * TOP_LOGITS
    for value in set(values):
        same = [i for i, each in zip(ids, values, strict=True) if each == value]
        assert same == sorted(same)


def test_a_small_vocabulary_gives_no_entry_twice() -> None:
    table = logits(some_directions(2, 24), gpt2(), "transformer.h.1", top=1000)
    assert table is not None
    assert sorted(table.column("vocab_id").to_pylist()[:VOCAB]) == list(range(VOCAB))


def test_a_model_in_bfloat16_is_read_in_float32() -> None:
    model, rows = gpt2(), some_directions(4, 24)
    half = gpt2().bfloat16()
    close = all_logits(half, "transformer.h.1", rows)
    torch.testing.assert_close(unit(close), unit(all_logits(model, "transformer.h.1", rows)), rtol=0, atol=0.02)


def test_no_features_have_no_logits() -> None:
    table = logits(torch.zeros(3, 24), gpt2(), "transformer.h.1")
    assert table is not None
    assert len(table) == 0


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_a_norm_counts_whatever_its_size_and_what_is_no_norm_does_not(size: float) -> None:
    model, rows = gpt2(), some_directions(2, 24)
    expected = unit(all_logits(model, "transformer.h.1", rows))
    model.transformer.ln_f.weight.mul_(size)
    model.transformer.ln_f.bias.mul_(size)
    torch.testing.assert_close(unit(all_logits(model, "transformer.h.1", rows)), expected, rtol=1e-4, atol=1e-5)
    model.transformer.ln_f = torch.nn.GELU()
    assert logits(rows, model, "transformer.h.1") is None


@torch.no_grad()
def test_looking_for_the_path_leaves_the_model_as_it_was() -> None:
    model, ids = gpt2(), torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    assert direct_path(model, "transformer.h.0") is not None
    assert torch.equal(model(ids).logits, before)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logits_are_finite_numbers() -> None:
    table = logits(some_directions(5, 24), llama(), "model.layers.0")
    assert table is not None
    assert all(math.isfinite(value) for value in table.column("logit").to_pylist())
