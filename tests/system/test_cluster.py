"""A Dask scheduler and workers as processes of their own: the artefacts of one process, whoever is killed on the
way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from distributed import Client

from flows.support.tasks import MOST_TASKS, runs_of
from saeflow.pipeline import collect, compact, encode, tokens, train
from saeflow.pipeline.dask import clusters
from saeflow.pipeline.dask.workers import Workers
from saeflow.pipeline.lineage import Lineage, grouped
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.s3_server import s3_server
from tests.support.small_pipeline import (
    Ingredients,
    documents,
    quiet,
    recipe_data,
    tree,
    write_corpus,
    write_model,
    write_recipe,
)

ROOT = Path(__file__).resolve().parents[2]
SAES = {"grid": {"sae.k": [2, 3, 4, 6], "sae.architecture": ["topk", "batchtopk"]}}

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # Dask's own, when its processes are killed


@dataclass
class Cluster:
    """A scheduler, and workers of one thread each."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    def start(self, name: str, *arguments: str) -> None:
        """`name` begins with scheduler or worker."""
        module = f"distributed.cli.dask_{name.rstrip('0123456789')}"
        command = [sys.executable, "-m", module, "--scheduler-file", str(self.file), "--host", "127.0.0.1", *arguments]
        about = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, cwd=self.folder, env=about, stdout=log, stderr=log)

    def start_scheduler(self) -> None:
        self.file.unlink(missing_ok=True)
        self.start("scheduler", "--port", "0", "--no-dashboard", "--no-show")
        until = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < until
            time.sleep(0.05)

    def start_workers(self, *numbers: int, more: tuple[str, ...] = ()) -> None:
        for number in numbers:
            self.start(
                f"worker{number}", "--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--no-nanny",
                "--name", f"worker{number}", "--local-directory", str(self.folder / "scratch"),
            )  # fmt: skip

    def restore(self, n_workers: int) -> None:
        """So many workers, and a scheduler, where some were killed."""
        if "scheduler" not in self.processes:
            self.kill(*self.processes)
            self.start_scheduler()
        wanted = [n for n in range(3) if f"worker{n}" not in self.processes]
        self.start_workers(*wanted[: n_workers + 1 - len(self.processes)])

    def kill(self, *names: str) -> None:
        for name in names:
            process = self.processes.pop(name)
            process.kill()
            process.wait()

    def signal(self, number: int) -> None:
        for name, process in self.processes.items():
            if name != "scheduler":
                process.send_signal(number)

    def busy(self) -> list[str]:
        """Names of the workers that have something to do."""
        with contextlib.closing(Client(scheduler_file=str(self.file), set_as_default=False, timeout=30)) as client:
            names = {address: each["name"] for address, each in client.scheduler_info(n_workers=-1)["workers"].items()}
            return [names[address] for address, keys in client.processing().items() if keys]


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    here = Cluster(tmp_path_factory.mktemp("dask"))
    here.restore(3)
    try:
        yield here
    finally:
        here.kill(*here.processes)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Parts that take a while: some ten of 4,000 tokens."""
    folder = tmp_path_factory.mktemp("ingredients")
    given = Ingredients(write_model(folder / "model"), write_corpus(folder / "c.parquet", documents(500)))
    quick = {"n_tokens": 10_000, "checkpoint_seconds": 0.2}
    few = {"part_tokens": 4000}
    return parse_recipe(recipe_data(given, tokens=few, train=quick, sweep=SAES, features={"compact_parts": 2}))


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What one process makes of the recipe, stage by stage in folders of their own."""
    root = tmp_path_factory.mktemp("alone")
    run_alone(root, recipe)
    return Store(root)


def run_alone(root: Path, recipe: Recipe) -> None:
    store = Store.create(root / "tokens")
    tokens.run(Lineage(store, recipe), quiet())
    for before, after, stage in [("tokens", "collect", collect.run), ("collect", "train", train.run_all)]:
        shutil.copytree(root / before, root / after)
        stage(Lineage(Store(root / after), recipe), quiet())
    for after, stage in [("encode", encode_pairs), ("compact", compact_first)]:
        shutil.copytree(root / {"encode": "train", "compact": "encode"}[after], root / after)
        stage(Lineage(Store(root / after), recipe), quiet())


def encode_pairs(lineage: Lineage, progress: Progress) -> None:
    for group in grouped(lineage.members, lambda member: member.feature_facts["site"]):
        encode.run_together(group[:2], progress)


def compact_first(lineage: Lineage, progress: Progress) -> None:
    compact.run(lineage.members[0], progress, enough=2)


STAGES: dict[str, tuple[str, Callable[..., Any]]] = {
    "collect": ("tokens", collect.run),
    "train": ("collect", train.run_all),
    "encode": ("train", encode_pairs),
    "compact": ("encode", compact_first),
}
"""Of each stage what it begins from, and what runs it."""


def on(dask: Cluster, recipe: Recipe, **settings: Any) -> Recipe:
    return recipe.model_copy(
        update={"cluster": parse_recipe(plain(recipe) | {"cluster": address_of(dask) | settings}).cluster}
    )


def workers_of(store: Store, recipe: Recipe) -> contextlib.AbstractContextManager[Workers]:
    assert recipe.cluster is not None
    return clusters.workers_of(store, recipe.cluster, quiet())


def plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def address_of(dask: Cluster) -> dict[str, Any]:
    return {"scheduler_file": str(dask.file), "wait_seconds": 60}


def begun(alone: Store, stage: str, folder: Path) -> Store:
    """A store that lacks what the stage makes."""
    shutil.copytree(alone.root / STAGES[stage][0], folder / "store")
    return Store(folder / "store")


class Running(Thread):
    """A stage at work in a thread; its error is kept."""

    def __init__(self, stage: str, store: Store, recipe: Recipe) -> None:
        super().__init__(daemon=True)
        self.stage, self.store, self.recipe, self.error = stage, store, recipe, None

    def run(self) -> None:
        try:
            STAGES[self.stage][1](Lineage(self.store, self.recipe), quiet())
        except BaseException as error:
            self.error = error

    def wait_for(self, sign: Callable[[Store], bool]) -> None:
        until = time.monotonic() + 100
        while not sign(self.store):
            assert self.is_alive(), f"it ended too soon: {self.error}"
            assert time.monotonic() < until
            time.sleep(0.002)

    def end(self) -> BaseException | None:
        self.join(120)
        assert not self.is_alive()
        return self.error


def part_begun(store: Store) -> bool:
    """Has a worker files of a part that is not finished?"""
    return any(path.is_file() for path in store.root.glob("tmp/[af]*/*/*-*/**/*"))


def checkpoint_written(store: Store) -> bool:
    return any(store.root.glob("tmp/*.checkpoint/restart-0/state.json"))


SIGNS = {"collect": part_begun, "encode": part_begun, "compact": part_begun, "train": checkpoint_written}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_three_workers_one_killed_at_work_gives_the_artefacts_of_one_process(
    stage: str, dask: Cluster, recipe: Recipe, alone: Store, tmp_path: Path
) -> None:
    dask.restore(2 if stage == "compact" else 3)  # it has one group of parts to merge
    store = begun(alone, stage, tmp_path)
    running = Running(stage, store, on(dask, recipe))
    running.start()
    running.wait_for(SIGNS[stage])
    dask.signal(signal.SIGSTOP)  # none can finish between the look and the kill
    assert SIGNS[stage](store), "the part was finished meanwhile"
    victims = dask.busy()
    assert victims
    dask.kill(victims[0])
    dask.signal(signal.SIGCONT)
    assert running.end() is None
    assert tree(store.root) == tree(alone.root / stage)


def test_the_scheduler_killed_ends_the_run_with_what_to_do_and_the_same_command_finishes_on_a_new_one(
    dask: Cluster, recipe: Recipe, alone: Store, tmp_path: Path
) -> None:
    dask.restore(1)
    store = begun(alone, "collect", tmp_path)
    running = Running("collect", store, on(dask, recipe))
    running.start()
    running.wait_for(part_begun)
    dask.kill("scheduler")
    error = running.end()
    assert isinstance(error, UserError)
    for words in ("is lost", "Finished parts are safe", "Start scheduler and workers again", "same command again"):
        assert words in str(error)
    for process in dask.processes.values():  # workers of a lost scheduler end by themselves
        process.wait(60)
    assert not list(store.root.glob("activations/*/manifest.json"))
    dask.restore(1)
    collect.run(Lineage(store, on(dask, recipe)), quiet())
    assert tree(store.root) == tree(alone.root / "collect")


def test_a_run_that_is_terminated_ends_at_once_and_its_workers_drop_what_they_were_making(
    dask: Cluster, recipe: Recipe, alone: Store, tmp_path: Path
) -> None:
    dask.restore(1)
    store = begun(alone, "collect", tmp_path)
    data = recipe.model_dump(mode="json", exclude_none=True, exclude={"sweep"}) | {"cluster": address_of(dask)}
    command = [
        sys.executable,
        "-c",
        "from saeflow.cli.app import main; main()",
        "collect",
        str(write_recipe(tmp_path / "small.toml", data)),
        "--store",
        str(store.root),
    ]
    about = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=about, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 100
        while not part_begun(store):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "Stopped. Nothing finished is lost" in said
    assert "Traceback" not in said
    assert dask.busy() == []
    until = time.monotonic() + 30
    while list(store.root.glob("tmp/activations-*/*/*-*")):
        assert time.monotonic() < until, "the worker goes on with what nobody waits for"
        time.sleep(0.05)


def test_no_worker_within_the_time_that_is_set_is_said(tmp_path: Path, recipe: Recipe, alone: Store) -> None:
    here = Cluster(tmp_path)
    here.start_scheduler()
    try:
        with (
            pytest.raises(
                UserError, match=r"no worker since 2 s \(cluster\.wait_seconds\)[\s\S]*dask worker tcp://127"
            ),
            workers_of(Store(alone.root / "collect"), on(here, recipe, wait_seconds=2)),
        ):
            pass
    finally:
        here.kill(*here.processes)


def test_no_scheduler_within_the_time_that_is_set_is_said(alone: Store, recipe: Recipe) -> None:
    given = parse_recipe(plain(recipe) | {"cluster": {"address": "tcp://127.0.0.1:9", "wait_seconds": 1}})
    with (
        pytest.raises(UserError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:9 within 1 s"),
        workers_of(alone, given),
    ):
        pass


def test_a_worker_that_does_not_see_the_store_is_named_before_any_work(
    dask: Cluster, recipe: Recipe, alone: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask.restore(1)
    begun(alone, "collect", tmp_path)
    monkeypatch.chdir(tmp_path)
    store = Store(Path("/proc/self/cwd/store"))  # a path that leads each process to a folder of its own
    with pytest.raises(UserError, match=r"does not see the store /proc/self/cwd/store [\s\S]*network file system"):
        collect.run(Lineage(store, on(dask, recipe)), quiet())
    assert not list(store.root.glob("tmp/cluster-*"))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="mended in Python 3.12")
def test_workers_do_not_run_the_profiler_that_blocks_python_3_11(dask: Cluster, recipe: Recipe, alone: Store) -> None:
    dask.restore(1)

    def profiles(dask_worker: Any) -> bool:
        return bool(dask_worker.periodic_callbacks["profile"].is_running())

    profiles.__module__ = "__main__"  # sent by value
    with workers_of(Store(alone.root / "tokens"), on(dask, recipe)) as workers:
        assert set(workers.client.run(profiles).values()) == {False}


def test_what_a_worker_refuses_reaches_the_user_with_the_workers_name(
    dask: Cluster, recipe: Recipe, alone: Store, tmp_path: Path
) -> None:
    dask.restore(1)
    store = begun(alone, "train", tmp_path)
    other = on(dask, recipe).model_copy(update={"sweep": None, "name": "small_cuda", "data": "small"})
    other = other.model_copy(update={"train": recipe.train.model_copy(update={"device": "cuda:7"})})
    with pytest.raises(UserError, match=r"On the worker .*: train\.device is 'cuda:7'"):
        train.run(Lineage(store, other), quiet())


def test_with_a_cluster_of_its_own_kind_a_run_starts_it_and_ends_it(
    recipe: Recipe, alone: Store, tmp_path: Path
) -> None:
    store = begun(alone, "collect", tmp_path)
    before = set(psutil.Process().children(recursive=True))
    own = parse_recipe(plain(recipe) | {"cluster": {"kind": "local", "n_workers": 1}})
    with clusters.kept_open():
        collect.run(Lineage(store, own), quiet())
        started = {each.pid for each in psutil.Process().children(recursive=True) if each not in before}
        heard = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in started]
        heard += [each for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"]
        assert {each.laddr.ip for each in heard} == {"127.0.0.1"}
    assert tree(store.root) == tree(alone.root / "collect")
    left = [each for each in psutil.Process().children(recursive=True) if each not in before]
    assert not [each for each in left if "resource_tracker" not in " ".join(each.cmdline())]


def test_two_attempts_at_a_part_in_folders_of_their_own_leave_one_part(tmp_path: Path) -> None:
    def attempt() -> Artefact:
        return replace(Store(tmp_path).artefact("features", "run", "00000000"), shared=True)

    one, other = attempt(), attempt()
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(each.new_part(3, {"n": 1})) for each in (one, other)]
        assert folders[0] != folders[1]
        for folder in folders:
            (folder / "file").write_text("equal")
    assert one.made == other.made
    assert [path.name for path in one.path.glob("parts/*")] == [one.made[3].folder]
    assert list(one.parts().values()) == [one.made[3]]
    assert not list(one.own_work.iterdir())


def test_a_damaged_part_is_replaced_by_an_attempt(tmp_path: Path) -> None:
    target = replace(Store(tmp_path).artefact("features", "run", "00000000"), shared=True)
    for _ in range(2):
        with target.new_part(3, {"n": 1}) as folder:
            (folder / "file").write_text("whole")
        (target.part_path(target.made[3]) / "file").write_text("x")
    with target.new_part(3, {"n": 1}) as folder:
        (folder / "file").write_text("whole")
    assert list(target.parts().values()) == [target.made[3]]


@pytest.mark.parametrize(("n", "at_once"), [(3, 2), (100, 7), (8, 8)])
def test_a_sweep_is_shared_out_evenly_and_only_members_of_the_same_sites_together(n: int, at_once: int) -> None:
    sites = [("a",) if number % 4 else ("b",) for number in range(n)]
    groups = train.shares(sites, at_once)
    assert sorted(number for group in groups for number in group) == list(range(n))
    assert all(len({sites[number] for number in group}) == 1 for group in groups)
    assert len(groups) <= at_once + 1
    assert max(map(len, groups)) <= -(-n // at_once) + 1


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001, 100_000])
def test_a_flow_run_has_a_thousand_tasks_at_most_whatever_the_parts(n: int) -> None:
    runs = runs_of(range(n))
    assert [index for run in runs for index in run] == list(range(n))
    assert len(runs) <= MOST_TASKS
    assert n > MOST_TASKS or all(len(run) == 1 for run in runs)


def test_a_cluster_may_be_named_by_its_address_alone_and_an_empty_section_is_none(recipe: Recipe) -> None:
    short, none = (parse_recipe(plain(recipe) | {"cluster": each}) for each in ("tls://host:8786", {}))
    assert (short.cluster and short.cluster.address, none.cluster) == ("tls://host:8786", None)
    assert parse_recipe(json.loads(short.model_dump_json())) == short
    assert [member.cluster for member in short.members()] == [short.cluster] * 8


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("local-cuda", "dask-cuda"),
        ("slurm", "dask-jobqueue"),
        ("lsf", "dask-jobqueue"),
        ("kubernetes", "dask-kubernetes"),
    ],
)
def test_a_kind_whose_package_is_missing_says_what_to_install(
    recipe: Recipe, alone: Store, kind: str, package: str
) -> None:
    pytest.importorskip("distributed")
    with contextlib.suppress(ImportError):
        __import__(package.replace("-", "_"))
        pytest.skip(f"{package} is installed")
    given = parse_recipe(plain(recipe) | {"cluster": {"kind": kind, "n_workers": 2}})
    with (
        pytest.raises(UserError, match=f"which needs the package {package}. Install it: pip install {package}"),
        workers_of(alone, given),
    ):
        pass


def test_options_that_the_class_does_not_know_are_refused_by_its_name(recipe: Recipe, alone: Store) -> None:
    given = parse_recipe(plain(recipe) | {"cluster": {"kind": "local", "options": {"queue": "red"}}})
    with (
        pytest.raises(UserError, match=r"cluster\.kind is 'local', but LocalCluster refuses: [\s\S]*cluster\.options"),
        workers_of(alone, given),
    ):
        pass


def test_a_cluster_changes_no_fingerprint(recipe: Recipe, alone: Store) -> None:
    store, on_it = Store(alone.root / "train"), parse_recipe(plain(recipe) | {"cluster": "tcp://a:1"})
    assert Lineage(store, on_it).activations == Lineage(store, recipe).activations
    for mine, plain_one in zip(on_it.members(), recipe.members(), strict=True):
        assert Lineage(store, mine).sae == Lineage(store, plain_one).sae
        assert Lineage(store, mine).features == Lineage(store, plain_one).features


def test_workers_of_a_store_in_a_bucket_make_the_objects_that_one_process_makes(
    recipe: Recipe, alone: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Cluster(tmp_path)
    with s3_server() as server, contextlib.ExitStack() as stack:
        for name, value in (server.environment | {"SAEFLOW_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        stack.callback(lambda: here.kill(*here.processes))
        here.start_scheduler()
        here.start_workers(0, more=("--resources", "GPU=1"))
        url = server.bucket("store") + "/here"
        for path in (alone.root / "tokens").rglob("*"):
            if path.is_file() and path.relative_to(alone.root).parts[1] != "tmp":
                key = f"here/{path.relative_to(alone.root / 'tokens').as_posix()}"
                server.client().put_object(Bucket="store", Key=key, Body=path.read_bytes())
        one = on(here, recipe).members()[0]
        for stage in (collect.run, train.run, encode.run):
            stage(Lineage(Store.create(url), one), quiet())
        caches = [path.name for path in (tmp_path / "cache").iterdir()]
        assert len([name for name in caches if "-worker-" in name]) == 1, "it works in a folder of its own"
        made = server.files("store", "here")
    wanted = tree(alone.root / "encode")
    assert {content for name, content in made.items() if name.startswith("tmp/")} == {b"{}\n"}, "leases of nobody"
    for name, content in wanted.items():
        if name.startswith("activations") or one.name in name:
            assert made[name] == content, name
