"""The section [schedule]: what `saeflow serve` does and when, and how its times are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo

from saeflow.recipe.section import Section
from saeflow.runtime.text import brief

NEVER = "never"
ANCHOR = datetime(2024, 1, 1, tzinfo=UTC)
"""Start of every interval, so that a restart does not shift them."""

_INTERVAL = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAY = timedelta(days=1)


def _require_time(value: str, info: ValidationInfo) -> str:
    if value == NEVER or interval_of(value) is not None:
        return value
    try:
        _require_one_meaning(value.split())
        CronSim(value, ANCHOR)
    except CronSimError as error:
        raise ValueError(
            f"schedule.{info.field_name} is {brief(repr(value))}, which cannot be read ({str(error).lower()}).\n"
            'Write an interval ("15m", "6h", "1d"), five cron fields (minute, hour, day of month, month, day of week; '
            f'"0 3 * * *" is 3:00 every day), or "{NEVER}".'
        ) from None
    return value


def _require_one_meaning(fields: list[str]) -> None:
    """Refuse cron fields that cron readers, Prefect's among them, understand differently or not at all."""
    if len(fields) != 5:
        raise CronSimError(f"it has {len(fields)} fields, not five")
    _, _, day, _, weekday = fields
    if "W" in day.upper() or weekday.upper().endswith("L"):
        raise CronSimError("W, and L except as the day of month, do not work everywhere")
    if "*" not in (day, weekday) and ("*" in day + weekday or "#" in weekday):
        raise CronSimError("with both days set, neither may contain * or #")


def _known_zone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError(
            f"schedule.timezone is {brief(repr(value))}, which is no time zone. Write one such as Europe/Berlin or UTC."
        )
    return value


When = Annotated[str, AfterValidator(_require_time)]


class ScheduleConfig(Section):
    """What `saeflow serve` does, and when: an interval such as 15m, five cron fields, or never."""

    ingest: When = Field("15m", description="Run new and changed documents through every stage.")
    train: When = Field(NEVER, description="Train a new SAE on what the store holds.")
    keep_runs: int = Field(
        0, ge=0, description="How many of this recipe's newest runs encode new documents. 0: all of them."
    )
    train_growth: float = Field(
        0.2, ge=0, description="Also train once the store has grown by this share since the newest SAE. 0: never."
    )
    compact: When = Field("37 2 * * *", description="Merge small parts, and remove forgotten documents from the disk.")
    verify: When = Field("7 4 * * *", description="Read a share of the store back and compare its checksums.")
    verify_nights: PositiveInt = Field(7, description="Runs of `verify` after which every part has been read.")
    gc: When = Field("7 5 * * *", description="Remove what no reader can reach any more.")
    gc_grace_hours: float = Field(
        24, ge=0, description="Hours to keep a replaced generation for readers that still use it."
    )
    timezone: Annotated[str, AfterValidator(_known_zone)] = Field("UTC", description="Time zone of the times above.")
    removed: Literal["keep", "forget"] = Field(
        "keep", description="What the next `ingest` does with documents that left the corpus: keep or forget them."
    )
    most_removed: PositiveFloat = Field(
        0.5,
        le=1,
        description="Largest share of documents to forget at once. If more are gone, the run takes in new ones, then "
        "fails.",
    )


def once_a_store(schedules: Sequence[ScheduleConfig], stores: Sequence[str]) -> list[ScheduleConfig]:
    """Return the schedules with `verify` and `gc` set to never, except in the first one of each store that times them.

    Both work on a whole store, so one recipe per store is enough.
    """
    found, taken = [], set()
    for about, store in zip(schedules, stores, strict=True):
        timed = {stage for stage in ("verify", "gc") if getattr(about, stage) != NEVER}
        found.append(about.model_copy(update={stage: NEVER for stage in timed if (store, stage) in taken}))
        taken |= {(store, stage) for stage in timed}
    return found


def interval_of(when: str) -> timedelta | None:
    """The interval that a time stands for; None for cron fields and never."""
    found = _INTERVAL.fullmatch(when)
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]]) if found else None


def next_time(when: str, zone: str, now: datetime) -> datetime | None:
    """The first time after now, in that time zone; None for never."""
    if when == NEVER:
        return None
    if (interval := interval_of(when)) is None:
        return next(CronSim(when, now.astimezone(ZoneInfo(zone))))
    clock = UTC if interval % _DAY else ZoneInfo(zone)  # whole days keep their hour when summer time begins or ends
    anchor = ANCHOR.astimezone(clock)
    return (anchor + ((now.astimezone(clock) - anchor) // interval + 1) * interval).astimezone(ZoneInfo(zone))
