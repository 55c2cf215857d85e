"""A run that the stages made, read file by file: what `small_store.Given` says of a run that a test wrote."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.part_tables import Rows, Token, Value
from tests.support.small_store import Document


@dataclass
class Stored:
    """Tokens, documents and dense values of a run, without any question."""

    store: Store
    run: Artefact

    @property
    def name(self) -> str:
        return self.run.name

    @cached_property
    def source(self) -> Artefact:
        return self.store.input_of(self.run, "tokens")

    @property
    def signed(self) -> bool:
        return self.run.record.facts["architecture"] == "abstopk"

    @property
    def length(self) -> int:
        return int(self.source.record.facts["context_length"])

    @property
    def n_features(self) -> int:
        return int(self.run.record.facts["n_features"])

    @property
    def skipped(self) -> list[int]:
        return list(self.run.record.facts.get("skip_positions", []))

    @cached_property
    def hidden(self) -> list[int]:
        return list(self.source.published().hidden_ids)

    @cached_property
    def vocab(self) -> list[bytes]:
        return list(pq.read_table(self.source.own_file("vocab.parquet")).column("bytes").to_pylist())

    @cached_property
    def _documents(self) -> Rows:
        rows = sorted(self._rows(self.source, "documents.parquet"), key=lambda row: row["document_id"])
        assert [row["document_id"] for row in rows] == list(range(len(rows)))
        return rows

    @cached_property
    def _tokens(self) -> list[Token]:
        sources = {row["document_id"]: row["source"] for row in self._documents}
        rows = sorted(self._rows(self.source, "tokens.parquet"), key=lambda row: row["token_id"])
        return [
            Token(r["token_id"], r["vocab_id"], r["document_id"], sources.get(r["document_id"]), r["position"])
            for r in rows
        ]

    def every_token(self) -> list[Token]:
        return self._tokens

    @cached_property
    def documents(self) -> list[Document]:
        pieces: dict[int | None, list[bytes]] = {}
        for token in self._tokens:
            pieces.setdefault(token.document_id, []).append(self.vocab[token.vocab_id])
        return [Document(row["key"], row["source"], pieces.get(row["document_id"], [])) for row in self._documents]

    @cached_property
    def values(self) -> list[Value]:
        rows = [
            row
            for path in sorted(self.run.path.rglob("*.parquet"))
            if "token_major" in path.as_posix() and self._is_published(path)
            for row in pq.read_table(path, partitioning=None).to_pylist()
        ]
        return sorted((row["token_id"], row["feature_id"], row["value"]) for row in rows)

    @cached_property
    def tables(self) -> dict[str, Rows]:
        names = {file.name for file in self.run.record.files}
        found = {name: f"{name}.parquet" for name in ("similar", "logits")}
        return {
            name: pq.read_table(self.run.own_file(file)).to_pylist() for name, file in found.items() if file in names
        }

    def _is_published(self, path) -> bool:
        return any(self.run.part_path(part) in path.parents for part in self.run.published().parts)

    @staticmethod
    def _rows(artefact: Artefact, file: str) -> Rows:
        tables = [pq.read_table(artefact.part_file(part, file)) for part in artefact.published().parts]
        return list(pa.concat_tables(tables, promote_options="default").to_pylist())
