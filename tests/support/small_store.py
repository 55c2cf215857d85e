"""A hand-written store: a few documents, a few feature values, laid out as the stages lay them out."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus.token_parts import VOCAB_BLOCKS, VOCAB_IDS
from saeflow.corpus.tokenise.texts import MARK_TYPES
from saeflow.features.schema import LEFT_OUT_TABLE, PART_TABLES, RUN_TABLES, SAMPLE_TABLES
from saeflow.features.schema import VALUES as VALUE_SCHEMAS
from saeflow.store.artefact import Artefact
from saeflow.store.files import write_json
from saeflow.store.records import Hidden
from saeflow.store.store import Store
from tests.support import part_tables
from tests.support.part_tables import Rows, Token, Value

CONTEXT_LENGTH = 4
N_FEATURES = 4


@dataclass
class Document:
    key: str
    source: str | None
    pieces: list[bytes]


DOCUMENTS = [
    Document("emma", "novels", [b"Emma", b" loves", b" no", b" one", b"."]),
    Document("psalm", "bible", [b"Love", b" thy", b" love"]),
    Document("empty", "bible", []),
]
"""Eight real tokens, 0 to 7, in two sequences."""

VALUES = [(0, 0, 1.0), (1, 0, 2.5), (1, 2, 0.5), (3, 1, 4.0), (5, 0, 3.0), (7, 0, 2.0), (7, 2, 1.5)]


@dataclass
class Given:
    """What is written; a test changes one thing. Every table that is None, or not named, is derived from the others."""

    documents: list[Document] = field(default_factory=lambda: list(DOCUMENTS))
    values: list[Value] = field(default_factory=lambda: list(VALUES))
    feature_major: list[Value] | None = None
    stats: list[dict[str, float]] | None = None
    tokens: list[dict[str, object]] | None = None
    vocab_blocks: Rows | None = None
    has_vocab_ids: bool = True
    """False as of a saeflow that knew only the blocks."""
    tables: dict[str, Rows] = field(default_factory=dict)
    """Tables of a part as they are written in each, or `similar` and `logits`, which are empty else."""
    metadata: dict[str, pa.Array] = field(default_factory=dict)
    name: str = "demo"
    fp: str = "f0000001"
    quality: dict[str, object] | None = None
    n_parts: int = 1
    """Parts of the features, each some sequences."""
    n_token_parts: int = 1
    """Parts of the tokens, each some documents and padding at its end."""
    in_folders: bool = False
    n_buckets: int = 0
    """Files of a part by feature range; 0: the files do not say what they may hold."""
    names: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    """What a file of an order, by its number, says that it may hold, in the place of what it should say."""
    is_early: bool = False
    """As a saeflow wrote it that knew neither marginals nor blocks."""
    skipped: Sequence[int] = ()
    """Positions that are not encoded."""
    skips_special: Sequence[bytes] = ()
    """Entries that are special, and not encoded."""
    long: Sequence[int] = ()
    """Tokens whose vectors are too long, so that they are not encoded."""
    early_parts: Sequence[int] = ()
    """Parts of the features as a saeflow wrote them that knew no marginals."""
    without_sample: Sequence[int] = ()
    """Parts of the features as a saeflow wrote them that stored no sample."""
    corpus: tuple[str, str] | None = None
    """Name and fingerprint of the tokens; by default those of the run."""
    hidden: Sequence[int] = ()
    """Documents forgotten after everything was written."""
    row_group_size: int | None = None
    """Values in a row group of a file."""
    signed: bool = False
    """A run of an autoencoder that keeps values below zero."""
    roles: dict[int, str] = field(default_factory=dict)
    """The role of the message that a token is part of."""

    def write(self, root: Path) -> Store:
        store = Store.create(root)
        tokens = self._tokens(store)
        self._features(store, tokens)
        return store

    @property
    def length(self) -> int:
        return CONTEXT_LENGTH

    @property
    def vocab(self) -> list[bytes]:
        return sorted({piece for document in self.documents for piece in document.pieces}) or [b"?"]

    @property
    def n_features(self) -> int:
        return max([N_FEATURES, *(feature + 1 for _, feature, _ in self.values)]) if self.stats is None else N_FEATURES

    def token_parts(self) -> list[list[Token]]:
        """Documents end to end, the last sequence of each part padded."""
        numbers = {piece: vocab_id for vocab_id, piece in enumerate(self.vocab)}
        parts, token_id = [], 0
        for index in range(self.n_token_parts):
            part = []
            for i in self._documents_of(index):
                for piece in self.documents[i].pieces:
                    owner = (i, self.documents[i].source)
                    part.append(Token(token_id, numbers[piece], *owner, token_id % CONTEXT_LENGTH))
                    token_id += 1
            while token_id % CONTEXT_LENGTH:
                part.append(Token(token_id, 0, None, None, token_id % CONTEXT_LENGTH))
                token_id += 1
            parts.append(part)
        return parts

    def every_token(self) -> list[Token]:
        return [token for part in self.token_parts() for token in part]

    def values_of(self, index: int) -> list[Value]:
        """The values of a part of the features."""
        parts = self.parts_of([token_id for token_id, _, _ in self.values])
        return [row for row, part in zip(self.values, parts, strict=True) if part == index]

    def parts_of(self, token_ids: Sequence[int]) -> list[int]:
        """The part of the features that tokens belong to: their part of the tokens, or a share of all sequences."""
        ends = list(itertools.accumulate(map(len, self.token_parts())))
        if self.n_parts == self.n_token_parts:
            return [min(bisect.bisect(ends, token_id), self.n_parts - 1) for token_id in token_ids]
        n_sequences = max(1, ends[-1] // CONTEXT_LENGTH)
        return [min(i // CONTEXT_LENGTH * self.n_parts // n_sequences, self.n_parts - 1) for i in token_ids]

    def _documents_of(self, index: int) -> range:
        n = len(self.documents)
        return range(n * index // self.n_token_parts, n * (index + 1) // self.n_token_parts)

    def _tokens(self, store: Store) -> Artefact:
        artefact = store.artefact("tokens", *(self.corpus or (self.name, self.fp)))
        if artefact.exists():
            return artefact
        artefact.create({"context_length": CONTEXT_LENGTH})
        vocab = self.vocab
        entries = {
            "vocab_id": pa.array(range(len(vocab)), pa.int32()),
            "piece": [piece.decode("utf-8", "replace") for piece in vocab],
            "bytes": pa.array(vocab, pa.binary()),
            "special": [piece in self.skips_special for piece in vocab],
        }
        pq.write_table(pa.table(entries), artefact.path / "vocab.parquet")
        for index, part in enumerate(self.token_parts()):
            n_tokens = sum(token.document_id is not None for token in part)
            counts = {"n_tokens": n_tokens} | self._place(part) | ({} if self.is_early else {"n_offsets": n_tokens})
            with artefact.new_part(index, counts) as folder:
                rows = self.tokens if self.tokens is not None else self._marked(token_rows(part))
                schema = EARLY_TOKENS if self.is_early else TOKENS
                pq.write_table(pa.Table.from_pylist(rows, schema), folder / "tokens.parquet")
                pq.write_table(self._documents(index), folder / "documents.parquet")
                if not self.is_early:
                    blocks = self.vocab_blocks if self.vocab_blocks is not None else part_tables.blocks(part)
                    pq.write_table(pa.Table.from_pylist(blocks, VOCAB_BLOCKS), folder / "vocab_blocks.parquet")
                if not self.is_early and self.vocab_blocks is None and self.has_vocab_ids:
                    np.save(folder / VOCAB_IDS, np.array([row["vocab_id"] for row in rows], "<i4"))
        owners = {i: index for index in range(self.n_token_parts) for i in self._documents_of(index)}
        hidden: dict[int, tuple[Hidden, ...]] = {}
        for i in self.hidden:
            mine = Hidden(document_id=i, key_hash=f"{i}", reason="forgotten")
            hidden[owners[i]] = (*hidden.get(owners[i], ()), mine)
        artefact.publish(artefact.parts().values(), hidden=hidden)
        return artefact

    def _marked(self, rows: list[dict[str, object]]) -> list[dict[str, object]]:
        """The rows with the characters that each token stands for; a letter counts in each token that has a byte."""
        begun: dict[object, bytes] = {}
        for row in rows:
            if row["mask"]:
                before = begun.get(row["document_id"], b"")
                after = begun[row["document_id"]] = before + self.vocab[row["vocab_id"]]
                row["char_start"] = len(before.decode("utf-8", "ignore"))
                row["char_end"] = len(after.decode("utf-8", "replace"))
                row["role"] = self.roles.get(row["token_id"])
        return rows

    def _place(self, part: Sequence[Token]) -> dict[str, int]:
        """Which sequences a part of the tokens has; unsaid where the features are cut into other parts."""
        if self.n_parts != self.n_token_parts or not part:
            return {}
        return {"first_sequence": part[0].token_id // CONTEXT_LENGTH, "n_sequences": len(part) // CONTEXT_LENGTH}

    def _documents(self, index: int) -> pa.Table:
        order = [token.document_id for token in self.every_token()]
        mine = self._documents_of(index)
        documents = [self.documents[i] for i in mine]
        columns = {
            "document_id": pa.array(mine, pa.int64()),
            "key": pa.array([document.key for document in documents], pa.string()),
            "source": pa.array([document.source for document in documents], pa.string()),
            "content_hash": ["00"] * len(documents),
            "held_out": pa.array([False] * len(documents), pa.bool_()),
            "n_tokens": pa.array([len(document.pieces) for document in documents], pa.int64()),
            "first_token_id": pa.array([order.index(i) if i in order else None for i in mine], pa.int64()),
        }
        return pa.table(columns | {name: values[mine.start : mine.stop] for name, values in self.metadata.items()})

    def _features(self, store: Store, tokens: Artefact) -> Artefact:
        artefact = store.artefact("features", self.name, self.fp)
        facts = {"sae": f"saes/{self.name}-{self.fp}", "n_features": self.n_features, "site": "layers.1"}
        facts |= {"architecture": "abstopk"} if self.signed else {}
        settings = {
            "skip_positions": list(self.skipped), "skip_special": bool(self.skips_special),
            "skip_norms_above": 10.0 if self.long else None,
        }  # fmt: skip
        facts |= {name: value for name, value in settings.items() if value}
        artefact.path.mkdir(parents=True, exist_ok=True)
        own = [name for name in RUN_TABLES if name in self.tables]
        for name in own:
            pq.write_table(pa.Table.from_pylist(self.tables[name], RUN_TABLES[name]), artefact.path / f"{name}.parquet")
        artefact.create(facts, [tokens.id, f"saes/{self.name}-{self.fp}"], [f"{name}.parquet" for name in own])
        hidden = tokens.published()
        for index in range(self.n_parts):
            mine = self.values_of(index)
            inputs = {"hidden": hidden.hidden_digest(index)} if self.hidden else {}
            with artefact.new_part(index, {"n_values": len(mine)}, inputs) as folder:
                self._write_orders(folder, mine)
                self._write_tables(folder, mine, index)
        artefact.publish(artefact.parts().values())
        if self.quality is not None:
            write_json(artefact.path / "quality.json", self.quality)
        return artefact

    def _write_orders(self, folder: Path, mine: list[Value]) -> None:
        by_feature = mine if self.feature_major is None else self.feature_major
        if self.n_buckets:
            tokens = [token_id for token_id, _, _ in mine] or [0]
            span = self.names.get(("token_major", 0), (min(tokens), max(tokens)))
            write_values(mine, said(folder, "token_major", *span), "token_major", self.row_group_size)
            edges = [self.n_features * i // self.n_buckets for i in range(self.n_buckets + 1)]
            for i, (low, end) in enumerate(itertools.pairwise(edges)):
                rows = [row for row in by_feature if low <= row[1] < end]
                if end > low:
                    span = self.names.get(("feature_major", i), (low, end - 1))
                    write_values(rows, said(folder, "feature_major", *span), "feature_major", self.row_group_size)
            return
        for order, rows in (("token_major", mine), ("feature_major", by_feature)):
            for i, path in enumerate(self._files(folder, order)):
                write_values(rows[i::2] if self.in_folders else rows, path, order, self.row_group_size)

    def _write_tables(self, folder: Path, mine: list[Value], index: int) -> None:
        tokens = self.every_token()
        seen = [token for token in tokens if token.document_id not in self.hidden]
        parts = self.parts_of([token.token_id for token in seen])
        of_part = [token for token, part in zip(seen, parts, strict=True) if part == index]
        special = {entry for entry, piece in enumerate(self.vocab) if piece in self.skips_special}
        of_part = [token for token in of_part if token.vocab_id not in special and token.token_id not in self.long]
        if self.long:
            entries = {token.token_id: token.vocab_id for token in tokens}
            rows = [{"token_id": i, "vocab_id": entries.get(i, 0), "length": 100.0 + i} for i in self.long]
            pq.write_table(pa.Table.from_pylist(rows, LEFT_OUT_TABLE["left_out"]), folder / "left_out.parquet")
        tables = part_tables.part_tables(mine, of_part, self.n_features, self.skipped, self.signed)
        if self.stats is not None:
            tables["feature_stats"] = list(self.stats)
        if index not in self.without_sample:
            encoded = [token for token in of_part if token.position not in self.skipped]
            keys = [document.key for document in self.documents]
            tables |= part_tables.sample_tables(mine, encoded, keys)
        tables |= {name: rows for name, rows in self.tables.items() if name in tables}
        schemas = PART_TABLES | SAMPLE_TABLES
        for name, rows in tables.items():
            if not (self.is_early or index in self.early_parts) or name == "feature_stats":
                pq.write_table(pa.Table.from_pylist(rows, schemas[name]), folder / f"{name}.parquet")

    def _files(self, folder: Path, table: str) -> list[Path]:
        if not self.in_folders:
            return [folder / f"{table}.parquet"]
        (folder / table).mkdir()
        return [folder / table / f"{i:03d}.parquet" for i in range(2)]


EARLY_TOKENS = pa.schema(
    {
        "token_id": pa.int64(),
        "vocab_id": pa.int32(),
        "document_id": pa.int64(),
        "position": pa.int32(),
        "mask": pa.bool_(),
    }
)
TOKENS = pa.unify_schemas([EARLY_TOKENS, pa.schema(MARK_TYPES)])


def token_rows(tokens: Sequence[Token]) -> list[dict[str, object]]:
    return [
        {
            "token_id": token.token_id,
            "vocab_id": token.vocab_id,
            "document_id": token.document_id,
            "position": token.position,
            "mask": token.document_id is not None,
        }
        for token in tokens
    ]


def said(folder: Path, order: str, low: int, high: int) -> Path:
    """The file of an order that says what it may hold."""
    path = folder / order / f"low={low}" / f"high={high}"
    path.mkdir(parents=True)
    return path / "000.parquet"


def write_values(values: list[Value], path: Path, order: str, row_group_size: int | None = None) -> None:
    schema = VALUE_SCHEMAS[order]
    rows = [dict(zip(("token_id", "feature_id", "value"), row, strict=True)) for row in values]
    rows.sort(key=lambda row: tuple(row[name] for name in schema.names[:2]))
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)


def count_stats(values: list[Value]) -> list[dict[str, float]]:
    return part_tables.count_stats(values, N_FEATURES)
