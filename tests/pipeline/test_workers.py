"""What a cluster's client and workers do with one another: workers are threads of this process, or none at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Timer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster, Worker
from prefect.task_runners import ThreadPoolTaskRunner

from flows import encode
from flows.support import tasks
from saeflow.features import compaction
from saeflow.features.part_merger import MergeSettings
from saeflow.pipeline import encode as features
from saeflow.pipeline import train
from saeflow.pipeline.dask import start as cluster_start
from saeflow.pipeline.dask import work as cluster_work
from saeflow.pipeline.dask import workers as cluster
from saeflow.pipeline.dask.work import Session, software
from saeflow.pipeline.dask.workers import Workers
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.recipe.cluster import ClusterConfig
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime import threads as parallel
from saeflow.runtime.devices import GPU_WORKERS
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress, Stopped
from saeflow.store.artefact import Artefact, Job
from saeflow.store.lease import acquire, hold_lease
from saeflow.store.records import PartRecord
from tests.conftest import Finished
from tests.support.small_pipeline import Ingredients, quiet, recipe_data, tree

pytestmark = pytest.mark.filterwarnings("default")  # Dask's own, when a worker ends


@dataclass
class InThreads:
    """A scheduler and workers in threads of this process, and parts of no work for them."""

    dask: LocalCluster
    client: Client
    begun: list[tuple[Any, str]] = field(default_factory=list)
    """Items, and the worker that began each."""
    behave: dict[Any, Callable[[Any], Any]] = field(default_factory=dict)
    """What an item does instead of nothing."""
    progress: Progress = field(default_factory=quiet)
    """That of the item begun last."""

    def workers(self, **config: Any) -> Workers:
        config = {"kind": "local", "wait_seconds": 1} | config
        return Workers(self.client, ClusterConfig(**config), Session("/store", "token", software()["saeflow"]))

    def make(self, workers: Workers, items: list[int], progress: Progress | None = None) -> dict[int, Any]:
        with (progress or quiet()).bar("fake", None, "units") as bar:
            return dict(workers.each("fake_parts.fake_at", {}, items, bar, dict.fromkeys(items, 1)))

    def fake_at(self, store: str, settings: str, item: int, progress: Any) -> int:
        from distributed import get_worker

        self.progress = progress
        self.begun.append((item, get_worker().address))
        with progress.bar("fake", None, "units") as bar:
            self.behave.pop(item, lambda _: None)(bar)
        return item

    def worker(self, address: str) -> Worker:
        return next(each for each in self.dask.workers.values() if each.address == address)


@pytest.fixture
def dask(monkeypatch: pytest.MonkeyPatch) -> Iterator[InThreads]:
    arguments = {"processes": False, "dashboard_address": "127.0.0.1:0", "protocol": "tcp", "host": "127.0.0.1"}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, **arguments) as started,
        Client(started, set_as_default=False) as one,
    ):
        here, module = InThreads(started, one), ModuleType("saeflow.fake_parts")
        module.fake_at = here.fake_at  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "saeflow.fake_parts", module)
        yield here


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    store = replace(finished.store, root=tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    return Finished(store, finished.recipe, finished.summary)


def test_a_group_that_workers_merged_before_an_earlier_one_is_there_when_it_is_shown(
    copied: Finished, tmp_path: Path
) -> None:
    run = Lineage(copied.store, copied.recipe).features
    used = Ancestors(copied.store, run).selection()
    n_values = [part.counts["n_values"] for part in run.published().parts]
    settings = MergeSettings(most_values=sum(n_values) * 2 // 3)
    alone = tmp_path / "alone"
    shutil.copytree(copied.store.root, alone)

    def last_first(groups: list[list[PartRecord]], bar: Bar) -> Iterator[PartRecord]:
        assert len(groups) > 1
        worker = replace(run, shared=True, made={})
        made = [compaction.merge_whole_parts(worker, used, group, bar) for group in reversed(groups)]
        yield from reversed(made)

    compaction.compact_run(run, used, quiet(), 2, merge_groups=last_first, settings=settings)
    compaction.compact_run(replace(run, root=alone), used, quiet(), 2, settings=settings)
    assert not [run.part_path(part) for part in run.published().parts if not run.part_path(part).is_dir()]
    assert tree(copied.store.root) == tree(alone)


def test_a_part_whose_folder_is_gone_is_not_published(tmp_path: Path) -> None:
    target = Artefact(tmp_path, "features", "run", "00000000")
    target.create({})
    for index in range(2):
        with target.new_part(index, {"n": 1}) as folder:
            (folder / "file").write_text("values")
    target.publish([target.made[0]], clear=False)
    shutil.rmtree(target.part_path(target.made[1]))
    with pytest.raises(UserError, match=f"Part {target.made[1].folder} of features/run-00000000 is gone"):
        target.publish(target.made.values())
    assert target.published().parts == (target.made[0],)


def advance_until_told(bar: Bar) -> None:
    for _ in range(2_000):
        time.sleep(0.005)
        bar.advance(1)


def test_a_part_of_a_worker_that_is_retired_is_made_by_another(dask: InThreads) -> None:
    retired = Event()

    def retire(bar: Bar) -> None:  # its worker still holds what it made of part 1
        dask.client.loop.add_callback(dask.worker(dask.begun[-1][1]).close_gracefully)
        retired.set()
        advance_until_told(bar)

    dask.behave |= {2: lambda _: retired.wait(10), 3: retire}
    assert dask.make(dask.workers(), [1, 2, 3]) == {1: 1, 2: 2, 3: 3}
    first, second = (address for item, address in dask.begun if item == 3)
    assert first != second


def test_a_worker_that_waits_for_another_run_is_free_once_its_own_is_stopped(
    dask: InThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFLOW_LEASE_SECONDS", "1")
    target, free, stopped = Artefact(tmp_path, "saes", "run", "00000000"), Event(), quiet()

    def wait(_: Bar) -> None:
        stopped.stopping.set()
        try:
            cluster_work.wait_for_turn([target], dask.progress)
        finally:
            free.set()

    dask.behave[1] = wait
    with hold_lease(target.slot, target.id, "refuse"):
        with pytest.raises(Stopped):
            dask.make(dask.workers(), [1], stopped)
        assert free.wait(5)


def test_without_a_gpu_left_the_run_ends_though_other_workers_are_there(
    dask: InThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.1)

    async def start() -> Worker:
        return await Worker(dask.dask.scheduler_address, nthreads=1, resources={"GPU": 1}, host="127.0.0.1")

    gpu: Worker = dask.client.sync(start)

    def end(bar: Bar) -> None:
        dask.client.loop.add_callback(gpu.close)
        advance_until_told(bar)

    dask.behave[1] = end
    with pytest.raises(UserError, match=r"no worker left since 1 s \(cluster\.wait_seconds\)"):
        dask.make(dask.workers(), [1, 2])
    assert {address for _, address in dask.begun} == {gpu.address}


def test_an_error_of_a_worker_says_which_machine_and_which_part(dask: InThreads) -> None:
    def fail(error: Exception, bar: Bar) -> None:
        dask.behave[1] = partial(fail, error)  # at each try
        raise error

    where = f"on the worker {platform.node()}, in fake_parts.fake_at, part 1"
    dask.behave[1] = partial(fail, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match=f"No space left on device[\\s\\S]*{where}[\\s\\S]*Finished parts are safe"):
        dask.make(dask.workers(), [1])
    dask.behave[1] = partial(fail, RuntimeError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        dask.make(dask.workers(), [1])
    assert where in caught.value.__notes__[0]


def test_what_a_worker_tells_of_a_part_counts_for_the_call_that_began_it(dask: InThreads) -> None:
    workers = dask.workers()
    seen: list[int] = []

    def tell(bar: Bar) -> None:
        for item in range(4):
            workers.told((0.0, {"token": "token", "item": json.dumps(item), "done": 900}))

    dask.behave[0] = tell
    sizes = dict.fromkeys(range(4), 1000)
    with quiet().bar("fake", 4000, "units") as bar:
        calls = [workers.each("fake_parts.fake_at", {}, [item], bar, sizes) for item in range(4)]
        for each in reversed(calls):
            next(each)
            seen.append(bar.done)
        for each in calls:
            each.close()
    assert seen[:3] == [1000, 2000, 3000]
    assert bar.done == 4000


def test_a_run_frees_on_the_workers_only_what_is_its_own() -> None:
    made: list[str] = []

    def model_of(name: str) -> str:
        made.append(name)
        return name

    token = cluster_work._token.set("mine")
    try:
        cluster_work.let_go()
        cluster_work.held(model_of, "model")
        cluster_work.let_go("another's")
        cluster_work.held(model_of, "model")
        assert made == ["model"]
        cluster_work.let_go("mine")
        cluster_work.held(model_of, "model")
        assert made == ["model"] * 2
    finally:
        cluster_work.let_go()
        cluster_work._token.reset(token)


def test_a_scheduler_lost_after_the_last_part_does_not_end_the_run(
    finished: Finished, dask: InThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(cluster, "started", lambda _: contextlib.nullcontext(dask.dask))
    monkeypatch.setattr(cluster, "_look_at", lambda *_: None)
    recipe = finished.recipe.model_copy(update={"cluster": ClusterConfig(kind="local")})
    with cluster.workers_of(finished.store, recipe, quiet()) as workers:
        assert workers is not None
        monkeypatch.setattr(workers.client, "run", lost)


def test_a_scheduler_without_saeflow_is_named_before_any_work(
    finished: Finished, dask: InThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'saeflow'")

    monkeypatch.setattr(cluster, "software", missing)
    with pytest.raises(UserError, match=r"The Dask scheduler at tcp://\S+ cannot load saeflow[\s\S]*Install saeflow"):
        cluster._look_at(dask.workers(), finished.store, quiet())


def test_a_worker_whose_disk_refuses_is_named_before_any_work(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cluster_work, "_require_seen", full)
    monkeypatch.setattr(cluster_work, "stop_profiler", lambda _: None)
    found = cluster_work.look(Session(str(finished.store.root), "token", software()["saeflow"]), "tmp/marker")
    assert f"The worker on {platform.node()} cannot work there" in found["problem"]
    assert "No space left on device" in found["problem"]


def test_a_folder_of_another_host_in_a_shared_cache_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path))
    url = "s3://bucket/shared"
    home = cluster_work.cache_folder(url).name
    others = [tmp_path / f"{home}-worker-{platform.node()}-{rest}" for rest in ("gpu-77", "2-77")]
    gone = tmp_path / f"{home}-worker-{platform.node()}-{2**22 + 1}"  # more than Linux counts
    for folder in [*others, gone]:
        folder.mkdir()
    cluster_work._own_cache(url)
    assert [folder.exists() for folder in [*others, gone]] == [True, True, False]


def test_workers_that_come_later_are_counted_where_the_recipe_starts_them(dask: InThreads) -> None:
    here = dask.workers(kind="slurm", n_workers=80, threads_per_worker=2)
    assert (here.n_threads, here.n_expected, here.n_calls) == (2, 80, 160)
    there = dask.workers(kind=None, address="tcp://127.0.0.1:1")
    assert (there.n_threads, there.n_expected) == (2, 2)
    assert there.n_calls >= 64, "an address says nothing of those that come"


@pytest.mark.parametrize(
    ("settings", "n_workers", "threads"),
    [
        ({"kind": "local"}, 8, 1),
        ({"kind": "local", "n_workers": 2}, 2, 4),
        ({"kind": "local", "threads_per_worker": 3}, 8, 3),
        ({"kind": "slurm", "n_workers": 2, "threads_per_worker": 3}, 2, 3),
        ({"kind": "slurm", "n_workers": 2, "options": {"cores": 5}}, 2, 5),
        ({"address": "tcp://a:1"}, 2, 0),
    ],
)
def test_workers_of_one_machine_share_its_cores(
    settings: dict[str, Any], n_workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "cpu_count", lambda: 8)
    assert cluster_start.threads_of_worker(ClusterConfig(**settings), n_workers) == threads


def test_without_threads_a_process_takes_the_cores_that_it_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert parallel.n_threads(0) == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert parallel.n_threads(5) == 5


def test_a_task_that_is_tried_again_makes_only_what_is_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(indices: Sequence[int]) -> Iterator[PartRecord]:
        for index in indices:
            made.append(index)
            if made.count(7) == 1 and index == 7:
                raise OSError("network")
            yield PartRecord(index=index, counts={}, files=[])

    tries: list[Callable[..., list[str]]] = []
    monkeypatch.setattr(tasks, "MOST_TASKS", 1)
    monkeypatch.setattr(tasks, "name_run", lambda *_: None)
    monkeypatch.setattr(tasks, "part_task", lambda _: lambda work: tries.append(work) or work)
    monkeypatch.setattr(ThreadPoolTaskRunner, "map", lambda *_: SimpleNamespace(result=lambda: None))
    monkeypatch.setattr(ThreadPoolTaskRunner, "__enter__", lambda self: self)
    monkeypatch.setattr(ThreadPoolTaskRunner, "__exit__", lambda *_: None)
    tasks.make_parts("part", Job(list(range(10)), make), quiet(), 1)
    with pytest.raises(OSError, match="network"):
        tries[0]("parts", list(range(10)))
    assert len(tries[0]("parts", list(range(10)))) == 10
    assert made == [*range(8), 7, 8, 9]


def test_a_training_that_another_run_is_at_is_refused_before_a_worker_has_it(
    copied: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = copied.recipe.model_copy(update={"cluster": ClusterConfig(kind="local")})
    target = Lineage(copied.store, recipe).sae
    shutil.rmtree(target.path)
    monkeypatch.setattr(train, "workers_of", lambda *_: pytest.fail("a cluster was asked for"))
    monkeypatch.setattr(train, "_NOTICING_SECONDS", 0.3)
    with (
        hold_lease(target.slot, target.id, "refuse"),
        pytest.raises(UserError, match=f"Another run is writing {target.id}"),
    ):
        train.run(Lineage(copied.store, recipe), quiet())


def test_a_worker_of_a_killed_run_has_some_seconds_to_notice_it(
    copied: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = copied.recipe.model_copy(update={"cluster": ClusterConfig(kind="local")})
    target = Lineage(copied.store, recipe).sae
    shutil.rmtree(target.path)
    left, asked = acquire(target.slot, target.id, "refuse"), Event()

    def each(*_: Any) -> Iterator[Any]:
        asked.set()
        yield from ()

    queue = SimpleNamespace(n_expected=1, each=each)
    monkeypatch.setattr(train, "workers_of", lambda *_: contextlib.nullcontext(queue))
    noticing = Timer(0.3, left.release)
    noticing.start()
    train.run(Lineage(copied.store, recipe), quiet())
    noticing.join()
    assert asked.is_set()


@pytest.mark.parametrize("content", ["{}", "[]", "null", '"tcp://a:1"', "{"])
def test_a_file_that_no_scheduler_wrote_is_said(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scheduler.json"
    path.write_text(content)
    config = ClusterConfig(scheduler_file=str(path), wait_seconds=0.01)
    with (
        pytest.raises(UserError, match=r"No Dask scheduler answers at .*scheduler\.json within 0\.01 s"),
        cluster_start.client_of(config, None),
    ):
        pass


def test_advice_is_for_the_kind_of_cluster_that_it_is(dask: InThreads) -> None:
    ours, theirs = dask.workers(kind="slurm", n_workers=2), dask.workers(kind=None, address="tcp://127.0.0.1:1")
    assert "dask worker" not in str(ours.alone("no worker"))
    assert "raise cluster.wait_seconds" in str(ours.alone("no worker"))
    assert "Start scheduler" not in str(ours.lost())
    assert "Run the same command again" in str(ours.lost())
    assert "dask worker tcp://" in str(theirs.alone("no worker"))
    assert "Start scheduler and workers again, then run the same command again" in str(theirs.lost())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"address": "host:8786"}, "cluster.address is 'host:8786'"),
        ({"address": "tcp://a:1", "kind": "local"}, "cluster.address and cluster.kind each name a cluster"),
        ({"kind": "slurm"}, "cluster.kind is 'slurm', which needs cluster.n_workers"),
        ({"kind": "yarn"}, "cluster.kind is 'yarn'"),
        ({"adress": "tcp://a:1"}, "Did you mean address?"),
        ({"address": "tcp://a:1", "n_workers": 2}, "cluster.n_workers is for a cluster that saeflow starts"),
        ({"scheduler_file": "s.json", "threads_per_worker": 2}, "cluster.scheduler_file is already running"),
        ({"address": "tcp://a:1", "options": {"cores": 2}}, "cluster.options is for a cluster"),
        ({"kind": "kubernetes", "n_workers": 2, "threads_per_worker": 2}, "cluster.threads_per_worker is 2"),
    ],
)
def test_a_cluster_that_cannot_be_and_a_setting_that_would_do_nothing_are_refused_when_the_recipe_is_read(
    ingredients: Ingredients, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(recipe_data(ingredients) | {"cluster": settings})
    assert says in str(caught.value)


def test_a_group_of_parts_is_found_by_its_ends(finished: Finished) -> None:
    run = Lineage(finished.store, finished.recipe).features
    parts = run.published().parts
    for group in compaction.plan_merges(parts, Ancestors(finished.store, run).selection().spans):
        assert compaction.group_between(parts[::-1], group[0].folder, group[-1].folder) == group


def test_a_sweep_is_split_for_the_workers_that_the_recipe_starts_though_one_is_there_yet(
    copied: Finished, ingredients: Ingredients, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def each(function: str, settings: Any, items: list[list[str]], *_: Any) -> Iterator[Any]:
        given.extend(items)
        yield from ()

    data = recipe_data(ingredients, sweep={"grid": {"sae.k": [2, 3, 5, 6]}})
    recipe = parse_recipe(data | {"cluster": {"kind": "slurm", "n_workers": 3}})
    queue = Workers(SimpleNamespace(), recipe.cluster, Session("/store", "token", ""))  # type: ignore[arg-type]
    queue._able = time.monotonic(), {"tcp://the-first": 1}
    monkeypatch.setattr(queue, "each", each)
    monkeypatch.setattr(train, "workers_of", lambda *_: contextlib.nullcontext(queue))
    train.run_all(Lineage(copied.store, recipe), quiet())
    assert sorted(map(len, given)) == [1, 1, 2]


def test_a_gpu_gets_as_many_parts_at_once_from_the_flow_as_from_the_command(
    copied: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(features, "device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(features, "encoding_together", lambda *_: contextlib.nullcontext(Job([], lambda _: iter(()))))
    monkeypatch.setattr(encode, "reporting", lambda _: contextlib.nullcontext(quiet()))
    monkeypatch.setattr(encode, "make_parts", lambda stage, job, progress, n_here: asked.append(n_here))
    monkeypatch.setattr(encode, "show_table", lambda *_: None)
    encode.encode_flow.fn(copied.recipe, str(copied.store.root))
    assert asked == [GPU_WORKERS]
    assert features._workers(copied.recipe.features, 64)._max_workers == GPU_WORKERS


def test_a_cluster_of_the_runs_own_that_does_not_answer_is_called_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(cluster_start, "Client", silent)
    with (
        pytest.raises(
            UserError, match=r"No Dask scheduler answers at the address of cluster\.kind = 'local' within 2 s"
        ),
        cluster_start.client_of(ClusterConfig(kind="local", wait_seconds=2), object()),
    ):
        pass
