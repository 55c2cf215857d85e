"""Models that are no plain reader of text, and vocabularies that are wider or narrower than the tokenizer's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from saeflow.model.load import load_tokenizer
from saeflow.model.sites import (
    embedding_size,
    list_sites,
    predicts_next_token,
    require_length,
    resolve_sites,
    run_on,
    spliced,
)
from saeflow.pipeline import collect, stages, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.recipe.data_settings import ModelConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.small_pipeline import Ingredients, quiet, recipe_data, write_corpus

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SOUND = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embedding_groups": 2}


def a_model(kind: str, about: str, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(getattr(transformers, about)(**settings)).eval()


@pytest.mark.parametrize(
    ("kind", "about", "settings"),
    [
        ("Wav2Vec2ForCTC", "Wav2Vec2Config", SMALL | SOUND),
        ("HubertModel", "HubertConfig", SMALL | SOUND),
        ("ViTModel", "ViTConfig", SMALL | {"image_size": 16, "patch_size": 8}),
        ("ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}),
        ("T5ForConditionalGeneration", "T5Config", {"vocab_size": 50, "d_model": 16, "d_kv": 8, "num_heads": 2}),
        ("MarianMTModel", "MarianConfig", SIDES | {"vocab_size": 50, "d_model": 16, "pad_token_id": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_model_of_sounds_pictures_or_two_texts_is_refused_with_the_way_out(
    kind: str, about: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=rf"a {kind} needs more than the tokens of a text .*\nName a decoder"):
        list_sites(a_model(kind, about, **settings))


def test_a_model_without_a_longest_sequence_reads_any_length() -> None:
    model = a_model("XLNetLMHeadModel", "XLNetConfig", vocab_size=50, d_model=16, d_inner=24, n_layer=1, n_head=2)
    require_length(model, 200, resolve_sites(model, ["lm_loss"]))
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[True, True, False]])
    with torch.no_grad():
        torch.testing.assert_close(run_on(model, ids, mask).logits, model(ids, attention_mask=mask.long()).logits)


def test_a_block_that_gives_a_tuple_with_names_is_replaced() -> None:
    model = a_model(
        "ReformerModelWithLMHead", "ReformerConfig", vocab_size=50, hidden_size=16, feed_forward_size=24,
        num_attention_heads=2, attention_head_size=8, attn_layers=["local"], axial_pos_embds=False,
        max_position_embeddings=64, local_attn_chunk_length=8, is_decoder=True,
    )  # fmt: skip
    ids = torch.arange(16)[None]
    with torch.no_grad(), spliced(model, "reformer.encoder.layers.0", "reformer.encoder.layers.0", lambda x, y: y):
        same = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(same, model(ids).logits)


@pytest.mark.parametrize("kind", ["XLMRobertaForMaskedLM", "BertForMaskedLM"])
def test_an_encoder_with_small_weights_does_not_predict_the_next_token(kind: str) -> None:
    assert not predicts_next_token(a_model(kind, kind.replace("ForMaskedLM", "Config"), vocab_size=50, **SMALL))


def test_a_vocabulary_of_three_entries_is_large_enough() -> None:
    model = a_model("GPT2LMHeadModel", "GPT2Config", vocab_size=3, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    assert predicts_next_token(model)


def extended(ingredients: Ingredients, folder: Path, text: str, n_rows: int | None = None) -> Recipe:
    """The small model, whose tokenizer has got a padding token and a word more; its embedding has `n_rows`."""
    shutil.copytree(ingredients.model, folder / "model")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder / "model")
    if n_rows:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder / "model")
        model.resize_token_embeddings(n_rows, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[len(tokenizer) :] = 100
        model.save_pretrained(folder / "model")
    rows = [{"key": str(i), "text": f"{text} the cat sees number {i} by the sea", "source": "s"} for i in range(40)]
    corpus = write_corpus(folder / "corpus.parquet", rows)
    return parse_recipe(recipe_data(Ingredients(folder / "model", corpus), train={"n_tokens": 1000}))


def test_padding_beyond_the_embedding_is_fed_as_another_id(ingredients: Ingredients, tmp_path: Path) -> None:
    lineage = Lineage(Store.create(tmp_path / "store"), extended(ingredients, tmp_path, "plain"))
    quality = stages.run(lineage, quiet())["quality"]
    assert quality["n_predicted"] > 0


def test_a_word_beyond_the_embedding_is_refused_by_its_name_before_work(
    ingredients: Ingredients, tmp_path: Path
) -> None:
    lineage = Lineage(Store.create(tmp_path / "store"), extended(ingredients, tmp_path, "a zebra"))
    tokens.run(lineage, quiet())
    with pytest.raises(UserError, match=r"gives 'zebra' the id 401, but .* the ids 0 to 399\.\n.*resize_token_emb"):
        collect.run(lineage, quiet())
    assert not lineage.activations.exists()


def test_rows_that_no_token_has_push_no_words(ingredients: Ingredients, tmp_path: Path) -> None:
    lineage = Lineage(Store.create(tmp_path / "store"), extended(ingredients, tmp_path, "a zebra", 464))
    stages.run(lineage, quiet())
    with connect(lineage.store) as connection:
        assert ask(connection, "feature_logits", [0]).num_rows == 40


def test_what_is_masked_does_not_change_what_is_read(ingredients: Ingredients) -> None:
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(ingredients.model).eval()
    assert embedding_size(model) == 400
    ids, mask = torch.tensor([[5, 6, 9000]]), torch.tensor([[True, True, False]])
    with torch.no_grad():
        found = run_on(model, ids, mask).logits
        torch.testing.assert_close(found[:, :2], model(ids[:, :2]).logits)
    assert ids[0, 2] == 9000
