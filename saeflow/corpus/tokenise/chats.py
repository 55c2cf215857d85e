"""Conversations become vocabulary ids that know which message they belong to, and whether the assistant wrote it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np

from saeflow.corpus.tokenise.templates import Chat, ChatTemplate
from saeflow.corpus.tokenise.texts import MARKS, Tokenised, tokenise_texts
from saeflow.recipe.data_settings import TokensConfig
from saeflow.runtime.errors import UserError


class ChatTokeniser:
    """Makes tokens of conversations. `roles` are the names of all roles so far: marks hold their places in it."""

    def __init__(self, tokenizer: Any, config: TokensConfig) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                "corpus.messages needs a tokenizer with a tokenizer.json: one written in Python does not say which "
                "characters its tokens stand for."
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config.chat_template)
        self.parsing = config.model_copy(update={"parse_special": True})
        self.literal = config.model_copy(update={"parse_special": False})
        self.roles: list[str] = []

    def tokens(self, key: str, document: str) -> Tokenised:
        """Return the tokens of a conversation, given as JSON (`messages.conversation`)."""
        about = json.loads(document)
        messages = about["messages"]
        chat = self.template.written(messages, about.get("tools"), key)
        tokens = self._tokens(chat)
        starts, ends = tokens.marks["char_start"], tokens.marks["char_end"]
        turns, written = _turn_of_letters(chat), np.zeros(len(chat.text) + 1, np.int32)
        for start, end in chat.assistant:
            written[start + 1 : end + 1] = 1
        before = written.cumsum()
        tokens.marks["assistant"] = before[ends] > before[starts]
        last = np.maximum(ends - 1, starts)
        turn = np.where(turns[starts] >= 0, turns[starts], turns[last])
        tokens.marks["turn"] = np.where(ends > starts, turn, -1)
        codes = np.array([*map(self._code, (message["role"] for message in messages)), -1], np.int16)
        tokens.marks["role"] = codes[tokens.marks["turn"]]
        return tokens

    def _code(self, role: str) -> int:
        if role not in self.roles:
            self.roles.append(role)
        return self.roles.index(role)

    def _tokens(self, chat: Chat) -> Tokenised:
        """Tokenise the text with the special tokens of the template, but not with those that messages name."""
        if not chat.names:
            return tokenise_texts(self.tokenizer, [chat.text], self.parsing)[0]
        cuts = [0, *(place for name in chat.names for place in name), len(chat.text)]
        pieces = [
            self._piece(chat.text, start, end, is_name=n % 2 == 1)
            for n, (start, end) in enumerate(itertools.pairwise(cuts))
            if end > start
        ]
        return Tokenised(*(np.concatenate(each) for each in zip(*pieces, strict=True)))

    def _piece(self, text: str, start: int, end: int, is_name: bool) -> Tokenised:
        """Tokenise a piece of a text, behind a line end so that no blank is put before it as before a whole text."""
        config = self.literal if is_name else self.parsing
        for lead in ("\n", "") if start else ("",):
            tokens = tokenise_texts(self.tokenizer, [lead + text[start:end]], config)[0]
            own = tokens.marks["char_end"] > len(lead)
            if (tokens.marks["char_start"][own] >= len(lead)).all():
                break
        found = Tokenised(tokens.vocab_ids[own], tokens.marks[own].astype(MARKS))
        for name in ("char_start", "char_end"):
            found.marks[name] += start - len(lead)
        return found


def _turn_of_letters(chat: Chat) -> np.ndarray:
    """Return the number of the message that each letter belongs to, int32 (letters + 1,), -1 where it is none's."""
    turns = np.full(len(chat.text) + 1, -1, np.int32)
    for start, end, turn in chat.messages:
        turns[start:end] = turn
    return turns
