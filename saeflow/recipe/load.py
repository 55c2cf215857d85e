"""Reading a recipe from its TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saeflow.recipe.recipe import Recipe, parse_recipe, put
from saeflow.recipe.sweep import by_dotted_name
from saeflow.runtime.errors import UserError


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe; relative paths inside it count from the folder it lies in.

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
        put(data, dotted.split("."), value)
    return parse_recipe(_anchored(data, path.resolve().parent), str(path))


def _anchored(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the recipe's own relative paths absolute; URLs and hub names stay as they are."""

    def anchor(value: object) -> object:
        if isinstance(value, list):
            return [anchor(item) for item in value]
        if not isinstance(value, str) or "://" in value or Path(value).is_absolute():
            return value
        return os.path.normpath(folder / value)

    def anchor_if_there(value: object) -> object:
        return anchor(value) if isinstance(value, str) and (folder / value).exists() else value

    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    if isinstance(data.get("corpus"), dict) and "sql" in data["corpus"]:
        data["corpus"].setdefault("folder", str(folder))
    for section, key, how in [
        ("corpus", "files", anchor),
        ("corpus", "folder", anchor),
        ("activations", "source", anchor),
        ("sae", "source", anchor),
        ("train", "tensorboard", anchor),
        ("model", "path", anchor_if_there),
        ("cluster", "scheduler_file", anchor),
    ]:
        if isinstance(data.get(section), dict) and key in data[section]:
            data[section][key] = how(data[section][key])
    if isinstance(sweep := data.get("sweep"), dict):
        for key in sweep:
            sweep[key] = _map(sweep[key], lambda chosen: _anchored_settings(chosen, anchor))
    if isinstance(data.get("store"), str):
        data["store"] = anchor(data["store"])
    return data


def _map(value: object, change: Callable[[object], object]) -> object:
    return [change(item) for item in value] if isinstance(value, list) else change(value)


def _anchored_settings(chosen: object, anchor: Callable[[object], object]) -> object:
    """A sweep's settings, by dotted name or nested, with their paths anchored."""
    flat = by_dotted_name(chosen)
    if not isinstance(flat, dict):
        return chosen
    return {key: anchor(value) if key in ("sae.source", "train.tensorboard") else value for key, value in flat.items()}
