"""What every section of a recipe is made of: its base class, and kinds of values that several sections have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo

RECIPE_NAME = r"^[a-z0-9][a-z0-9_]*$"
"""What a recipe may be called."""

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel, frozen=True, extra="forbid"):
    """A section of a recipe. It refuses unknown keys, and its values never change after reading."""


def recipe_folder(info: ValidationInfo) -> Path | None:
    """The folder of the recipe that is being read; None if the settings do not come from a file."""
    return info.context["folder"] if info.context else None


def from_folder(folder: Path, value: str) -> str:
    """Return a path as an absolute one, where relative ones count from `folder`; URLs stay as they are."""
    return value if "://" in value or Path(value).is_absolute() else os.path.normpath(folder / value)


def _from_recipe(value: str, info: ValidationInfo) -> str:
    folder = recipe_folder(info)
    return from_folder(folder, value) if folder else value


def _from_recipe_if_there(value: str, info: ValidationInfo) -> str:
    folder = recipe_folder(info)
    return from_folder(folder, value) if folder and (folder / value).exists() else value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


PathFromRecipe = Annotated[str, AfterValidator(_from_recipe)]
"""A path that counts from the recipe's folder."""
PathOrHubName = Annotated[str, AfterValidator(_from_recipe_if_there)]
"""A path that counts from the recipe's folder if it leads to something; otherwise a name on a hub."""
PathsFromRecipe = Annotated[list[PathFromRecipe], BeforeValidator(_one_or_many)]
Names = Annotated[list[str], BeforeValidator(_one_or_many)]
