"""The times of a recipe: Prefect starts what is due when `saeflow serve` says, and what it would not understand is
refused."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime
from typing import Any

import pytest
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule
from pydantic import ValidationError

from saeflow.recipe.schedule import ANCHOR, NEVER, ScheduleConfig, interval_of, next_time, once_a_store

pytestmark = pytest.mark.filterwarnings("default")  # Prefect's own

STAGES = ("ingest", "train", "compact", "verify", "gc")
_CRON = itertools.product(
    ["0", "37", "*/15"],
    ["3", "*/6"],
    ["*", "1", "*/2", "L", "LW", "1-7", "31"],
    ["*", "jan"],
    ["*", "7", "mon-fri", "5#2", "5L", "*/2"],
)
CRON = [" ".join(fields) for fields in _CRON]


def prefects_time(when: str, zone: str, now: datetime) -> datetime:
    interval = interval_of(when)
    schedule: Any = (
        IntervalSchedule(interval=interval, anchor_date=ANCHOR, timezone=zone)
        if interval
        else CronSchedule(cron=when, timezone=zone)
    )
    return datetime.fromisoformat(asyncio.run(schedule.get_dates(1, start=now))[0].isoformat())


def accepted(when: str) -> bool:
    try:
        return ScheduleConfig(gc=when).gc == when
    except ValidationError:
        return False


def test_what_is_accepted_as_cron_means_to_prefect_what_serve_says() -> None:
    now = datetime(2026, 3, 28, 12, 7, 1, tzinfo=UTC)
    taken = [when for when in CRON if accepted(when)]
    assert len(taken) > len(CRON) / 3
    assert [when for when in taken if next_time(when, "UTC", now) != prefects_time(when, "UTC", now)] == []


@pytest.mark.parametrize("when", ["15m", "6h", "1d", "2d", "7d"])
@pytest.mark.parametrize("month", [1, 7])
def test_an_interval_is_due_when_prefect_starts_it_in_summer_and_winter(when: str, month: int) -> None:
    now = datetime(2026, month, 8, 12, 7, 1, tzinfo=UTC)
    assert next_time(when, "Europe/Berlin", now) == prefects_time(when, "Europe/Berlin", now)


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("0 3 4 * * *", "it has 6 fields, not five"),
        ("0 0 * * 5L", "w, and l"),
        ("0 0 LW * *", "w, and l"),
        ("0 3 */2 * mon", "both days"),
        ("0 3 1-7 * mon#1", "both days"),
    ],
)
def test_cron_that_is_read_in_two_ways_is_refused(when: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ScheduleConfig(verify=when)


@pytest.mark.parametrize("zone", ["right/UTC", "posix/Europe/Berlin"])
def test_a_zone_that_prefect_does_not_know_is_refused(zone: str) -> None:
    with pytest.raises(ValidationError, match="which is no time zone"):
        ScheduleConfig(timezone=zone)


def test_by_default_nothing_starts_in_the_second_of_an_ingest() -> None:
    about, now = ScheduleConfig(), datetime(2026, 5, 4, tzinfo=UTC)
    times = [
        next_time(when, "UTC", now) for stage in STAGES if (when := getattr(about, stage)) not in (NEVER, about.ingest)
    ]
    interval = interval_of(about.ingest)
    assert interval is not None
    assert [when for when in times if when is None or not (when - ANCHOR) % interval] == []
    assert len(set(times)) == len(times) == 3


def test_recipes_of_one_store_verify_it_and_collect_its_garbage_once() -> None:
    both, none = ScheduleConfig(), ScheduleConfig(verify="never")
    found = once_a_store([none, both, both, both], ["/a", "/a", "/a", "/b"])
    assert [each.verify for each in found] == ["never", both.verify, "never", both.verify]
    assert [each.gc for each in found] == [both.gc, "never", "never", both.gc]
    assert {each.ingest for each in found} == {both.ingest}
