"""Flows on a real Prefect server: the same artefacts as the command, a task a part, retries, what a page shows."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import psutil
import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.collect import collect_as_tasks
from flows.encode import encode_as_tasks, encode_flow
from flows.evaluate import evaluate_flow
from flows.pipeline import pipeline_flow
from flows.support import page
from flows.support.reporting import reporting
from flows.support.tasks import Attempts, Tasks
from flows.tokens import tokens_flow
from saeflow.pipeline import collect, encode, stages, train
from saeflow.pipeline.judge import sweep
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Here, PartMaker, PartWork, Records, Tally
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.engine_folders import Answered, write_vllm
from tests.support.fake_cluster import Watched
from tests.support.prefect_server import prefect_server
from tests.support.small_pipeline import (
    Ingredients,
    a_table,
    brought_data,
    quiet,
    recipe_data,
    tree,
    write_recipe,
    write_table,
)

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("default")  # Prefect's own


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("server")
    with (
        prefect_server(home) as server,
        temporary_settings({PREFECT_API_URL: server.api, PREFECT_HOME: home}),
    ):
        yield
        for worker in (APILogWorker, EventsWorker):  # what they hold could not be sent later
            worker.drain_all()


@pytest.fixture(scope="module")
def flowed(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which the pipeline flow has run the small recipe."""
    store = Store(tmp_path_factory.mktemp("flowed") / "store")
    pipeline_flow(parse_recipe(recipe_data(ingredients)), str(store.root))
    return store


@pytest.fixture
def upstream(finished: Finished, tmp_path: Path) -> Store:
    """The finished store without its activations and what came of them."""
    store = Store.create(tmp_path / "upstream")
    shutil.copytree(finished.store.root / "tokens", store.root / "tokens")
    return store


def task_runs(flow_name: str, store: Store) -> list[TaskRun]:
    """Task runs of a flow's runs on this store, as the server knows them."""
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [r.id for r in runs(flow_name, store)]}))


def runs(flow_name: str, store: Store) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        flow = client.read_flow_by_name(flow_name)
        found = client.read_flow_runs()
    return [run for run in found if run.flow_id == flow.id and run.parameters["store"] == str(store.root)]


def artifacts(store: Store) -> list[Artifact]:
    """What the flow runs on a store wrote for Prefect's pages: other tests use the same server."""
    with get_client(sync_client=True) as client:
        own = [str(run.id) for run in client.read_flow_runs() if run.parameters.get("store") == str(store.root)]
        return client.read_artifacts(artifact_filter=ArtifactFilter.model_validate({"flow_run_id": {"any_": own}}))


def published(store: Store) -> list[str]:
    return sorted({path.parent.parent.name for path in store.root.glob("*/*/manifest.json")})


def test_the_flow_makes_the_artefacts_that_the_command_makes(flowed: Store, finished: Finished) -> None:
    assert tree(flowed.root) == tree(finished.store.root)


def test_there_is_one_task_run_a_part(flowed: Store, finished: Finished) -> None:
    for flow_name, kind in (("saeflow-collect", "activations"), ("saeflow-encode", "features")):
        parts = next(iter(finished.store.artefacts(kind))).published().parts  # type: ignore[arg-type]
        assert len(parts) > 2
        stage = flow_name.removeprefix("saeflow-")
        names = sorted(run.name for run in task_runs(flow_name, flowed))
        assert names == [f"{stage}-{part.index}" for part in parts]
        assert all(run.state is not None and run.state.is_completed() for run in task_runs(flow_name, flowed))


@pytest.mark.long
def test_an_engines_requests_are_stored_and_encoded_as_tasks(ingredients: Ingredients, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(0)
    states = {
        f"r{i}": Answered([3, 4, 5, 6, 7] * 4, {"transformer.h.0": torch.randn(20, 16, generator=dice)})
        for i in range(12)
    }
    folder = write_vllm(tmp_path / "requests", states, ["transformer.h.0"])
    about = {
        "tokens": {"packing": "isolated", "part_tokens": 60}, "activations": {"sites": ["transformer.h.0"]},
        "train": {"n_tokens": 300}, "features": {"check_values": 0},
    }  # fmt: skip
    recipe = parse_recipe(recipe_data(ingredients, **about) | {"corpus": {"requests": str(folder), "held_out": 0.2}})
    flowed, plain = Store(tmp_path / "flowed"), Store.create(tmp_path / "plain")
    pipeline_flow(recipe, str(flowed.root))
    stages.run(Lineage(plain, recipe), quiet())
    assert tree(flowed.root) == tree(plain.root)
    assert len(task_runs("saeflow-collect", flowed)) == len(Lineage(plain, recipe).tokens.published().parts) > 1


def test_progress_and_numbers_are_artifacts(flowed: Store) -> None:
    found = artifacts(flowed)
    kinds = {(artifact.key, artifact.type) for artifact in found}
    for stage in ("tokens", "collect", "train", "encode", "evaluate"):
        assert {(f"saeflow-{stage}", "progress"), (f"saeflow-{stage}-numbers", "table")} <= kinds
        assert {a.data for a in found if a.key == f"saeflow-{stage}"} == {100.0}
    assert ("saeflow-pipeline-numbers", "table") in kinds


def test_runs_are_named_and_tagged_by_what_they_do(flowed: Store, finished: Finished) -> None:
    n_parts = len(finished.store.artefacts("activations")[0].published().parts)
    wanted = {
        "pipeline": "pipeline small: tokens, collect, train, encode, compact, evaluate",
        "tokens": f"tokens small: {finished.summary['n_tokens']:,} tokens",
        "collect": f"collect small: {n_parts} parts",
        "train": "train small: batchtopk, 64 features",
        "encode": f"encode small: {n_parts} parts",
        "evaluate": "evaluate small",
    }
    for stage, name in wanted.items():
        [run] = runs(f"saeflow-{stage}", flowed)
        assert run.name == name
        assert set(run.tags) == {stage, "small", "batchtopk"}


def test_the_pipeline_ends_with_a_page_of_picture_numbers_and_next_commands(flowed: Store, finished: Finished) -> None:
    [found] = [each for each in artifacts(flowed) if each.key == "saeflow-result"]
    text = str(found.data)
    [picture] = flowed.root.glob("features/*/density.png")
    assert base64.b64encode(picture.read_bytes()).decode() in text
    assert f"saeflow ask search_token the --store {flowed.name}" in text
    assert f"| {page.plain('n tokens')} | {finished.summary['n_tokens']:,} |" in text


@flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
def collect_telling(recipe: Recipe, store: str) -> None:
    """Collect slowly, with a warning at each part, and tell often how far it is."""

    def warn(index: int) -> None:
        logging.getLogger("saeflow.activations.tables.arrays").warning("part %d is \x1b[31modd", index)
        time.sleep(0.3)

    with reporting("collect", page_seconds=0.2, log_seconds=0.2) as progress:
        lineage = Lineage(Store.create(store), recipe)
        collect.run(lineage, progress, lambda executor: Tasks("collect", Watched(executor, before=warn)))


def test_what_saeflow_says_and_warns_of_is_in_the_log_of_the_run(upstream: Store, finished: Finished) -> None:
    collect_telling(finished.recipe, str(upstream.root))
    said = wait_for_logs(runs("saeflow-collect", upstream)[0].id, "activations: 4,273 tokens in")
    assert any(
        re.search(r"activations: [\d,]+ of [\d,]+ \(\d+%\) tokens, [\d,]+/s, [\d:]+ left", line) for line in said
    )
    assert "part 1 is ␛[31modd" in said


def wait_for_logs(run_id: UUID, last: str) -> list[str]:
    """Lines of a flow run's log on the server, once one of them begins with `last`; they are sent from time to time."""
    for _ in range(100):
        with get_client(sync_client=True) as client:
            found = client._client.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [str(run_id)]}}}).json()
        said = [each["message"] for each in found]
        if any(line.startswith(last) for line in said):
            return said
        time.sleep(0.2)
    raise AssertionError(f"no such line: {last}")


def test_a_second_run_does_nothing_twice_and_says_so(
    flowed: Store, finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in flowed.root.rglob("*") if path.suffix in (".json", ".parquet")}
    summary = pipeline_flow(finished.recipe, str(flowed.root))
    after = {path: path.stat().st_mtime_ns for path in flowed.root.rglob("*") if path.suffix in (".json", ".parquet")}
    assert after == before
    said = capfd.readouterr().err
    for stage in ("tokens", "activations", "train", "features", "evaluate"):
        assert f"{stage}: already done" in said
    assert summary["n_tokens"] == finished.summary["n_tokens"]
    collected = task_runs("saeflow-collect", flowed)
    assert len(collected) == len({run.name for run in collected}), "a finished part was given to a task again"
    for stage in ("collect", "encode"):
        assert f"{stage} small: 0 parts" in {run.name for run in runs(f"saeflow-{stage}", flowed)}


def collect_failing(recipe: Recipe, store: Store, error: Exception, times: int, tried: list[int]) -> None:
    """Run the collect flow. Part 1 fails so many times; `tried` gets the indices of the parts that were begun."""

    def fail(index: int) -> None:
        tried.append(index)
        if index == 1 and tried.count(1) <= times:
            raise error

    @flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
    def failing(recipe: Recipe, store: str) -> str:
        return collect_as_tasks(recipe, store, lambda executor: Watched(executor, before=fail))

    failing(recipe, str(store.root))


def test_a_part_that_fails_once_is_tried_again_and_the_flow_completes(upstream: Store, finished: Finished) -> None:
    tried: list[int] = []
    collect_failing(finished.recipe, upstream, RuntimeError("a cosmic ray"), 1, tried)
    assert tried.count(1) == 2
    assert all(tried.count(index) == 1 for index in set(tried) - {1})
    assert tree(upstream.root / "activations") == tree(finished.store.root / "activations")


def test_a_part_that_always_fails_fails_the_flow_and_publishes_nothing(upstream: Store, finished: Finished) -> None:
    with pytest.raises(RuntimeError, match="a broken disk"):
        collect_failing(finished.recipe, upstream, RuntimeError("a broken disk"), 100, [])
    assert published(upstream) == ["tokens"]
    assert [run.state_name for run in runs("saeflow-collect", upstream)] == ["Failed"]
    tried: list[int] = []
    collect_failing(finished.recipe, upstream, RuntimeError(), 0, tried)
    assert 1 in tried
    assert len(tried) < len(finished.store.artefacts("activations")[0].published().parts), "finished parts came again"
    assert tree(upstream.root / "activations") == tree(finished.store.root / "activations")


def test_after_a_failure_no_task_works_on_without_the_lock(upstream: Store, finished: Finished) -> None:
    two_at_once = finished.recipe.model_copy(update={"threads": 2})
    for stage in (collect.run, train.run):
        stage(Lineage(upstream, two_at_once), quiet())
    begun, ended, another = list[int](), list[int](), threading.Event()

    def begin(item: tuple[int, list[str]]) -> None:
        if item[0] == 0:
            assert another.wait(60), "no other part began"
            raise UserError("Mend the disk.")
        begun.append(item[0])
        another.set()
        time.sleep(0.5)

    @flow(name="saeflow-encode", flow_run_name="encode {recipe.name}")
    def failing(recipe: Recipe, store: str) -> list[str]:
        around = partial(Watched, before=begin, after=lambda item: ended.append(item[0]))
        return encode_as_tasks(recipe, store, around)

    with pytest.raises(UserError, match="Mend the disk"):
        failing(two_at_once, str(upstream.root))
    assert sorted(ended) == sorted(begun) != []


def test_an_error_of_the_user_is_not_tried_again(upstream: Store, finished: Finished) -> None:
    tried: list[int] = []
    with pytest.raises(UserError, match="Mend the table"):
        collect_failing(finished.recipe, upstream, UserError("Mend the table."), 100, tried)
    assert tried.count(1) == 1
    [run] = runs("saeflow-collect", upstream)
    assert run.state is not None
    assert str(run.state.message).endswith("UserError: Mend the table.")
    assert any("stopped" in str(each.description) for each in artifacts(upstream) if each.flow_run_id == run.id)


def test_a_task_that_is_tried_again_makes_only_what_is_not_finished() -> None:
    class Numbers(PartMaker, name="fake-numbers"):
        made: ClassVar[list[int]] = []

        @classmethod
        def open(cls, store: Store, settings: dict[str, Any]) -> Numbers:
            return cls()

        def make(self, item: int, progress: Progress) -> Records:
            self.made.append(item)
            if self.made.count(7) == 1 and item == 7:
                raise OSError("network")
            return {}

    work = PartWork(Numbers, {}, [(index, 1) for index in range(10)], [], ("fake", "parts"), here=Numbers())
    with quiet().bar("fake", 10, "parts") as bar:
        task = Attempts(Here(), work, work.items, Tally(bar, work.sizes))
        with pytest.raises(OSError, match="network"):
            task.make(range(10))
        assert task.make(range(10)) == list(range(10))
    assert Numbers.made == [*range(8), 7, 8, 9]


def test_a_flow_on_missing_input_says_what_to_run_first(upstream: Store, finished: Finished) -> None:
    with pytest.raises(UserError, match="is not finished"):
        encode_flow(finished.recipe, str(upstream.root))


def test_a_flow_takes_the_recipe_as_plain_json(finished: Finished, upstream: Store) -> None:
    plain = finished.recipe.model_dump(mode="json")
    assert tokens_flow.validate_parameters({"recipe": plain, "store": None})["recipe"] == finished.recipe
    form = pipeline_flow.parameters.model_dump()["properties"]["recipe"]
    assert form["title"] == "recipe"
    assert isinstance(finished.recipe, Recipe)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Prefect home; its database is made by the first process that uses it."""
    return tmp_path_factory.mktemp("prefect")


def processes_with(home: Path) -> list[psutil.Process]:
    """Processes that were given this PREFECT_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def as_a_process(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m flows.pipeline`, with a Prefect home and so a temporary server of its own."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-m", "flows.pipeline", *map(str, arguments)]
    environment = given | {"PREFECT_HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.long
def test_the_module_runs_a_recipe_and_leaves_no_server_behind(home: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = as_a_process(home, "flows/recipes/toy.toml", "--store", store, "--set", "train.n_tokens=800")
    assert done.returncode == 0, done.stderr
    assert processes_with(home) == []
    assert "activations: 8 rows in" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("$ saeflow ask") == 3
    assert published(Store(store)) == ["activations", "features", "tokens"]


@pytest.mark.long
def test_the_module_ends_with_2_and_one_message_where_the_user_can_mend_it(home: Path, tmp_path: Path) -> None:
    table = a_table(40)
    table[7, 0] = float("nan")
    recipe = write_recipe(tmp_path / "r.toml", brought_data(write_table(tmp_path / "t.npy", table)))
    done = as_a_process(home, recipe, "--store", tmp_path / "store")
    assert done.returncode == 2, done.stderr
    assert "row 7" in done.stderr
    assert "Traceback" not in done.stderr
    assert processes_with(home) == []


@pytest.mark.long
def test_a_sweep_is_one_training_task_with_its_table_and_picture_on_the_page(
    finished: Finished, upstream: Store, tmp_path: Path
) -> None:
    shutil.copytree(finished.store.root / "activations", upstream.root / "activations")
    shutil.copytree(upstream.root, tmp_path / "alone")
    data = finished.recipe.model_dump(mode="json") | {"sweep": {"grid": {"sae.k": [2, 4], "train.n_tokens": [3000]}}}
    recipe = parse_recipe(data)
    summary = pipeline_flow(recipe, str(upstream.root))
    stages.run(Lineage(Store.create(tmp_path / "alone"), recipe), quiet())
    assert tree(upstream.root / "saes") == tree(tmp_path / "alone" / "saes")
    assert tree(upstream.root / "sweeps") == tree(tmp_path / "alone" / "sweeps")
    assert sorted(run.name for run in task_runs("saeflow-train", upstream)) == ["judge", "train"]
    assert not (upstream.root / "features").exists()
    encoded = encode_flow(recipe, str(upstream.root))
    encode.run(Lineage(Store.create(tmp_path / "alone"), recipe), quiet())
    assert tree(upstream.root / "features") == tree(tmp_path / "alone" / "features")
    assert len(encoded) == len(upstream.artefacts("features")) == 2
    found = {each.key: each.data for each in artifacts(upstream)}
    rows = json.loads(found["saeflow-sweep"])
    members = ["small_k2_n_tokens3000", "small_k4_n_tokens3000"]
    assert [row["member"] for row in rows] == [page.plain(member) for member in members]
    assert [float(row["l0"]) for row in rows] == [row["l0"] for row in summary["sweep"]["saes"]]
    picture = sweep.picture_of(Lineage(upstream, recipe))
    assert base64.b64encode(picture.read_bytes()).decode() in found["saeflow-sweep-picture"]
    assert page.plain(str(picture)) in found["saeflow-sweep-picture"]
    assert "saeflow run RECIPE --member small_k" in found["saeflow-result"]


@pytest.mark.long
def test_encoding_without_storing_is_one_task_a_part_and_gives_what_the_command_gives(
    finished: Finished, upstream: Store, tmp_path: Path
) -> None:
    shutil.copytree(upstream.root, tmp_path / "alone")
    data = finished.recipe.model_dump(mode="json")
    data["activations"]["keep"] = False
    data["sae"] = {"source": str(Lineage(finished.store, finished.recipe).sae.path)}
    recipe = parse_recipe(data)
    pipeline_flow(recipe, str(upstream.root))
    alone = Lineage(Store.create(tmp_path / "alone"), recipe)
    stages.run(alone, quiet())
    assert len(alone.features.published().parts) > 2
    for kind in ("activations", "saes", "features"):
        assert tree(upstream.root / kind) == tree(tmp_path / "alone" / kind)
    names = sorted(run.name for run in task_runs("saeflow-encode", upstream))
    assert names == [f"encode-{part.index}" for part in alone.features.published().parts]
    assert not list(upstream.root.rglob("*.zarr"))


def test_a_flow_about_one_sae_refuses_a_sweep(finished: Finished, tmp_path: Path) -> None:
    swept = Recipe.model_validate(finished.recipe.model_dump() | {"sweep": {"grid": {"sae.k": [2, 4]}}})
    with pytest.raises(UserError, match=r"is a sweep of 2 SAEs"):
        evaluate_flow.fn(swept, str(tmp_path / "store"))
