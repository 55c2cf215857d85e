"""What `saeflow serve` asks of Prefect: deployments of recipes on a server, worked on in this process.

pyproject.toml names this module as the entry point `prefect` of saeflow.orchestrators: it is an `Orchestrator`, as
saeflow/cli/serve.py describes one.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from uuid import UUID

import httpx
import torch
from prefect import get_client
from prefect.automations import EventTrigger, Posture
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.support import tasks
from flows.support.deployments import TAG, deployments, keep_what_was_set
from saeflow.runtime.errors import UserError

HEARTBEAT_SECONDS = 30
"""Seconds between two signs of life of a flow run. Prefect's own default is three minutes."""

SECONDS_BETWEEN_LOOKS = 5.0
"""Seconds between two looks for a server that is away."""

__all__ = ["deployments", "found", "hand_to_workers", "others", "page_url", "prepare_server", "work"]

ZOMBIES = f"{TAG}: a run without a sign of life has crashed"


@contextlib.contextmanager
def found() -> Iterator[str]:
    """Let Prefect use a server inside the block: PREFECT_API_URL, else the address of `prefect server start`.

    Yields the URL of its API. Raises UserError if no server answers: a temporary server would keep no schedule.
    """
    settings = get_current_settings()
    url = settings.api.url or f"http://{settings.server.api.host}:{settings.server.api.port}/api"
    if (why := _silence(url)) is not None:
        raise UserError(
            f"No Prefect server answers at {url} ({why}).\nStart one, which keeps the schedules and shows the page: "
            "prefect server start --background\nIf it is elsewhere, say where: "
            "prefect config set PREFECT_API_URL=http://HOST:4200/api"
        )
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


def _silence(url: str) -> str | None:
    """Return why no server answers at this API; None if one does."""
    try:
        httpx.get(f"{url}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return None


def page_url(url: str) -> str:
    return str(get_current_settings().ui_url or url.removesuffix("/api"))


def set_zombie_automation(heartbeat_seconds: int = HEARTBEAT_SECONDS) -> UUID:
    """Set one automation that crashes runs of saeflow after four heartbeats without a sign of life."""
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "AwaitingRetry")
    beat = "prefect.flow-run.heartbeat"
    wanted = AutomationCore(
        name=ZOMBIES,
        description="Set by saeflow serve: the process is gone, or its machine.",
        enabled=True,
        trigger=EventTrigger(
            after={beat},
            expect={beat, *(f"prefect.flow-run.{end}" for end in ends)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},  # type: ignore[arg-type]
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=4 * heartbeat_seconds),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="No sign of life: the process is gone.")
        ],
    )
    with get_client(sync_client=True) as client:
        known = client.read_automations_by_name(ZOMBIES)
        for twice in known[1:]:
            client.delete_automation(twice.id)
        if not known:
            return client.create_automation(wanted)
        client.update_automation(known[0].id, wanted)
        return known[0].id


def prepare_server() -> None:
    """Set what all deployments share: the automation and, if this machine has GPUs and none is set, their limit."""
    set_zombie_automation()
    if torch.cuda.is_available():
        tasks.set_limit(torch.cuda.device_count())


def others(wanted: Sequence[RunnerDeployment]) -> list[str]:
    """Return full names of saeflow's other deployments on the server that have times, sorted."""
    named = {deployment.full_name for deployment in wanted}
    with get_client(sync_client=True) as client:
        tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        timed = [
            each
            for each in client.read_deployments(deployment_filter=tagged)
            if not each.paused and each.work_pool_name is None and any(given.active for given in each.schedules)
        ]
        return sorted({f"{client.read_flow(each.flow_id).name}/{each.name}" for each in timed} - named)


def hand_to_workers(wanted: Sequence[RunnerDeployment], pool: str) -> None:
    """Create or refresh the deployments for the workers of a pool. Raises UserError if there is no such pool."""
    _require_pool(pool)
    for deployment in wanted:
        keep_what_was_set(deployment)
        deployment.job_variables = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}}
        deployment.apply(work_pool_name=pool)


def _require_pool(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            raise UserError(
                f"There is no work pool {name}. Make it first: prefect work-pool create {name} --type process"
            ) from None


def work(
    wanted: Sequence[RunnerDeployment], at_once: Iterable[str], limit: int | None, say: Callable[[str], None]
) -> None:
    """Start runs of these deployments as they fall due, each in its own process. SIGTERM and Ctrl-C end all.

    Deployments whose full name is in `at_once` also run now, unless they are paused. If the server is lost, the runs
    end; once the server answers again, due runs start.
    """
    due = set(at_once)
    with contextlib.suppress(KeyboardInterrupt, TerminationSignal):
        while not _worked(wanted, due, limit):
            url = PREFECT_API_URL.value()
            say(f"The Prefect server at {url} is away. Waiting until it answers; Ctrl-C ends this.")
            while _silence(str(url)) is not None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            say("It answers: going on with what is due.")


def _worked(wanted: Sequence[RunnerDeployment], due: set[str], limit: int | None) -> bool:
    """Work until the user ends it; return False if the server was lost."""
    runner = Runner(name=TAG, limit=limit, pause_on_shutdown=False, heartbeat_seconds=HEARTBEAT_SECONDS)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for deployment in wanted:
            _add(runner, deployment, due)
        signal.signal(signal.SIGINT, runner.handle_sigterm)  # as start() does with SIGTERM
        asyncio.run(runner.start())
    except Exception as error:
        if _is_outage(error):
            return False
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(runner._tmp_dir, ignore_errors=True)  # Prefect leaves it
    return True


def _add(runner: Runner, deployment: RunnerDeployment, due: set[str]) -> None:
    keep_what_was_set(deployment)
    made = runner.add_deployment(deployment)
    assert isinstance(made, UUID)  # a coroutine only in async code
    if deployment.full_name in due and not deployment.paused:
        with get_client(sync_client=True) as client:
            client.create_flow_run_from_deployment(made, tags=[*(deployment.tags or []), "at-start"])
    due.discard(deployment.full_name)


def _is_outage(error: BaseException | None) -> bool:
    """True if a runner ended because the server is away or has failed."""
    match error:
        case BaseExceptionGroup():
            return all(map(_is_outage, error.exceptions))
        case httpx.HTTPStatusError():
            return error.response.status_code >= 500
        case httpx.TransportError() | OSError():
            return True
        case RuntimeError():  # Prefect's own after three failed looks, or where it could not begin
            return "exceeded error threshold" in str(error) or _is_outage(error.__cause__)
    return False
