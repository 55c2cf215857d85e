"""Stored activations with zstd beside those without: size on disk, speed of writing and of reading.

python -m tests.benchmarks.compression            256 MiB a row, three alternations
python -m tests.benchmarks.compression --quick    64 MiB a row, one

Real activations: the demo model after its ReLU, and SmolLM2's residual stream and MLP (`make smollm2`). They are
repeated up to the size for the speeds; the ratio is that of the activations themselves, unrepeated. Reading finds the
files in the system's cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from saeflow.activations.shards import StoredArray, plan_layout
from saeflow.activations.writer import open_writer
from saeflow.corpus import token_parts
from saeflow.model.load import load_model
from saeflow.model.sites import SiteReader, resolve_sites
from saeflow.pipeline import tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.recipe.recipe import load_recipe
from saeflow.runtime.progress import Progress
from saeflow.store.storage.folder import Folder
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

ROOT = Path(__file__).resolve().parents[2]
SITES = {"demo": ["transformer.h.0.mlp.act"], "smollm2": ["model.layers.9", "model.layers.9.mlp.act_fn"]}
SHARE = {"demo": 0.01, "smollm2": 0.01}
N_SEQUENCES = {"demo": 160, "smollm2": 40}


def real_activations(name: str, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Float32 (S, T, D) by site."""
    recipe = load_recipe(ROOT / "flows" / "recipes" / f"{name}.toml", **{"corpus.share": SHARE[name]})
    assert recipe.model is not None
    store = Store.create(folder / name)
    tokens.run(Lineage(store, recipe), Progress(verbosity=-1))
    source = Lineage(store, recipe).tokens
    ids = np.concatenate([token_parts.read_part(source, part)[0] for part in source.published().parts])[
        : N_SEQUENCES[name]
    ]
    model = load_model(recipe.model)
    sites = resolve_sites(model, SITES[name])
    reader = SiteReader(model, sites)
    found = [reader.read(torch.from_numpy(ids[start : start + 8]), None) for start in range(0, len(ids), 8)]
    for site in sites:
        yield f"{name} {site.name}", torch.cat([each[site.name] for each in found])


def measured(values: np.ndarray, config: ActivationsConfig, folder: Path) -> tuple[float, float, float]:
    """Bytes on disk, and bytes of activations a second written and read."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "a.zarr"
    writer = open_writer(path, plan_layout(len(values), *values.shape[1:], config), config)
    began = time.perf_counter()
    for start in range(0, len(values), 16):
        writer.append(values[start : start + 16])
    writer.close()
    wrote = time.perf_counter() - began
    array = StoredArray(path, Folder(path.parent))
    began = time.perf_counter()
    for start in range(0, len(values), 64):
        array.read(slice(start, start + 64))
    read = time.perf_counter() - began
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return size, values.nbytes / wrote, values.nbytes / read


def main() -> None:
    quick = arguments(__doc__).quick
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="saeflow-compression-", dir=ROOT / "data") as temporary:
        folder = Path(temporary)
        there = [
            name
            for name in SITES
            if Path(str(load_recipe(ROOT / "flows/recipes" / f"{name}.toml").model.path)).exists()
        ]  # type: ignore[union-attr]
        for site, values in (each for name in there for each in real_activations(name, folder)):
            for dtype in ("float16", "bfloat16"):
                kept = values.to(getattr(torch, dtype))
                array = (kept.view(torch.uint16) if dtype == "bfloat16" else kept).numpy()
                kinds = [ActivationsConfig(dtype=dtype, compression=how) for how in ("none", "zstd")]  # type: ignore[arg-type]
                ratio = array.nbytes / measured(array, kinds[1], folder)[0]
                array = np.tile(array, (-(-((64 if quick else 256) << 20) // array.nbytes), 1, 1))
                rounds = []
                for _ in range(1 if quick else 3):
                    one, other = (measured(array, kind, folder) for kind in kinds)
                    rounds.append([one[1] / 1e6, other[1] / 1e6, one[2] / 1e6, other[2] / 1e6])
                names = ["write_none", "write_zstd", "read_none", "read_zstd"]
                speeds = dict(zip(names, np.median(rounds, 0).round(0).tolist(), strict=True))
                figures[f"{site} {dtype}"] = {"ratio": round(ratio, 3), **speeds}
                print(f"{site} {dtype}", figures[f"{site} {dtype}"], flush=True)
    relu = figures["demo transformer.h.0.mlp.act float16"]
    bars = [Bar("size over size with zstd, demo model after its ReLU, float16", 4.0, ">=", relu["ratio"])]
    residual = figures.get("smollm2 model.layers.9 bfloat16")
    name = "the same, SmolLM2's residual stream, bfloat16"
    bars.append(
        Bar(name, 1.2, ">=", residual["ratio"])
        if residual
        else Bar(name, 1.2, ">=", None, reason="no SmolLM2 here; `make smollm2` fetches it")
    )
    report("compression", bars, megabytes_per_second_and_ratio=figures)


if __name__ == "__main__":
    main()
