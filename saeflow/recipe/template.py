"""The commented recipe that `saeflow init` writes, made from the settings' own descriptions.

A TOML library such as tomli-w writes no comments, and here the comments are most of the text.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ByteSize

from saeflow.recipe.recipe import Recipe
from saeflow.recipe.section import section_of
from saeflow.runtime.text import human_bytes, sanitise

_HEAD = """\
# A saeflow recipe. Lines that begin with # show a setting's default, or an example if it has none.
# Relative paths count from the folder of this file.
#
#   saeflow run {file}          do everything, from text to SQL answers
#   saeflow ask                 list the questions you can ask afterwards

name = "{name}"
{top}"""
_TOP_LEVEL = {"data": '"{name}"', "store": '"data/store"', "threads": "0", "overlap": '"refuse"'}
DEFAULT_MODEL = "openai-community/gpt2"
Start = dict[str, dict[str, str | None]]
"""TOML values by section and setting; None leaves a setting open."""
_FIRST_VALUES: Start = {
    "corpus": {"files": '["texts/*.txt"]'},
    "model": {"path": f'"{DEFAULT_MODEL}"'},
    "activations": {"sites": '["transformer.h.6.mlp.act"]'},
}


def recipe_name_of(stem: str) -> str:
    """Return a name that a recipe may have and that is like the name of its file."""
    plain = unicodedata.normalize("NFKD", stem.lower()).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "_", plain).strip("_") or "recipe"


def template(
    name: str, file: str, start: dict[str, dict[str, str | None]] | None = None, sites_of: str | None = None
) -> str:
    """Return the whole recipe as TOML text. `start` gives TOML values by section and setting.

    `sites_of` names a model other than `DEFAULT_MODEL`. Its sites are left open, since only `saeflow sites` knows them.
    """
    chosen = {
        section: _FIRST_VALUES.get(section, {}) | (start or {}).get(section, {}) for section in Recipe.model_fields
    }
    hint = ""
    if sites_of is not None:
        del chosen["activations"]["sites"]
        hint = f" List them: saeflow sites {sanitise(shlex.quote(sites_of))}"
    sections = [
        _section_text(section, field.annotation, chosen[section], {"sites": hint} if section == "activations" else {})
        for section, field in Recipe.model_fields.items()
    ]
    top = [
        f"# {key} = {value.format(name=name)}  # {Recipe.model_fields[key].description}\n"
        for key, value in _TOP_LEVEL.items()
    ]
    return _HEAD.format(name=name, file=file, top="".join(top)) + "".join(sections)


def _section_text(name: str, annotation: Any, start: dict[str, str | None], hints: dict[str, str]) -> str:
    model = section_of(annotation)
    if model is None:
        return ""
    purpose = (model.__doc__ or "").strip().splitlines()[0]
    return f"\n[{name}]  # {purpose}\n" + "".join(_lines(model, start, hints))


def _lines(model: type[BaseModel], start: dict[str, str | None], hints: dict[str, str]) -> Iterator[str]:
    for key, field in model.model_fields.items():
        about = f"{field.description}{hints.get(key, '')}"
        if start.get(key):
            yield f"{key} = {start[key]}  # {about}\n"
        elif key != "synthetic":
            value = field.default
            if value is None and field.examples:
                value, about = field.examples[0], f"e.g.: {about}"
            yield f"# {key} = {_toml(value)}  # {about}\n"


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case ByteSize():
            return f'"{human_bytes(value).replace(".0", "").replace(" ", "")}"'
        case str():
            return f'"{value}"'
    return str(value)
