"""Parts of tokens: texts become vocabulary ids, laid into sequences of one length, written and read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus import sources
from saeflow.corpus.ledger import Entry, Ledger
from saeflow.recipe.settings import CorpusConfig, TokensConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord


def ids_of(tokenizer: Any, texts: list[str], config: TokensConfig) -> list[list[int]]:
    """Return the vocabulary ids of texts. Special-token names in them are plain text, unless `parse_special` is set."""
    literal = {} if config.parse_special else {"split_special_tokens": True}
    return list(tokenizer(texts, add_special_tokens=False, verbose=False, **literal)["input_ids"])


def bos_ids(tokenizer: Any, config: TokensConfig) -> list[int]:
    """Return the ids put before each document."""
    habit = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    wanted = habit if config.prepend_bos is None else config.prepend_bos
    if wanted and tokenizer.bos_token_id is None:
        raise UserError("tokens.prepend_bos is true, but the tokenizer has no BOS token. Set it to false.")
    return [tokenizer.bos_token_id] if wanted else []


class Packed(NamedTuple):
    """Sequences of one part: `vocab_ids` (S, T) and `documents` (S, T), -1 where padding."""

    vocab_ids: np.ndarray
    documents: np.ndarray


def pack(documents: Sequence[tuple[int, np.ndarray]], length: int, packing: str, pad: int) -> Packed:
    """Lay documents, as (document_id, vocab ids), into rows of `length`; nothing is cut, the end is padded."""
    runs = [list(documents)] if packing == "concatenated" else [[document] for document in documents]
    rows = [_rows(run, length, pad) for run in runs if sum(len(ids) for _, ids in run)]
    if not rows:
        return Packed(np.empty((0, length), np.int32), np.empty((0, length), np.int64))
    return Packed(np.concatenate([ids for ids, _ in rows]), np.concatenate([owners for _, owners in rows]))


def _rows(run: Sequence[tuple[int, np.ndarray]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    n_tokens = sum(len(ids) for _, ids in run)
    shape = (-(-n_tokens // length), length)
    vocab_ids = np.full(shape, pad, np.int32)
    owners = np.full(shape, -1, np.int64)
    vocab_ids.reshape(-1)[:n_tokens] = np.concatenate([ids for _, ids in run])
    owners.reshape(-1)[:n_tokens] = np.repeat([owner for owner, _ in run], [len(ids) for _, ids in run])
    return vocab_ids, owners


_DOCUMENTS = pa.schema(
    {
        "document_id": pa.int64(), "key": pa.string(), "source": pa.string(), "content_hash": pa.string(),
        "held_out": pa.bool_(), "n_tokens": pa.int64(), "first_token_id": pa.int64(),
    }
)  # fmt: skip

BLOCK_TOKENS = 512
"""Tokens whose vocabulary ids lie in one row of vocab_blocks: one value is found without reading a column."""

VOCAB_BLOCKS = pa.schema(
    {"block_id": pa.int64(), "first_token_id": pa.int64(), "n_tokens": pa.int32(), "vocab_ids": pa.binary()}
)

_BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at once."""


class TokenPartWriter:
    """Makes the parts of one artefact; knows the numbers the next part begins with."""

    def __init__(self, target: Artefact, tokenizer: Any, about: CorpusConfig, config: TokensConfig) -> None:
        self.target, self.tokenizer, self.about, self.config = target, tokenizer, about, config
        self.metadata = pa.schema([])
        self.n_sequences = self.n_documents = 0
        self.n_vocab = 1 + max(tokenizer.get_vocab().values())
        as_it_is = about.token_ids is not None and config.prepend_bos is None
        self.bos = [] if as_it_is else bos_ids(tokenizer, config)
        self.pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def open_corpus(self, ledger: Ledger) -> Iterator[Entry]:
        """Yield the documents of the corpus that the ledger does not have."""
        opened = sources.open_corpus(self.about)
        self.metadata = opened.metadata
        return ledger.entries_to_store(opened.documents, self.about)

    def advance(self, record: PartRecord) -> None:
        self.n_sequences += record.counts["n_sequences"]
        self.n_documents += record.counts["n_documents"]

    def take(self, stream: Iterator[Entry]) -> Iterator[tuple[Entry, np.ndarray]]:
        """Yield tokenised documents for the next part: whole ones, until it is full."""
        n_tokens = 0
        for batch in _batches(stream, self.config.part_tokens):
            for entry, ids in self.tokenised(batch):
                n_tokens += len(ids)
                yield entry, ids
            if n_tokens >= self.config.part_tokens:
                return

    def tokenised(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, np.ndarray]]:
        for entry, ids in zip(entries, self._ids(entries), strict=True):
            yield entry, np.concatenate([np.array(self.bos, np.int32), np.asarray(ids, np.int32)])

    def _ids(self, entries: Sequence[Entry]) -> Sequence[Sequence[int]]:
        if not entries:
            return []
        if self.about.token_ids is None:
            return ids_of(self.tokenizer, [entry.document.text for entry in entries], self.config)
        for entry in entries:
            self._require_known(entry.key, entry.document.vocab_ids)
        return [entry.document.vocab_ids for entry in entries]

    def _require_known(self, key: str, ids: Sequence[int]) -> None:
        wrong = [i for i in ids if not 0 <= i < self.n_vocab]
        if wrong:
            raise UserError(
                f"corpus.token_ids: the document {key!r} has the id {wrong[0]}, but the model's tokenizer has 0 to "
                f'{self.n_vocab - 1}.\nWas it tokenised for another model? Name the text column instead: text = "...".'
            )

    def write(self, index: int, tokenised: Sequence[tuple[Entry, np.ndarray]]) -> PartRecord:
        numbered = [(self.n_documents + i, entry, ids) for i, (entry, ids) in enumerate(tokenised)]
        sides = [[(n, ids) for n, entry, ids in numbered if entry.held_out == wanted] for wanted in (False, True)]
        train, held_out = (pack(s, self.config.context_length, self.config.packing, self.pad) for s in sides)
        both = Packed(*map(np.concatenate, zip(train, held_out, strict=True)))
        counts = {
            "first_sequence": self.n_sequences,
            "n_sequences": len(both.vocab_ids),
            "n_train_sequences": len(train.vocab_ids),
            "first_document": self.n_documents,
            "n_documents": len(numbered),
            "n_tokens": int((both.documents >= 0).sum()),
            "n_train_tokens": int((train.documents >= 0).sum()),
        }
        return write_part(self.target, index, counts, both, self._documents(numbered, both))

    def _documents(self, numbered: list[tuple[int, Entry, np.ndarray]], packed: Packed) -> pa.Table:
        owners = packed.documents.reshape(-1)
        names, first = np.unique(owners, return_index=True)
        first_token = dict(zip(names.tolist(), first.tolist(), strict=True))
        base = self.n_sequences * self.config.context_length
        begins = [base + first_token[n] if n in first_token else None for n, _, _ in numbered]
        rows = [
            {
                **e.document.metadata, "document_id": n, "key": e.key, "source": e.document.source,
                "content_hash": e.document.content_hash, "held_out": e.held_out, "n_tokens": len(ids),
                "first_token_id": begin,
            }
            for (n, e, ids), begin in zip(numbered, begins, strict=True)
        ]  # fmt: skip
        metadata = [pa.field(field.name, field.type) for field in self.metadata]
        return pa.Table.from_pylist(rows, pa.schema([*_DOCUMENTS, *metadata]))


def write_part(target: Artefact, index: int, counts: dict[str, int], packed: Packed, documents: pa.Table) -> PartRecord:
    """Write one part: the table that the model is fed from, and the documents that begin in it."""
    n_rows, length = packed.vocab_ids.shape
    owners = packed.documents.reshape(-1)
    first = counts["first_sequence"] * length
    table = pa.table(
        {
            "token_id": np.arange(first, first + owners.size, dtype=np.int64),
            "vocab_id": packed.vocab_ids.reshape(-1),
            "document_id": pa.array(owners, mask=owners < 0),
            "position": np.tile(np.arange(length, dtype=np.int32), n_rows),
            "mask": owners >= 0,
        }
    )
    return write_tables(target, index, counts, table, documents)


def write_tables(
    target: Artefact, index: int, counts: dict[str, int], table: pa.Table, documents: pa.Table
) -> PartRecord:
    with target.new_part(index, counts) as folder:
        pq.write_table(
            table, folder / "tokens.parquet", compression="zstd", row_group_size=122_880, use_dictionary=["vocab_id"],
            column_encoding={"token_id": "DELTA_BINARY_PACKED", "document_id": "DELTA_BINARY_PACKED"},
        )  # fmt: skip
        pa.default_memory_pool().release_unused()  # the next table would be written beside freed pages of this one
        pq.write_table(documents, folder / "documents.parquet", compression="zstd")
        pq.write_table(vocab_blocks(table), folder / "vocab_blocks.parquet", compression="none", row_group_size=128)
    return target.made[index]


def vocab_blocks(table: pa.Table) -> pa.Table:
    """Return the vocabulary ids of consecutive tokens as rows of BLOCK_TOKENS, where a question looks one up."""
    token_ids = table.column("token_id").to_numpy()
    ids = table.column("vocab_id").to_numpy().astype(">i4")
    cuts = np.flatnonzero(token_ids % BLOCK_TOKENS == 0)
    starts = np.unique(np.r_[cuts, 0]) if len(ids) else cuts
    ends = np.r_[starts[1:], len(ids)]
    blobs = [ids[a:b].tobytes() for a, b in zip(starts, ends, strict=False)]
    columns = [token_ids[starts] // BLOCK_TOKENS, token_ids[starts], (ends - starts)[: len(starts)], blobs]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, VOCAB_BLOCKS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=VOCAB_BLOCKS)


def _batches(stream: Iterator[Entry], n_tokens: int) -> Iterator[list[Entry]]:
    """Yield documents in groups so small that a part is overfilled by at most one group."""
    limit = min(_BATCH_CHARACTERS, n_tokens)
    batch: list[Entry] = []
    n_characters = 0
    for entry in stream:
        batch.append(entry)
        n_characters += len(entry.document.content)
        if n_characters >= limit:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def read_part(target: Artefact, part: PartRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return the vocabulary ids int64 (S, T) and the mask bool (S, T) of one part."""
    table = pq.read_table(target.part_file(part, "tokens.parquet"), columns=["vocab_id", "mask"])
    shape = (part.counts["n_sequences"], int(target.record.facts["context_length"]))
    vocab_ids = table.column("vocab_id").to_numpy().astype(np.int64)
    return vocab_ids.reshape(shape), table.column("mask").to_numpy(zero_copy_only=False).reshape(shape)
