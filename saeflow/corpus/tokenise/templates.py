"""Conversations written out by a chat template, and where in that text each message stands.

A template says itself what the assistant wrote if it has {% generation %} blocks. Else, and for every other role, the
conversation is written out a second time with a mark before and after each content. A mark is a character that no text
has. Without the marks both must be the same text, so that the marks' places are those of the contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import brief

Message = dict[str, Any]
_BLOCKS = (*range(0xFDD0, 0xFDEA, 6), *range(0xFFFF0, 0xF0000, -6))
"""Where six characters in a row may be free for marks: noncharacters, and a private plane."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_OF_TODAY = (
    "{%- macro strftime_now(format) -%}{{ format|replace('%Y', '2024')|replace('%m', '07')|replace('%d', '26')"
    "|replace('%b', 'Jul')|replace('%B', 'July') }}{%- endmacro -%}"
)
"""A template that writes today's date gives other tokens every day. It gets the date that Llama 3 falls back to."""


class Span(NamedTuple):
    """The characters start to end - 1, of the message with this number."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True)
class Chat:
    """A conversation as text, and what of it the messages are."""

    text: str
    messages: list[Span]
    """What each role wrote, in order; nothing that the template adds."""
    assistant: list[tuple[int, int]]
    """What the assistant wrote, with the token that ends its turn."""
    names: list[tuple[int, int]]
    """Names of special tokens within the messages: they are no special tokens."""


class ChatTemplate:
    """The chat template of a tokenizer, or of a file. Raises UserError if there is none."""

    def __init__(self, tokenizer: Any, path: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.given = _text_of_file(path) if path else None
        if not (self.given or tokenizer.chat_template):
            raise UserError(
                "corpus.messages needs a chat template, but the model's tokenizer has none: it may be a base model.\n"
                'Name a file with one, e.g. chat_template = "template.jinja" under [tokens].'
            )
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def written(self, messages: list[Message], tools: list[Any] | None, key: str) -> Chat:
        """Write a conversation out. Raises UserError, which names the document, if the template refuses it."""
        try:
            text, generated = self._render(messages, tools)
        except Exception as error:  # Jinja's errors, and those of Python within a template
            raise UserError(
                f"The chat template cannot write document {key!r}: {brief(first_line(error), 200)}.\n"
                "Change or leave out such conversations with corpus.sql, or set tokens.chat_template to another one."
            ) from error
        marks = _Marks.free_in(text + repr(messages) + repr(tools))
        found, names = self._places(messages, tools, text, marks)
        if generated is None:
            spans = self._of_assistant(messages, tools, text, found)
        else:
            spans = _by_turn(generated, messages, found)
        return Chat(text, sorted([*found, *spans]), [span[:2] for span in spans], names)

    def _render(
        self, messages: Sequence[Message], tools: Any, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Return the text, and what the template says that the assistant wrote; None if it says nothing."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(self.given, tools)
        template = _DATE_OF_TODAY + template if "strftime_now" in template else template
        tracks = bool(_GENERATION.search(template))
        found: Any = render_jinja_template(
            [list(messages)], tools=tools, chat_template=template, return_assistant_tokens_mask=tracks,
            add_generation_prompt=prompt, **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        texts, spans = found
        return texts[0], [(start, end) for start, end in spans[0]] if tracks else None

    def _try(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str | None:
        """Return the text; None if the template refuses these messages, e.g. a part of a conversation."""
        try:
            return self._render(messages, tools, prompt)[0]
        except Exception:  # whatever a template raises
            return None

    def _places(
        self, messages: list[Message], tools: Any, text: str, marks: _Marks
    ) -> tuple[list[Span], list[tuple[int, int]]]:
        """Return where the contents stand, and the names of special tokens in all that the messages say."""
        named = marks.around_names(messages, self.special)
        marked_tools = marks.around_names(tools, self.special)
        for strips in (False, True):
            marked = [marks.around_content(message, turn, strips) for turn, message in enumerate(named)]
            if found := marks.read(self._try(marked, marked_tools), text):
                spans = (_span(found, turn, message["content"], text) for turn, message in enumerate(messages))
                return [span for span in spans if span], found.names
        return self._places_one_by_one(messages, tools, text, marks)

    def _places_one_by_one(
        self, messages: list[Message], tools: Any, text: str, marks: _Marks
    ) -> tuple[list[Span], list[tuple[int, int]]]:
        """Mark one content at a time, as the template looks at some of them; else search the text for it, in order."""
        spans: list[Span] = []
        for turn, message in enumerate(messages):
            one = [marks.around_content(each, n, True) if n == turn else each for n, each in enumerate(messages)]
            found, core = marks.read(self._try(one, tools), text), message["content"].strip()
            at = text.find(core, spans[-1].end if spans else 0) if core else -1
            span = _span(found, turn, core, text) if found else Span(at, at + len(core), turn) if at >= 0 else None
            spans += [span] if span else []
        named = marks.around_names(messages, self.special), marks.around_names(tools, self.special)
        if found := marks.read(self._try(*named), text):
            return spans, found.names
        names = [
            (start + match.start(), start + match.end())
            for start, end, _ in spans
            for match in self.special.finditer(text[start:end])
        ]
        return spans, names

    def _of_assistant(self, messages: list[Message], tools: Any, text: str, found: Sequence[Span]) -> list[Span]:
        """Return what the assistant wrote: what follows the prompt to generate, up to the token that ends the turn."""
        contents = {span.turn: span for span in found}
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        return [span for turn in turns if (span := self._written_in(turn, messages, tools, text, contents.get(turn)))]

    def _written_in(
        self, turn: int, messages: list[Message], tools: Any, text: str, content: Span | None
    ) -> Span | None:
        if messages[turn].keys() - {"role", "content"} or not content:  # tool calls or thoughts, or no words
            before = self._try(messages[:turn], tools, prompt=True)
            after = (self._try(messages[: turn + 1], tools) or "").rstrip()
            if before and len(before) < len(after) and text.startswith(before) and text.startswith(after):
                return Span(len(before), len(after), turn)
        last = self.special.match(text, content.end) if content else None
        return content._replace(end=last.end()) if content and last else content


def _by_turn(generated: list[tuple[int, int]], messages: list[Message], found: Sequence[Span]) -> list[Span]:
    """Return the template's own spans with the numbers of their messages."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) == len(generated):
        return [Span(start, end, turn) for (start, end), turn in zip(generated, turns, strict=True)]
    before = [[span.turn for span in found if span.start < end] or [0] for _, end in generated]
    return [Span(start, end, inside[-1]) for (start, end), inside in zip(generated, before, strict=True)]


class _Found(NamedTuple):
    """Places of marks in the text without them: before and after contents by number, and around names."""

    starts: dict[int, int]
    ends: dict[int, int]
    names: list[tuple[int, int]]


@dataclass(frozen=True)
class _Marks:
    """Six characters that a conversation does not have: around a number before and after contents, around names."""

    first: int

    @classmethod
    def free_in(cls, text: str) -> _Marks:
        used = set(text)
        return cls(next((n for n in _BLOCKS if not any(chr(n + i) in used for i in range(6))), _BLOCKS[-1]))

    def around_content(self, message: Message, turn: int, strips: bool) -> Message:
        """Return the message with marks around its content, within the blanks at its ends if the template strips."""
        a, b, c, d = (chr(self.first + i) for i in range(4))
        content = message["content"]
        core = content.strip() if strips else content
        at = content.find(core)
        marked = f"{content[:at]}{a}{turn}{b}{core}{c}{turn}{d}{content[at + len(core) :]}" if core.strip() else content
        return message | {"content": marked}

    def around_names(self, value: Any, special: re.Pattern[str]) -> Any:
        """Return the value with marks around the names of special tokens in its texts."""
        if isinstance(value, str):
            return special.sub(lambda match: f"{chr(self.first + 4)}{match[0]}{chr(self.first + 5)}", value)
        if isinstance(value, dict):
            return {self.around_names(name, special): self.around_names(each, special) for name, each in value.items()}
        return [self.around_names(each, special) for each in value] if isinstance(value, list) else value

    def read(self, marked: str | None, text: str) -> _Found | None:
        """Return the places of the marks; None if the text is another one without them."""
        if marked is None:
            return None
        found = _Found({}, {}, [])
        pieces, n, opened = [], 0, 0
        for piece, kind, turn in self._split(marked):
            pieces.append(piece)
            n += len(piece)
            if kind == 4:
                opened = n
            elif kind == 5:
                found.names.append((opened, n))
            elif kind is not None:
                (found.starts if kind == 0 else found.ends).setdefault(turn, n)
        return found if "".join(pieces) == text else None

    def _split(self, marked: str) -> Iterator[tuple[str, int | None, int]]:
        """Yield each piece of text, with the kind of the mark behind it and the number in that mark."""
        a, b, c, d, e, f = (chr(self.first + i) for i in range(6))
        at = 0
        for match in re.finditer(f"{a}(\\d+){b}|{c}(\\d+){d}|[{e}{f}]", marked):
            turn = match[1] or match[2]
            yield (
                marked[at : match.start()],
                0 if match[1] else 2 if match[2] else ord(match[0]) - self.first,
                int(turn or 0),
            )
            at = match.end()
        yield marked[at:], None, 0


def _span(found: _Found, turn: int, content: str, text: str) -> Span | None:
    """Return where a content stands. If the template drops one end of it, it is what the text has of the other."""
    start, end = found.starts.get(turn), found.ends.get(turn)
    if start is None and end is not None:
        start = end - _n_common(content.rstrip()[::-1], text[:end][::-1])
        start += len(text[start:end]) - len(text[start:end].lstrip())
    elif end is None and start is not None:
        end = start + _n_common(content.lstrip(), text[start:])
    return Span(start, end, turn) if start is not None and end is not None and start < end else None


def _n_common(one: str, other: str) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _text_of_file(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokens.chat_template is {path!r}, which cannot be read: {first_line(error)}.") from error
