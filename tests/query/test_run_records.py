"""Questions about the records of a run say what the files say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest

import saeflow
from saeflow.pipeline.lineage import Lineage
from saeflow.query.api import Run
from saeflow.store.records import read_checked
from tests.conftest import Finished


@pytest.fixture(scope="module")
def run(finished: Finished) -> Iterator[Run]:
    with saeflow.open(finished.store.root) as opened:
        yield opened


def test_metrics_are_those_of_the_evaluation(run: Run, finished: Finished):
    quality = read_checked(Lineage(finished.store, finished.recipe).features.path / "quality.json")
    rows = run.ask("metrics").to_pylist()
    assert {row["metric"]: row["value"] for row in rows} == {row["metric"]: quality[row["metric"]] for row in rows}
    assert {row["metric"] for row in rows} >= {"l0", "variance_unexplained", "loss_recovered_zero", "dead_share"}
    assert all(row["meaning"] for row in rows)


def test_the_training_curve_is_the_log_of_the_training(run: Run, finished: Finished):
    log = pq.read_table(Lineage(finished.store, finished.recipe).sae.path / "log.parquet").to_pylist()
    rows = run.ask("training_curve").to_pylist()
    for name in ("step", "l0", "loss", "variance_unexplained", "dead"):
        assert [row[name] for row in rows] == [row[name] for row in log]
    assert rows[0]["n_tokens"] == log[0]["batch_rows"]


def test_settings_that_differ_are_those_of_the_recipe(run: Run, finished: Finished):
    rows = {(row["section"], row["setting"]): row for row in run.ask("settings").to_pylist()}
    trained = rows["train", "n_tokens"]
    assert json.loads(trained["value"]) == finished.recipe.train.n_tokens
    assert trained["differs"]
    assert [key for key, row in rows.items() if row["differs"] and row["value"] == row["usual"]] == []


def test_stages_have_the_bytes_that_lie_on_the_disk(run: Run, finished: Finished):
    rows = {row["stage"]: row for row in run.ask("stages").to_pylist()}
    assert list(rows) == ["tokens", "activations", "saes", "features"]
    sae = finished.store.root / rows["saes"]["artefact"]
    files = [sae / name for name in ("cfg.json", "log.parquet", "sae_weights.safetensors")]
    assert rows["saes"]["n_bytes"] == sum(path.stat().st_size for path in files)
    assert rows["saes"]["seconds"] > 0
    assert rows["activations"]["seconds"] is None  # its record does not say
