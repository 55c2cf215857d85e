"""Cancelled on Prefect's page: the run is Cancelled within seconds, nothing is lost, nothing is left behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from saeflow.pipeline import stages
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.prefect_server import ROOT, children, prefect_server, running
from tests.support.small_pipeline import quiet, tree

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # Prefect's own

SECONDS = 25
"""Within which a run is Cancelled, on a busy machine; Prefect kills it after 30."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """Of a server that a process serves the slow pipeline from."""
    home = tmp_path_factory.mktemp("cancel")
    with prefect_server(home) as server:
        command = [sys.executable, "-m", "tests.support.slow_flows"]
        env = dict(server.env) | {"PYTHONPATH": str(ROOT)}
        with (
            running(command, home / "serve.log", env) as serving,
            temporary_settings({PREFECT_API_URL: server.api}),
            get_client(sync_client=True) as opened,
        ):
            until(lambda: any(each.name == "slow" for each in opened.read_deployments()))
            yield opened
            until(lambda: not children(serving.pid))


def until(holds: Callable[[], object], seconds: float = 120) -> float:
    """Seconds it took until something held."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it does not come"
        time.sleep(0.1)
    return time.monotonic() - began


def started(client: SyncPrefectClient, recipe: Recipe, store: Store, bar: str) -> UUID:
    deployment = client.read_deployment_by_name("slow-pipeline/slow")
    given = {"recipe": recipe.model_dump(mode="json"), "store": store.name, "bar": bar}
    return client.create_flow_run_from_deployment(deployment.id, parameters=given).id


def state_of(client: SyncPrefectClient, run: UUID) -> str | None:
    return client.read_flow_run(run).state_name


def collecting(store: Store, recipe: Recipe) -> Artefact:
    return Lineage(store, recipe).activations


def training(store: Store, recipe: Recipe) -> Artefact:
    return Lineage(store, recipe).sae


def encoding(store: Store, recipe: Recipe) -> Artefact:
    return Lineage(store, recipe).features


def is_begun(artefact: Callable[[Store, Recipe], Artefact], store: Store, recipe: Recipe) -> bool:
    """Is the stage in the midst of its first part, or has the training made a step?"""
    kind = {collecting: "activations", training: "saes", encoding: "features"}[artefact]
    pattern = f"tmp/{kind}-*.checkpoint/*/state.json" if kind == "saes" else f"tmp/{kind}-*/*/00000*"
    return any(store.root.glob(pattern))


@pytest.mark.parametrize(
    ("bar", "artefact"), [("activations", collecting), ("train", training), ("features", encoding)]
)
def test_a_run_cancelled_on_the_page_ends_in_seconds_and_the_next_one_finishes_its_work(
    client: SyncPrefectClient, finished: Finished, tmp_path: Path, bar: str, artefact: Callable[..., Artefact]
) -> None:
    recipe = finished.recipe.model_copy(
        update={"train": finished.recipe.train.model_copy(update={"checkpoint_seconds": 0.5})}
    )
    store = Store.create(tmp_path / "store")
    run = started(client, recipe, store, bar)
    until(lambda: is_begun(artefact, store, recipe))
    assert state_of(client, run) == "Running"

    client.set_flow_run_state(run, Cancelling())
    assert until(lambda: state_of(client, run) == "Cancelled") < SECONDS
    assert set(states_below(client, run)) == {"Completed", "Cancelled"}, "its process was killed"
    target = artefact(store, recipe)
    assert not (target.exists() if bar == "train" else target.generation())
    left = [path.name for path in (store.root / "tmp").iterdir() if path.name != "locks"]
    assert left == ([f"saes-{target.name}-{target.fp}.checkpoint"] if bar == "train" else [])
    with target.writing():
        pass  # nobody holds its lock

    stages.run(Lineage(store, recipe), quiet())
    assert tree(store.root) == tree(finished.store.root)


def states_below(client: SyncPrefectClient, run: UUID) -> list[str | None]:
    """States of the flow runs that a run has started, and of those that they have."""
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run]}}))
    return [name for each in found for name in (each.state_name, *states_below(client, each.id))]
