"""Parts of tokens: texts become vocabulary ids, laid into sequences of one length, written and read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus import sources
from saeflow.corpus.ledger import Entry, Ledger
from saeflow.corpus.requests.files import PROMPT
from saeflow.corpus.tokenise.chats import ChatTokeniser
from saeflow.corpus.tokenise.texts import MARKS, Tokenised, mark_columns, tokenise_texts
from saeflow.corpus.vocabulary import text_it_reads
from saeflow.recipe.data_settings import CorpusConfig, TokensConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import ROW_GROUP
from saeflow.store.records import PartRecord


@dataclass(frozen=True)
class Frame:
    """Vocabulary ids of the special tokens before and after a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    in_each_sequence: bool = False
    """True if they stand around each stretch of a document in a sequence, False if only around the document."""

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(each, np.int32) for each in (self.before, ids, self.after)])

    def filled(self, value: int) -> Frame:
        """Return a frame of this shape with one value in the place of every id."""
        before, after = ((value,) * len(each) for each in (self.before, self.after))
        return replace(self, before=before, after=after)


def frame_of(tokenizer: Any, about: CorpusConfig, config: TokensConfig) -> Frame:
    """Return the special tokens that the tokenizer's own call adds; BOS or none if the recipe says so.

    An encoder's tokenizer (it has a mask token) and rows of one document have them in each sequence, as the tokenizer
    itself cuts long texts. BOS alone stands only where a document begins.
    """
    if config.prepend_bos is None and (about.tokenised or about.messages):
        return Frame()
    if config.prepend_bos is None:
        own, n_special = _own_frame(tokenizer), sum(map(len, special_tokens(tokenizer)))
        if config.context_length <= n_special:
            raise UserError(
                f"tokens.context_length is {config.context_length}, but the tokenizer adds {n_special} special tokens."
                f"\nSet at least {n_special + 1}, or tokens.prepend_bos = false to leave them out."
            )
        joined = config.packing == "concatenated" and tokenizer.mask_token_id is None
        return replace(own, in_each_sequence=bool(n_special) and not joined)
    if config.prepend_bos and tokenizer.bos_token_id is None:
        raise UserError("tokens.prepend_bos is true, but the tokenizer has no BOS token. Set it to false.")
    return Frame((tokenizer.bos_token_id,) if config.prepend_bos else ())


def _own_frame(tokenizer: Any) -> Frame:
    """Return what the tokenizer's own call puts before and after the ids of a text."""
    text = text_it_reads(tokenizer, "a text 1")
    plain, whole = (tuple(tokenizer(text, add_special_tokens=added)["input_ids"]) for added in (False, True))
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    start = next(starts, None)
    return Frame() if start is None else Frame(whole[:start], whole[start + len(plain) :])


def special_tokens(tokenizer: Any) -> list[list[str]]:
    """Return the names of the tokens that the tokenizer puts before and after a text; empty if BOS at most."""
    own = _own_frame(tokenizer)
    if own in (Frame(), Frame((tokenizer.bos_token_id,))):
        return []
    return [tokenizer.convert_ids_to_tokens(list(ids)) for ids in (own.before, own.after)]


class Packed(NamedTuple):
    """Sequences of one part: `vocab_ids` (S, T), `documents` (S, T), -1 where padding, and `marks` (S, T) of MARKS."""

    vocab_ids: np.ndarray
    documents: np.ndarray
    marks: np.ndarray | None = None
    roles: Sequence[str] = ()
    """Names of the roles in `marks`."""


Stretch = tuple[int, np.ndarray]
"""A document_id, or -1 for padding, and vocab ids."""


def pack(documents: Sequence[Stretch], length: int, packing: str, pad: int, frame: Frame = Frame()) -> Packed:
    """Lay documents into rows of `length`. Nothing is cut off, the end is padded.

    If the frame is in each sequence, documents are given without it, and a row with too little room is padded.
    """
    runs = [list(documents)] if packing == "concatenated" else [[document] for document in documents]
    if frame.in_each_sequence:
        runs = [list(_framed_stretches(run, length, pad, frame)) for run in runs]
    rows = [_packed_rows(run, length, pad) for run in runs if sum(len(ids) for _, ids in run)]
    if not rows:
        return Packed(np.empty((0, length), np.int32), np.empty((0, length), np.int64))
    return Packed(np.concatenate([ids for ids, _ in rows]), np.concatenate([owners for _, owners in rows]))


def _framed_stretches(run: Sequence[Stretch], length: int, pad: int, frame: Frame) -> Iterator[Stretch]:
    """Cut documents where sequences end, and put the special tokens around each stretch."""
    left = length
    for owner, ids in run:
        start = 0
        while start < len(ids) or not start:  # an empty document has special tokens, too
            if left < len(frame) + min(len(ids), 1):
                yield -1, np.full(left, pad, np.int32)
                left = length
            stretch = frame.around(ids[start : start + left - len(frame)])
            yield owner, stretch
            start += max(len(stretch) - len(frame), 1)
            left = left - len(stretch) or length


def _packed_rows(run: Sequence[Stretch], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
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

VOCAB_IDS = "vocab_ids.npy"
"""The same ids as one array, int32 (n,), which readers map into memory."""

_BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at once."""


class TokenPartWriter:
    """Makes the parts of one artefact; knows the numbers the next part begins with."""

    def __init__(self, target: Artefact, tokenizer: Any, about: CorpusConfig, config: TokensConfig) -> None:
        self.target, self.tokenizer, self.about, self.config = target, tokenizer, about, config
        self.metadata = pa.schema([])
        self.n_sequences = self.n_documents = 0
        self.n_vocab = 1 + max(tokenizer.get_vocab().values())
        self.frame = frame_of(tokenizer, about, config)
        self.chats = ChatTokeniser(tokenizer, config) if about.messages else None
        self.pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def open_corpus(self, ledger: Ledger) -> Iterator[Entry]:
        """Yield the documents of the corpus that the ledger does not have."""
        opened = sources.open_corpus(self.about)
        self.metadata = opened.metadata
        return ledger.entries_to_store(opened.documents, self.about)

    def advance(self, record: PartRecord) -> None:
        self.n_sequences += record.counts["n_sequences"]
        self.n_documents += record.counts["n_documents"]

    def take(self, stream: Iterator[Entry]) -> Iterator[tuple[Entry, Tokenised]]:
        """Yield tokenised documents for the next part: whole ones, until it is full."""
        n_tokens = 0
        for batch in _document_batches(stream, self.config.part_tokens):
            for entry, tokens in self.tokenised(batch):
                n_tokens += len(tokens.vocab_ids) + (0 if self.frame.in_each_sequence else len(self.frame))
                yield entry, tokens
            if n_tokens >= self.config.part_tokens:
                return

    def tokenised(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Tokenised]]:
        """Yield the documents with their tokens, without special tokens around them."""
        return zip(entries, self._tokens(entries), strict=True)

    def _tokens(self, entries: Sequence[Entry]) -> Sequence[Tokenised]:
        if not entries:
            return []
        if self.chats:
            return [self.chats.tokens(entry.key, entry.document.text) for entry in entries]
        if not self.about.tokenised:
            return tokenise_texts(self.tokenizer, [entry.document.text for entry in entries], self.config)
        for entry in entries:
            self._require_known(entry.key, entry.document.vocab_ids)
        return [self._generated(entry, Tokenised.of(entry.document.vocab_ids)) for entry in entries]

    def _generated(self, entry: Entry, tokens: Tokenised) -> Tokenised:
        """Mark what an engine has generated as the assistant's, where the length of the prompt is known."""
        n_prompt = entry.document.metadata.get(PROMPT) if self.about.requests else None
        if isinstance(n_prompt, int):
            tokens.marks["assistant"] = np.arange(len(tokens.marks)) >= n_prompt
        return tokens

    def _require_known(self, key: str, ids: Sequence[int]) -> None:
        wrong = [i for i in ids if not 0 <= i < self.n_vocab]
        if wrong:
            way_out = "Name that model" if self.about.requests else 'Name the text column instead: text = "..."'
            setting = "corpus.requests" if self.about.requests else "corpus.token_ids"
            raise UserError(
                f"{setting}: the document {key!r} has the id {wrong[0]}, but the model's tokenizer has 0 to "
                f"{self.n_vocab - 1}.\nWas it tokenised for another model? {way_out}."
            )

    def write(
        self, index: int, tokenised: Sequence[tuple[Entry, Tokenised]], like: PartRecord | None = None
    ) -> PartRecord:
        """Write a part, with the columns and files that a part `like` it has: an earlier saeflow wrote fewer."""
        numbered = [(self.n_documents + i, entry, tokens) for i, (entry, tokens) in enumerate(tokenised)]
        sides = [
            self._packed([(n, tokens) for n, entry, tokens in numbered if entry.held_out == wanted])
            for wanted in (False, True)
        ]
        train = sides[0]
        ids, owners, marks = (np.concatenate([side[place] for side in sides]) for place in range(3))
        is_marked, with_ids = like is None or has_marks(like), like is None or has_vocab_ids(like)
        both = Packed(ids, owners, marks if is_marked else None, self.chats.roles if self.chats else ())
        counts = {
            "first_sequence": self.n_sequences,
            "n_sequences": len(both.vocab_ids),
            "n_train_sequences": len(train.vocab_ids),
            "first_document": self.n_documents,
            "n_documents": len(numbered),
            "n_tokens": int((both.documents >= 0).sum()),
            "n_train_tokens": int((train.documents >= 0).sum()),
        }
        return write_part(self.target, index, counts, both, self._documents(numbered, both), with_ids)

    def _packed(self, side: Sequence[tuple[int, Tokenised]]) -> Packed:
        """Lay documents into rows, and their marks in the same way: by the places of the tokens one after another."""
        marks = np.concatenate([*(tokens.marks for _, tokens in side), np.full(1, -1, MARKS)])
        ends = np.cumsum([0, *(len(tokens.marks) for _, tokens in side)])
        places = [(n, np.arange(*ends[i : i + 2], dtype=np.int32)) for i, (n, _) in enumerate(side)]
        packed = self._laid([(n, tokens.vocab_ids) for n, tokens in side], self.pad, self.frame)
        return packed._replace(marks=marks[self._laid(places, -1, self.frame.filled(-1)).vocab_ids])

    def _laid(self, stretches: Sequence[Stretch], pad: int, frame: Frame) -> Packed:
        framed = stretches if frame.in_each_sequence else [(n, frame.around(ids)) for n, ids in stretches]
        return pack(framed, self.config.context_length, self.config.packing, pad, frame)

    def _documents(self, numbered: list[tuple[int, Entry, Tokenised]], packed: Packed) -> pa.Table:
        owners = packed.documents.reshape(-1)
        names, *found = (each.tolist() for each in np.unique(owners, return_index=True, return_counts=True))
        places = dict(zip(names, zip(*found, strict=True), strict=True))
        base = self.n_sequences * self.config.context_length
        rows = [
            {
                **e.document.metadata, "document_id": n, "key": e.key, "source": e.document.source,
                "content_hash": e.document.content_hash, "held_out": e.held_out,
                "n_tokens": places[n][1] if n in places else 0,
                "first_token_id": base + places[n][0] if n in places else None,
            }
            for n, e, _ in numbered
        ]  # fmt: skip
        metadata = [pa.field(field.name, field.type) for field in self.metadata]
        return pa.Table.from_pylist(rows, pa.schema([*_DOCUMENTS, *metadata]))


def write_part(
    target: Artefact, index: int, counts: dict[str, int], packed: Packed, documents: pa.Table, with_ids: bool = True
) -> PartRecord:
    """Write one part: the table that the model is fed from, and the documents that begin in it.

    The record counts the tokens with characters only if the table has the columns of MARKS. `with_ids`: with VOCAB_IDS.
    """
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
    if packed.marks is not None:
        for name, column in mark_columns(packed.marks.reshape(-1), packed.roles).items():
            table = table.append_column(name, column)
        counts |= {"n_offsets": int((packed.marks["char_start"] >= 0).sum())}
    return write_token_tables(target, index, counts, table, documents, with_ids)


def has_marks(part: PartRecord) -> bool:
    """True if the tokens have the columns of MARKS. Those of tables and of an earlier saeflow have none."""
    return "n_offsets" in part.counts


def has_vocab_ids(part: PartRecord) -> bool:
    return any(file.name == VOCAB_IDS for file in part.files)


def write_token_tables(
    target: Artefact, index: int, counts: dict[str, int], table: pa.Table, documents: pa.Table, with_ids: bool = True
) -> PartRecord:
    names = set(table.schema.names)
    ascending = names & {"token_id", "document_id", "char_start", "char_end"}
    with target.new_part(index, counts) as folder:
        pq.write_table(
            table, folder / "tokens.parquet", compression="zstd", row_group_size=ROW_GROUP,
            use_dictionary=sorted(names & {"vocab_id", "role"}),
            column_encoding=dict.fromkeys(ascending, "DELTA_BINARY_PACKED"),
        )  # fmt: skip
        pa.default_memory_pool().release_unused()  # the next table would be written beside freed pages of this one
        pq.write_table(documents, folder / "documents.parquet", compression="zstd")
        pq.write_table(vocab_blocks(table), folder / "vocab_blocks.parquet", compression="none", row_group_size=128)
        if with_ids:
            np.save(folder / VOCAB_IDS, table.column("vocab_id").to_numpy().astype("<i4"), allow_pickle=False)
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


def _document_batches(stream: Iterator[Entry], n_tokens: int) -> Iterator[list[Entry]]:
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
    shape = (part.counts["n_sequences"], int(target.fact("context_length")))
    vocab_ids = table.column("vocab_id").to_numpy().astype(np.int64)
    return vocab_ids.reshape(shape), table.column("mask").to_numpy(zero_copy_only=False).reshape(shape)
