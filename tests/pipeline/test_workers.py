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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from dask import config as dask_config
from distributed import Client, LocalCluster, Worker, get_worker

from saeflow.features import compaction
from saeflow.features.compaction import MergeSettings
from saeflow.pipeline import compact, train
from saeflow.pipeline.dask import clusters, work
from saeflow.pipeline.dask.work import Bench, Session, make_part, software
from saeflow.pipeline.dask.workers import Workers, threads_of_worker
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.pipeline.parts import Item, Made, PartMaker, PartWork, Records, Tally, registered
from saeflow.recipe.cluster import ClusterConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress, Stopped
from saeflow.runtime.threads import n_threads
from saeflow.store.artefact import Artefact
from saeflow.store.lease import acquire, hold_lease
from saeflow.store.store import Store
from saeflow.store.user_cache import cache_folder
from tests.conftest import Finished
from tests.support.fake_cluster import FakeCluster, IdleCluster
from tests.support.small_pipeline import Ingredients, quiet, recipe_data, tree

pytestmark = pytest.mark.filterwarnings("default")  # Dask's own, when a worker ends


class FakeParts(PartMaker, name="fake-parts", alone=False):
    """Parts of no work; `behave` says what an item does instead."""

    begun: ClassVar[list[tuple[Any, str]]] = []
    """Items, and the worker that began each."""
    behave: ClassVar[dict[Any, Callable[[Any], Any]]] = {}
    waits: ClassVar[dict[Any, Artefact]] = {}

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> FakeParts:
        return cls()

    def make(self, item: int, progress: Progress) -> Records:
        self.begun.append((item, get_worker().address))
        with progress.bar("fake", None, "units") as bar:
            self.behave.pop(item, lambda _: None)(bar)
        return {}

    def waits_for(self, item: int) -> list[Artefact]:
        return [self.waits[item]] if item in self.waits else []


@dataclass
class InThreads:
    """A scheduler and workers in threads of this process."""

    dask: LocalCluster
    client: Client
    store: Store

    @property
    def begun(self) -> list[tuple[Any, str]]:
        return FakeParts.begun

    @property
    def behave(self) -> dict[Any, Callable[[Any], Any]]:
        return FakeParts.behave

    def workers(self, look_seconds: float = 5, **config: Any) -> Workers:
        config = {"kind": "local", "wait_seconds": 1} | config
        session = Session(self.store.name, "token", software()["saeflow"])
        return Workers(self.client, ClusterConfig(**config), session, look_seconds)

    def make(self, workers: Workers, items: list[int], progress: Progress | None = None) -> list[int]:
        """The items in the order in which they are finished."""
        made: list[int] = []
        fake_work(items, made=lambda item, _: made.append(item)).run(workers, progress or quiet())
        return made

    def worker(self, address: str) -> Worker:
        return next(each for each in self.dask.workers.values() if each.address == address)


def fake_work(items: list[int], size: int = 1, **more: Any) -> PartWork:
    return PartWork(FakeParts, {}, [(item, size) for item in items], [], ("fake", "units"), **more)


def test_the_bar_of_a_stage_begins_before_its_cluster_is_joined(tmp_path: Path) -> None:
    happened = list[str]()

    class Noting(Progress):
        def bar(self, *about: Any) -> contextlib.AbstractContextManager[Bar]:
            happened.append("bar")
            return super().bar(*about)

    @contextlib.contextmanager
    def join(store: Store, config: ClusterConfig, progress: Progress) -> Iterator[Any]:
        happened.append("joined")
        yield IdleCluster()

    with clusters.kept_open(join):
        clusters.make_parts(fake_work([1]), Store(tmp_path), ClusterConfig(kind="local"), Noting(verbosity=-1))
    assert happened == ["bar", "joined"]


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[InThreads]:
    arguments = {"processes": False, "dashboard_address": "127.0.0.1:0", "protocol": "tcp", "host": "127.0.0.1"}
    for known in (FakeParts.begun, FakeParts.behave, FakeParts.waits):
        known.clear()
    searched = sys.path.copy()
    with (
        dask_config.set({"distributed.comm.timeouts.connect": "3s"}),  # a client of a lost scheduler closes sooner
        LocalCluster(n_workers=2, threads_per_worker=1, **arguments) as started,
        Client(started, set_as_default=False) as one,
    ):
        yield InThreads(started, one, Store.create(tmp_path / "fakes"))
    sys.path[:] = searched  # workers have added their folders


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    return Finished(store, finished.recipe, finished.summary)


def test_a_group_that_workers_merged_before_an_earlier_one_is_there_when_it_is_shown(
    copied: Finished, tmp_path: Path
) -> None:
    run = Lineage(copied.store, copied.recipe).features
    sizes = MergeSettings(most_values=sum(part.counts["n_values"] for part in run.published().parts) * 2 // 3)
    alone = Store(tmp_path / "alone")
    shutil.copytree(copied.store.root, alone.root)
    cluster = FakeCluster(backwards=True)
    with clusters.kept_open(cluster.join):
        compact.merge_parts(copied.store, run, on_a_cluster(copied.recipe), quiet(), 2, sizes=sizes)
    compact.merge_parts(alone, Lineage(alone, copied.recipe).features, copied.recipe, quiet(), 2, sizes=sizes)
    assert len(cluster.works[0].items) > 1
    assert not [run.part_path(part) for part in run.published().parts if not run.part_path(part).is_dir()]
    assert tree(copied.store.root) == tree(alone.root)


def on_a_cluster(recipe: Recipe, **settings: Any) -> Recipe:
    return recipe.model_copy(update={"cluster": ClusterConfig(**{"kind": "local"} | settings)})


def test_a_part_whose_folder_is_gone_is_not_published(tmp_path: Path) -> None:
    target = Store(tmp_path).artefact("features", "run", "00000000")
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

    dask.behave.update({2: lambda _: retired.wait(10), 3: retire})
    assert sorted(dask.make(dask.workers(), [1, 2, 3])) == [1, 2, 3]
    first, second = (address for item, address in dask.begun if item == 3)
    assert first != second


def test_a_worker_that_waits_for_another_run_is_free_once_its_own_is_stopped(
    dask: InThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFLOW_LEASE_SECONDS", "1")
    target, stopped, workers = Store(tmp_path).artefact("saes", "run", "00000000"), quiet(), dask.workers()
    FakeParts.waits[1] = FakeParts.waits[2] = target

    def busy() -> list[str]:
        return [key for keys in dask.client.processing().values() for key in keys]

    with hold_lease(target.slot, target.id, "refuse"):
        Timer(0.5, stopped.stopping.set).start()
        with pytest.raises(Stopped):
            dask.make(workers, [1, 2], stopped)
        assert sorted(dask.make(workers, [3, 4, 5])) == [3, 4, 5], "a worker waits for what nobody wants"
        assert not busy()
    assert not {1, 2} & {item for item, _ in dask.begun}


def test_without_a_gpu_left_the_run_ends_though_other_workers_are_there(dask: InThreads) -> None:
    async def start() -> Worker:
        return await Worker(dask.dask.scheduler_address, nthreads=1, resources={"GPU": 1}, host="127.0.0.1")

    gpu: Worker = dask.client.sync(start)

    def end(bar: Bar) -> None:
        dask.client.loop.add_callback(gpu.close)
        advance_until_told(bar)

    dask.behave[1] = end
    with pytest.raises(UserError, match=r"no worker left since 1 s \(cluster\.wait_seconds\)"):
        dask.make(dask.workers(look_seconds=0.1), [1, 2])
    assert {address for _, address in dask.begun} == {gpu.address}


def test_an_error_of_a_worker_says_which_machine_and_which_part(dask: InThreads) -> None:
    def fail(error: Exception, bar: Bar) -> None:
        dask.behave[1] = partial(fail, error)  # at each try
        raise error

    where = f"on the worker {platform.node()}, in fake-parts, part 1"
    dask.behave[1] = partial(fail, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match=f"No space left on device[\\s\\S]*{where}[\\s\\S]*Finished parts are safe"):
        dask.make(dask.workers(), [1])
    dask.behave[1] = partial(fail, RuntimeError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        dask.make(dask.workers(), [1])
    assert where in caught.value.__notes__[0]


def test_what_a_worker_tells_of_a_part_counts_for_the_call_that_began_it(dask: InThreads) -> None:
    workers, seen = dask.workers(), list[int]()

    def tell(bar: Bar) -> None:
        for item in range(4):
            workers.told((0.0, {"token": "token", "item": json.dumps(item), "done": 900}))

    dask.behave[0] = tell
    work = fake_work([0, 1, 2, 3], size=1000)
    with quiet().bar("fake", 4000, "units") as bar:
        tally = Tally(bar, work.sizes)
        calls = [workers.each(work, [item], tally) for item in range(4)]
        for each in reversed(calls):
            next(each)
            seen.append(bar.done)
        for each in calls:
            each.close()
    assert seen[:3] == [1000, 2000, 3000]
    assert bar.done == 4000


class Kept(PartMaker, name="fake-kept", stays=True):
    opened: ClassVar[list[str]] = []

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Kept:
        cls.opened.append(settings["model"])
        return cls()

    def make(self, item: int, progress: Progress) -> Records:
        return {}


def test_a_worker_keeps_its_maker_until_it_needs_another_or_the_run_ends(tmp_path: Path) -> None:
    store, bench = Store.create(tmp_path / "store"), Bench()
    session = Session(store.name, "mine", "")

    def open_maker(name: str, model: str) -> PartMaker:
        return bench.maker(session, name, json.dumps({"model": model}))

    first = open_maker("fake-kept", "model")
    bench.let_go("another's")
    assert open_maker("fake-kept", "model") is first
    assert Kept.opened == ["model"]
    bench.let_go("mine")
    assert open_maker("fake-kept", "model") is not first
    open_maker("fake-kept", "another")
    open_maker("fake-parts", "none")  # which uses all of the worker's memory itself
    open_maker("fake-kept", "another")
    assert Kept.opened == ["model", "model", "another", "another"]


def test_a_worker_runs_registered_work_alone(dask: InThreads) -> None:
    with pytest.raises(UserError, match=r"'os.system' is no work of a stage. Workers make: .*fake-parts"):
        registered("os.system")
    answer = dask.client.submit(make_part, dask.workers().session, "shutil.rmtree", "{}", "/")
    assert "is no work of a stage" in answer.result()["refused"]


def test_each_stage_has_registered_its_parts_under_the_name_that_is_seen_on_dasks_page() -> None:
    for name in ("activations-collect", "features-encode", "features-merge", "train-train"):
        assert registered(name).name == name


def test_a_scheduler_lost_after_the_last_part_does_not_end_the_run(dask: InThreads) -> None:
    config = ClusterConfig(kind="local")

    def there(_: ClusterConfig) -> contextlib.AbstractContextManager[LocalCluster]:
        return contextlib.nullcontext(dask.dask)

    with clusters.joined_cluster(dask.store, config, quiet(), start=there) as workers:
        dask.client.sync(dask.dask.scheduler.close)
        assert workers.client.status != "running" or not workers.able()


def test_a_scheduler_without_saeflow_is_named_before_any_work(dask: InThreads) -> None:
    def missing() -> dict[str, str]:
        raise ModuleNotFoundError("No module named 'saeflow'")

    session = dask.workers().session
    with pytest.raises(UserError, match=r"The Dask scheduler at tcp://\S+ cannot load saeflow[\s\S]*Install saeflow"):
        clusters.require_fit(dask.client, session, dask.store, quiet(), ask=missing)


def test_a_worker_whose_disk_refuses_is_named_before_any_work(dask: InThreads) -> None:
    (dask.store.root / "marker").mkdir()  # cannot be read as a file
    found = work.look(dask.workers().session, "marker", next(iter(dask.dask.workers.values())))
    assert f"The worker on {platform.node()} does not see the store" in found["problem"]
    assert "Is a directory" in found["problem"]


def test_a_folder_of_another_host_in_a_shared_cache_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFLOW_CACHE", str(tmp_path))
    url = "s3://bucket/shared"
    home = cache_folder(url).name
    others = [tmp_path / f"{home}-worker-{platform.node()}-{rest}" for rest in ("gpu-77", "2-77")]
    gone = tmp_path / f"{home}-worker-{platform.node()}-{2**22 + 1}"  # more than Linux counts
    for folder in [*others, gone]:
        folder.mkdir()
    work.own_cache(url)
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
def test_workers_of_one_machine_share_its_cores(settings: dict[str, Any], n_workers: int, threads: int) -> None:
    assert threads_of_worker(ClusterConfig(**settings), n_workers, n_cores=8) == threads


def test_without_threads_a_process_takes_the_cores_that_it_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert n_threads(0) == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert n_threads(5) == 5


def test_a_training_that_another_run_is_at_is_refused_before_a_worker_has_it(copied: Finished) -> None:
    lineage, cluster = Lineage(copied.store, on_a_cluster(copied.recipe)), IdleCluster()
    shutil.rmtree(lineage.sae.path)
    with (
        clusters.kept_open(cluster.join),
        hold_lease(lineage.sae.slot, lineage.sae.id, "refuse"),
        pytest.raises(UserError, match=f"Another run is writing {lineage.sae.id}"),
    ):
        train.run_all(lineage, quiet(), noticing_seconds=0.3)
    assert cluster.n_joined == 0


def test_a_worker_of_a_killed_run_has_some_seconds_to_notice_it(copied: Finished) -> None:
    lineage, cluster = Lineage(copied.store, on_a_cluster(copied.recipe)), IdleCluster()
    shutil.rmtree(lineage.sae.path)
    left = acquire(lineage.sae.slot, lineage.sae.id, "refuse")
    noticing = Timer(0.3, left.release)
    noticing.start()
    with clusters.kept_open(cluster.join):
        train.run(lineage, quiet())
    noticing.join()
    assert [work.items for work in cluster.works] == [[[copied.recipe.name]]]


@pytest.mark.parametrize("content", ["{}", "[]", "null", '"tcp://a:1"', "{"])
def test_a_file_that_no_scheduler_wrote_is_said(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scheduler.json"
    path.write_text(content)
    config = ClusterConfig(scheduler_file=str(path), wait_seconds=0.01)
    with (
        pytest.raises(UserError, match=r"No Dask scheduler answers at .*scheduler\.json within 0\.01 s"),
        clusters.client_of(config, None),
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
        ({"n_workers": 2, "ranks": 3}, "cluster.ranks is 3, but cluster.n_workers is 2. Start a worker for each rank"),
        ({"kind": "yarn"}, "cluster.kind is 'yarn'"),
        ({"adress": "tcp://a:1"}, "Did you mean address?"),
        ({"address": "tcp://a:1", "n_workers": 2}, "cluster.n_workers is for clusters that saeflow starts"),
        ({"scheduler_file": "s.json", "threads_per_worker": 2}, "cluster.scheduler_file is already running"),
        ({"address": "tcp://a:1", "options": {"cores": 2}}, "cluster.options is for clusters"),
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


class OneThere(Workers):
    """One worker is there yet, and nobody makes a part."""

    given: ClassVar[list[Item]] = []

    def able(self) -> dict[str, int]:
        return {"tcp://the-first": 1}

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        self.given.extend(items)
        yield from ()


def test_a_sweep_is_split_for_the_workers_that_the_recipe_starts_though_one_is_there_yet(
    copied: Finished, ingredients: Ingredients
) -> None:
    data = recipe_data(ingredients, sweep={"grid": {"sae.k": [2, 3, 5, 6]}})
    recipe = parse_recipe(data | {"cluster": {"kind": "slurm", "n_workers": 3}})

    def join(store: Store, config: ClusterConfig, progress: Progress) -> contextlib.AbstractContextManager[Workers]:
        session = Session(store.name, "token", "")
        return contextlib.nullcontext(OneThere(SimpleNamespace(status="running"), config, session))  # type: ignore[arg-type]

    with clusters.kept_open(join):
        train.run_all(Lineage(copied.store, recipe), quiet())
    assert sorted(map(len, OneThere.given)) == [1, 1, 2]


def test_a_cluster_of_the_runs_own_that_does_not_answer_is_called_by_its_kind() -> None:
    with (
        pytest.raises(
            UserError, match=r"No Dask scheduler answers at the address of cluster\.kind = 'local' within 1 s"
        ),
        clusters.client_of(ClusterConfig(kind="local", wait_seconds=1), "tcp://127.0.0.1:9"),
    ):
        pass
