"""What pydantic finds wrong with a recipe, in words that name the setting and the way out."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from saeflow.runtime.suggest import nearest

Location = tuple[int | str, ...]


def message_of(error: Any, recipe: type[BaseModel]) -> str:
    """Return one of pydantic's error records as a message."""
    location: Location = error["loc"]
    name = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        known = list(_section_at(location[:-1], recipe).model_fields)
        return f"unknown key {name}. {_nearest(str(location[-1]), known)}"
    if error["type"] == "missing":
        return f"{name} is missing. {_description(location, recipe)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{name} is {error['input']!r}, but: {message[:1].lower()}{message[1:]}. {_description(location, recipe)}"


def _nearest(key: str, known: list[str]) -> str:
    near = nearest(key, known, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(known)}."


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, perhaps as `Section | None`; None if it holds something else."""
    choices = (annotation, *get_args(annotation))
    return next((each for each in choices if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _section_at(location: Location, recipe: type[BaseModel]) -> type[BaseModel]:
    """The innermost section that a location leads to."""
    section = recipe
    for part in location:
        field = section.model_fields.get(str(part))
        inner = section_of(field.annotation) if field else None
        if inner is None:
            break
        section = inner
    return section


def _description(location: Location, recipe: type[BaseModel]) -> str:
    field = _section_at(location[:-1], recipe).model_fields.get(str(location[-1]))
    return (field.description or "") if field else ""
