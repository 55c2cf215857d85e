"""Parts made in this process, and what is counted of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from saeflow.pipeline import encode
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Executor, Here, PartMaker, PartWork, Records, Tally
from saeflow.runtime.devices import GPU_WORKERS, model_threads
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.small_pipeline import quiet


@pytest.mark.parametrize("executor", [Here(), Here(3)])
def test_parts_are_made_in_this_process_and_published_after_the_last(executor: Here) -> None:
    happened, heard = list[Any](), list[int]()

    class Counting(PartMaker, name="fake-counting", alone=executor.n_calls == 1):
        @classmethod
        def open(cls, store: Store, settings: dict[str, Any]) -> Counting:
            return cls()

        def make(self, item: int, progress: Progress) -> Records:
            with progress.bar("part", None, "units") as bar:
                for _ in range(10):
                    bar.advance(1)
            return {}

    sizes = [(item, 10) for item in range(7)]
    work = PartWork(
        Counting, {}, sizes, [], ("fake", "units"), Counting(),
        made=lambda item, _: happened.append(item), publish=lambda: happened.append("published"),
    )  # fmt: skip
    work.run(executor, Progress(verbosity=-1, listener=lambda bar: heard.append(bar.done)))
    assert sorted(happened[:-1]) == list(range(7))
    assert happened[-1] == "published"
    assert heard[-1] == max(heard) == 70


def test_a_part_that_is_made_twice_counts_once() -> None:
    with quiet().bar("fake", 10, "units") as bar:
        tally = Tally(bar, [(3, 10)])
        for _ in range(2):
            with tally.progress(3).bar("part", None, "units") as part:
                part.advance(6)
        assert bar.done == 6
        tally.finish(3)
    assert bar.done == 10


def test_a_gpu_gets_several_parts_at_once_and_a_processor_one_a_thread(finished: Finished, tmp_path: Path) -> None:
    store, asked = Store(tmp_path / "store"), list[int]()
    shutil.copytree(finished.store.root, store.root, ignore=shutil.ignore_patterns("features"))

    def through(executor: Executor) -> Executor:  # as a flow puts its tasks around it
        asked.append(executor.n_calls)
        return executor

    encode.run(Lineage(store, finished.recipe), quiet(), through)
    assert asked == [encode.n_at_once(finished.recipe.features, finished.recipe.threads)]
    assert encode.n_at_once(finished.recipe.features.model_copy(update={"device": "cpu"}), 3) == 3
    assert model_threads(torch.device("cuda"), 64) == GPU_WORKERS
