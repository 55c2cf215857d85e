"""Models of other families than GPT-2, each through the same code: by the names of its modules alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as tf
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saeflow.activations import shards
from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.corpus.vocabulary import tokenizer_vocab
from saeflow.model.load import load_model, load_tokenizer
from saeflow.model.sites import SiteReader, predicts_next_token, require_length, resolve_sites, spliced
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.stages import run
from saeflow.recipe.data_settings import ModelConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.support.small_pipeline import SCRIPTS, Ingredients, documents, recipe_data

TEXTS = [row["text"] for row in documents()]
IDS = torch.tensor([[5, 9, 200, 2, 4], [7, 7, 1, 3, 8]])


def a_model(about: transformers.PretrainedConfig, kind: type[Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(about)


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE over words that begin with a mark, bytes for what it does not know, BOS before each text: as Llama 2 has
    it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_only_special(tokenizer, special[:3]), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _only_special(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """The trainer marks the bytes as special entries too; only `names` are."""
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] in names]
    return Tokenizer.from_str(json.dumps(written))


def word_piece() -> PreTrainedTokenizerFast:
    """Words and what they go on with, lower case, [CLS] before and [SEP] after: as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def llama_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    a_model(llama_config(), transformers.LlamaForCausalLM).save_pretrained(folder)
    byte_fallback().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    about = transformers.BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    a_model(about, transformers.BertForMaskedLM).save_pretrained(folder)
    word_piece().save_pretrained(folder)
    return folder


def read(model: Any, site: str, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with contextlib.closing(SiteReader(model, resolve_sites(model, [site]))) as reader:
        return reader.read(ids, mask)[site]


def recipe_of(folder: Path, corpus: Path, site: str, **changes: Any) -> Recipe:
    ingredients = Ingredients(folder, corpus)
    changes = {"activations": {"sites": [site], "dtype": "float32"}} | changes
    return parse_recipe(recipe_data(ingredients, **changes))


def stored_rows(store: Store, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(vocab_ids, mask, activations) of every sequence in the store."""
    source, stored = Lineage(store, recipe).tokens, Lineage(store, recipe).activations
    site = stored_sites(stored)[0]
    for one, other in zip(source.published().parts, stored.published().parts, strict=True):
        vocab_ids, mask = (torch.from_numpy(each) for each in token_parts.read_part(source, one))
        yield from zip(vocab_ids, mask, shards.open_site(stored, other, site).read(slice(None)), strict=True)


def test_the_hidden_layer_of_a_gated_mlp_is_the_input_of_its_last_module(llama: Path) -> None:
    model: Any = load_model(ModelConfig(path=str(llama)))
    mlp = model.get_submodule("model.layers.1.mlp")
    x = read(model, "model.layers.1.mlp:input")
    hidden = read(model, "model.layers.1.mlp.down_proj:input")
    assert hidden.shape == (2, 5, 48)
    torch.testing.assert_close(hidden, tf.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(read(model, "model.layers.1.mlp.act_fn"), tf.silu(mlp.gate_proj(x)))


def test_the_residual_stream_of_a_llama_is_read_and_replaced_by_its_block(llama: Path) -> None:
    model: Any = load_model(ModelConfig(path=str(llama)))
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True)
        torch.testing.assert_close(read(model, "model.layers.0"), expected.hidden_states[1])
        with spliced(model, "model.layers.0", "model.layers.0", lambda x, there: x):
            torch.testing.assert_close(model(IDS).logits, expected.logits)
        with spliced(model, "model.layers.0", "model.layers.0", lambda x, there: torch.zeros_like(x)):
            assert not torch.allclose(model(IDS).logits, expected.logits)


def test_a_llama_goes_from_text_to_loss_recovered(llama: Path, ingredients: Ingredients, tmp_path: Path) -> None:
    recipe = recipe_of(llama, ingredients.corpus, "model.layers.0.mlp.down_proj:input")
    store = Store.create(tmp_path / "store")
    quality = run(Lineage(store, recipe), Progress(verbosity=-1))["quality"]
    assert quality["n_predicted"] > 0
    assert quality["loss_zero_ablated"] != quality["loss"]
    vocab_ids, mask, _ = next(stored_rows(store, recipe))
    assert mask.all()
    assert vocab_ids[0] == 1, "BOS, as its tokenizer has the habit"


def test_padding_changes_nothing_that_an_encoder_stores(bert: Path, ingredients: Ingredients, tmp_path: Path) -> None:
    recipe = recipe_of(bert, ingredients.corpus, "bert.encoder.layer.1", tokens={"packing": "isolated"})
    store = Store.create(tmp_path / "store")
    tokens.run(Lineage(store, recipe), Progress(verbosity=-1))
    collect.run(Lineage(store, recipe), Progress(verbosity=-1))
    model = load_model(ModelConfig(path=str(bert)))
    n_padded = 0
    for vocab_ids, mask, x in stored_rows(store, recipe):
        alone = read(model, "bert.encoder.layer.1", vocab_ids[mask][None])[0]
        torch.testing.assert_close(x[mask], alone, rtol=1e-4, atol=1e-5)
        n_padded += int((~mask).sum())
    assert n_padded > 100


def test_an_encoder_goes_from_text_to_features_and_its_loss_is_not_asked_for(
    bert: Path, ingredients: Ingredients, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(bert, ingredients.corpus, "bert.encoder.layer.0", tokens={"packing": "isolated"})
    quality = run(Lineage(Store.create(tmp_path / "store"), recipe), Progress())["quality"]
    assert 0 < quality["variance_unexplained"] < 1
    assert not [name for name in quality if name.startswith("loss")]
    assert "does not predict the next token" in capsys.readouterr().err


def test_only_decoders_with_their_head_predict_the_next_token(
    bert: Path, llama: Path, ingredients: Ingredients
) -> None:
    assert predicts_next_token(load_model(ModelConfig(path=str(llama))))
    assert predicts_next_token(load_model(ModelConfig(path=str(ingredients.model))))
    assert not predicts_next_token(load_model(ModelConfig(path=str(bert))))
    assert not predicts_next_token(a_model(llama_config(), transformers.LlamaModel).eval())


def test_a_model_that_needs_more_than_tokens_is_refused_in_words() -> None:
    about = transformers.T5Config(
        vocab_size=100, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(UserError, match=r"(?s)T5ForConditionalGeneration needs more than the tokens.*decoder.*encoder"):
        resolve_sites(a_model(about, transformers.T5ForConditionalGeneration), ["encoder.block.0"])


def test_a_gguf_file_gives_what_the_model_it_was_made_from_gives(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "small.gguf", llama)
    packed, whole = load_model(ModelConfig(path=str(path))), load_model(ModelConfig(path=str(llama)))
    torch.testing.assert_close(read(packed, "model.layers.1"), read(whole, "model.layers.1"), rtol=1e-5, atol=1e-5)
    assert predicts_next_token(packed)
    text = "The old sailor remembers the cat."
    ids = [load_tokenizer(ModelConfig(path=str(each)))(text)["input_ids"] for each in (path, llama)]
    assert ids[0] == ids[1]
    said = capfd.readouterr()
    assert said.out + said.err == "", "a bar of transformers"


def write_gguf(path: Path, folder: Path) -> Path:
    """A Llama as llama.cpp keeps it: its names of tensors and settings, rows of queries and keys in its order."""
    from gguf import GGUFWriter

    model: Any = load_model(ModelConfig(path=str(folder)))
    about, tokenizer = model.config, load_tokenizer(ModelConfig(path=str(folder)))
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(about.max_position_embeddings)
    writer.add_embedding_length(about.hidden_size)
    writer.add_block_count(about.num_hidden_layers)
    writer.add_feed_forward_length(about.intermediate_size)
    writer.add_head_count(about.num_attention_heads)
    writer.add_head_count_kv(about.num_key_value_heads)
    writer.add_rope_dimension_count(about.head_dim)
    writer.add_rope_freq_base(about.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(about.rms_norm_eps)
    writer.add_vocab_size(about.vocab_size)
    names = tokenizer.convert_ids_to_tokens(list(range(about.vocab_size)))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-float(i) for i in range(len(names))])
    writer.add_token_types([6 if name.startswith("<0x") else 3 if i < 3 else 1 for i, name in enumerate(names)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": about.num_attention_heads, "k_proj": about.num_key_value_heads}
        for projection, n_heads in heads.items():
            if projection in name:
                tensor = tensor.view(n_heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(_gguf_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def joined(tokenizer: Any, text: str) -> bytes:
    """The bytes of a text's entries, one after the other."""
    raw = tokenizer_vocab(tokenizer)[1]
    return b"".join(raw[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", [*SCRIPTS.values(), *TEXTS[10:13]])
def test_bytes_of_entries_join_to_the_text_for_byte_fallback(text: str) -> None:
    assert joined(byte_fallback(), text) == (b" " + text.encode() if text else b"")


@pytest.mark.parametrize("text", [*SCRIPTS.values(), *TEXTS[10:13]])
def test_bytes_of_entries_join_to_the_text_for_byte_level_bpe(text: str, ingredients: Ingredients) -> None:
    assert joined(load_tokenizer(ModelConfig(path=str(ingredients.model))), text) == text.encode()


def test_bytes_of_entries_join_to_words_for_word_pieces() -> None:
    assert joined(word_piece(), "The OLD sailor remembers") == b" the old sailor remembers"


@pytest.mark.parametrize(
    ("tokenizer", "name", "expected"),
    [
        (byte_fallback, "<0xE4>", b"\xe4"),
        (byte_fallback, "<0x0A>", b"\n"),
        (byte_fallback, "▁", b" "),
        (byte_fallback, "<s>", b"<s>"),
        (word_piece, "[CLS]", b"[CLS]"),
        (word_piece, "the", b" the"),
        (word_piece, "##s", b"s"),
    ],
)
def test_the_bytes_of_an_entry_are_what_it_adds_to_a_text(tokenizer: Any, name: str, expected: bytes) -> None:
    made = tokenizer()
    assert tokenizer_vocab(made)[1][made.convert_tokens_to_ids(name)] == expected


def test_a_model_with_several_heads_is_no_predictor_of_the_next_token() -> None:
    about = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    assert not predicts_next_token(a_model(about, transformers.BertForPreTraining).eval())


def test_a_model_that_keeps_positions_for_itself_says_so_before_work() -> None:
    about = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = a_model(about, transformers.RobertaForMaskedLM).eval()
    sites = resolve_sites(model, ["roberta.encoder.layer.0"])
    require_length(model, 18, sites)
    with pytest.raises(UserError, match=r"context_length is 20, but the model reads fewer .*Set less, such as 18"):
        require_length(model, 20, sites)
    with pytest.raises(UserError, match=r"at most 20 tokens"):
        require_length(model, 21, sites)
