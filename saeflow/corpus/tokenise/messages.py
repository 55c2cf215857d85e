"""Conversations as a corpus holds them: lists of {role, content}, checked and written as one JSON text each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from saeflow.corpus.sorting import CONTENT, FILE
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

TOOLS = "tools"
"""Column with the tools that a template may describe."""
TOOLS_ALIAS = "_saeflow_tools"
_FORM = 'a conversation is a list of messages such as [{"role": "user", "content": "Hello"}]'


def conversation(messages: Any, tools: Any, where: str) -> str:
    """Return a conversation as JSON: `messages`, and `tools` if there are any. Raises UserError that names the row."""
    found = [_message(each, f"{where}, message {n}") for n, each in enumerate(_list_of_messages(messages, where))]
    about: dict[str, Any] = {"messages": found}
    if tools := _parsed(tools, f"{where}, tools"):
        if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
            raise UserError(
                f"{where}: the tools are {_value_in_words(tools)}, but they must be a list of JSON schemas."
            )
        about["tools"] = _without_nulls(tools)
    return json.dumps(about, ensure_ascii=False)


def with_conversations(batches: Iterator[pa.RecordBatch], names: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield the batches with each content, JSON of a list of messages, checked and joined with its tools."""
    n_rows: Counter[str | None] = Counter()
    for batch in batches:
        files = batch.column(FILE).to_pylist() if FILE in batch.schema.names else [None] * len(batch)
        tools = batch.column(TOOLS_ALIAS).to_pylist() if TOOLS_ALIAS in batch.schema.names else [None] * len(batch)
        found = []
        for file, messages, mine in zip(files, batch.column(CONTENT).to_pylist(), tools, strict=True):
            n_rows[file] += 1
            where = "corpus.sql" if file is None else f"corpus.files: {names[file]}"
            found.append(conversation(messages, mine, f"{where}, row {n_rows[file]}"))
        left = batch.drop_columns([name for name in (CONTENT, TOOLS_ALIAS) if name in batch.schema.names])
        try:
            yield left.append_column(CONTENT, pa.array([each.encode() for each in found], pa.large_binary()))
        except UnicodeEncodeError as error:
            raise UserError(
                "corpus.messages has half of a character (a lone surrogate), which UTF-8 cannot hold."
            ) from error


def contents_as_text(document: str) -> str:
    """Return the contents of a conversation one after another: what a forecast counts."""
    return "\n".join(message["content"] for message in json.loads(document)["messages"])


def _list_of_messages(messages: Any, where: str) -> list[Any]:
    found = _parsed(messages, where)
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{where}: corpus.messages is {_value_in_words(found)}, but {_FORM}.\n"
            "Leave such rows out, or bring them into that form, with corpus.sql."
        )
    return found


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_value_in_words(value)} is no JSON, but {_FORM}.") from error


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        former = isinstance(message, dict) and {"from", "value"} <= message.keys()
        way_out = (
            "\nRename its fields, e.g. sql = \"select list_transform(conversations, lambda m: {'role': case m.from "
            "when 'human' then 'user' when 'gpt' then 'assistant' else m.from end, 'content': m.value}) as messages "
            "from 'chats.parquet'\"."
        )
        raise UserError(f"{where}, is {_value_in_words(message)}, but {_FORM}.{way_out if former else ''}")
    return {**_without_nulls(message), "content": _content(message.get("content"), where)}


def _content(content: Any, where: str) -> str:
    """Return the text of a message; parts are joined by line ends. Raises UserError for pictures and sounds."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = [
            each if isinstance(each, str) else each.get("text") if isinstance(each, dict) else None for each in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(str(part) for part in parts)
    raise UserError(f"{where}: its content is {_value_in_words(content)}, but it must be a text, or parts of text.")


def _without_nulls(value: Any) -> Any:
    """Return the value without fields that are null: a column of structs gives every row the fields of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _value_in_words(value: Any) -> str:
    return (
        "empty"
        if value in (None, "", [])
        else brief(value if isinstance(value, str) else json.dumps(value, default=str), 60)
    )
