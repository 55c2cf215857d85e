"""Loading a model: the one the user means, whole, or a refusal that names what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from saeflow.model.load import load_model, load_tokenizer
from saeflow.recipe.data_settings import ModelConfig
from saeflow.runtime.errors import UserError
from tests.support.small_pipeline import Ingredients

Change = Callable[[Path], None]


@pytest.fixture
def folder(ingredients: Ingredients, tmp_path: Path) -> Path:
    """A copy of the small model, to be harmed."""
    return Path(shutil.copytree(ingredients.model, tmp_path / "model"))


def renamed(prefix: str) -> Change:
    """Weights as a program saves them that wraps or compiles the model."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({prefix + name: value for name, value in load_file(path).items()}, path, {"format": "pt"})

    return change


def without(share: float) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = dict(sorted(load_file(path).items()))
        kept = list(weights)[: int(len(weights) * share)]
        save_file({name: weights[name] for name in kept}, path, {"format": "pt"})

    return change


def wider(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"n_embd": 32}))


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def damaged_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed("_orig_mod."), r"weights are missing in its files, e\.g\. .*; not understood: _orig_mod\."),
        (renamed("module."), r"weights are missing in its files, e\.g\. .*; not understood: module\."),
        (without(0.5), r"of \d+ weights are missing in its files, e\.g\. "),
        (wider, r"weights are of another shape in its files, e\.g\. "),
        (cut, "its weights are damaged or cut"),
        (pointer, r"model\.safetensors in it is a pointer of git-lfs"),
        (damaged_pickle, "its weights are damaged or cut"),
    ],
    ids=["compiled", "wrapped", "half", "other sizes", "cut", "pointer", "damaged pickle"],
)
def test_a_model_that_is_not_whole_is_refused(folder: Path, change: Change, says: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=says) as caught:
        load_model(ModelConfig(path=str(folder)))
    assert len(str(caught.value).splitlines()) <= 2


def test_a_model_with_tied_weights_or_without_its_head_is_whole(folder: Path, tmp_path: Path) -> None:
    assert load_model(ModelConfig(path=str(folder)))
    base = transformers.GPT2Model.from_pretrained(folder)
    base.save_pretrained(tmp_path / "base")
    model = load_model(ModelConfig(path=str(tmp_path / "base")))
    assert torch.equal(model.get_parameter("wte.weight"), base.wte.weight)


def test_an_encoder_saved_without_its_pooler_is_whole(tmp_path: Path) -> None:
    about = transformers.BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.BertModel(about, add_pooling_layer=False).save_pretrained(tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path)))


def test_a_folder_without_its_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    "named", [[5], "GPT2LMHeadModel", ["pipeline"], ["utils"], [None], {}, ["no such model"]], ids=str
)
def test_a_configuration_that_names_no_class_of_model_gives_the_model_without_a_head(
    folder: Path, named: object
) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"architectures": named}))
    try:
        model = load_model(ModelConfig(path=str(folder)))
    except UserError:
        return  # transformers itself refuses some of them
    assert type(model).__name__ == "GPT2Model"
