"""The benchmark of a GPU runs all of its code without one, and no part of it can stop the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.benchmarks import gpu
from tests.benchmarks._gpu import work
from tests.benchmarks._gpu.measure import Card, Row
from tests.benchmarks._gpu.tables import Tables

TOY = Card(torch.device("cpu"), True)

CHILD = """
import json, sys, time
from tests.benchmarks._gpu.measure import Row
from tests.benchmarks._gpu.work import Part, child

def fail(): raise ValueError("no room")
def die(): sys.exit(3)
def crash(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
tasks = {"one": lambda: Row("one", 1.0), "bad": fail, "crash": crash, "dead": die, "two": lambda: [Row("two", 2.0)],
         "slow": lambda: time.sleep(60), "never": lambda: Row("never", 3.0)}
child(Part("made", lambda card: tasks, 9), __import__("tests.sae.gpu.test_benchmark").sae.gpu.test_benchmark.TOY,
      json.loads(sys.argv[-1]))
"""


@pytest.mark.long
def test_a_task_that_fails_dies_or_takes_too_long_says_so_and_the_others_are_done() -> None:
    part = work.Part("made", lambda card: {}, 0)
    rows = work.rows_of(part, [sys.executable, "-c", CHILD], 40)
    found = {row.name: (row.value, row.note.partition(":")[0]) for row in rows}
    assert found == {
        "one": (1.0, ""), "bad": (None, "failed"), "crash": (None, "failed"), "dead": (None, "failed"),
        "two": (2.0, ""), "slow": (None, "failed"),
    }  # fmt: skip
    notes = {row.name: row.note for row in rows}
    assert notes["bad"] == "failed: ValueError: no room"
    assert "the process died" in notes["dead"]
    assert "not done in 40 s" in notes["slow"]


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == gpu.NO_GPU
    assert json.loads(said[-1])["bars"] == []


def test_a_share_is_that_of_the_time_that_computing_and_moving_take() -> None:
    rates = [Row("matmul in bfloat16", 500.0), Row("copy on the card", 2000.0)]
    part = Row("choice", 4.0, "ms", 0.4, flops=1e12, asked_share=0.4)
    step = Row("D=1 F=2 K=3 B=4,000: topk, by kernels", 1e6, "tokens/s", 1e5, flops=1e12)
    tables = Tables({"limits": rates, "parts": [part, step]})
    assert [tables.share(row) for row in (part, step)] == pytest.approx([0.5, 0.5])
    assert [(bar.name, bar.measured, bar.holds) for bar in tables.bars()] == [
        ("choice: share of the card's limit", pytest.approx(0.5), True)
    ]
    assert "| choice | 4 ms | 0.4 | 2 | 0.5 | share >= 0.4 |" in tables.markdown({})


@pytest.mark.long
@pytest.mark.parametrize("part", [part.name for part in gpu.parts()])
def test_all_of_it_runs_at_toy_sizes_and_what_is_exact_is_right(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--only", part, "--out", str(tmp_path)])
    gpu.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    rows: Sequence[dict[str, object]] = kept["rows"][part]
    assert not [row for row in rows if str(row["note"]).startswith("failed")]
    assert len(rows) >= 3
    assert [bar for bar in said["bars"] if bar["holds"] is False] == []
    assert (tmp_path / "gpu.md").read_text("utf-8").count("\n| ") > len(rows)
