"""The reference of the recipe: every section and setting, as the pydantic models describe them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from _generate import code, table
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.text import human_bytes

_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_KINDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`", "object": "table",
}  # fmt: skip


def page() -> str:
    schema = Recipe.model_json_schema()
    top = {key: field for key, field in Recipe.model_fields.items() if section_of(field) is None}
    parts = ["## Top of the file\n\n" + _settings(Recipe, schema, list(top))]
    for path, model in sections():
        about = schema["$defs"][model.__name__]
        purpose = (model.__doc__ or "").strip()
        parts.append(f"## `[{path}]` {{ #{path.replace('.', '')} }}\n\n{purpose}\n\n{_settings(model, about)}")
    return "\n\n".join(parts)


def sections(model: type[BaseModel] = Recipe, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections by their dotted names, each followed by those inside it."""
    for key, field in model.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            yield f"{path}{key}", inner
            yield from sections(inner, f"{path}{key}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    choices = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _settings(model: type[BaseModel], schema: dict[str, Any], keys: list[str] | None = None) -> str:
    rows = [
        (code(key), _default(field), allowed(schema["properties"][key], field), field.description or "")
        for key, field in model.model_fields.items()
        if section_of(field) is None and (keys is None or key in keys)
    ]
    return table(["setting", "default", "allowed", "meaning"], rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    value = field.get_default()
    if value is None:
        return ""
    return code(toml(round(value, 6) if isinstance(value, float) else value))


def toml(value: object) -> str:
    """A setting as it is written in a recipe."""
    if isinstance(value, ByteSize):
        return f'"{human_bytes(value).replace(".0", "").replace(" ", "")}"'
    return json.dumps(value)


def allowed(about: dict[str, Any], field: FieldInfo) -> str:
    """The kind of value, and its limits, in words."""
    choices = [each for each in about.get("anyOf", [about]) if each.get("type") != "null"]
    if field.annotation is ByteSize:
        return 'bytes, such as `"32MiB"`'
    return " or ".join(dict.fromkeys(map(_words, choices)))


def _words(about: dict[str, Any]) -> str:
    if "enum" in about:
        return ", ".join(code(toml(value)) for value in about["enum"])
    if about.get("type") == "array":
        return f"list: {_words(about.get('items', {}))}".removesuffix(": ")
    words = _KINDS.get(about.get("type", ""), "")
    limits = [f"{sign}&nbsp;{about[key]}" for key, sign in _SIGNS.items() if key in about]
    if "pattern" in about:
        limits.append(code(about["pattern"]))
    return ", ".join([words, *limits] if words else limits)
