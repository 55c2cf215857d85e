"""A hand-written store: a few documents, a few feature values, laid out as the stages lay them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.artefact import Artefact
from saeflow.disk import write_json
from saeflow.store import Store

CONTEXT_LENGTH = 4
N_FEATURES = 4

Value = tuple[int, int, float]
"""token_id, feature_id, value"""


@dataclass
class Document:
    key: str
    source: str
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
    """What is written; a test changes one thing. Every table that is None is derived from the others."""

    documents: list[Document] = field(default_factory=lambda: list(DOCUMENTS))
    values: list[Value] = field(default_factory=lambda: list(VALUES))
    feature_major: list[Value] | None = None
    stats: list[dict[str, float]] | None = None
    tokens: list[dict[str, object]] | None = None
    metadata: dict[str, pa.Array] = field(default_factory=dict)
    name: str = "demo"
    fp: str = "f0000001"
    quality: dict[str, object] | None = None
    n_parts: int = 1
    in_folders: bool = False

    def write(self, root: Path) -> Store:
        store = Store.create(root)
        tokens = self._tokens(store)
        self._features(store, tokens)
        return store

    def _tokens(self, store: Store) -> Artefact:
        artefact = store.artefact("tokens", self.name, self.fp)
        artefact.begin({"context_length": CONTEXT_LENGTH})
        vocab = sorted({piece for document in self.documents for piece in document.pieces}) or [b"?"]
        entries = {
            "vocab_id": pa.array(range(len(vocab)), pa.int32()),
            "piece": [piece.decode("utf-8", "replace") for piece in vocab],
            "bytes": pa.array(vocab, pa.binary()),
        }
        pq.write_table(pa.table(entries), artefact.path / "vocab.parquet")
        owners = [(i, piece) for i, document in enumerate(self.documents) for piece in document.pieces]
        with artefact.new_part(0, {"n_tokens": len(owners)}) as folder:
            rows = self.tokens if self.tokens is not None else token_rows(owners, vocab)
            pq.write_table(pa.Table.from_pylist(rows, TOKENS), folder / "tokens.parquet")
            pq.write_table(self._documents(owners), folder / "documents.parquet")
        artefact.publish(artefact.parts().values())
        return artefact

    def _documents(self, owners: list[tuple[int, bytes]]) -> pa.Table:
        order = [owner for owner, _ in owners]
        first = [order.index(i) if i in order else None for i in range(len(self.documents))]
        columns = {
            "document_id": pa.array(range(len(self.documents)), pa.int64()),
            "key": [document.key for document in self.documents],
            "source": [document.source for document in self.documents],
            "content_hash": ["00"] * len(self.documents),
            "held_out": [False] * len(self.documents),
            "n_tokens": pa.array([len(document.pieces) for document in self.documents], pa.int64()),
            "first_token_id": pa.array(first, pa.int64()),
        }
        return pa.table(columns | self.metadata)

    def _features(self, store: Store, tokens: Artefact) -> Artefact:
        artefact = store.artefact("features", self.name, self.fp)
        facts = {"sae": f"saes/{self.name}-{self.fp}", "n_features": N_FEATURES, "site": "layers.1"}
        artefact.begin(facts, [tokens.id, f"saes/{self.name}-{self.fp}"])
        for index in range(self.n_parts):
            mine = self.values[index :: self.n_parts]
            with artefact.new_part(index, {"n_values": len(mine)}) as folder:
                by_feature = mine if self.feature_major is None else self.feature_major
                for i, path in enumerate(self._files(folder, "token_major")):
                    write_values(mine[i::2] if self.in_folders else mine, path, ["token_id", "feature_id", "value"])
                for i, path in enumerate(self._files(folder, "feature_major")):
                    rows = by_feature[i::2] if self.in_folders else by_feature
                    write_values(rows, path, ["feature_id", "token_id", "value"])
                stats = count_stats(mine) if self.stats is None else self.stats
                pq.write_table(pa.Table.from_pylist(stats, STATS), folder / "feature_stats.parquet")
        artefact.publish(artefact.parts().values())
        if self.quality is not None:
            write_json(artefact.path / "quality.json", self.quality)
        return artefact

    def _files(self, folder: Path, table: str) -> list[Path]:
        if not self.in_folders:
            return [folder / f"{table}.parquet"]
        (folder / table).mkdir()
        return [folder / table / f"{i:03d}.parquet" for i in range(2)]


TOKENS = pa.schema(
    {
        "token_id": pa.int64(),
        "vocab_id": pa.int32(),
        "document_id": pa.int64(),
        "position": pa.int32(),
        "mask": pa.bool_(),
    }
)
STATS = pa.schema(
    {
        "feature_id": pa.int32(),
        "n_tokens": pa.int64(),
        "sum_value": pa.float64(),
        "sum_squares": pa.float64(),
        "max_value": pa.float64(),
    }
)
VALUE_TYPES = {"token_id": pa.int64(), "feature_id": pa.int32(), "value": pa.float32()}


def token_rows(owners: list[tuple[int, bytes]], vocab: list[bytes]) -> list[dict[str, object]]:
    """Documents end to end, the last sequence padded."""
    rows: list[dict[str, object]] = []
    for token_id in range(-(-len(owners) // CONTEXT_LENGTH) * CONTEXT_LENGTH):
        is_real = token_id < len(owners)
        document_id, piece = owners[token_id] if is_real else (None, vocab[0])
        rows.append(
            {
                "token_id": token_id,
                "vocab_id": vocab.index(piece),
                "document_id": document_id,
                "position": token_id % CONTEXT_LENGTH,
                "mask": is_real,
            }
        )
    return rows


def write_values(values: list[Value], path: Path, order: list[str]) -> None:
    rows = [dict(zip(("token_id", "feature_id", "value"), row, strict=True)) for row in values]
    rows.sort(key=lambda row: tuple(row[name] for name in order[:2]))
    schema = pa.schema([(name, VALUE_TYPES[name]) for name in order])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def count_stats(values: list[Value]) -> list[dict[str, float]]:
    rows = []
    for feature_id in range(N_FEATURES):
        mine = [value for _, feature, value in values if feature == feature_id]
        rows.append(
            {
                "feature_id": feature_id,
                "n_tokens": len(mine),
                "sum_value": sum(mine),
                "sum_squares": sum(value**2 for value in mine),
                "max_value": max(mine, default=0.0),
            }
        )
    return rows
