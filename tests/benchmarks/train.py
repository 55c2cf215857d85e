"""Training steps and what they reach, beside SAELens and sparsify, on the same rows of the same file.

python -m tests.benchmarks.train            both sizes, every architecture, quality after 2M tokens (about an hour)
python -m tests.benchmarks.train --steps 20 --only speed    shorter; without quality and without the store
python -m tests.benchmarks.train --quick    the first size with few steps, TopK alone, no quality

D = 256, F = 4,096, K = 16 and D = 512, F = 16,384, K = 32, batches of 4,096 float32 rows with mean squared norm D, Adam
at 1e-3. *Speed* is that of steps after a warm-up, each peer in turn, the median of three; batches are made in nobody's
time. SAELens trains in its own trainer, in float32 or in its autocast, whichever a short trial finds quicker;
sparsify's step is measured as shipped and with bfloat16 autocast around it. *Floor* is the encoder product alone in the
quickest precision. relu, gated and jumprelu start sparse here (`sae.first_share`), relu also as in the article, with
half of its values positive. The peers come with `make peers`; without them their lines say so.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.train import open_feed
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.runtime.linear import fast_dtype
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import in_parallel, keep_freed_memory, ranges
from saeflow.sae import loss
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.encoder import Encoder
from saeflow.store.store import Store
from saeflow.train.training import FeedBatch, Training
from tests.benchmarks import _peers, _superposed
from tests.benchmarks._bars import Bar, report

LR, BATCH, ALTERNATIONS = 1e-3, 4096, 3
NO_PEER = "the peers are not installed: make peers"


@dataclass(frozen=True)
class Size:
    """Width, features, active features, steps of warm-up, timed steps, and steps where a peer takes seconds for one."""

    width: int
    n_features: int
    k: int
    warmup: int
    timed: int
    peer_warmup: int
    peer_timed: int

    @property
    def name(self) -> str:
        return f"D={self.width} F={self.n_features:,} K={self.k}"


FIRST = Size(256, 4096, 16, 10, 50, 10, 50)
SECOND = Size(512, 16384, 32, 5, 20, 2, 6)
QUICK = Size(256, 4096, 16, 3, 8, 2, 4)

OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": {},
    "relu": {"l1_weight": 1.0, "first_share": 0.05},
    "relu-dense-start": {"l1_weight": 1.0},
    "gated": {"l1_weight": 1.0},
    "jumprelu": {},
}
ASKED_SAELENS = {"topk": 10, "batchtopk": 10, "relu": 2, "gated": 2, "jumprelu": 2}


class Rows:
    """Training rows in a file, and rows held out."""

    def __init__(self, folder: Path, size: Size, n_rows: int) -> None:
        self.data, self.held_out = folder / f"{size.width}.npy", folder / f"{size.width}-held-out.npy"
        made = _superposed.rows(n_rows + 16384, size.width, size.n_features // 2, size.k, seed=0)
        made *= np.sqrt(size.width / np.square(made - made[:65536].mean(0)).sum(1).mean())
        np.save(self.data, made[:n_rows])
        np.save(self.held_out, made[n_rows:])

    def batches(self, seed: int = 0) -> Iterator[torch.Tensor]:
        rows, draw = np.load(self.data, mmap_mode="r"), np.random.default_rng(seed)
        while True:
            order = draw.permutation(len(rows))
            for start in range(0, len(rows) - BATCH + 1, BATCH):
                yield torch.from_numpy(rows[order[start : start + BATCH]])


def a_training(name: str, size: Size, rows: Rows, n_steps: int, **train: Any) -> Training:
    architecture = name.partition("-")[0]
    config = SAEConfig(architecture=architecture, n_features=size.n_features, k=size.k, **OURS[name])
    made = SparseAutoencoder(config, size.width, threads=torch.get_num_threads())
    made.product_dtype = fast_dtype()
    first = next(rows.batches())
    made.initialise(first.mean(0))
    made.start_sparse(first)
    settings = TrainConfig(lr=LR, warmup_share=0.0, decay_share=0.0, log_every=10**9, **train)
    adam = torch.optim.Adam(made.parameters(), lr=LR, fused=True)
    return Training(made, adam, settings, (1.0,), n_steps)


def seconds_of_steps(training: Training, batches: Iterator[torch.Tensor], warmup: int, timed: int) -> float:
    """Seconds a step, batches not counted."""
    spent = []
    for number in range(warmup + timed):
        batch = FeedBatch(number, (next(batches),), None)  # type: ignore[arg-type]  # no feed to look into
        began = time.perf_counter()
        training.advance(batch)
        spent.append(time.perf_counter() - began)
    return sum(spent[warmup:]) / timed


def our_speed(name: str, size: Size, rows: Rows) -> float:
    """Tokens/s."""
    training = a_training(name, size, rows, 10**6)
    return BATCH / seconds_of_steps(training, rows.batches(), size.warmup, size.timed)


def their_speed(size: Size, rows: Rows, **about: Any) -> float:
    """Tokens/s."""
    n_steps = size.peer_warmup + size.peer_timed
    found = _peers.train(
        data=rows.data, held_out=rows.held_out, batch=BATCH, n_features=size.n_features, k=size.k,
        lr=LR, n_steps=n_steps, warmup_steps=size.peer_warmup, threads=torch.get_num_threads(), **about,
    )  # fmt: skip
    return float(found["tokens_per_s"])


def floor_speed(size: Size) -> float:
    """Tokens/s of the encoder product alone, on as many workers as a step has."""
    dtype, seconds = fast_dtype(), []
    x, w = torch.randn(BATCH, size.width).to(dtype), torch.randn(size.n_features, size.width)
    encoder = Encoder(w, torch.zeros(size.n_features), torch.zeros(size.width), dtype, threads=torch.get_num_threads())
    encoder.prepare()
    for _ in range(8):
        began = time.perf_counter()
        parts = ranges(BATCH, encoder.chunk_rows)
        in_parallel(lambda part: encoder.pre_activations(x[slice(*part)]), parts, encoder.threads)
        seconds.append(time.perf_counter() - began)
    return BATCH / statistics.median(seconds)


def quicker_autocast(size: Size, rows: Rows) -> bool:
    """Is SAELens quicker in its autocast here? By a trial of a few steps of TopK; never where bfloat16 is slow."""
    if fast_dtype() == torch.float32:
        return False
    trial = Size(size.width, size.n_features, size.k, 0, 0, 1, 3)
    speeds = [their_speed(trial, rows, peer="saelens", architecture="topk", autocast=cast) for cast in (False, True)]
    return speeds[1] > speeds[0]


def alternated(runs: dict[str, Callable[[], float]], times: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            found[name].append(run())
            print(f"  {name}: {found[name][-1]:,.0f} tokens/s", flush=True)
    return found


def ratio_bar(name: str, asked: float, ours: list[float], theirs: list[float] | None) -> Bar:
    if theirs is None:
        return Bar(name, asked, ">=", None, reason=NO_PEER)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Bar(name, asked, ">=", statistics.median(ratios), max(ratios) - min(ratios))


def speed(size: Size, rows: Rows, architectures: list[str], times: int) -> tuple[list[Bar], dict[str, Any]]:
    """Bars and tokens/s of ours, the floor, and the peers where they are."""
    print(size.name, flush=True)
    peers = _peers.available()
    autocast = peers and quicker_autocast(size, rows)
    bars, speeds = [], {}
    for name in architectures:
        theirs = name.partition("-")[0]
        runs: dict[str, Callable[[], float]] = {name: lambda name=name: our_speed(name, size, rows)}
        runs |= {"floor": lambda: floor_speed(size)}
        if peers:
            runs["SAELens"] = lambda theirs=theirs: their_speed(
                size, rows, peer="saelens", architecture=theirs, autocast=autocast
            )
        if peers and name == "topk":
            for cast in (False, True):
                runs[f"sparsify{', autocast' if cast else ''}"] = lambda cast=cast: their_speed(
                    size, rows, peer="sparsify", architecture="topk", autocast=cast
                )
        found = alternated(runs, times)
        speeds[name] = {who: round(statistics.median(each)) for who, each in found.items()}
        ours = found[name]
        if name in ASKED_SAELENS:
            bars.append(ratio_bar(f"{size.name}: {name} over SAELens", ASKED_SAELENS[name], ours, found.get("SAELens")))
        if name in ("topk", "batchtopk"):
            asked = 0.5 if fast_dtype() == torch.bfloat16 else 0.4
            bars.append(ratio_bar(f"{size.name}: {name}, share of the floor", asked, ours, found["floor"]))
        if name == "topk":
            first = size.n_features == FIRST.n_features
            for who, of_first, of_second in (("sparsify", 4, 3), ("sparsify, autocast", 2, 1.5)):
                asked = of_first if first else of_second
                bars.append(ratio_bar(f"{size.name}: topk over {who}", asked, ours, found.get(who)))
    return bars, {"tokens_per_s": speeds, "saelens_in_autocast": autocast, "step": where_it_goes(size, rows)}


def where_it_goes(size: Size, rows: Rows) -> dict[str, float]:
    """Milliseconds of a TopK step by what is done; the rest is Python and the loss's bookkeeping."""
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return run

    training, batches, n = a_training("topk", size, rows, 10**6), rows.batches(), 10
    places = [
        (loss, "centred_batch", "centre the batch"), (loss, "largest_entries", "encoder product and top-k"),
        (loss, "sparse_step", "reconstruct and gradients"), (training.adam, "step", "Adam"),
        (training.sae, "after_step", "unit rows"), (training, "advance", "whole step"),
    ]  # fmt: skip
    kept = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, said in places:
        setattr(place, name, timed(said, getattr(place, name)))
    try:
        seconds_of_steps(training, batches, 3, n)
    finally:
        for place, name, work in kept:
            setattr(place, name, work)
    return {said: round(1e3 * seconds / (n + 3), 2) for said, seconds in spent.items()}


def quality(size: Size, rows: Rows, n_steps: int) -> tuple[list[Bar], dict[str, Any]]:
    """Variance unexplained and L0 on held-out rows after the same tokens, the rate falling over the last three
    tenths."""
    decay, bars, found = round(0.3 * n_steps), [], {}
    x = torch.from_numpy(np.load(rows.held_out))
    for name in ("topk", "batchtopk"):
        training = a_training(name, size, rows, n_steps)
        training.config = training.config.model_copy(update={"decay_share": 0.3})
        seconds_of_steps(training, rows.batches(), 0, n_steps)
        training.sae.eval()
        sparse = training.sae.encode_sparse(x)
        missed = (training.sae.decode(sparse) - x).square().sum() / (x - x.mean(0)).square().sum()
        found[name] = {"ours": {"variance_unexplained": float(missed), "l0": len(sparse.values) / len(x)}}
        for peer in ("saelens", "sparsify") if name == "topk" else ("saelens",):
            bar = f"{size.name}: {name}, variance unexplained less {peer}'s"
            if not _peers.available():
                bars.append(Bar(bar, 0.005, "<=", None, reason=NO_PEER))
                continue
            theirs = _peers.train(
                peer=peer, architecture=name, data=rows.data, held_out=rows.held_out, batch=BATCH, lr=LR, n_timed=0,
                n_features=size.n_features, k=size.k, n_steps=n_steps, decay_steps=decay,
                threads=torch.get_num_threads(),
            )  # fmt: skip
            found[name][peer] = {key: theirs[key] for key in ("variance_unexplained", "l0", "dead")}
            bars.append(Bar(bar, 0.005, "<=", float(missed) - theirs["variance_unexplained"]))
        print(f"  {name}: {found[name]}", flush=True)
    return bars, found


def from_store(size: Size, rows: Rows, folder: Path, n_steps: int, times: int) -> Bar:
    """Speed of TopK from a store over that from a tensor in memory, batches made in the time of both."""
    recipe = recipe_of(rows, size)
    store = Store.create(folder / "store")
    import_table.run(Lineage(store, recipe), Progress(verbosity=-1))
    feed = open_feed(Lineage(store, recipe))
    in_memory = torch.from_numpy(np.load(rows.data)).half()

    def shuffled() -> Iterator[torch.Tensor]:
        draw = np.random.default_rng(0)
        while True:
            yield from torch.from_numpy(draw.permutation(len(in_memory))).split(BATCH)

    def seconds(batches: Iterator[tuple[torch.Tensor, ...]]) -> float:
        training = a_training("topk", size, rows, 10**6)
        training.advance(FeedBatch(0, next(batches), feed))
        began = time.perf_counter()
        for number in range(1, n_steps):
            training.advance(FeedBatch(number, next(batches), feed))
        return time.perf_counter() - began

    ratios = []
    for _ in range(times):
        batches = feed.aligned()
        from_disk = seconds(batches)
        batches.close()
        ratios.append(seconds((in_memory[places],) for places in shuffled()) / from_disk)
    name = f"{size.name}: topk from a store of {len(in_memory):,} rows over the same from memory"
    return Bar(name, 0.95, ">=", statistics.median(ratios), max(ratios) - min(ratios))


def recipe_of(rows: Rows, size: Size) -> Recipe:
    """A table of the rows in float16, read in pools of a quarter of it."""
    n_bytes = 2 * len(np.load(rows.data, mmap_mode="r")) * size.width
    return parse_recipe(
        {
            "name": "rows",
            "activations": {"source": str(rows.data), "dtype": "float16"},
            "feed": {"batch_rows": BATCH, "pool_bytes": max(n_bytes // 2, 32 << 20)},
            "sae": {"architecture": "topk", "n_features": size.n_features, "k": size.k},
        }
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    parser.add_argument("--steps", type=int, default=50, help="timed steps at the first size, after a fifth of warm-up")
    parser.add_argument("--only", choices=["speed", "store", "quality", "second"], help="one part of it")
    parser.add_argument("--architectures", default=",".join(OURS), help="of the first size, e.g. topk,batchtopk")
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    quick, only = asked.quick, asked.only
    first = replace(
        FIRST, warmup=asked.steps // 5, timed=asked.steps, peer_warmup=asked.steps // 5, peer_timed=asked.steps
    )
    torch.set_num_threads(torch.get_num_threads())
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="saeflow-train-") as temporary:
        folder = Path(temporary)
        if quick:
            rows = Rows(folder, QUICK, 1 << 17)
            bars, facts = speed(QUICK, rows, ["topk"], 1)
            bars.append(from_store(QUICK, rows, folder, 12, 1))
            report("train", bars, fast_dtype=str(fast_dtype()), speed={QUICK.name: facts})
            return
        bars, speeds, reached = [], {}, {}
        rows = Rows(folder, first, 1 << 19)
        if only in (None, "speed"):
            bars, speeds[first.name] = speed(first, rows, asked.architectures.split(","), ALTERNATIONS)
        if only in (None, "store"):
            bars.append(from_store(first, rows, folder, 200, ALTERNATIONS))
        if only in (None, "quality"):
            more, reached = quality(first, rows, 2_000_000 // BATCH)
            bars += more
        if only in (None, "second"):
            more, speeds[SECOND.name] = speed(
                SECOND, Rows(folder, SECOND, 1 << 17), ["topk", "batchtopk"], ALTERNATIONS
            )
            bars += more
        report("train", bars, fast_dtype=str(fast_dtype()), timed_steps=asked.steps, speed=speeds, quality=reached)


if __name__ == "__main__":
    main()
