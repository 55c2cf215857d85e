"""Documents to fixed-length sequences of tokens, in parts that hold whole documents."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow import corpus
from saeflow.config import CorpusConfig, ModelConfig, Recipe, TokensConfig, UserError, fingerprint
from saeflow.corpus import Document
from saeflow.disk import replacing
from saeflow.model import load_tokenizer, model_fingerprint
from saeflow.progress import Progress
from saeflow.store import Artefact, PartRecord, Store

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
    return store.artefact("tokens", recipe.name, fingerprint(facts(recipe)))


def facts(recipe: Recipe) -> dict[str, Any]:
    """What makes two token artefacts comparable; how much corpus there is does not count."""
    assert recipe.model is not None
    assert recipe.corpus is not None
    return {
        "corpus": recipe.corpus.model_dump(mode="json"),
        "tokenizer": model_fingerprint(ModelConfig(path=recipe.model.path, revision=recipe.model.revision)),
        **recipe.tokens.model_dump(mode="json"),
    }


def run(store: Store, recipe: Recipe, progress: Progress) -> Artefact:
    """Tokenise the corpus; parts already there are not made again."""
    target = artefact(store, recipe)
    with target.writing():
        published = target.generation()
        done = target.parts()
        if published and all(done.get(part.index) == part for part in published.parts):
            progress.skip("tokens", f"{published.total('n_tokens'):,} tokens in {len(published.parts)} parts")
            return target
        assert recipe.model is not None
        assert recipe.corpus is not None
        tokenizer = load_tokenizer(recipe.model)
        target.begin(facts(recipe))
        write_vocab(target.path / "vocab.parquet", *tokenizer_vocab(tokenizer))
        began = time.monotonic()
        source = corpus.open_corpus(recipe.corpus)
        with progress.bar("tokens", None, "tokens") as bar:
            parts = list(_parts(target, source, tokenizer, recipe.corpus, recipe.tokens, done, bar))
        target.publish(parts, {"seconds": time.monotonic() - began})
    return target


def _parts(
    target: Artefact,
    source: corpus.Corpus,
    tokenizer: Any,
    about: CorpusConfig,
    config: TokensConfig,
    done: dict[int, PartRecord],
    bar: Any,
) -> Iterator[PartRecord]:
    """Cut the stream of documents into parts, in order; finished ones are only skipped over."""
    maker = _Maker(target, tokenizer, about, config, source.metadata)
    stream = iter(source.documents)
    for index in itertools.count():
        record = done.get(index)
        if record is not None and record.counts["first_sequence"] == maker.n_sequences:
            n_skipped = sum(1 for _ in itertools.islice(stream, record.counts["n_documents"]))
            if n_skipped < record.counts["n_documents"]:
                raise UserError(f"The corpus has fewer documents than {target.id} holds. Use another recipe name.")
        else:
            tokenised = list(maker.take(stream))
            if not tokenised:
                return
            record = maker.write(index, tokenised)
        maker.advance(record)
        bar.advance(record.counts["n_tokens"])
        yield record


class _Maker:
    """Makes the parts of one artefact; knows the numbers the next part begins with."""

    def __init__(
        self, target: Artefact, tokenizer: Any, about: CorpusConfig, config: TokensConfig, metadata: pa.Schema
    ) -> None:
        self.target, self.tokenizer, self.about, self.config, self.metadata = target, tokenizer, about, config, metadata
        self.n_sequences = self.n_documents = 0
        self.bos = _bos(tokenizer, config)
        self.pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def advance(self, record: PartRecord) -> None:
        self.n_sequences += record.counts["n_sequences"]
        self.n_documents += record.counts["n_documents"]

    def take(self, stream: Iterator[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Tokenised documents for the next part: whole ones, until it is full."""
        n_tokens = 0
        for batch in _batches(stream, self.config.part_tokens):
            encoded = self.tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)
            for document, ids in zip(batch, encoded["input_ids"], strict=True):
                ids = np.asarray(self.bos + ids, np.int32)
                n_tokens += len(ids)
                yield document, ids
            if n_tokens >= self.config.part_tokens:
                return

    def write(self, index: int, tokenised: Sequence[tuple[Document, np.ndarray]]) -> PartRecord:
        numbered = [(self.n_documents + i, document, ids) for i, (document, ids) in enumerate(tokenised)]
        held = [corpus.is_held_out(d.key, self.about.seed, self.about.held_out) for _, d, _ in numbered]
        packed = [
            pack(
                [(n, ids) for (n, _, ids), h in zip(numbered, held, strict=True) if h == wanted],
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
        return write_part(self.target, index, counts, both, self._documents(numbered, held, both))

    def _documents(
        self, numbered: list[tuple[int, Document, np.ndarray]], held: list[bool], packed: Packed
    ) -> pa.Table:
        owners = packed.documents.reshape(-1)
        names, first = np.unique(owners, return_index=True)
        first_token = dict(zip(names.tolist(), first.tolist(), strict=True))
        base = self.n_sequences * self.config.context_length
        columns = {
            "document_id": pa.array([n for n, _, _ in numbered], pa.int64()),
            "key": pa.array([d.key for _, d, _ in numbered], pa.string()),
            "source": pa.array([d.source for _, d, _ in numbered], pa.string()),
            "content_hash": pa.array([d.content_hash for _, d, _ in numbered], pa.string()),
            "held_out": pa.array(held, pa.bool_()),
            "n_tokens": pa.array([len(ids) for _, _, ids in numbered], pa.int64()),
            "first_token_id": pa.array(
                [base + first_token[n] if n in first_token else None for n, _, _ in numbered], pa.int64()
            ),
        }
        for name in self.metadata.names:
            kind = self.metadata.field(name).type
            columns[name] = pa.array([d.metadata[name] for _, d, _ in numbered], kind)
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
    return target.made[index]


def _batches(stream: Iterator[Document], n_tokens: int) -> Iterator[list[Document]]:
    """Documents in groups small enough that a part is overfilled by at most one group."""
    limit = min(_BATCH_CHARACTERS, n_tokens)
    batch: list[Document] = []
    n_characters = 0
    for document in stream:
        batch.append(document)
        n_characters += len(document.text)
        if n_characters >= limit:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _bos(tokenizer: Any, config: TokensConfig) -> list[int]:
    """The ids put before each document."""
    habit = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    wanted = habit if config.prepend_bos is None else config.prepend_bos
    if wanted and tokenizer.bos_token_id is None:
        raise UserError("tokens.prepend_bos is true, but the tokenizer has no BOS token. Set it to false.")
    return [tokenizer.bos_token_id] if wanted else []


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


def write_vocab(path: Path, pieces: Iterable[str], raw: Iterable[bytes]) -> None:
    pieces = list(pieces)
    table = pa.table(
        {
            "vocab_id": np.arange(len(pieces), dtype=np.int32),
            "piece": pa.array(pieces, pa.string()),
            "bytes": pa.array(list(raw), pa.binary()),
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_part(target: Artefact, part: PartRecord) -> tuple[np.ndarray, np.ndarray]:
    """Vocabulary ids int64 (S, T) and mask bool (S, T) of one part."""
    table = pq.read_table(target.part_path(part) / "tokens.parquet", columns=["vocab_id", "mask"])
    shape = (part.counts["n_sequences"], int(target.record.facts["context_length"]))
    vocab_ids = table.column("vocab_id").to_numpy().astype(np.int64)
    return vocab_ids.reshape(shape), table.column("mask").to_numpy(zero_copy_only=False).reshape(shape)
