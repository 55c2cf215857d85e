"""Small tokenizers of eight families, each of its own class, trained on the small corpus: no network is asked.

tokenizer = FAMILIES["bert"]()
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.support.small_pipeline import documents

TEXTS = [row["text"] for row in documents()]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(model: Any, before: Any, trainer: Any) -> dict[str, Any]:
    """The settings of a model that was trained on the small corpus, as tokenizer.json has them."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator(TEXTS, trainer)
    return dict(json.loads(tokenizer.to_str())["model"])


def byte_level(special: list[str]) -> dict[str, Any]:
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(letters), show_progress=False
    )
    found = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def metaspace(special: list[str]) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *BYTES], show_progress=False)
    found = trained(models.BPE(), pre_tokenizers.Metaspace(), trainer)
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def unigram(special: list[str]) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False, shrinking_factor=0.75
    )
    return [tuple(entry) for entry in trained(models.Unigram(), pre_tokenizers.Metaspace(), trainer)["vocab"]]


def word_pieces() -> dict[str, int]:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    return dict(trained(models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), trainer)["vocab"])


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Tokenizer(**byte_level(["<|endoftext|>"])),
    "llama": lambda: transformers.LlamaTokenizer(**metaspace(["<unk>", "<s>", "</s>"]), add_bos_token=True),
    "gemma": lambda: transformers.GemmaTokenizer(
        **metaspace(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]), add_bos_token=True
    ),
    "bert": lambda: transformers.BertTokenizer(vocab=word_pieces()),
    "roberta": lambda: transformers.RobertaTokenizer(**byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])),
    "t5": lambda: transformers.T5Tokenizer(vocab=unigram(["<pad>", "</s>", "<unk>"]), extra_ids=4),
    "byt5": lambda: transformers.ByT5Tokenizer(extra_ids=4),
    "unigram": lambda: transformers.XLMRobertaTokenizer(vocab=unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])),
}
