"""Documents to fixed-length sequences of tokens, in parts that hold whole documents."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus import sources
from saeflow.corpus.ledger import Entry, Ledger, merge_hidden
from saeflow.corpus.vocabulary import tokenizer_vocab, write_vocab
from saeflow.features.schema import BLOCK_TOKENS, VOCAB_BLOCKS
from saeflow.model.sites import load_tokenizer, model_fingerprint
from saeflow.recipe.fingerprint import fingerprint, settings_that_count
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import CorpusConfig, ModelConfig, TokensConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder
from saeflow.store.records import Generation, PartRecord, note_provenance, noted
from saeflow.store.store import Store

_BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at once."""


@dataclass(frozen=True)
class Packed:
    """Sequences of one part: `vocab_ids` (S, T) and `documents` (S, T), -1 where padding."""

    vocab_ids: np.ndarray
    documents: np.ndarray


def pack(documents: Sequence[tuple[int, np.ndarray]], length: int, packing: str, pad: int) -> Packed:
    """Lay documents, as (document_id, vocab ids), into rows of `length`; nothing is cut, the end is padded."""
    if packing == "concatenated":
        runs = [list(documents)] if documents else []
    else:
        runs = [[document] for document in documents]
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


def artefact(store: Store, recipe: Recipe) -> Artefact:
    """Where this recipe's tokens are, or will be."""
    return store.artefact("tokens", recipe.data_name, fingerprint(facts(recipe)))


def facts(recipe: Recipe) -> dict[str, Any]:
    """What makes two token artefacts comparable; how much corpus there is does not count."""
    assert recipe.model is not None
    assert recipe.corpus is not None
    return {
        "corpus": settings_that_count(recipe.corpus),
        "tokenizer": model_fingerprint(ModelConfig(path=recipe.model.path, revision=recipe.model.revision)),
        **settings_that_count(recipe.tokens),
    }


def run(store: Store, recipe: Recipe, progress: Progress) -> Artefact:
    """Tokenise what the corpus has and the store has not: all of it, new documents, changed ones, lost parts."""
    assert recipe.corpus is not None
    target = artefact(store, recipe)
    with target.writing():
        generation = target.generation() or Generation(0, ())
        done = target.parts()
        lost = [part for part in generation.parts if done.get(part.index) != part]
        whole = bool(generation.number) and not lost and target.complete()
        try:
            about = sources.pin_to_commits(recipe.corpus)
            seen = sources.corpus_signature(about)
        except UserError as error:
            if not whole:
                raise
            progress.say(f"tokens: the corpus is gone, going on with what is stored ({first_line(error)})")
            return target
        if whole and seen is not None and seen == noted(target.path, "corpus"):
            progress.skip("tokens", f"{generation.total('n_tokens'):,} tokens in {len(generation.parts)} parts")
            return target
        began = time.monotonic()
        if different := store.why_new(target, facts(recipe)):
            progress.say(f"{different} A glob such as texts/*.txt takes new files as new documents.")
        maker = _open_maker(target, recipe, about)
        with progress.bar("tokens", None, "tokens") as bar:
            kept = {part.index: part for part in generation.parts} | _restored(maker, lost, generation, bar)
            parts, ledger = _append(maker, generation, done, bar)
        hidden = merge_hidden(generation.hidden, ledger.replaced(generation.parts))
        target.publish([*kept.values(), *parts], {"seconds": time.monotonic() - began}, hidden)
        if seen is not None and ledger.is_complete:
            note_provenance(target.path, {"corpus": seen, "corpus_files": about.files})
            target.storage.send(target.path / "provenance.json")
        progress.say(_summary(ledger, generation))
    return target if ledger.is_complete else run(store, recipe, progress)


def _summary(ledger: Ledger, before: Generation) -> str:
    found = ledger.n_by_verdict
    said = f"tokens: {found['new']:,} documents are new"
    if before.number:
        said += f", {found['changed']:,} changed, {found['same']:,} as before, {found['forgotten']:,} forgotten"
    return said + (f"; {ledger.n_repeated:,} keys came again and got their content added" if ledger.n_repeated else "")


def _open_maker(target: Artefact, recipe: Recipe, about: CorpusConfig) -> _Maker:
    assert recipe.model is not None
    tokenizer = load_tokenizer(recipe.model)
    if not _has_vocab(target):
        make_folder(target.path)
        write_vocab(target.path / "vocab.parquet", *tokenizer_vocab(tokenizer), tokenizer.all_special_ids)
        target.create(facts(recipe), files=["vocab.parquet"])
        target.add_files(["vocab.parquet"])  # the same table has other bytes under another pyarrow
        target.storage.send(target.path / "vocab.parquet")
    return _Maker(target, tokenizer, about, recipe.tokens)


def _has_vocab(target: Artefact) -> bool:
    """Is the vocabulary there as it was recorded?"""
    files = [file for file in target.record.files if file.name == "vocab.parquet"] if target.exists() else []
    return bool(files) and not list(target.missing_files(target.path, files, full=True))


def _append(
    maker: _Maker, generation: Generation, done: dict[int, PartRecord], bar: Bar
) -> tuple[list[PartRecord], Ledger]:
    """Parts of the documents that no published part holds; those that a killed run has finished are kept."""
    ledger = Ledger.read(maker.target, generation)
    for part in generation.parts:
        maker.advance(part)
    stream = maker.open_corpus(ledger)
    parts: list[PartRecord] = []
    for index in itertools.count(len(generation.parts)):
        record, stream = _kept(maker, done.get(index), stream)
        if record is None:
            tokenised = list(maker.take(stream))
            if not tokenised:
                return parts, ledger
            record = maker.write(index, tokenised)
        maker.advance(record)
        bar.advance(record.counts["n_tokens"])
        parts.append(record)
    raise AssertionError  # the loop above has no end


def _kept(
    maker: _Maker, record: PartRecord | None, stream: Iterator[Entry]
) -> tuple[PartRecord | None, Iterator[Entry]]:
    """The record if it holds just the documents that come next, which are then taken from the stream."""
    if record is None or record.counts["first_sequence"] != maker.n_sequences:
        return None, stream
    taken = list(itertools.islice(stream, record.counts["n_documents"]))
    table = pq.read_table(maker.target.part_file(record, "documents.parquet"), columns=["key", "content_hash"])
    if [(e.key, e.document.content_hash) for e in taken] == list(zip(*table.to_pydict().values(), strict=True)):
        return record, stream
    return None, itertools.chain(taken, stream)


def _restored(maker: _Maker, lost: list[PartRecord], generation: Generation, bar: Bar) -> dict[int, PartRecord]:
    """Published parts made again from the documents that no other part holds. Raises UserError if those have
    changed."""
    if not lost:
        return {}
    made = {}
    gone = {part.index for part in lost}
    intact = tuple(part for part in generation.parts if part.index not in gone)
    hidden = {index: documents for index, documents in generation.hidden.items() if index not in gone}
    stream = maker.open_corpus(Ledger.read(maker.target, Generation(generation.number, intact, hidden)))
    for part in lost:
        maker.n_sequences, maker.n_documents = part.counts["first_sequence"], part.counts["first_document"]
        entries = list(itertools.islice(stream, part.counts["n_documents"]))
        made[part.index] = maker.write(part.index, list(maker.tokenised(entries)))
        if (made[part.index].counts, made[part.index].files) != (part.counts, part.files):
            raise UserError(
                f"Part {part.index} of {maker.target.id} is damaged, and the corpus no longer gives the documents it "
                f"held.\nBring the corpus back as it was, restore {maker.target.part_path(part)} from a backup, "
                "or use another recipe name."
            )
        bar.advance(part.counts["n_tokens"])
    maker.n_sequences = maker.n_documents = 0
    return made


class _Maker:
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
        """The documents of the corpus that the ledger does not have."""
        opened = sources.open_corpus(self.about)
        self.metadata = opened.metadata
        return ledger.entries_to_store(opened.documents, self.about)

    def advance(self, record: PartRecord) -> None:
        self.n_sequences += record.counts["n_sequences"]
        self.n_documents += record.counts["n_documents"]

    def take(self, stream: Iterator[Entry]) -> Iterator[tuple[Entry, np.ndarray]]:
        """Tokenised documents for the next part: whole ones, until it is full."""
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
            texts = [entry.document.text for entry in entries]
            return ids_of(self.tokenizer, texts, self.config)
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
        packed = [
            pack(
                [(n, ids) for n, entry, ids in numbered if entry.held_out == wanted],
                self.config.context_length,
                self.config.packing,
                self.pad,
            )
            for wanted in (False, True)
        ]
        both = Packed(
            *(np.concatenate(pair) for pair in zip(*((p.vocab_ids, p.documents) for p in packed), strict=True))
        )
        counts = {
            "first_sequence": self.n_sequences,
            "n_sequences": len(both.vocab_ids),
            "n_train_sequences": len(packed[0].vocab_ids),
            "first_document": self.n_documents,
            "n_documents": len(numbered),
            "n_tokens": int((both.documents >= 0).sum()),
            "n_train_tokens": int((packed[0].documents >= 0).sum()),
        }
        return write_part(self.target, index, counts, both, self._documents(numbered, both))

    def _documents(self, numbered: list[tuple[int, Entry, np.ndarray]], packed: Packed) -> pa.Table:
        owners = packed.documents.reshape(-1)
        names, first = np.unique(owners, return_index=True)
        first_token = dict(zip(names.tolist(), first.tolist(), strict=True))
        base = self.n_sequences * self.config.context_length
        begins = [base + first_token[n] if n in first_token else None for n, _, _ in numbered]
        columns = {
            "document_id": pa.array([n for n, _, _ in numbered], pa.int64()),
            "key": pa.array([e.key for _, e, _ in numbered], pa.string()),
            "source": pa.array([e.document.source for _, e, _ in numbered], pa.string()),
            "content_hash": pa.array([e.document.content_hash for _, e, _ in numbered], pa.string()),
            "held_out": pa.array([e.held_out for _, e, _ in numbered], pa.bool_()),
            "n_tokens": pa.array([len(ids) for _, _, ids in numbered], pa.int64()),
            "first_token_id": pa.array(begins, pa.int64()),
        }
        for name in self.metadata.names:
            kind = self.metadata.field(name).type
            columns[name] = pa.array([e.document.metadata[name] for _, e, _ in numbered], kind)
        return pa.table(columns)


def write_part(target: Artefact, index: int, counts: dict[str, int], packed: Packed, documents: pa.Table) -> PartRecord:
    """Write one part: the table the model is fed from, and the documents that begin in it."""
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
            table,
            folder / "tokens.parquet",
            compression="zstd",
            row_group_size=122_880,
            use_dictionary=["vocab_id"],
            column_encoding={"token_id": "DELTA_BINARY_PACKED", "document_id": "DELTA_BINARY_PACKED"},
        )
        pq.write_table(documents, folder / "documents.parquet", compression="zstd")
        pq.write_table(vocab_blocks(table), folder / "vocab_blocks.parquet", compression="none", row_group_size=128)
    return target.made[index]


def vocab_blocks(table: pa.Table) -> pa.Table:
    """The vocabulary ids of consecutive tokens as rows of BLOCK_TOKENS: where a question looks one up."""
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
    """Documents in groups small enough that a part is overfilled by at most one group."""
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


def ids_of(tokenizer: Any, texts: list[str], config: TokensConfig) -> list[list[int]]:
    """The vocabulary ids of texts. Names of special tokens in them are text like any other, unless the recipe says."""
    literal = {} if config.parse_special else {"split_special_tokens": True}
    return list(tokenizer(texts, add_special_tokens=False, verbose=False, **literal)["input_ids"])


def bos_ids(tokenizer: Any, config: TokensConfig) -> list[int]:
    """The ids put before each document."""
    habit = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    wanted = habit if config.prepend_bos is None else config.prepend_bos
    if wanted and tokenizer.bos_token_id is None:
        raise UserError("tokens.prepend_bos is true, but the tokenizer has no BOS token. Set it to false.")
    return [tokenizer.bos_token_id] if wanted else []


def read_part(target: Artefact, part: PartRecord) -> tuple[np.ndarray, np.ndarray]:
    """Vocabulary ids int64 (S, T) and mask bool (S, T) of one part."""
    table = pq.read_table(target.part_file(part, "tokens.parquet"), columns=["vocab_id", "mask"])
    shape = (part.counts["n_sequences"], int(target.record.facts["context_length"]))
    vocab_ids = table.column("vocab_id").to_numpy().astype(np.int64)
    return vocab_ids.reshape(shape), table.column("mask").to_numpy(zero_copy_only=False).reshape(shape)
