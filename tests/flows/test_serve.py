"""Pipelines on a real Prefect server: files dropped into a folder are asked about with no command typed; what is
deployed; what an operator set stays; forms that refuse; events; PostgreSQL; nothing left behind."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_SERVER_API_PORT,
    temporary_settings,
)
from typer.testing import CliRunner

from flows.gc import gc_flow
from flows.ingest import ingest_flow
from flows.retrain import retrain_flow
from flows.support import tasks
from flows.support.deployments import TAG, deployments, keep_what_was_set
from flows.support.serve import ZOMBIES, others, set_zombie_automation
from flows.tidy import tidy_flow
from flows.verify import verify_flow
from saeflow.cli import app as cli
from saeflow.pipeline.lifecycle import ingest
from saeflow.pipeline.lifecycle.forget import forget
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.cluster import ClusterConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store import garbage
from saeflow.store.records import KINDS
from saeflow.store.store import Store
from tests.support.prefect_server import SAEFLOW, Server, free_port, postgres, postgres_folder, prefect_server, wait_for
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, write_recipe

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # Prefect's own

WORD = "zebu"
FIRST = {f"{number:02d}.txt": row["text"] for number, row in enumerate(documents()[-24:])}
NEW = {f"new{number}.txt": f"{row['text']} {WORD}." for number, row in enumerate(documents(9, seed=5)[6:9])}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as found:
        yield found


def using(server: Server) -> AbstractContextManager[object]:
    """Flows and clients of this process use the server; their log stays here, as the server may end before it is
    sent."""
    return temporary_settings(
        {PREFECT_API_URL: server.api, PREFECT_HOME: server.home, PREFECT_LOGGING_TO_API_ENABLED: False}
    )


@pytest.fixture
def _here(server: Server) -> Iterator[None]:
    with using(server):
        yield


@dataclass
class Night:
    """A folder that `saeflow serve` watched, and what was there before and after three files were dropped into it."""

    folder: Path
    data: dict[str, Any]
    before: dict[str, int] = field(default_factory=dict)
    parts: dict[str, set[int]] = field(default_factory=dict)
    said: str = ""
    code: int | None = None
    left: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @property
    def recipe(self) -> Recipe:
        return parse_recipe(self.data)

    def written(self) -> dict[str, int]:
        files = [path for kind in KINDS for path in (self.store.root / kind).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.store.root)): path.stat().st_mtime_ns for path in files}

    def indices(self) -> dict[str, set[int]]:
        found = {each.kind: each.generation() for each in self.store.artefacts("tokens", "activations", "features")}
        return {kind: {part.index for part in each.parts} for kind, each in found.items() if each}

    def drop(self, texts: dict[str, str]) -> None:
        """All at once: a file that is half written would be taken as it is, and again once it is whole."""
        (self.folder / "texts").mkdir(exist_ok=True)
        for name, text in texts.items():
            (self.folder / f"{name}.part").write_text(text, "utf-8")
        for name in texts:
            (self.folder / f"{name}.part").rename(self.folder / "texts" / name)

    def ask(self, *words: str, environment: dict[str, str]) -> list[dict[str, str]]:
        command = [*SAEFLOW, *words, "--store", str(self.store.root), "-f", "csv"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return list(csv.DictReader(io.StringIO(done.stdout)))


@pytest.fixture(scope="module")
def night(server: Server, ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """`saeflow serve` as a process that looks every three seconds; three files come once the first texts can be asked
    about."""
    folder = tmp_path_factory.mktemp("night")
    corpus = {"files": [str(folder / "texts" / "*.txt")]}
    times = {"ingest": "3s", "train_growth": 0.0}
    data = recipe_data(ingredients, name="nightly", corpus=corpus, train={"n_tokens": 2000}, schedule=times)
    night = Night(folder, data)
    night.drop(FIRST)
    recipe = write_recipe(folder / "nightly.toml", data)
    command = [*SAEFLOW, "serve", str(recipe), "--store", str(night.store.root)]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, env=server.environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: _completed(server) > 0 or process.poll() is not None, 150, "an ingest is completed")
        night.before, night.parts = night.written(), night.indices()
        night.drop(NEW)
        wait_for(lambda: night.indices()["features"] > night.parts["features"], 100, "the new files are encoded")
        done = _completed(server)
        wait_for(lambda: _completed(server) > done, 100, "the ingest of the new files is completed")
        process.send_signal(signal.SIGTERM)
        night.code = process.wait(60)
    finally:
        process.kill()
        process.wait()
        night.said = (folder / "serve.log").read_text()
    night.left = [" ".join(each.cmdline()) for each in server.processes()]
    night.left += [
        str(path) for path in (server.home / "tmp").rglob("*") if path.is_file() or path.name.count("-") == 4
    ]
    return night


def _completed(server: Server) -> int:
    return len([run for run in server.find("flow_runs") if run["state_type"] == "COMPLETED"])


def test_a_word_that_only_the_dropped_files_hold_is_answered_about_with_no_command_typed(
    night: Night, server: Server
) -> None:
    found = night.ask("ask", "features_on", WORD, environment=server.environment)
    assert found
    assert {int(row["n_tokens"]) for row in found} != {0}
    keys = night.ask("sql", "select key from documents order by key", environment=server.environment)
    assert [row["key"] for row in keys] == sorted([*FIRST, *NEW])


def test_documents_tokens_and_parts_touched_are_exactly_the_new_ones(night: Night, server: Server) -> None:
    generation = Lineage(night.store, night.recipe).tokens.published()
    fresh = [part for part in generation.parts if part.index not in night.parts["tokens"]]
    assert sum(part.counts["n_documents"] for part in fresh) == len(NEW)
    where = f"key in ({', '.join(repr(name) for name in NEW)})"
    [row] = night.ask(
        "sql", f"select sum(n_tokens)::bigint as n from documents where {where}", environment=server.environment
    )
    assert sum(part.counts["n_tokens"] for part in fresh) == int(row["n"])
    indices = {part.index for part in fresh}
    assert {kind: parts - night.parts[kind] for kind, parts in night.indices().items()} == {
        "tokens": indices, "activations": indices, "features": indices,
    }  # fmt: skip
    after = night.written()
    changed = {Path(name).name for name, when in night.before.items() if after[name] != when}
    assert changed <= {"manifest.json", "provenance.json", "vocab.parquet"}, "an old part was written again"


def test_serve_says_what_runs_when_and_where_to_look(night: Night, server: Server) -> None:
    for words in ("ingest", "3s", "verify", "7 4 * * *", server.api.removesuffix("/api"), "saeflow ask --store"):
        assert words in night.said


def test_sigterm_ends_serve_and_its_runs_and_nothing_is_left_behind(night: Night) -> None:
    assert night.code == 0, night.said
    assert "Stopped" in night.said
    assert night.left == []
    assert not list((night.store.root / "tmp").glob("*-*")), "work in progress"


def test_runs_of_a_stage_do_not_overlap(night: Night, server: Server) -> None:
    began = [run for run in server.find("flow_runs") if "ingest" in run["tags"] and run["start_time"]]  # type: ignore[operator]
    spans = sorted((str(run["start_time"]), str(run["end_time"])) for run in began)
    worked = [(begin, end) for begin, end in spans if begin != end]  # the others were cancelled at once
    assert len(spans) > len(worked) >= 2
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(worked))


def deployment_of(server: Server, flow: str, name: str) -> dict[str, Any]:
    return dict(server.get(f"deployments/name/{flow}/{name}"))


def test_every_stage_is_deployed_with_its_tags_schedule_and_limit(night: Night, server: Server) -> None:
    for stage, flow, schedule, collision in [
        ("ingest", "saeflow-ingest", {"interval": 3.0}, "CANCEL_NEW"),
        ("train", "saeflow-retrain", None, "CANCEL_NEW"),
        ("compact", "saeflow-tidy", {"cron": "37 2 * * *"}, "CANCEL_NEW"),
        ("verify", "saeflow-verify", {"cron": "7 4 * * *"}, "CANCEL_NEW"),
        ("gc", "saeflow-gc", {"cron": "7 5 * * *"}, "CANCEL_NEW"),
    ]:
        found = deployment_of(server, flow, "nightly")
        assert sorted(found["tags"]) == sorted([TAG, "nightly", stage])
        assert found["global_concurrency_limit"]["limit"] == 1
        assert found["concurrency_options"]["collision_strategy"] == collision
        times = [each["schedule"] for each in found["schedules"]]
        assert [schedule.items() <= each.items() for each in times] == [True] if schedule else times == []
        assert not found["paused"], "serve paused it when it ended"


def test_the_form_of_a_deployment_shows_descriptions_and_bounds(night: Night, server: Server) -> None:
    form = deployment_of(server, "saeflow-ingest", "nightly")["parameter_openapi_schema"]["definitions"]
    k = form["SAEConfig"]["properties"]["k"]
    assert "Active features per token" in k["description"]
    assert k["exclusiveMinimum"] == 0
    assert form["ScheduleConfig"]["properties"]["most_removed"]["maximum"] == 1
    nights = deployment_of(server, "saeflow-verify", "nightly")["parameter_openapi_schema"]["properties"]["nights"]
    assert nights["exclusiveMinimum"] == 0
    assert "whole store has been read" in nights["description"]


@pytest.mark.parametrize(
    ("section", "setting", "value", "says"),
    [("sae", "k", 0, "recipe.sae.k"), ("corpus", "held_out", 1.5, "recipe.corpus.held_out"),
     ("sae", "architecture", "dense", "recipe.sae.architecture"), ("sae", "kk", 3, "kk")],
)  # fmt: skip
def test_the_server_refuses_a_setting_out_of_range(
    night: Night, server: Server, section: str, setting: str, value: object, says: str
) -> None:
    found = deployment_of(server, "saeflow-ingest", "nightly")
    found["parameters"]["recipe"][section][setting] = value
    url = f"{server.api}/deployments/{found['id']}/create_flow_run"
    answer = httpx.post(url, json={"parameters": found["parameters"]}, timeout=30)
    assert answer.status_code == 409
    assert says in answer.text


def small(ingredients: Ingredients, name: str, **schedule: Any) -> Recipe:
    return parse_recipe(recipe_data(ingredients, name=name, schedule=schedule))


def bring(recipe: Recipe, store: str = "/nowhere") -> None:
    for each in deployments([recipe], [store]):
        keep_what_was_set(each)
        each.apply()


@pytest.mark.usefixtures("_here")
def test_what_an_operator_paused_stays_paused_and_a_schedule_that_is_gone_from_the_recipe_goes(
    server: Server, ingredients: Ingredients
) -> None:
    bring(small(ingredients, "kept", train="0 1 * * *"))
    before = deployment_of(server, "saeflow-gc", "kept")
    httpx.post(f"{server.api}/deployments/{before['id']}/pause_deployment").raise_for_status()
    verify = deployment_of(server, "saeflow-verify", "kept")
    off = {"active": False}
    httpx.patch(f"{server.api}/deployments/{verify['id']}/schedules/{verify['schedules'][0]['id']}", json=off)
    bring(small(ingredients, "kept", ingest="1h", compact="never"))
    assert deployment_of(server, "saeflow-gc", "kept")["paused"]
    assert [each["active"] for each in deployment_of(server, "saeflow-verify", "kept")["schedules"]] == [False]
    assert deployment_of(server, "saeflow-retrain", "kept")["schedules"] == []
    assert deployment_of(server, "saeflow-tidy", "kept")["schedules"] == []
    [ingest_time] = deployment_of(server, "saeflow-ingest", "kept")["schedules"]
    assert ingest_time["schedule"]["interval"] == 3600
    bring(small(ingredients, "kept", ingest="0 6 * * *"))
    [ingest_time] = deployment_of(server, "saeflow-ingest", "kept")["schedules"]
    assert ingest_time["schedule"]["cron"] == "0 6 * * *"


@pytest.mark.usefixtures("_here")
def test_deployments_of_a_recipe_that_is_no_longer_named_are_listed(ingredients: Ingredients) -> None:
    bring(small(ingredients, "given_up", compact="never"))
    wanted = deployments([small(ingredients, "still_named")], ["/nowhere"])
    bring(small(ingredients, "still_named"))
    found = others(wanted)
    assert {name for name in found if name.endswith("/given_up")} == {
        "saeflow-ingest/given_up", "saeflow-verify/given_up", "saeflow-gc/given_up",
    }  # fmt: skip
    assert not [name for name in found if name.endswith("/still_named")]


def test_recipes_that_share_a_store_have_one_time_to_verify_it(ingredients: Ingredients) -> None:
    both = [small(ingredients, "one"), small(ingredients, "two")]
    timed = {each.full_name for each in deployments(both, ["/a", "/a"]) if each.schedules}
    assert {name for name in timed if "verify" in name or "gc" in name} == {"saeflow-verify/one", "saeflow-gc/one"}
    assert {"saeflow-ingest/one", "saeflow-ingest/two", "saeflow-tidy/one", "saeflow-tidy/two"} <= timed


@pytest.mark.usefixtures("_here")
def test_there_is_one_zombie_automation_however_often_it_is_set(server: Server) -> None:
    for seconds in (30, 60, 30):
        set_zombie_automation(seconds)
    found = [each for each in server.find("automations") if each["name"] == ZOMBIES]
    assert len(found) == 1
    trigger: Any = found[0]["trigger"]
    assert trigger["within"] == 120
    assert trigger["match_related"]["prefect.resource.id"] == f"prefect.tag.{TAG}", (
        "runs of others would be crashed, too"
    )


@pytest.mark.usefixtures("_here")
def test_a_flow_that_uses_a_gpu_holds_one_of_its_slots(server: Server, night: Night) -> None:
    tasks.set_limit(2)
    tasks.set_limit(1)
    limit = server.get(f"v2/concurrency_limits/{tasks.LIMIT}")["limit"]
    assert limit == 2, "what is set on the server was overwritten by the number of this machine"

    def taken() -> Any:
        return server.get(f"v2/concurrency_limits/{tasks.LIMIT}")["active_slots"]

    with tasks.gpu_slot(night.recipe, "cpu", "cpu"):
        assert taken() == 0
    with tasks.gpu_slot(night.recipe, "cpu", "cuda"):
        assert taken() == 1
    on_workers = night.recipe.model_copy(update={"cluster": ClusterConfig(address="tcp://127.0.0.1:8786")})
    with tasks.gpu_slot(on_workers, "cuda"):
        assert taken() == 0
    assert taken() == 0


@pytest.fixture
def again(night: Night, tmp_path: Path) -> Night:
    """A copy of the night's store, to be changed; its texts are the night's."""
    shutil.copytree(night.store.root, tmp_path / "store")
    return Night(tmp_path, night.data)


@pytest.mark.usefixtures("_here")
def test_a_store_that_has_grown_enough_is_trained_anew_by_an_event(night: Night, again: Night, server: Server) -> None:
    data = night.data | {"schedule": {"train_growth": 0.02}}
    recipe, store = parse_recipe(data), str(again.store.root)
    bring(recipe, store)
    assert retrain_flow(recipe, store, share=10.0)["trained"] == []
    more = {"late.txt": " ".join(FIRST.values())}
    night.drop(more)
    try:
        assert ingest_flow(recipe, store)["grown"] > 0.02
    finally:
        (night.folder / "texts" / "late.txt").unlink()
    deployment = deployment_of(server, "saeflow-retrain", "nightly")["id"]

    def begun() -> list[dict[str, Any]]:
        return [run for run in server.find("flow_runs") if run["deployment_id"] == deployment]

    wait_for(lambda: bool(begun()), 60, "the event has started a training")
    [run] = begun()
    assert run["parameters"]["share"] == 0.02
    made = retrain_flow(
        parse_recipe(run["parameters"]["recipe"]), run["parameters"]["store"], run["parameters"]["share"]
    )
    assert len(made["trained"]) == 1
    assert retrain_flow(recipe, store, 0.02)["trained"] == []


@pytest.mark.usefixtures("_here")
def test_a_damaged_part_fails_the_verify_flow_by_name_and_gc_removes_what_nobody_reads(again: Night) -> None:
    store = str(again.store.root)
    assert gc_flow(again.recipe, store, 24) == 0
    assert gc_flow(again.recipe, store, 0) > 0
    assert not garbage.collect_garbage(again.store, 0, remove=False).garbage
    assert verify_flow(again.recipe, store, nights=1) == 0
    assert [verify_flow(again.recipe, store, nights=2) for _ in range(3)] == [0, 1, 0]
    [stored] = again.store.artefacts("activations")
    part = stored.published().parts[0]
    [shard] = [path for path in stored.part_path(part).rglob("c/*") if path.is_file()][:1] or [
        max((path for path in stored.part_path(part).rglob("*") if path.is_file()), key=os.path.getsize)
    ]
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="1 damaged"):
        verify_flow(again.recipe, store, nights=1)
    [failed] = [run for run in _runs_of("saeflow-verify", store) if run.state_name == "Failed"]
    assert failed.state is not None
    assert f"{stored.id}, part 0" in str(failed.state.message)


def _runs_of(flow: str, store: str) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        known = client.read_flow_by_name(flow)
        return [run for run in client.read_flow_runs() if run.flow_id == known.id and run.parameters["store"] == store]


@pytest.mark.usefixtures("_here")
def test_the_nightly_compaction_merges_the_parts_of_every_run_and_takes_forgotten_documents_off_the_disk(
    again: Night,
) -> None:
    recipe = parse_recipe(again.data | {"features": {"compact_parts": 2}})
    forget(again.store, ["03.txt"], quiet())
    left = tidy_flow(recipe, str(again.store.root))
    lineage = Lineage(again.store, recipe)
    assert set(left.values()) == {len(lineage.activations.published().parts).bit_count()}, "any two of a level are one"
    source = lineage.tokens
    kept = [pq.read_table(source.part_file(part, "documents.parquet")) for part in source.published().parts]
    assert "03.txt" not in {key for table in kept for key in table.column("key").to_pylist()}
    before = again.written()
    tidy_flow(recipe, str(again.store.root))
    assert again.written() == before


@pytest.mark.usefixtures("_here")
def test_a_scheduled_compaction_waits_for_who_is_writing_instead_of_failing(again: Night) -> None:
    recipe, begun, ended = parse_recipe(again.data), threading.Event(), list[str]()

    def write() -> None:
        with Lineage(again.store, recipe).activations.writing():
            begun.set()
            time.sleep(2)
            ended.append("written")

    writer = threading.Thread(target=write)
    writer.start()
    assert begun.wait(30)
    tidy_flow(recipe, str(again.store.root))
    assert ended == ["written"]
    writer.join()


def test_two_recipes_of_one_name_are_refused(ingredients: Ingredients) -> None:
    twice = [small(ingredients, "same"), small(ingredients, "same")]
    with pytest.raises(UserError, match="Two recipes are called same"):
        deployments(twice, ["/a", "/b"])


def test_without_a_server_serve_says_how_to_start_one(ingredients: Ingredients, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients))
    command = ["serve", str(recipe), "--store", str(tmp_path / "store")]
    nowhere = {PREFECT_API_URL: None, PREFECT_SERVER_API_PORT: free_port(), PREFECT_HOME: tmp_path}
    with temporary_settings(nowhere), pytest.raises(UserError, match="prefect server start") as caught:
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert "prefect config set PREFECT_API_URL=" in str(caught.value)
    assert not (tmp_path / "prefect.db").exists(), "a temporary server was started"


@pytest.mark.usefixtures("_here")
def test_deployments_for_a_work_pool_are_made_and_serve_ends(
    night: Night, server: Server, ingredients: Ingredients, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "pooled.toml", recipe_data(ingredients, name="pooled"))
    command = ["serve", str(recipe), "--store", str(tmp_path / "store"), "--work-pool", "hall"]
    with pytest.raises(UserError, match="prefect work-pool create hall --type process"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    httpx.post(f"{server.api}/work_pools/", json={"name": "hall", "type": "process"}).raise_for_status()
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert "prefect worker start --pool hall" in done.output
    found = deployment_of(server, "saeflow-ingest", "pooled")
    assert found["work_pool_name"] == "hall"
    assert found["entrypoint"] == "flows.ingest.ingest_flow"
    assert found["schedules"][0]["schedule"]["interval"] == 900


def test_the_deployments_of_prefect_yaml_can_be_deployed(server: Server, ingredients: Ingredients) -> None:
    httpx.post(f"{server.api}/work_pools/", json={"name": "yard", "type": "process"}).raise_for_status()
    given = {
        "SAEFLOW_STORE": "/srv/store", "SAEFLOW_TEXTS": "/srv/*.txt", "SAEFLOW_MODEL": str(ingredients.model),
        "SAEFLOW_SITES": "*.0.mlp.act", "SAEFLOW_POOL": "yard", "PREFECT_API_URL": server.api,
    }  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        "flows/prefect.yaml",
    ]
    environment = server.environment | given
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("ingest", "retrain", "tidy", "verify", "gc"):
        found = deployment_of(server, f"saeflow-{stage}", "nightly")
        assert found["work_pool_name"] == "yard"
        assert parse_recipe(found["parameters"]["recipe"]).name == "nightly"
        assert found["parameters"]["store"] == "/srv/store"


def test_an_ingest_runs_on_a_server_with_postgresql(ingredients: Ingredients, tmp_path: Path) -> None:
    programs = postgres_folder()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    (tmp_path / "home").mkdir()
    with (
        postgres(programs) as url,
        prefect_server(tmp_path / "home", PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as server,
        using(server),
    ):
        recipe, store = parse_recipe(recipe_data(ingredients, train={"n_tokens": 1000})), str(tmp_path / "store")
        assert ingest_flow(recipe, store)["trained"]
        assert [run.state_name for run in _runs_of("saeflow-ingest", store)] == ["Completed"]
    assert not (tmp_path / "home" / "prefect.db").exists(), "it was SQLite after all"
    assert ingest.run(Lineage(Store.open(tmp_path / "store"), recipe), quiet())["n_documents"] == 0
