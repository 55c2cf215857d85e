"""Deployments of a recipe: which flows Prefect starts, when, and how many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import Flow, get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger, DeploymentTriggerTypes, TriggerTypes
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType

from flows.gc import gc_flow
from flows.ingest import GROWN, ingest_flow, resource
from flows.retrain import retrain_flow
from flows.tidy import tidy_flow
from flows.verify import verify_flow
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.schedule import ANCHOR, NEVER, ScheduleConfig, interval_of, once_a_store
from saeflow.runtime.errors import UserError

TAG = "saeflow"
_STAGES: dict[str, Flow[..., Any]] = {
    "ingest": ingest_flow, "train": retrain_flow, "compact": tidy_flow, "verify": verify_flow, "gc": gc_flow,
}  # fmt: skip


def deployments(recipes: Sequence[Recipe], stores: Sequence[str]) -> list[RunnerDeployment]:
    """Return the deployments of every recipe for its store. If recipes share a store, one has the times of `verify`
    and `gc`. Raises UserError if two recipes have one name.
    """
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two recipes are called {name}. Deployments go by that name: let them differ.")
    times = once_a_store([recipe.schedule for recipe in recipes], stores)
    return [
        _deployment(stage, recipe, store, about)
        for recipe, store, about in zip(recipes, stores, times, strict=True)
        for stage in _STAGES
    ]


def _deployment(stage: str, recipe: Recipe, store: str, about: ScheduleConfig) -> RunnerDeployment:
    """Return a deployment that cancels a second run of a stage: the first does all the work, or the next ingest asks
    again (train)."""
    own: dict[str, dict[str, Any]] = {
        "verify": {"nights": about.verify_nights},
        "gc": {"grace_hours": about.gc_grace_hours},
    }
    parameters: dict[str, Any] = {"recipe": recipe.model_dump(mode="json", exclude_none=True), "store": store}
    made = _STAGES[stage].to_deployment(
        recipe.name,
        parameters=parameters | own.get(stage, {}),
        schedules=_schedules(stage, about),
        triggers=_triggers(stage, recipe, store),
        tags=[TAG, recipe.name, stage],
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # a coroutine only in async code
    return made


def slug(stage: str) -> str:
    """Return the server's name of a schedule that a recipe gives. Schedules of other names are an operator's."""
    return f"{TAG}-{stage}"


def _schedules(stage: str, about: ScheduleConfig) -> list[Schedule]:
    when = getattr(about, stage)
    if when == NEVER:
        return []
    if (interval := interval_of(when)) is not None:
        return [Interval(interval, anchor_date=ANCHOR, timezone=about.timezone, slug=slug(stage))]
    return [Cron(when, timezone=about.timezone, slug=slug(stage))]


def _triggers(stage: str, recipe: Recipe, store: str) -> list[DeploymentTriggerTypes | TriggerTypes]:
    """Let training follow an ingest that made the store grow enough, which the training checks itself."""
    share = recipe.schedule.train_growth
    if stage != "train" or not share:
        return []
    about = {"prefect.resource.id": resource(recipe, store)["prefect.resource.id"]}
    name = f"{TAG}: {recipe.name} is trained anew when its store has grown"
    return [DeploymentEventTrigger(name=name, expect={GROWN}, match=about, parameters={"share": share})]


def keep_what_was_set(deployment: RunnerDeployment) -> None:
    """Keep what an operator has paused, and remove schedules that the recipe no longer gives."""
    with get_client(sync_client=True) as client:
        try:
            known = client.read_deployment_by_name(deployment.full_name)
        except ObjectNotFound:
            return
        deployment.paused = known.paused
        wanted = {each.slug: each for each in deployment.schedules or []}
        for there in known.schedules:
            if (given := wanted.get(there.slug)) is not None:
                given.active = there.active
            elif there.slug is not None and there.slug.startswith(f"{TAG}-"):
                client.delete_deployment_schedule(known.id, there.id)
