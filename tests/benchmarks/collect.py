"""Collecting activations, beside the same forward pass with its output dropped, and beside SAELens' cache runner.

python -m tests.benchmarks.collect            a quarter of the demo corpus by its own model, a hundredth by SmolLM2
python -m tests.benchmarks.collect --quick    a twentieth and a hundred-and-sixtieth

SmolLM2 comes with `make smollm2`, the peer with `make peers`; without them their lines say so.
*Ours* includes everything of the stage: conversion, checksums, files flushed to the disk, publication.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.model.sites import SiteReader
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Executor
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import map_in_order
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "flows" / "recipes"
PEER = ROOT / ".bench" / "saelens" / "bin" / "python"
ALTERNATIONS = 3
QUIET = Progress(verbosity=-1)

PEER_PROGRAM = """
import json, sys, time
from datasets import load_dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
about = json.load(sys.stdin)
texts = load_dataset("parquet", data_files=about.pop("texts"), split="train")
runner = CacheActivationsRunner(CacheActivationsRunnerConfig(**about), override_dataset=texts)
began = time.perf_counter()
found = runner.run()
print(len(found) * about["context_size"] / (time.perf_counter() - began))
"""


def some_tokens(name: str, share: float, folder: Path) -> tuple[Store, Recipe]:
    """A store with the tokens of a share of the recipe's documents."""
    recipe = load_recipe(RECIPES / f"{name}.toml", **{"corpus.share": share})
    store = Store.create(folder / "store")
    tokens.run(Lineage(store, recipe), QUIET)
    return store, recipe


def dropped(store: Store, recipe: Recipe) -> float:
    """Tokens/s of the forward pass alone, stopped at the same module."""
    source = Lineage(store, recipe).tokens
    parts = source.published().parts
    collector = collect.open_collector(Lineage(store, recipe), parts)
    workers = collector.forward.workers
    reader = SiteReader(collector.forward.model, collector.sites)
    began = time.perf_counter()
    for part in parts:
        vocab_ids, mask = token_parts.read_part(source, part)

        def forward(start: int, vocab_ids: torch.Tensor, mask: torch.Tensor) -> None:
            rows = slice(start, start + recipe.activations.forward_batch)
            reader.read(vocab_ids[rows], None if mask[rows].all() else mask[rows])

        ids, real = torch.from_numpy(vocab_ids), torch.from_numpy(mask)
        starts = range(0, len(ids), recipe.activations.forward_batch)
        for _ in map_in_order(lambda start, ids=ids, real=real: forward(start, ids, real), starts, workers):
            pass
    seconds = time.perf_counter() - began
    reader.close()
    return source.published().total("n_tokens") / seconds


def collected(store: Store, recipe: Recipe) -> float:
    """Tokens/s of the whole stage, the loading of the model aside."""
    lineage = Lineage(store, recipe)
    source, target = lineage.tokens, lineage.activations
    shutil.rmtree(target.path, ignore_errors=True)
    began = 0.0

    def started(executor: Executor) -> Executor:
        nonlocal began
        began = time.perf_counter()
        return executor

    collect.run(lineage, QUIET, started)
    return source.published().total("n_tokens") / (time.perf_counter() - began)


def peer(store: Store, recipe: Recipe, folder: Path) -> float:
    """Tokens/s of SAELens' runner on the same sequences, tokenised beforehand, without its shuffling."""
    lineage = Lineage(store, recipe)
    source, target = lineage.tokens, lineage.activations
    ids = [row for part in source.published().parts for row in token_parts.read_part(source, part)[0].tolist()]
    pq.write_table(pa.table({"input_ids": ids}), folder / "peer.parquet")
    shutil.rmtree(folder / "peer", ignore_errors=True)
    assert recipe.model is not None
    batch, length = recipe.activations.forward_batch, recipe.tokens.context_length
    about = {
        "texts": str(folder / "peer.parquet"), "dataset_path": "none", "model_name": recipe.model.path,
        "model_class_name": "AutoModelForCausalLM", "hook_name": recipe.activations.sites[0],
        "d_in": stored_sites(target)[0].width, "model_batch_size": batch, "context_size": length,
        "training_tokens": len(ids) // batch * batch * length, "new_cached_activations_path": str(folder / "peer"),
        "shuffle": False, "streaming": False, "dtype": "float16", "prepend_bos": False, "device": "cpu",
    }  # fmt: skip
    command = [PEER, "-c", PEER_PROGRAM]
    run = subprocess.run(command, input=json.dumps(about), capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return float(run.stdout.split()[-1])


def bar(name: str, asked: float, pairs: list[tuple[float, float]]) -> Bar:
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return Bar(name, asked, ">=", ratios[len(ratios) // 2], spread=ratios[-1] - ratios[0])


def demo(share: float, figures: dict[str, float]) -> list[Bar]:
    with tempfile.TemporaryDirectory(prefix="saeflow-collect-", dir=ROOT / "data") as temporary:
        folder = Path(temporary)
        store, recipe = some_tokens("demo", share, folder)
        collected(store, recipe)  # the first run compiles and warms up
        rounds = []
        for _ in range(ALTERNATIONS):
            round_ = [dropped(store, recipe), collected(store, recipe)]
            rounds.append([*round_, peer(store, recipe, folder) if PEER.exists() else None])
        figures |= dict(zip(["demo_forward", "demo_collect", "demo_saelens"], rounds[-1], strict=True))
        about = "SAELens' cache runner, demo model"
        missing = Bar(about, 2.0, ">=", None, reason="no peers here; `make peers` installs them")
        beside = [(ours, theirs) for _, ours, theirs in rounds if theirs is not None]
        return [
            bar("collection over the forward pass, demo model", 0.80, [(ours, top) for top, ours, _ in rounds]),
            bar(f"collection over {about}", 2.0, beside) if beside else missing,
        ]


def smollm2(share: float, figures: dict[str, float]) -> list[Bar]:
    name = "collection over the forward pass, SmolLM2 to its 10th block"
    recipe = load_recipe(RECIPES / "smollm2.toml")
    assert recipe.model is not None
    if not Path(recipe.model.path).exists():
        return [Bar(name, 0.95, ">=", None, reason="no SmolLM2 here; `make smollm2` fetches it")]
    with tempfile.TemporaryDirectory(prefix="saeflow-collect-", dir=ROOT / "data") as temporary:
        store, recipe = some_tokens("smollm2", share, Path(temporary))
        pairs = []
        for _ in range(ALTERNATIONS):
            top = dropped(store, recipe)
            pairs.append((collected(store, recipe), top))
        figures |= {"smollm2_forward": pairs[-1][1], "smollm2_collect": pairs[-1][0]}
        return [bar(name, 0.95, pairs)]


def main() -> None:
    quick = arguments(__doc__).quick
    figures: dict[str, float] = {}
    bars = demo(0.05 if quick else 0.25, figures) + smollm2(0.006 if quick else 0.01, figures)
    report("collect", bars, tokens_per_second=figures)


if __name__ == "__main__":
    main()
