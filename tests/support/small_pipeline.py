"""Small real things that run through every stage in seconds: a model, a corpus, recipes.

    ingredients = Ingredients.write(folder)            # a random two-layer GPT-2, its tokenizer, a corpus
    data = recipe_data(ingredients, sae={"k": 2})      # a dict, as TOML gives it; each keyword changes one section
    recipe = parse_recipe(data)
    path = write_recipe(tmp_path / "small.toml", data)

`brought_data` does the same for a user's own table of activations, which needs no model.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.runtime.progress import Progress
from saeflow.store.lease_slot import Owner, Slot

WIDTH = 32
"""Neurons of one MLP layer of the model: the width of the site that recipes read."""

SITE = "transformer.h.0.mlp.act"
CONTEXT_LENGTH = 16
END = "<|endoftext|>"

SCRIPTS = {
    "chinese": "人工智能正在改变世界。猫和狗都是动物，机器人不是。",
    "arabic": "القطة والكلب حيوانان، أما الروبوت فليس حيوانًا.",
    "emoji": "👩‍👩‍👧‍👦 likes 🐈‍⬛ and 🏳️‍🌈; 👍🏽 to 🇨🇭!",
    "combining": "e\u0301 is not é, n\u0303 is not ñ; Z\u0351\u036b\u0343a\u0334l\u0321g\u0322o\u0360; हिन्दी ภาษาไทย",
    "spaces": "\ttabs\tand  two spaces\r\nand\u00a0others\u2028 \n\n",
    "empty": "",
}
"""Texts that break careless tokenisers, by key."""

_SUBJECTS = [
    "the cat",
    "a happy cat",
    "the dog",
    "my loyal dog",
    "a robot",
    "an AI assistant",
    "the old sailor",
    "her brother",
]
_VERBS = ["sees", "follows", "likes", "does not like", "remembers", "writes to", "runs from", "speaks of"]
_PLACES = ["in the garden", "by the sea", "at night", "on a hill", "without a word", "in 1851", "before supper"]


def documents(n: int = 60, seed: int = 0) -> list[dict[str, str]]:
    """Rows with key, text, source and title: the texts of `SCRIPTS`, then `n` made ones of 1 to 12 sentences."""
    dice = random.Random(seed)
    rows = [{"key": key, "text": text, "source": "scripts", "title": key.title()} for key, text in SCRIPTS.items()]
    for i in range(n):
        sentences = [
            f"{dice.choice(_SUBJECTS).capitalize()} {dice.choice(_VERBS)} {dice.choice(_SUBJECTS)} "
            f"{dice.choice(_PLACES)}."
            for _ in range(dice.randint(1, 12))
        ]
        source = ("tales", "letters")[i % 2]
        rows.append({"key": f"{source}/{i:03d}", "text": " ".join(sentences), "source": source, "title": f"No {i}"})
    return rows


def write_corpus(path: Path, rows: list[dict[str, str]] | None = None) -> Path:
    """Documents as one Parquet file."""
    pq.write_table(pa.Table.from_pylist(documents() if rows is None else rows), path)
    return path


def write_model(folder: Path, n_layers: int = 2, activation: str = "gelu_new", n_positions: int = 64) -> Path:
    """A random GPT-2 with its own byte-level BPE of 400 entries, in Hugging Face format."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([row["text"] for row in documents()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    wrapped.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=n_positions, n_embd=16, n_layer=n_layers, n_head=2,
        n_inner=WIDTH, activation_function=activation, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Ingredients:
    """Where a model and a corpus lie."""

    model: Path
    corpus: Path

    @classmethod
    def write(cls, folder: Path) -> Ingredients:
        folder.mkdir(exist_ok=True)
        write_model(folder / "model")
        write_corpus(folder / "corpus.parquet")
        return cls.at(folder)

    @classmethod
    def at(cls, folder: Path) -> Ingredients:
        """Return what `write` wrote into a folder."""
        return cls(folder / "model", folder / "corpus.parquet")


_SMALL: dict[str, Any] = {
    "threads": 1,
    "tokens": {"context_length": CONTEXT_LENGTH, "part_tokens": 800},
    "activations": {"sites": [SITE], "forward_batch": 8},
    "feed": {"batch_rows": 256},
    "sae": {"architecture": "batchtopk", "n_features": 64, "k": 4},
    "train": {"n_tokens": 10_000, "log_every": 5},
    "features": {"compact_parts": 100},  # parts stay as they were encoded
}


def recipe_data(ingredients: Ingredients, **changes: Any) -> dict[str, Any]:
    """A small recipe as a dict. A keyword that is a dict is merged into its section; None removes the section."""
    return _merged(
        {
            "name": "small",
            "corpus": {"files": [str(ingredients.corpus)], "held_out": 0.2},
            "model": {"path": str(ingredients.model)},
            **_SMALL,
        },
        changes,
    )


def brought_data(source: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that reads a table of activations instead of a model."""
    data = {"name": "brought", **_SMALL, "activations": {"source": str(source), "part_rows": 300}}
    return _merged({key: value for key, value in data.items() if key != "tokens"}, changes)


def _merged(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for key, value in changes.items():
        out[key] = {**out.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in out.items() if value is not None}


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    """The dict as TOML (one level of sections)."""
    lines = [f"{key} = {_toml(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for section, values in data.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def a_table(n_rows: int = 700, width: int = 12, seed: int = 0) -> np.ndarray:
    """Activations float32 (n, D) that are sums of a few of 24 directions, plus a little noise and an offset."""
    dice = np.random.default_rng(seed)
    directions = dice.normal(size=(24, width))
    strengths = dice.exponential(size=(n_rows, 24)) * (dice.random((n_rows, 24)) < 0.1)
    return (strengths @ directions + 0.05 * dice.normal(size=(n_rows, width)) + 0.5).astype(np.float32)


def write_table(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def quiet() -> Progress:
    """Progress that says nothing."""
    return Progress(verbosity=-1)


NOT_COMPARED = ("provenance.json", "catalog.sql")
"""Files in which equal stores differ: times and hosts; absolute paths."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but provenance.json, catalog.sql (it names absolute paths), locks and what repair has
    moved aside: equal trees hold equal bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in NOT_COMPARED
        and not {"locks", "damaged"} & set(path.relative_to(folder).parts)
    }


def value_file(folder: Path, order: str = "token_major") -> Path:
    """The one file of an order in the folder of a feature part."""
    [path] = folder.glob(f"{order}/low=*/high=*/*.parquet")
    return path


def take_over(slot: Slot) -> None:
    """Another machine has a lease from now on, whoever had it."""
    theirs = replace(Owner.here(), machine="elsewhere", about="process 7 on elsewhere (saeflow run)")
    while not slot.swap(theirs, slot.read()[1])[0]:  # its owner beats in between
        pass
