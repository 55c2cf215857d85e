"""What every section of a recipe is made of: its base class, kinds of values, and what is wrong with one, in words."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from saeflow.runtime.text import brief, nearest

RECIPE_NAME = r"^[a-z0-9][a-z0-9_]*$"
"""What a recipe may be called."""

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A section of a recipe. It refuses unknown keys, and its values never change after reading."""

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        """Refuse what neither files nor numbers of 64 bits can hold."""
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "\0" in each:
                raise PydanticCustomError("text", "It must not hold a zero byte")
            if isinstance(each, int) and not -(1 << 63) <= each < 1 << 63:
                raise PydanticCustomError("number", "It must be a number of 64 bits: at most 9223372036854775807")
        return value


def recipe_folder(info: ValidationInfo) -> Path | None:
    """The folder of the recipe that is being read; None if the settings do not come from a file."""
    return info.context["folder"] if info.context else None


def from_folder(folder: Path, value: str) -> str:
    """Return a path as an absolute one, where relative ones count from `folder`; URLs stay as they are."""
    value = os.path.expanduser(value) if value.startswith("~/") else value
    return value if "://" in value or Path(value).is_absolute() else os.path.normpath(folder / value)


def _from_recipe(value: str, info: ValidationInfo) -> str:
    folder = recipe_folder(info)
    return from_folder(folder, value) if folder else value


def _from_recipe_if_there(value: str, info: ValidationInfo) -> str:
    folder = recipe_folder(info)
    return from_folder(folder, value) if folder and Path(from_folder(folder, value)).exists() else value


def sae_from_folder(folder: Path, value: str) -> str:
    """Return the absolute path of an SAE; but OWNER/REPOSITORY/FOLDER, and the like, if nothing is there, stays."""
    path = from_folder(folder, value)
    is_name = "/" in value and not value.startswith(("/", ".", "~")) and not Path(path).exists()
    return value if is_name else path


def _sae_from_recipe(value: str, info: ValidationInfo) -> str:
    folder = recipe_folder(info)
    return sae_from_folder(folder, value) if folder else value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _with_ranges(value: object) -> object:
    """Put the numbers of a range such as "4-7" in its place. What is none is left to pydantic."""
    numbers: list[object] = []
    for each in value if isinstance(value, list) else [value]:
        found = re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", each) if isinstance(each, str) else None
        first, last = map(int, found.groups()) if found else (1, 0)
        if found and not first <= last < first + _LONGEST_RANGE:
            raise PydanticCustomError("range", "A range goes from a lower position to a higher one, such as 4-7")
        numbers += range(first, last + 1) if found else [each]
    return numbers


_LONGEST_RANGE = 1 << 20


def _named_entries(value: object) -> object:
    if value in (0, 1) or (isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off")):
        return value
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, list) or not all(type(each) is str or (type(each) is int and each >= 0) for each in named):
        raise PydanticCustomError("entries", "It must be true, false, or a list of names and ids of vocabulary entries")
    return named


def _pattern_from_recipe(value: str, info: ValidationInfo) -> str:
    """Only the value is a pattern: signs such as [ in the folder's own name mean themselves."""
    folder = recipe_folder(info)
    if folder and glob.has_magic(value) and not (folder / value).exists():
        return from_folder(Path(glob.escape(str(folder))), value)
    return _from_recipe(value, info)


PathFromRecipe = Annotated[str, AfterValidator(_from_recipe)]
"""A path that counts from the recipe's folder."""
PathOrHubName = Annotated[str, AfterValidator(_from_recipe_if_there)]
"""A path that counts from the recipe's folder if it leads to something; otherwise a name on a hub."""
SAESource = Annotated[str, AfterValidator(_sae_from_recipe)]
"""A path that counts from the recipe's folder, or a name with a slash on a hub or in a catalogue."""
PatternsFromRecipe = Annotated[
    list[Annotated[str, AfterValidator(_pattern_from_recipe)]], BeforeValidator(_one_or_many)
]
"""Paths with globs that count from the recipe's folder."""
Names = Annotated[list[str], BeforeValidator(_one_or_many)]
Positions = Annotated[list[int], BeforeValidator(_with_ranges)]
"""Whole numbers. A text such as "4-7" among them stands for the numbers from 4 to 7."""
Entries = Annotated[bool | list[str | int], Field(union_mode="left_to_right"), BeforeValidator(_named_entries)]
"""All of some kind of vocabulary entries, or none, or those of these names and ids."""


Location = tuple[int | str, ...]


def message_of(error: Any, recipe: type[BaseModel]) -> str:
    """Return one of pydantic's error records as a message."""
    location: Location = error["loc"]
    name = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        known = list(_section_at(location[:-1], recipe).model_fields)
        near = nearest(str(location[-1]), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(known)}."
        return f"unknown key {name}. {hint}"
    if error["type"] == "missing":
        return f"{name} is missing. {_description(location, recipe)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    given, why = brief(repr(error["input"])), f"{message[:1].lower()}{message[1:]}"
    return f"{name} is {given}, but: {why}. {_description(location, recipe)}"


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
