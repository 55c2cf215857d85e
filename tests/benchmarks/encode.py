"""The whole encode stage, beside the encoder product alone and beside the plain way of keeping every value.

python -m tests.benchmarks.encode            both sizes, memory at 1M and 10M tokens (about an hour; 25 GB of disk)
python -m tests.benchmarks.encode --only memory    one part of it: speed, memory
python -m tests.benchmarks.encode --quick    the first size with few rows, memory of small parts

D = 512, K = 32, F = 4,096 and 16,384: a TopK autoencoder whose directions are those that the rows are made of (kind
`superposed`, float16, in a real store). *Stage* is `features.run` from the store to published parts, both orders and
all statistics, files flushed; compaction and the checks are timed apart. *Product* is the encoder product alone over as
many rows, in the quickest precision, on all threads. *Plain way* is what delphi's cache of latents does: float32
pre-activations and topk of torch, scattered into a dense matrix, whose non-zeros are looked for and appended to lists,
put together at the end, one safetensors file a range of features (`locations` int64 (n, 3), `activations`); it reads
the same store. Each in turn, the median of three. Memory is the peak of a fresh process each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from saeflow.activations import shards
from saeflow.activations.shards import stored_sites
from saeflow.activations.synthetic import SuperposedFeatures
from saeflow.model.sites import choose_site
from saeflow.pipeline import compact, encode, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.query.connection import require_checks
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.linear import fast_dtype
from saeflow.runtime.memory import measure_usage
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.encoder import Encoder
from saeflow.sae.formats.load import load_sae
from saeflow.sae.formats.save import save_sae
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, report

ROOT = Path(__file__).resolve().parents[2]
BATCH, ALTERNATIONS, N_FILES, SAMPLE = 4096, 3, 5, 512
QUIET = Progress(verbosity=-1)


@dataclass(frozen=True)
class Size:
    width: int
    n_features: int
    k: int
    n_rows: int
    part_rows: int
    asked: float
    """Share of the product's speed."""

    @property
    def name(self) -> str:
        return f"D={self.width} F={self.n_features:,} K={self.k}"

    def recipe(self, folder: Path) -> Recipe:
        made = {
            "kind": "superposed", "n_samples": self.n_rows, "n_neurons": self.width, "n_true": self.n_features,
            "l0": self.k,
        }  # fmt: skip
        about = {"synthetic": made, "dtype": "float16", "part_rows": self.part_rows}
        data = {"name": "rows", "activations": about, "sae": {"source": str(folder / "sae")}}
        return parse_recipe(data | {"features": {"check_values": 0}})


FIRST = Size(512, 4096, 32, 1 << 20, 1 << 18, 0.4)
SECOND = Size(512, 16384, 32, 1 << 20, 1 << 18, 0.5)
QUICK = Size(512, 4096, 32, 1 << 16, 1 << 15, 0.4)
LITTLE, MUCH = 1_000_000, 10_000_000


def prepared(folder: Path, size: Size) -> tuple[Store, Recipe]:
    """A store with the rows and the autoencoder; rows that are there are kept."""
    recipe = size.recipe(folder)
    synthetic = recipe.activations.synthetic
    assert synthetic is not None
    if not (folder / "sae").exists():
        world = SuperposedFeatures.of(synthetic)
        sae = SparseAutoencoder(SAEConfig(architecture="topk", n_features=size.n_features, k=size.k), size.width)
        with torch.no_grad():
            for weight in (sae.W_enc, sae.W_dec):
                weight.copy_(torch.from_numpy(world.directions))
            sae.b_dec.copy_(torch.from_numpy(world.offset))
        save_sae(sae, folder / "sae", {})
    store = Store.create(folder / "store")
    import_table.run(Lineage(store, recipe), QUIET)
    train.run(Lineage(store, recipe), QUIET)
    return store, recipe


def stage(store: Store, recipe: Recipe) -> float:
    """Tokens/s."""
    shutil.rmtree(Lineage(store, recipe).features.path, ignore_errors=True)
    began = time.perf_counter()
    encode.run(Lineage(store, recipe), QUIET)
    return n_tokens(store, recipe) / (time.perf_counter() - began)


def compaction(store: Store, recipe: Recipe) -> float:
    """Tokens/s of compacting the run that `stage` left."""
    began = time.perf_counter()
    compact.run(Lineage(store, recipe), QUIET, 2)
    return n_tokens(store, recipe) / (time.perf_counter() - began)


def check(store: Store, recipe: Recipe) -> float:
    """Tokens/s of the checks that an encoding ends with, over all that `stage` left."""
    target = Lineage(store, recipe).features
    parts, began = target.published().parts, time.perf_counter()
    require_checks(store, target, parts, sum(part.counts["n_values"] for part in parts), QUIET)
    return n_tokens(store, recipe) / (time.perf_counter() - began)


def n_tokens(store: Store, recipe: Recipe) -> int:
    return Lineage(store, recipe).activations.published().total("n_tokens")


def product(size: Size) -> float:
    """Tokens/s, on as many workers as torch has threads."""
    dtype = fast_dtype()
    x, w = torch.randn(BATCH, size.width).to(dtype), torch.randn(size.n_features, size.width)
    threads = torch.get_num_threads()
    encoder = Encoder(w, torch.zeros(size.n_features), torch.zeros(size.width), dtype, threads=threads)
    encoder.prepare()
    parts, n_batches = ranges(BATCH, encoder.chunk_rows), -(-size.n_rows // BATCH)
    began = time.perf_counter()
    for _ in range(n_batches):
        in_parallel(lambda part: encoder.pre_activations(x[slice(*part)]), parts, threads)
    return n_batches * BATCH / (time.perf_counter() - began)


def batches(store: Store, recipe: Recipe) -> Iterator[tuple[int, torch.Tensor]]:
    """First token and rows (B, D) in float32."""
    stored = Lineage(store, recipe).activations
    site = choose_site(stored_sites(stored), None)
    first = 0
    for part in stored.published().parts:
        array = shards.open_site(stored, part, site)
        for start in range(0, part.counts["n_tokens"], array.chunk):
            for rows in array.read(slice(start, start + array.chunk)).reshape(-1, site.width).split(BATCH):
                yield first, rows.float()
                first += len(rows)


@torch.no_grad()
def plain(store: Store, recipe: Recipe, folder: Path) -> float:
    """Tokens/s."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sae = load_sae(Lineage(store, recipe).sae.path)
    n_features, k = sae.config.n_features, sae.config.k
    began = time.perf_counter()
    locations, values = [], []
    for first, rows in batches(store, recipe):
        top = torch.addmm(sae.b_enc, rows - sae.b_dec, sae.W_enc.t()).topk(k, dim=1)
        dense = torch.zeros(len(rows), n_features).scatter_(1, top.indices, top.values)
        fires = dense.abs() > 1e-5
        found = fires.nonzero()
        locations.append(torch.stack([first + found[:, 0], torch.zeros(len(found), dtype=torch.int64), found[:, 1]], 1))
        values.append(dense[fires])
    every, strengths = torch.cat(locations), torch.cat(values)
    for start, stop in ranges(n_features, -(-n_features // N_FILES)):
        mine = (every[:, 2] >= start) & (every[:, 2] < stop)
        kept = {"locations": every[mine], "activations": strengths[mine]}
        save_file(kept, folder / f"{start}_{stop - 1}.safetensors")
    return n_tokens(store, recipe) / (time.perf_counter() - began)


def differing(store: Store, recipe: Recipe) -> int:
    """Values of the first and last tokens that are not those of float64 arithmetic, rounded to 11 significand bits."""
    target, sae = Lineage(store, recipe).features, load_sae(Lineage(store, recipe).sae.path)
    w, b, off = (weight.detach().double().numpy() for weight in (sae.W_enc, sae.b_enc, sae.b_dec))
    n, wrong = n_tokens(store, recipe), 0
    sample = {*range(min(SAMPLE // 2, n)), *range(max(n - SAMPLE // 2, 0), n)}
    found = stored_values(target, sample)
    for first, rows in batches(store, recipe):
        for token in sorted(sample & set(range(first, first + len(rows)))):
            pre = w @ (rows[token - first].double().numpy() - off) + b
            chosen = np.argsort(-pre, kind="stable")[: sae.config.k]
            expected = {int(i): float(eleven_bits(pre[i])) for i in chosen if pre[i] > 0}
            wrong += len(expected.items() ^ found.get(token, {}).items())
    return wrong


def stored_values(target: Any, tokens: set[int]) -> dict[int, dict[int, float]]:
    """Values by feature, by token, from the published token-major files."""
    found: dict[int, dict[int, float]] = {}
    for part in target.published().parts:
        for file in (file for file in part.files if file.name.startswith("token_major")):
            table = pq.read_table(
                target.part_path(part) / file.name, partitioning=None, filters=[("token_id", "in", tokens)]
            )
            for row in table.to_pylist():
                found.setdefault(row["token_id"], {})[row["feature_id"]] = row["value"]
    return found


def eleven_bits(value: float) -> float:
    """Halves to even."""
    significand, exponent = np.frexp(value)
    return float(np.ldexp(np.rint(significand * 2048), exponent - 11))


def ratio_bar(name: str, asked: float, ours: list[float], theirs: list[float]) -> Bar:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Bar(name, asked, ">=", statistics.median(ratios), max(ratios) - min(ratios))


def speed(size: Size, figures: dict[str, Any]) -> list[Bar]:
    with tempfile.TemporaryDirectory(prefix="saeflow-encode-", dir=ROOT / "data") as temporary:
        folder = Path(temporary)
        store, recipe = prepared(folder, size)
        load_sae(folder / "sae").encode_sparse(torch.randn(BATCH, size.width))  # compiles
        runs: dict[str, Callable[[], float]] = {
            "product": lambda: product(size),
            "stage": lambda: stage(store, recipe),
            "plain way": lambda: plain(store, recipe, folder / "plain"),
        }
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ALTERNATIONS):
            for name, run in runs.items():
                found[name].append(run())
                print(f"  {size.name}: {name} {found[name][-1]:,.0f} tokens/s", flush=True)
        run_of = Lineage(store, recipe).features.published()
        n_bytes = sum(part.n_bytes for part in run_of.parts)
        wrong = differing(store, recipe)
        figures[size.name] = {
            "tokens_per_s": found, "n_rows": size.n_rows, "bytes_per_value": n_bytes / run_of.total("n_values"),
            "plain_bytes_per_value": sum(path.stat().st_size for path in (folder / "plain").iterdir())
            / run_of.total("n_values"),
            "checks_tokens_per_s": check(store, recipe), "compaction_tokens_per_s": compaction(store, recipe),
        }  # fmt: skip
    return [
        ratio_bar(f"{size.name}: encode stage over the product alone", size.asked, found["stage"], found["product"]),
        ratio_bar(f"{size.name}: encode stage over the plain way", 3.0, found["stage"], found["plain way"]),
        Bar(f"{size.name}: values unlike float64 arithmetic's, of {SAMPLE} tokens", 0, "<=", float(wrong)),
    ]


PROGRAM = """
import json, sys
from pathlib import Path
from tests.benchmarks.encode import Size, peak_of
about = json.load(sys.stdin)
print(peak_of(Path(about.pop("folder")), Size(**about)))
"""


def peak_of(folder: Path, size: Size) -> int:
    """Bytes this process held at most while it encoded what `prepared` left."""
    store, recipe = Store.create(folder / "store"), size.recipe(folder)
    with measure_usage() as taken:
        stage(store, recipe)
    return taken.peak_bytes


def memory(size: Size, little: int, much: int, figures: dict[str, Any]) -> Bar:
    """Of encoding `much` tokens over that of `little`, in parts of one size."""
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="saeflow-encode-", dir=ROOT / "data") as temporary:
        for n_rows in (little, much):
            each = replace(size, n_rows=n_rows)
            prepared(Path(temporary), each)
            given = json.dumps(asdict(each) | {"folder": temporary})
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM], input=given, cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            peaks[n_rows] = int(done.stdout)
            print(f"  {size.name}: {n_rows:,} tokens take {peaks[n_rows] / 2**20:,.0f} MiB", flush=True)
    figures["peak_bytes"] = peaks
    return Bar(f"{size.name}: memory of {much:,} tokens over {little:,}", 1.10, "<=", peaks[much] / peaks[little])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    parser.add_argument("--rows", type=int, help=f"rows of each size, instead of {FIRST.n_rows:,}")
    parser.add_argument("--only", choices=["speed", "memory"], help="one part of it")
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    sizes = [QUICK] if asked.quick else [FIRST, SECOND]
    amounts = (1 << 14, 1 << 17) if asked.quick else (LITTLE, MUCH)
    bars, figures = [], {}
    if asked.only in (None, "speed"):
        for size in sizes:
            bars += speed(replace(size, n_rows=asked.rows or size.n_rows), figures)
    if asked.only in (None, "memory"):
        of_memory = replace(QUICK, part_rows=1 << 13) if asked.quick else FIRST
        bars.append(memory(of_memory, *amounts, figures))
    report("encode", bars, fast_dtype=str(fast_dtype()), threads=torch.get_num_threads(), figures=figures)


if __name__ == "__main__":
    main()
