"""A commented recipe to start from, written from the settings' own descriptions."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ByteSize

from saeflow.recipe.recipe import Recipe
from saeflow.store.files import human_bytes

_HEAD = """\
# A saeflow recipe. Lines that begin with # show settings at their defaults, or, where there is none, an example.
# Relative paths count from the folder of this file.
#
#   saeflow run {file}          everything, from text to SQL answers
#   saeflow ask                 the questions you can ask afterwards

name = "{name}"
{top}"""
_TOP = {"data": '"{name}"', "store": '"data/store"', "threads": "0", "overlap": '"refuse"'}
DEFAULT_MODEL = "openai-community/gpt2"
_START: dict[str, dict[str, str]] = {
    "corpus": {"files": '["texts/*.txt"]'},
    "model": {"path": f'"{DEFAULT_MODEL}"'},
    "activations": {"sites": '["transformer.h.6.mlp.act"]'},
}


def template(name: str, file: str, start: dict[str, dict[str, str]] | None = None, sites_of: str | None = None) -> str:
    """The whole recipe as TOML text; `start` gives TOML values for settings without a default.

    With another model than `DEFAULT_MODEL`, `sites_of`, the sites are left open: only `saeflow sites` knows them.
    """
    chosen = {section: _START.get(section, {}) | (start or {}).get(section, {}) for section in Recipe.model_fields}
    hint = ""
    if sites_of is not None:
        del chosen["activations"]["sites"]
        hint = f" List them: saeflow sites {shlex.quote(sites_of)}"
    sections = [
        _section(section, field.annotation, chosen[section], {"sites": hint} if section == "activations" else {})
        for section, field in Recipe.model_fields.items()
    ]
    top = [
        f"# {key} = {value.format(name=name)}  # {Recipe.model_fields[key].description}\n"
        for key, value in _TOP.items()
    ]
    return _HEAD.format(name=name, file=file, top="".join(top)) + "".join(sections)


def _section(name: str, annotation: Any, start: dict[str, str], hints: dict[str, str]) -> str:
    choices = [annotation, *getattr(annotation, "__args__", ())]
    model = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
    if model is None:
        return ""
    purpose = (model.__doc__ or "").strip().splitlines()[0]
    return f"\n[{name}]  # {purpose}\n" + "".join(_lines(model, start, hints))


def _lines(model: type[BaseModel], start: dict[str, str], hints: dict[str, str]) -> Iterator[str]:
    for key, field in model.model_fields.items():
        about = f"{field.description}{hints.get(key, '')}"
        if key in start:
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
