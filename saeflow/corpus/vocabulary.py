"""The vocabulary as a table: the printable text and the raw bytes of every entry."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, did_you_mean, nearest
from saeflow.store.files import replacing


def tokenizer_vocab(tokenizer: Any) -> tuple[list[str], list[bytes]]:
    """Return the printable text and the raw bytes of every vocabulary entry, by vocab_id.

    The bytes are what the entry adds to a text that has begun: ` the` at the start of a word, `ing` inside one, a
    single byte for an entry of byte fallback (Kudo & Richardson 2018), and a special entry's own name.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    read = _bytes_of_letters if _is_byte_level(tokenizer) else _byte_of_fallback
    read = _byte_of_letter if _has_byte_letters(tokenizer) else read
    known = [added[i].encode() if i in added else read(name or "") for i, name in enumerate(names)]
    others = iter(_decoded_additions(tokenizer, [i for i, entry in enumerate(known) if entry is None]))
    raw = [next(others) if entry is None else entry for entry in known]
    return [entry.decode("utf-8", "replace") for entry in raw], raw


def _is_byte_level(tokenizer: Any) -> bool:
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    return "ByteLevel" in json.dumps([backend.get("decoder"), backend.get("pre_tokenizer")])


def _has_byte_letters(tokenizer: Any) -> bool:
    """True if each byte is one entry, named by the letter of its number (ByT5, Xue et al. 2022)."""
    names = tokenizer.get_vocab()
    return not tokenizer.is_fast and all(chr(byte) in names for byte in range(256))


def _byte_of_letter(name: str) -> bytes | None:
    return name.encode("latin-1") if len(name) == 1 and ord(name) < 256 else None


def _bytes_of_letters(name: str) -> bytes | None:
    """Return the bytes of an entry of byte-level BPE; None if it is not one."""
    if all(letter in _BYTES_BY_LETTER for letter in name):
        return bytes(_BYTES_BY_LETTER[letter] for letter in name)
    return None


def _byte_of_fallback(name: str) -> bytes | None:
    found = re.fullmatch("<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(found[1]) if found else None


def _decoded_additions(tokenizer: Any, vocab_ids: list[int]) -> list[bytes]:
    """Return what each entry adds to the text before it when the tokenizer decodes both."""
    begun = tokenizer(text_it_reads(tokenizer, "a"), add_special_tokens=False)["input_ids"][:1]
    before = tokenizer.decode(begun)
    whole = tokenizer.batch_decode([[*begun, i] for i in vocab_ids])
    alone = tokenizer.batch_decode([[i] for i in vocab_ids])
    pairs = zip(whole, alone, strict=True)
    added = (text[len(before) :] if text.startswith(before) else entry for text, entry in pairs)
    return [text.encode("utf-8", "replace") for text in added]  # CANINE has an entry for each half of a surrogate


def text_it_reads(tokenizer: Any, preferred: str) -> str:
    """Return a text that has a vocabulary id: the preferred one, or an entry where all its letters are unknown."""
    for text in itertools.chain([preferred], _own_entries(tokenizer)):
        with contextlib.suppress(Exception):  # tokenizers raises no other class where a vocabulary has no <unk>
            if tokenizer(text, add_special_tokens=False)["input_ids"]:
                return text
    return preferred


def _own_entries(tokenizer: Any) -> Iterator[str]:
    for i in sorted(tokenizer.get_vocab().values()):
        if i not in tokenizer.added_tokens_decoder:
            yield tokenizer.decode([i])


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
_LETTERS = map(chr, [*_PRINTABLE, *range(256, 256 + len(_OTHERS))])
_BYTES_BY_LETTER = dict(zip(_LETTERS, [*_PRINTABLE, *_OTHERS], strict=True))
"""The byte of each printable letter in byte-level BPE (GPT-2's table, Radford et al. 2019)."""


def write_vocab(
    path: Path, pieces: Iterable[str], raw: Sequence[bytes] | None = None, special: Iterable[int] = ()
) -> None:
    """Write the vocabulary as Parquet, holding one row group in memory. By default `raw` is `pieces` in UTF-8.

    `special` are the vocab_ids of entries that are not text, such as the end of a document.
    """
    marked, left, n = np.array(sorted(special), np.int64), iter(pieces), 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, _VOCABULARY_SCHEMA, compression="zstd") as file:
        while (batch := list(itertools.islice(left, _VOCABULARY_ROW_GROUP))) or not n:
            numbers = np.arange(n, n + len(batch))
            text = pa.array(batch, pa.string())
            content = text.cast(pa.binary()) if raw is None else pa.array(raw[n : n + len(batch)], pa.binary())
            columns = [pa.array(numbers, pa.int32()), text, content, pa.array(np.isin(numbers, marked))]
            file.write_table(pa.Table.from_arrays(columns, schema=_VOCABULARY_SCHEMA), _VOCABULARY_ROW_GROUP)
            n += len(batch)
            if not batch:
                break

    pa.default_memory_pool().release_unused()


_VOCABULARY_ROW_GROUP = 1 << 17
_VOCABULARY_SCHEMA = pa.schema(
    [("vocab_id", pa.int32()), ("piece", pa.string()), ("bytes", pa.binary()), ("special", pa.bool_())]
)


def special_ids(path: Path) -> np.ndarray:
    """Return the vocab_ids (int32) of special entries. Format 1 did not mark any."""
    if "special" not in pq.read_schema(path).names:
        return np.empty(0, np.int32)
    table = pq.read_table(path, columns=["vocab_id", "special"])
    return np.asarray(table.filter(table.column("special")).column("vocab_id").cast(pa.int32()).to_numpy())


def chosen_vocab_ids(path: Path, chosen: bool | Sequence[str | int]) -> np.ndarray:
    """Return the vocab_ids (int32, sorted) of special entries (true), or of these names and ids. Raises UserError."""
    if isinstance(chosen, bool):
        return special_ids(path) if chosen else np.empty(0, np.int32)
    pieces = pq.read_table(path, columns=["piece"]).column("piece").combine_chunks()
    found = {each for each in chosen if isinstance(each, int)}
    if beyond := [each for each in found if each >= len(pieces)]:
        raise UserError(
            f"activations.skip_special names the id {min(beyond)}; the vocabulary has the ids 0 to {len(pieces) - 1}."
        )
    for name in (each for each in chosen if isinstance(each, str)):
        here = pc.indices_nonzero(pc.equal(pieces, name)).to_pylist()
        if not here:
            special = pieces.take(pa.array(special_ids(path))).to_pylist()
            raise UserError(
                f"activations.skip_special names {brief(name)!r}, but no vocabulary entry is called so. "
                f"{did_you_mean(name, nearest(name, pieces.to_pylist()) or special)}"
            )
        found.update(here)
    return np.array(sorted(found), np.int32)
