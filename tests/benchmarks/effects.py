"""What changing features does to the demo model: 1,000 features at 200 firings each, and beside one change at a time.

python -m tests.benchmarks.effects            1,000 live features × 200 firings, each set to zero
python -m tests.benchmarks.effects --quick    100 features × 50 firings

Needs the run `demo` (`make demo`); SAEFLOW_STORE names a store elsewhere. The store is not changed: its files are
linked into a temporary folder. *Seconds* are those of the whole command, from opening the store to publishing. Beside
it some firings are changed one at a time: a forward pass of the whole sequence for each, with no saeflow code but the
autoencoder's weights. Both run the model in float64, as `saeflow effects` does by default.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saeflow.meaning.effects.measure import EFFECTS_COMMAND, EffectSettings, measure_effects
from saeflow.meaning.effects.run_model import RunModel, model_of_run
from saeflow.query.connection import connect_to_run
from saeflow.runtime.memory import peak_bytes
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

ROOT = Path(__file__).resolve().parents[2]
_LIVE = "select feature_id from stg_feature_stats where n_tokens >= ? order by md5(feature_id::varchar) limit ?"


def linked(store: Path, folder: Path) -> Store:
    """A store with the same files, in which new ones can be written."""
    shutil.copytree(
        store, folder, copy_function=os.link, ignore=shutil.ignore_patterns("tmp", "catalog.sql", "effects")
    )
    shutil.copy(store / "store.json", folder / "linked.json")
    os.replace(folder / "linked.json", folder / "store.json")
    return Store.open(str(folder))


def one_at_a_time(store: Store, rows: pa.Table) -> float:
    """Return the largest difference of loss change and KL from passes over whole sequences, one for each firing."""
    run, connection = connect_to_run(store, "demo")
    with contextlib.closing(connection):
        loaded = RunModel.load(store, run, model_of_run(store, run, "", "cpu", EFFECTS_COMMAND))
        model, worst = loaded.model.double(), 0.0
        module = dict(model.named_modules())[loaded.place.target]
        for row in rows.to_pylist():
            first = row["token_id"] - row["token_id"] % loaded.context_length
            found = connection.execute(
                "select vocab_id from stg_tokens where token_id between ? and ? order by token_id",
                [first, first + loaded.context_length - 1],
            ).fetchall()
            ids, place = torch.tensor([[each[0] for each in found]]), row["token_id"] - first
            moved = (row["set_to"] - row["value"]) * loaded.sae.W_dec[row["feature_id"]].detach().double()

            def add(module, inputs, output, place=place, moved=moved):  # type: ignore[no-untyped-def]
                output[0, place] += moved
                return output

            with torch.no_grad():
                before = torch.log_softmax(model(ids).logits[0, place].double(), 0)
                hook = module.register_forward_hook(add)
                after = torch.log_softmax(model(ids).logits[0, place].double(), 0)
                hook.remove()
            kl = float((before.exp() * (before - after)).sum())
            worst = max(worst, abs(kl - row["kl"]))
            if row["loss_change"] is not None:
                following = ids[0, place + 1]
                worst = max(worst, abs(float(before[following] - after[following]) - row["loss_change"]))
    return worst


def main() -> None:
    quick = arguments(__doc__).quick
    n_features, n = (100, 50) if quick else (1_000, 200)
    place = Path(os.environ.get("SAEFLOW_STORE", ROOT / "data" / "store"))
    with tempfile.TemporaryDirectory(prefix="saeflow-effects-", dir=ROOT / "data") as temporary:
        store = linked(place, Path(temporary) / "store")
        _, connection = connect_to_run(store, "demo")
        with contextlib.closing(connection):
            features = [row[0] for row in connection.execute(_LIVE, [n, n_features]).fetchall()]
        settings = EffectSettings(features=",".join(map(str, sorted(features))), n=n)
        began = time.perf_counter()
        made = measure_effects(store, "demo", settings, Progress())
        seconds = time.perf_counter() - began
        rows = pq.read_table(made.artefact.path / "effects.parquet")
        some = np.linspace(0, rows.num_rows - 1, 100).astype(int)
        worst = one_at_a_time(store, rows.take(some))
        again = settings.__class__(**{**vars(settings), "change": "same", "n": 2})
        same = pq.read_table(
            measure_effects(store, "demo", again, Progress(verbosity=-1)).artefact.path / "effects.parquet"
        )
        identity = max(float(np.nanmax(np.abs(same[name].to_numpy()))) for name in ("loss_change", "kl"))
        n_firings = made.facts["n_firings"]
        n_bytes = (made.artefact.path / "effects.parquet").stat().st_size
    report(
        "effects",
        [
            Bar(f"seconds for {len(features):,} features at {n} firings", 300, "<=", seconds),
            Bar("largest difference from one change at a time", 1e-5, "<=", worst),
            Bar("largest effect of the identity change", 1e-5, "<=", identity),
        ],
        n_firings=n_firings,
        firings_per_second=n_firings / seconds,
        table_bytes=n_bytes,
        peak_bytes=peak_bytes(),
    )


if __name__ == "__main__":
    main()
