"""Models that are not the one the user thinks: each is refused, and sites give what their module gave, once a token."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor

from saeflow.corpus.token_parts import special_tokens
from saeflow.corpus.tokenise.texts import ids_of
from saeflow.corpus.vocabulary import tokenizer_vocab
from saeflow.model.load import load_model, load_tokenizer, model_fingerprint
from saeflow.model.sites import SiteReader, list_sites, resolve_sites, spliced
from saeflow.recipe.data_settings import ModelConfig, TokensConfig
from saeflow.runtime.errors import UserError
from tests.support.small_pipeline import Ingredients

Change = Callable[[Path], None]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.tensor([[5, 9, 20, 2, 4], [7, 7, 1, 3, 8]])


@pytest.fixture
def folder(ingredients: Ingredients, tmp_path: Path) -> Path:
    """A copy of the small model, to be harmed."""
    return Path(shutil.copytree(ingredients.model, tmp_path / "model"))


def configured(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | changes))

    return change


def with_more(*names: str) -> Change:
    """Weights beside those of the model."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({**load_file(path), **{name: torch.zeros(2, 16) for name in names}}, path, {"format": "pt"})

    return change


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


def own_code(folder: Path) -> None:
    configured(auto_map={"AutoModelForCausalLM": "modeling.Mine"}, architectures=["Mine"])(folder)
    (folder / "modeling.py").write_text("raise SystemExit('it ran')")


def own_code_of_a_new_kind(folder: Path) -> None:
    own_code(folder)
    configured(model_type="mine", auto_map={"AutoConfig": "modeling.Mine"})(folder)


def sharded(folder: Path) -> list[Path]:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def without_a_shard(folder: Path) -> None:
    sharded(folder)[-1].unlink()


def index_without_map(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def in_a_dict(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": weights}, folder / "pytorch_model.bin")


def safetensors_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (configured(n_layer=1), r"has no place for 11 weights of its files, e\.g\. transformer\.h\.1\."),
        (configured(n_layer=-1), r"has no place for 22 weights"),
        (with_more("transformer.h.0.adapter.down.weight"), r"no place for 1 weights .* transformer\.h\.0\.adapter"),
        (with_more("h.1.attn.c_attn.lora_A.default.weight"), r"no place for .* h\.1\.attn\.c_attn\.lora_A"),
        (adapter, r"an adapter of PEFT, which saeflow does not apply\.\nMerge it"),
        (own_code, r"needs Python code of its own \(auto_map\)"),
        (own_code_of_a_new_kind, r"needs Python code of its own \(auto_map\)"),
        (without_a_shard, r"its files give no model \(.*model-0000\d-of-0000\d\.safetensors"),
        (index_without_map, r"its files give no model \(no entry 'weight_map'\)"),
        (in_a_dict, r"28 of 29 weights are missing .*; not understood: state_dict"),
        (safetensors_by_another_name, r"its weights are damaged or cut \(PyTorch reads no weights from them\)"),
        (configured(n_layer="2"), r"its files give no model \(Validation error for field 'n_layer': .* got str"),
        (configured(quantization_config={"quant_method": "gptq", "bits": 4}), r"needs a package that is not installed"),
        (configured(tie_word_embeddings=False), r"1 of 29 weights are missing in its files, e\.g\. lm_head\.weight"),
    ],
    ids=["fewer layers", "no layers", "more in a layer", "lora", "adapter", "own code", "own kind", "no shard",
         "index", "dict", "safetensors", "text for a number", "quantised", "untied"],
)  # fmt: skip
def test_another_model_than_the_user_thinks_is_refused(folder: Path, change: Change, says: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=says) as caught:
        load_model(ModelConfig(path=str(folder)))
    assert len(str(caught.value).splitlines()) <= 2
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_is_no_folder_with_a_model(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"that is a file\. Name the folder it lies in"):
        load_model(ModelConfig(path=str(folder / name)))


@pytest.mark.parametrize("names", [["h.0.attn.masked_bias"], ["transformer.h.1.attn.inv_freq"], ["score.weight"]])
def test_what_earlier_versions_saved_and_other_heads_are_left_over(folder: Path, names: list[str]) -> None:
    with_more(*names)(folder)
    assert load_model(ModelConfig(path=str(folder)))


def test_causal_masks_of_old_checkpoints_are_left_over(tmp_path: Path) -> None:
    about = transformers.GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    transformers.GPTNeoForCausalLM(about).save_pretrained(tmp_path)
    with_more("transformer.h.0.attn.attention.bias")(tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path)))
    with_more("transformer.h.0.attn.attention.q_proj.bias")(tmp_path)
    with pytest.raises(UserError, match=r"no place for 1 weights of its files, e\.g\. .*q_proj\.bias"):
        load_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_gives_its_own_numbers(folder: Path, dtype: torch.dtype) -> None:
    transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    model = load_model(ModelConfig(path=str(folder)))
    saved = load_file(folder / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert saved.dtype == dtype
    torch.testing.assert_close(model.get_parameter("transformer.h.0.mlp.c_fc.weight"), saved.float(), rtol=0, atol=0)


def test_weights_in_a_folder_below_belong_to_what_the_model_is(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "sub/weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "sub").mkdir()
    found = []
    for factor in (1, 2):
        save_file(
            {name: factor * w for name, w in weights.items()}, folder / "sub/weights.safetensors", {"format": "pt"}
        )
        os.utime(folder / "sub/weights.safetensors", ns=(factor, factor))  # both within one tick of the clock
        found.append(model_fingerprint(ModelConfig(path=str(folder))))
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", ["Bert", "T5", "Gemma", "XLMRoberta", "Albert", "MPNet", "OpenAIGPT", "XLNet"])
def test_a_class_that_makes_a_tokenizer_of_nothing_is_no_tokenizer(kind: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer is empty, as its files are missing"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def letters(folder: Path, post_processor: Any) -> ModelConfig:
    """A tokenizer of the four letters of DNA, without an entry for what is unknown."""
    tokenizer = Tokenizer(models.BPE({"A": 0, "C": 1, "G": 2, "T": 3, "<s>": 4, "</s>": 5}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor, tokenizer.decoder = post_processor, decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def test_an_alphabet_without_the_letters_of_our_trial_is_read_with_its_special_tokens(tmp_path: Path) -> None:
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)])
    tokenizer = load_tokenizer(letters(tmp_path, ends))
    assert special_tokens(tokenizer) == [["<s>"], ["</s>"]]
    assert tokenizer_vocab(tokenizer)[1][:4] == [b"A", b"C", b"G", b"T"]


def test_a_text_that_a_tokenizer_cannot_read_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"cat": 0, "dog": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    made = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert ids_of(made, ["cat", "dog"], TokensConfig()) == [[0], [1]]
    with pytest.raises(UserError, match=r"cannot read the text 'bird': .*UNK"):
        ids_of(made, ["cat", "bird", "dog"], TokensConfig())


def test_a_tokenizer_of_letters_has_the_bytes_of_each_but_of_half_letters() -> None:
    class Letters:
        """As CANINE has it: the number of a letter is its id."""

        is_fast, added_tokens_decoder = False, {}  # type: ignore[var-annotated]

        def get_vocab(self) -> dict[str, int]:
            return {letter: i for i, letter in enumerate([*string.ascii_lowercase, "\ud800", "é"])}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [list(self.get_vocab())[i] for i in ids]

        def decode(self, ids: list[int]) -> str:
            return "".join(self.convert_ids_to_tokens(ids))

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return list(map(self.decode, rows))

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [self.get_vocab()[letter] for letter in text]}

    assert tokenizer_vocab(Letters())[1][-3:] == [b"z", b"?", "é".encode()]


def a_model(kind: str, about: str, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(getattr(transformers, about)(**settings)).eval()


def read(model: Any, patterns: list[str]) -> dict[str, Tensor]:
    with contextlib.closing(SiteReader(model, resolve_sites(model, patterns))) as reader:
        return reader.read(IDS, None)


@pytest.mark.parametrize(
    ("kind", "about", "settings"),
    [
        ("FalconForCausalLM", "FalconConfig", SMALL),
        ("CTRLLMHeadModel", "CTRLConfig", {"vocab_size": 50, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2}),
        ("PhiForCausalLM", "PhiConfig", SMALL),
        ("AlbertForMaskedLM", "AlbertConfig", SMALL | {"embedding_size": 16}),
        ("LlamaForCausalLM", "LlamaConfig", SMALL),
    ],
    ids=["falcon", "ctrl", "phi", "albert", "llama"],
)
def test_a_site_gives_the_same_whichever_others_are_read_with_it(
    kind: str, about: str, settings: dict[str, Any]
) -> None:
    model = a_model(kind, about, **settings)
    names = [site.name for site in list_sites(model)]
    together = read(model, names)
    assert set(together) == set(names)
    for name in names:
        assert torch.equal(read(model, [name])[name], together[name]), name


def test_a_transcoder_gets_what_was_read_though_the_model_adds_to_it_later() -> None:
    model = a_model("FalconForCausalLM", "FalconConfig", **SMALL)
    given: list[Tensor] = []

    def change(x: Tensor, there: Tensor) -> Tensor:
        given.append(x.clone())
        return there

    with torch.no_grad(), spliced(model, "transformer.h.0.mlp", "transformer.h.1.mlp", change):
        model(IDS)
    assert torch.equal(given[0], read(model, ["transformer.h.0.mlp"])["transformer.h.0.mlp"])


def test_a_layer_that_runs_several_times_is_no_site() -> None:
    model = a_model("AlbertForMaskedLM", "AlbertConfig", **SMALL, embedding_size=16)
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    with pytest.raises(UserError, match=rf"{layer} runs several times .*\nName a module that runs once"):
        resolve_sites(model, [layer])
    assert resolve_sites(model, ["albert.embeddings"])


def test_only_the_encoder_of_two_halves_reads_the_tokens_as_they_are() -> None:
    halves = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    model = a_model("BartForConditionalGeneration", "BartConfig", vocab_size=50, d_model=16, **halves)
    names = [site.name for site in list_sites(model)]
    assert "model.encoder.layers.1" in names
    assert not [name for name in names if "decoder" in name or "lm_head" in name]
