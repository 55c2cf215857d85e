"""The vocabulary as a table: the printable text and the raw bytes of every entry."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.disk import replacing


def tokenizer_vocab(tokenizer: Any) -> tuple[list[str], list[bytes]]:
    """The printable text and the raw bytes of every vocabulary entry, by vocab_id."""
    n_entries = max(tokenizer.get_vocab().values()) + 1
    names = tokenizer.convert_ids_to_tokens(list(range(n_entries)))
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    byte_level = "ByteLevel" in json.dumps([backend.get("decoder"), backend.get("pre_tokenizer")])
    special = set(tokenizer.all_special_ids)
    raw = [_entry_bytes(name or "", byte_level and i not in special, i, tokenizer) for i, name in enumerate(names)]
    return [entry.decode("utf-8", "replace") for entry in raw], raw


def _entry_bytes(name: str, byte_level: bool, vocab_id: int, tokenizer: Any) -> bytes:
    if byte_level and all(letter in _BYTE_OF_LETTER for letter in name):
        return bytes(_BYTE_OF_LETTER[letter] for letter in name)
    return str(tokenizer.decode([vocab_id]) if name not in tokenizer.all_special_tokens else name).encode()


def _byte_letters() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2's table, Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()


def write_vocab(path: Path, pieces: Iterable[str], raw: Iterable[bytes], special: Iterable[int] = ()) -> None:
    """`special`: vocab_ids of entries that are no text, such as the end of a document. Holds one row group at a time."""
    marked = np.array(sorted(special), np.int64)
    pairs, n = zip(pieces, raw, strict=True), 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as file:
        while (batch := list(itertools.islice(pairs, _ROW_GROUP))) or not n:
            numbers = np.arange(n, n + len(batch))
            columns = [
                pa.array(numbers, pa.int32()),
                pa.array([piece for piece, _ in batch], pa.string()),
                pa.array([content for _, content in batch], pa.binary()),
                pa.array(np.isin(numbers, marked)),
            ]
            file.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), _ROW_GROUP)
            n += len(batch)
            if not batch:
                break


_ROW_GROUP = 1 << 17
_SCHEMA = pa.schema([("vocab_id", pa.int32()), ("piece", pa.string()), ("bytes", pa.binary()), ("special", pa.bool_())])


def special_ids(path: Path) -> np.ndarray:
    """vocab_ids int32 of the special entries; none in format 1, which did not mark them."""
    if "special" not in pq.read_schema(path).names:
        return np.empty(0, np.int32)
    table = pq.read_table(path, columns=["vocab_id", "special"])
    return np.asarray(table.filter(table.column("special")).column("vocab_id").to_numpy())
