"""A store of very many parts whose records and lists are real and whose contents are not.

Real: `artefact.json`, `part.json` of every part, generations, manifest, and one file for each that a record names, of
the size that it states. Not real: what is in them. Shards are holes, other files hard links to a few small ones,
checksums are digits by chance; nothing is flushed to the disk while the parts are made. `documents.parquet` is real
where asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.shards import plan_layout
from saeflow.activations.writer import ArrayWriter
from saeflow.corpus.vocabulary import write_vocab
from saeflow.features.compaction import USUAL_MERGE
from saeflow.features.schema import FIRST_INDEX, PART_TABLES, SAMPLE_TABLES, stands_for
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.store.artefact import Artefact
from saeflow.store.records import FileRecord, Generation, PartRecord
from saeflow.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
LENGTH, WIDTH, N_FEATURES = 256, 512, 16_384
SITE = "transformer.h.0.mlp.act"
N_SEQUENCES, N_TRAIN = 1024, 973
"""Of a part, if nothing else is said: 262,144 tokens, as `tokens.part_tokens` is by default; and how many of them
train."""
N_DOCUMENTS = 100
VALUES_PER_TOKEN = 32
_MOST_LINKS = 50_000


@dataclass
class Many:
    """The store, its recipe, and how its parts are made."""

    store: Store
    n_parts: int
    sources: Mapping[str, Path] = field(default_factory=dict)
    """Small real files by the name that parts give them; others have one byte."""
    with_files: bool = True
    with_documents: bool = False
    n_shards: int = 8
    n_sequences: int = N_SEQUENCES
    """In a part; a twentieth of them held out."""

    @property
    def recipe(self) -> Recipe:
        return parse_recipe(
            {
                "name": "many",
                "corpus": {"files": ["texts/*.txt"]},
                "model": {"path": str(ROOT / "data" / "demo" / "model")},
                "tokens": {"context_length": LENGTH},
                "activations": {"sites": [SITE]},
                "sae": {"n_features": N_FEATURES, "k": VALUES_PER_TOKEN},
            }
        )

    @cached_property
    def lineage(self) -> Lineage:
        return Lineage(self.store, self.recipe)

    @property
    def tokens(self) -> Artefact:
        return self.lineage.tokens

    @property
    def activations(self) -> Artefact:
        return self.lineage.activations

    @property
    def features(self) -> Artefact:
        return self.lineage.features

    def make(self, *kinds: str) -> None:
        """Publish all parts of these kinds, in the order of the stages."""
        for kind in kinds:
            getattr(self, f"_make_{kind}")()

    def token_parts(self, start: int, stop: int) -> Iterator[PartRecord]:
        names = ("documents.parquet", "tokens.parquet", "vocab_blocks.parquet", "vocab_ids.npy")
        for index in range(start, stop):
            documents = {"documents.parquet": self._documents(index)} if self.with_documents else {}
            yield self._part(self.tokens, index, self._counts(index), dict.fromkeys(names) | documents, {})

    def activation_parts(self, start: int, stop: int) -> Iterator[PartRecord]:
        shards = [f"{SITE}.zarr/c.{shard}.0.0" for shard in range(self.n_shards)]
        size = 2 * self.n_sequences * LENGTH * WIDTH // self.n_shards
        files = {"norms.parquet": None, **dict.fromkeys(shards, size), f"{SITE}.zarr/zarr.json": None}
        for index, part in enumerate(self.tokens.published().parts[start:stop], start):
            yield self._part(self.activations, index, self._counts(index), files, {"tokens": part.folder})

    def feature_parts(self, start: int, stop: int) -> Iterator[PartRecord]:
        pairs = zip(
            self.tokens.published().parts[start:stop], self.activations.published().parts[start:stop], strict=True
        )
        for index, (source, stored) in enumerate(pairs, start):
            counts = {"n_tokens": source.counts["n_tokens"], "n_values": VALUES_PER_TOKEN * source.counts["n_tokens"]}
            first = index * self.n_sequences * LENGTH
            ends = {"feature_major": (0, N_FEATURES - 1), "token_major": (first, first + self.n_sequences * LENGTH - 1)}
            files = dict.fromkeys(
                [f"{table}.parquet" for table in PART_TABLES | SAMPLE_TABLES]
                + [f"{order}/low={low}/high={high}/000.parquet" for order, (low, high) in ends.items()]
            )
            inputs = {"tokens": source.folder, "activations": stored.folder}
            yield self._part(self.features, index, counts, files, inputs)

    def compacted_parts(self) -> Iterator[PartRecord]:
        """What `saeflow compact` makes of all parts: files of about as many values as it writes."""
        every = list(replace(self, with_files=False).feature_parts(0, self.n_parts))
        per_part = every[0].counts["n_values"]
        for start in range(0, len(every), USUAL_MERGE.most_values // per_part):
            group = every[start : start + USUAL_MERGE.most_values // per_part]
            n_values = per_part * len(group)
            of_feature, of_token = USUAL_MERGE.file_values(n_values)
            ids = np.linspace(0, N_FEATURES, max(1, n_values // of_feature) + 1, dtype=int)
            first = group[0].index * self.n_sequences * LENGTH
            last = first + len(group) * self.n_sequences * LENGTH
            tokens = np.linspace(first, last, max(1, n_values // of_token) + 1, dtype=int)
            files = [f"{table}.parquet" for table in PART_TABLES | SAMPLE_TABLES]
            files += [f"feature_major/low={a}/high={b - 1}/000.parquet" for a, b in itertools.pairwise(ids)]
            files += [f"token_major/low={a}/high={b - 1}/000.parquet" for a, b in itertools.pairwise(tokens)]
            counts = {"n_tokens": last - first, "n_values": n_values, "n_parts": len(group)}
            inputs = {f"{part.index:06d}": stands_for(part.inputs) for part in group}
            yield self._part(self.features, FIRST_INDEX + group[0].index, counts, dict.fromkeys(files), inputs)

    def _make_tokens(self) -> None:
        os.makedirs(self.tokens.path, exist_ok=True)
        pieces = [f" w{i}" for i in range(4096)]
        write_vocab(self.tokens.path / "vocab.parquet", pieces)
        self.tokens.create(self.lineage.token_facts, files=["vocab.parquet"])
        self._publish(self.tokens, self.token_parts(0, self.n_parts))

    def _make_activations(self) -> None:
        facts = self.lineage.activation_facts | {"stored": [[SITE, WIDTH]]}
        self.activations.create(facts, [self.tokens.id])
        self._publish(self.activations, self.activation_parts(0, self.n_parts))

    def _make_features(self) -> None:
        facts = self.lineage.feature_facts | {"context_length": LENGTH, "architecture": "batchtopk"}
        trained = self.lineage.sae
        inputs = [self.tokens.id, self.activations.id]
        with trained.writing(), trained.publish_folder(self.lineage.sae_facts, inputs, {}) as folder:
            (folder / "cfg.json").write_text("{}")
        self.features.create(facts, [*inputs, trained.id])
        self._publish(self.features, self.feature_parts(0, self.n_parts))

    def _described(self) -> Path:
        """A real `zarr.json`: the feed opens arrays for it."""
        scratch = self.store.root / "tmp" / "described.zarr"
        if not scratch.exists():
            ArrayWriter(scratch, plan_layout(self.n_sequences, LENGTH, WIDTH, self.recipe.activations), "float16")
        return scratch / "zarr.json"

    def _publish(self, target: Artefact, parts: Iterator[PartRecord]) -> None:
        target.show(target._write_list(Generation(1, tuple(parts))).number)

    def _part(
        self,
        target: Artefact,
        index: int,
        counts: dict[str, int],
        files: Mapping[str, int | bytes | None],
        inputs: dict[str, str],
    ) -> PartRecord:
        record = PartRecord(
            index=index,
            counts=dict(sorted(counts.items())),
            files=[self._file(index, name, content) for name, content in sorted(files.items())],
            inputs=inputs,
        )
        if self.with_files:
            self._write(f"{target.path}/parts/{record.folder}", record, files)
        return record

    def _file(self, index: int, name: str, content: int | bytes | None) -> FileRecord:
        known = len(content) if isinstance(content, bytes) else content
        size = os.stat(self.source(name)).st_size if known is None else known
        checksum = hashlib.blake2b(f"{index} {name}".encode(), digest_size=16).hexdigest()
        return FileRecord(name=name, n_bytes=size, checksum=checksum)

    def source(self, name: str) -> str:
        """The small file that parts link to under this name."""
        table = name.partition("/")[0]
        if name.endswith("zarr.json"):
            return str(self._described())
        if table in self.sources:
            return str(self.sources[table])
        made = f"{self.store.root}/tmp/one-byte"
        if not os.path.exists(made):
            Path(made).write_bytes(b"x")
        return made

    def _write(self, folder: str, record: PartRecord, files: Mapping[str, int | bytes | None]) -> None:
        made: set[str] = set()
        for name, content in files.items():
            path = f"{folder}/{name}"
            parent = path.rpartition("/")[0]
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            if content is None:
                os.link(self._linked(name, record.index), path)
                continue
            with open(path, "wb") as file:
                file.write(content) if isinstance(content, bytes) else file.truncate(content)
        with open(f"{folder}/part.json", "w") as file:
            file.write(record.text)

    def _linked(self, name: str, index: int) -> str:
        """A copy of the small file for every 50,000 parts: a file has at most 65,000 names on ext4."""
        source = self.source(name)
        digest = hashlib.blake2b(source.encode(), digest_size=6).hexdigest()
        copy = f"{self.store.root}/tmp/{digest}-{name.partition('/')[0]}-{index // _MOST_LINKS}"
        if not os.path.exists(copy):
            shutil.copy(source, copy)
        return copy

    def _counts(self, index: int) -> dict[str, int]:
        n, n_train = self.n_sequences, self.n_sequences * N_TRAIN // N_SEQUENCES
        return {
            "first_sequence": index * n,
            "n_sequences": n,
            "n_train_sequences": n_train,
            "first_document": index * N_DOCUMENTS,
            "n_documents": N_DOCUMENTS,
            "n_tokens": n * LENGTH,
            "n_train_tokens": n_train * LENGTH,
        }

    def _documents(self, index: int) -> bytes:
        ids = np.arange(index * N_DOCUMENTS, (index + 1) * N_DOCUMENTS)
        per_document = self.n_sequences * LENGTH // N_DOCUMENTS
        table = pa.table(
            {
                "document_id": ids,
                "key": [f"texts/{number:09d}.txt" for number in ids],
                "source": ["texts"] * N_DOCUMENTS,
                "content_hash": [hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest() for number in ids],
                "held_out": [False] * N_DOCUMENTS,
                "n_tokens": np.full(N_DOCUMENTS, per_document),
                "first_token_id": ids * per_document,
            }
        )
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue().to_pybytes()
