"""A run of any size, its values made up but realistic, written by the writers that encoding uses.

Rates of features fall as a power of their rank, and documents have subjects: a document's features fire in bursts
inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from saeflow.activations.sparse_values import SparseValues
from saeflow.corpus.selection import TokenSelection
from saeflow.corpus.token_parts import Packed, write_part
from saeflow.corpus.vocabulary import write_vocab
from saeflow.features.part_encoder import PartWriter
from saeflow.features.statistics import read_token_columns
from saeflow.runtime.threads import use_one_thread
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

LENGTH = 128
N_FEATURES = 16_384
N_VOCAB = 50_000
PER_TOKEN = 32
SUBJECTS = 48
"""Features that a document is about: half of its tokens' features are among them."""


def make(
    store: Store, n_values: int, part_tokens: int | Sequence[int] = 262_144, n_threads: int = 2,
    n_features: int = N_FEATURES,
) -> Artefact:  # fmt: skip
    """A published run of about so many values, in parts of so many tokens each."""
    n_tokens = n_values // PER_TOKEN
    if isinstance(part_tokens, int):
        part_tokens = [min(part_tokens, n_tokens - start) for start in range(0, n_tokens, part_tokens)]
    source = _tokens(store, n_tokens, part_tokens)
    target = store.artefact("features", "made", f"{n_values:08x}"[:8])
    facts = {"n_features": n_features, "context_length": LENGTH, "site": "made"}
    target.create(facts, [source.id, f"activations/made-{source.fp}", f"saes/made-{source.fp}"])
    used = TokenSelection(source)

    def work(part: PartRecord) -> PartRecord:
        use_one_thread()
        return _values(target, used, part, n_features)

    with target.writing(), ThreadPoolExecutor(n_threads) as pool:
        target.publish(list(pool.map(work, source.published().parts)))
    return target


def _tokens(store: Store, n_tokens: int, part_tokens: Sequence[int]) -> Artefact:
    source = store.artefact("tokens", "made", f"{n_tokens:08x}"[:8])
    source.create({"context_length": LENGTH, "packing": "concatenated"})
    pieces = [f" w{i}" for i in range(N_VOCAB)]
    write_vocab(source.path / "vocab.parquet", pieces)
    source.add_files(["vocab.parquet"])
    first, n_documents, made = 0, 0, []
    with source.writing():
        for index, size in enumerate(part_tokens):
            dice = np.random.default_rng([7, index])
            n_rows = size // LENGTH
            owners = n_documents + np.arange(n_rows * LENGTH) // 700
            counts = {
                "first_sequence": first, "n_sequences": n_rows, "n_train_sequences": n_rows,
                "first_document": n_documents, "n_documents": int(owners[-1]) + 1 - n_documents,
                "n_tokens": owners.size, "n_train_tokens": owners.size,
            }  # fmt: skip
            vocab_ids = (dice.zipf(1.2, owners.size) % N_VOCAB).astype(np.int32)
            packed = Packed(vocab_ids.reshape(n_rows, LENGTH), owners.reshape(n_rows, LENGTH))
            made.append(write_part(source, index, counts, packed, _documents(owners, first * LENGTH)))
            first, n_documents = first + n_rows, int(owners[-1]) + 1
        source.publish(made)
    return source


def _documents(owners: np.ndarray, base: int) -> pa.Table:
    ids, begins, sizes = np.unique(owners, return_index=True, return_counts=True)
    return pa.table(
        {
            "document_id": ids,
            "key": [f"document {i}" for i in ids],
            "source": [f"source {i % 5}" for i in ids],
            "content_hash": ["00"] * len(ids),
            "held_out": [False] * len(ids),
            "n_tokens": sizes,
            "first_token_id": begins + base,
        }
    )


def _values(target: Artefact, used: TokenSelection, part: PartRecord, n_features: int) -> PartRecord:
    about = read_token_columns(used, part.index)
    counts: dict[str, int] = {}
    with target.new_part(part.index, counts, {"tokens": part.folder, "activations": part.folder}) as folder:
        writer = PartWriter(folder, counts, about, n_features)
        for start in range(0, len(about.mask), 16_384):
            ids = np.arange(start, min(start + 16_384, len(about.mask)))
            writer.take(about.first_token + ids, sparse_values(part.index, start, len(ids), n_features=n_features))
        writer.close()
    return target.made[part.index]


def sparse_values(*seed: int, n_features: int = N_FEATURES) -> SparseValues:
    """Values of consecutive tokens; `seed` ends with how many."""
    dice, n = np.random.default_rng(seed), seed[-1]
    by_rank = np.random.default_rng(0).permutation(n_features)
    rates = np.cumsum(1 / np.arange(1, n_features + 1) ** 0.9)
    documents = np.arange(n) // 700
    subjects = _drawn(dice, rates, (documents[-1] + 1, SUBJECTS))
    own = subjects[documents[:, None], dice.integers(0, SUBJECTS, (n, PER_TOKEN // 2))]
    ranks = np.sort(np.concatenate([own, _drawn(dice, rates, (n, PER_TOKEN // 2))], 1), 1)
    ids = np.sort(by_rank[ranks], 1)
    first = np.concatenate([np.ones((n, 1), bool), ids[:, 1:] != ids[:, :-1]], 1)
    values = dice.lognormal(0.0, 0.8, (n, PER_TOKEN)).astype(np.float32)
    values = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    starts = np.concatenate([[0], first.sum(1).cumsum()])
    return SparseValues(starts, ids[first].astype(np.int32), values[first])


def _drawn(dice: np.random.Generator, rates: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.minimum(np.searchsorted(rates, dice.random(shape) * rates[-1]), len(rates) - 1)
