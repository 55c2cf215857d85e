"""Texts become vocabulary ids, with the characters that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from saeflow.recipe.data_settings import TokensConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import brief
from saeflow.store.records import no_collection

MARK_TYPES = {
    "char_start": pa.int32(), "char_end": pa.int32(), "role": pa.string(), "turn": pa.int32(), "assistant": pa.bool_(),
}  # fmt: skip
"""Columns that tie a token to its document's text and to a message of its conversation; null where there is none."""
MARKS = np.dtype([("char_start", "i4"), ("char_end", "i4"), ("role", "i2"), ("turn", "i4"), ("assistant", "i1")])
"""The same in memory, with -1 for null, and a role as its place in a list of names."""


class Tokenised(NamedTuple):
    """The tokens of one document: `vocab_ids` int32 (n,) and `marks` (n,) of type MARKS."""

    vocab_ids: np.ndarray
    marks: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None = None) -> Tokenised:
        marks = np.full(len(ids), -1, MARKS)
        if offsets:
            pairs = np.array(offsets, "i4,i4")  # thrice as quick as into two columns
            marks["char_start"], marks["char_end"] = pairs["f0"], pairs["f1"]
        return cls(np.asarray(ids, np.int32), marks)


def mark_columns(marks: np.ndarray, roles: Sequence[str]) -> dict[str, pa.Array]:
    """Return the columns of MARK_TYPES for marks (n,)."""
    flat = {name: np.ascontiguousarray(marks[name]) for name in MARK_TYPES}
    found = {name: pa.array(values, mask=values < 0) for name, values in flat.items()}
    named = pa.DictionaryArray.from_arrays(found["role"], pa.array(roles or [""], pa.string()))
    return found | {"role": named.dictionary_decode(), "assistant": found["assistant"].cast(pa.bool_())}


def ids_of(tokenizer: Any, texts: list[str], config: TokensConfig) -> list[list[int]]:
    """Return the vocabulary ids of texts. Special-token names in them are plain text, unless `parse_special` is set."""
    return [ids for read in _tokenised_batches(tokenizer, texts, config) for ids in read["input_ids"]]


def tokenise_texts(tokenizer: Any, texts: list[str], config: TokensConfig) -> list[Tokenised]:
    """Return the vocabulary ids of texts, and the characters that each token stands for by the tokenizer's own account.

    Tokenizers written in Python give no such account.
    """
    if not tokenizer.is_fast:
        return list(map(Tokenised.of, ids_of(tokenizer, texts, config)))
    with no_collection():
        found = _tokenised_batches(tokenizer, texts, config, return_offsets_mapping=True, return_attention_mask=False)
        return [each for read in found for each in map(Tokenised.of, read["input_ids"], read["offset_mapping"])]


def _tokenised_batches(tokenizer: Any, texts: list[str], config: TokensConfig, **options: bool) -> list[Any]:
    literal = {} if config.parse_special else {"split_special_tokens": True}
    try:
        return [tokenizer(texts, add_special_tokens=False, verbose=False, **literal, **options)]
    except Exception as error:  # tokenizers raises no other class
        if len(texts) > 1:
            return [read for text in texts for read in _tokenised_batches(tokenizer, [text], config, **options)]
        raise UserError(
            f"The model's tokenizer cannot read the text {brief(texts[0])!r}: {first_line(error)}.\n"
            "Leave such documents out of the corpus, or name an entry for what is unknown in tokenizer.json."
        ) from error
