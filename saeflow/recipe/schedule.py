"""When `saeflow serve` does what: the recipe's section, and how its times are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo

from saeflow.recipe.settings import Section

NEVER = "never"
ANCHOR = datetime(2024, 1, 1, tzinfo=UTC)
"""Intervals are counted from here, so that starting anew does not shift them."""

_INTERVAL = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAY = timedelta(days=1)


def _readable(value: str, info: ValidationInfo) -> str:
    if value == NEVER or interval_of(value) is not None:
        return value
    try:
        _require_one_meaning(value.split())
        CronSim(value, ANCHOR)
    except CronSimError as error:
        raise ValueError(
            f"schedule.{info.field_name} is {value!r}, which cannot be read ({str(error).lower()}).\n"
            'Write an interval ("15m", "6h", "1d"), five fields of cron ("0 3 * * *": at 3:00; minute, hour, '
            f'day of month, month, day of week), or "{NEVER}".'
        ) from None
    return value


def _require_one_meaning(fields: list[str]) -> None:
    """Refuse what readers of cron understand differently, or not all of them, Prefect's among them."""
    if len(fields) != 5:
        raise CronSimError(f"it has {len(fields)} fields, not five")
    _, _, day, _, weekday = fields
    if "W" in day.upper() or weekday.upper().endswith("L"):
        raise CronSimError("L and W, but for L as the day of month, are not known everywhere")
    if "*" not in (day, weekday) and ("*" in day + weekday or "#" in weekday):
        raise CronSimError("with both days set, neither can have a * or #")


def _known_zone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError(
            f"schedule.timezone is {value!r}, which is no time zone. Write one as in Europe/Berlin or UTC."
        )
    return value


When = Annotated[str, AfterValidator(_readable)]


class ScheduleConfig(Section):
    """What `saeflow serve` does by itself, and when: an interval such as 15m, cron's five fields, or never."""

    ingest: When = Field("15m", description="New and changed documents through every stage to answers.")
    train: When = Field(NEVER, description="A new SAE on what the store holds by then.")
    keep_runs: int = Field(
        0, ge=0, description="Of so many runs of the recipe's name, the newest, new documents are encoded; 0: of all."
    )
    train_growth: float = Field(
        0.2, ge=0, description="Also train when the store has grown by this share since the newest SAE; 0: never."
    )
    compact: When = Field("37 2 * * *", description="Many small parts become few; forgotten documents leave the disk.")
    verify: When = Field("7 4 * * *", description="Read a share of the store back and compare its checksums.")
    verify_nights: PositiveInt = Field(7, description="Times of `verify` after which every part has been read.")
    gc: When = Field("7 5 * * *", description="Remove what no reader can reach any more.")
    gc_grace_hours: float = Field(24, ge=0, description="For so long a replaced generation is kept for its readers.")
    timezone: Annotated[str, AfterValidator(_known_zone)] = Field("UTC", description="Of the times above.")
    removed: Literal["keep", "forget"] = Field(
        "keep", description="Documents that are gone from the corpus: keep them, or forget them at the next `ingest`."
    )
    most_removed: PositiveFloat = Field(
        0.5,
        le=1,
        description="A larger share at once is not forgotten: once what is new is taken in, the run fails.",
    )


def once_a_store(schedules: Sequence[ScheduleConfig], stores: Sequence[str]) -> list[ScheduleConfig]:
    """The same, where `verify` and `gc`, which are of a whole store, are left to the first of a store that gives them a
    time."""
    found, taken = [], set()
    for about, store in zip(schedules, stores, strict=True):
        timed = {stage for stage in ("verify", "gc") if getattr(about, stage) != NEVER}
        found.append(about.model_copy(update={stage: NEVER for stage in timed if (store, stage) in taken}))
        taken |= {(store, stage) for stage in timed}
    return found


def interval_of(when: str) -> timedelta | None:
    """The interval that a time says, None where it is cron's or never."""
    found = _INTERVAL.fullmatch(when)
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]]) if found else None


def next_time(when: str, zone: str, now: datetime) -> datetime | None:
    """The first time after now, in that zone; None for never."""
    if when == NEVER:
        return None
    if (interval := interval_of(when)) is None:
        return next(CronSim(when, now.astimezone(ZoneInfo(zone))))
    clock = UTC if interval % _DAY else ZoneInfo(zone)  # whole days keep to the hour when summer time begins and ends
    anchor = ANCHOR.astimezone(clock)
    return (anchor + ((now.astimezone(clock) - anchor) // interval + 1) * interval).astimezone(ZoneInfo(zone))
