"""Reading a recipe from its TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from saeflow.recipe.recipe import Recipe, parse_recipe, set_setting
from saeflow.runtime.errors import UserError


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe. Relative paths in it count from its folder.

    `overrides` replace values by dotted name, e.g. `{"sae.k": 16}`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No recipe at {path}. Write one with `saeflow init {path}`.")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from error
    for dotted, value in overrides.items():
        set_setting(data, dotted, value)
    return parse_recipe(data, str(path), path.resolve().parent)
