"""Shuffled minibatches out of a store larger than memory may be, beside the machine's own limit.

python -m tests.benchmarks.feed            512 MiB pool, a store of 20 pools (10 GiB of disk, kept warm)
python -m tests.benchmarks.feed --quick    64 MiB pool, 6 pools

*Speed*: bytes/s of batches, over those of the same blocks copied out of the memory-mapped shard files into a pool and
taken from it by `np.take`, without checksums, conversion or a thread. *Memory*: the peak of a process of its own.
*Mixing*: how many tokens of its own document a token meets in its batch, on neighbouring documents in a block.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from saeflow.activations import shards as arrays
from saeflow.activations.epoch import plan_epoch
from saeflow.activations.feed import Feed
from saeflow.activations.writer import ArrayWriter
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection
from saeflow.corpus.token_parts import Packed
from saeflow.model.sites import Site
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.recipe.settings import FeedConfig
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

LENGTH, WIDTH, PART_SEQUENCES = 256, 512, 512
SITE = Site("made", WIDTH)
SEQUENCE_BYTES = LENGTH * WIDTH * 2
ALTERNATIONS = 3
OVERHEAD_BYTES = 1_000_000_000


def make_store(folder: Path, n_bytes: int) -> None:
    """Parts of 128 MiB of float16 noise; 8 sequences a document."""
    store = Store.create(folder)
    source, target = artefacts(store)
    source.create({"context_length": LENGTH, "packing": "concatenated"})
    target.create({"stored": [[SITE.name, WIDTH]]}, [source.id])
    noise = np.random.default_rng(0).standard_normal((PART_SEQUENCES, LENGTH, WIDTH), np.float32).astype(np.float16)
    for index in range(n_bytes // (PART_SEQUENCES * SEQUENCE_BYTES)):
        n = PART_SEQUENCES
        counts = {"first_sequence": index * n, "n_sequences": n, "n_train_sequences": n, "n_tokens": n * LENGTH,
                  "n_train_tokens": n * LENGTH}  # fmt: skip
        owners = np.repeat(np.arange(n) // 8, LENGTH).reshape(n, LENGTH) + index * n
        packed = Packed(np.zeros((n, LENGTH), np.int32), owners)
        token_parts.write_part(source, index, counts, packed, pa.table({"document_id": np.unique(owners)}))
        config = ActivationsConfig(sites=[SITE.name])
        with target.new_part(index, counts) as place:
            writer = ArrayWriter(place / SITE.file, arrays.plan_layout(n, LENGTH, WIDTH, config), "float16")
            writer.append(np.roll(noise, index, axis=0))
            writer.close()
    for item in (source, target):
        item.publish(item.parts().values())


def artefacts(store: Store) -> tuple[Artefact, Artefact]:
    return store.artefact("tokens", "feed", "0" * 8), store.artefact("activations", "feed", "0" * 8)


def open_feed(folder: Path, pool_bytes: int) -> Feed:
    source, target = artefacts(Store.open(folder))
    return Feed(TokenSelection(source), target, SITE, FeedConfig(pool_bytes=pool_bytes))


def mapped_chunks(feed: Feed) -> Callable[[int], list[np.ndarray]]:
    """A block's rows (n, D) where they lie in the shard files: chunk after chunk, each with four bytes of checksum."""
    files = {}
    for part in feed.blocks.parts:
        folder = feed.target.part_path(part) / SITE.file
        shards = sorted(folder.glob("c.*"), key=lambda path: int(path.name.split(".")[1]))
        files[part.index] = feed._array(part.index, SITE), [np.memmap(shard, np.uint8, "r") for shard in shards]

    def chunks(number: int) -> list[np.ndarray]:
        block = feed.blocks[number]
        array, shards = files[block.part.index]
        chunk, per_shard = array.chunk, array.shard
        pieces = []
        for first in range(block.start, block.stop, chunk):
            at = first % per_shard // chunk * (chunk * SEQUENCE_BYTES + 4)
            n_bytes = min(chunk, block.stop - first) * SEQUENCE_BYTES
            pieces.append(shards[first // per_shard][at : at + n_bytes].view(np.float16).reshape(-1, WIDTH))
        return pieces

    return chunks


def limit_batches(feed: Feed) -> Iterator[np.ndarray]:
    """The plan of the feed, carried out in the plainest way."""
    chunks_of = mapped_chunks(feed)
    for pool in feed.pools(0):
        blocks = [chunks_of(int(number)) for number in pool.blocks]
        held = np.concatenate([chunk for block in blocks for chunk in block])
        starts = np.concatenate([[0], np.cumsum([sum(map(len, block)) for block in blocks])[:-1]])
        shift = starts - pool.blocks * feed.stride
        for batch in pool.batches:
            yield np.take(held, batch + shift[np.searchsorted(pool.blocks, batch // feed.stride)], axis=0)


def bytes_per_second(batches: Iterator[object], n: int) -> float:
    began, rows = time.perf_counter(), 0
    for batch in islice(batches, n):
        rows += len(batch)  # type: ignore[arg-type]
    return rows * WIDTH * 2 / (time.perf_counter() - began)


def speeds(folder: Path, pool_bytes: int) -> list[tuple[float, float]]:
    """(feed, limit) in bytes/s, one after the other, several times."""
    found = []
    for _ in range(ALTERNATIONS):
        feed = open_feed(folder, pool_bytes)
        n = feed.batches_per_epoch
        batches = feed.batches()
        found.append((bytes_per_second(batches, n), bytes_per_second(limit_batches(feed), n)))
        batches.close()
    return found


def peak_bytes(folder: Path, pool_bytes: int, n_pools: int) -> int:
    """Peak resident memory of a process that reads so many pools."""
    command = [sys.executable, "-m", "tests.benchmarks.feed", "--peak", folder, str(pool_bytes), str(n_pools)]
    shown = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return int(json.loads(shown.stdout.splitlines()[-1]))


def read_pools(folder: Path, pool_bytes: int, n_pools: int) -> None:
    feed = open_feed(folder, pool_bytes)
    n_batches = sum(len(pool.batches) for pool in islice(feed.pools(0), n_pools))
    for _ in islice(feed.batches(), n_batches):
        pass
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with that of the parent
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def partners(n_documents: int, document_rows: int, block_rows: int, pool_blocks: int, batch_rows: int) -> float:
    """Same-document partners of a token in its batch, over those in a pool of as many randomly chosen blocks.

    The store is documents end to end. In a pool of M rows with c of one document, a batch of B holds on average
    (c - 1) (B - 1) / (M - 1) partners of each of them.
    """
    n_rows = n_documents * document_rows
    blocks = np.split(np.arange(n_rows), range(block_rows, n_rows, block_rows))
    met, n_met = 0, 0
    for pool in plan_epoch(blocks.__getitem__, len(blocks), pool_blocks, batch_rows, seed=0):
        for rows in pool.batches:
            sizes = np.unique(rows // document_rows, return_counts=True)[1]
            met, n_met = met + int((sizes * (sizes - 1)).sum()), n_met + len(rows)
    random = np.random.default_rng(1)
    expected = []
    for _ in range(200):
        rows = np.concatenate([blocks[i] for i in random.permutation(len(blocks))[:pool_blocks]])
        sizes = np.unique(rows // document_rows, return_counts=True)[1]
        mean_others = (sizes * (sizes - 1)).sum() / len(rows)
        expected.append(mean_others * (batch_rows - 1) / (len(rows) - 1))
    return met / n_met / float(np.mean(expected))


def main() -> None:
    quick = arguments(__doc__).quick
    pool_bytes, n_pools = (64 << 20, 6) if quick else (512 << 20, 20)
    with tempfile.TemporaryDirectory(prefix="saeflow-feed-") as temporary:
        folder = Path(temporary) / "store"
        make_store(folder, pool_bytes * n_pools)
        found = speeds(folder, pool_bytes)
        peaks = [peak_bytes(folder, pool_bytes, 2 * n) for n in (1, n_pools)]  # half a pool is mixed at a time
    ratios = sorted(feed / limit for feed, limit in found)
    bars = [
        Bar("bytes/s over the machine's limit", 0.8, ">=", ratios[1], spread=ratios[-1] - ratios[0]),
        Bar("peak memory over 1.25 pools + 1 GB", 1.0, "<=", peaks[1] / (1.25 * pool_bytes + OVERHEAD_BYTES)),
        Bar("peak memory of all pools over that of one", 1.1, "<=", peaks[1] / peaks[0]),
        Bar("same-document partners over random blocks, documents of half a block", 1.2, "<=",
            partners(400, 2048, 4096, 16, 1024)),
        Bar("same-document partners over random blocks, one document a block", 1.2, "<=",
            partners(200, 4096, 4096, 16, 1024)),
    ]  # fmt: skip
    speed = {"feed_bytes_per_second": found[0][0], "limit_bytes_per_second": found[0][1], "peak_bytes": peaks}
    report("feed", bars, pool_bytes=pool_bytes, n_pools=n_pools, **speed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        read_pools(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
